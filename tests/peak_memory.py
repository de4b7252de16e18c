"""How much memory a call takes, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[1]

_PROGRAM = """
import resource, sys
from pathlib import Path
from golfmodel.runtime.errors import GolfError
{imports}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before = peak()
try:
    {call}
    said = "no error"
except GolfError as error:
    said = str(error)
print(peak() - before, said)
"""


def peak_growth(imports: str, call: str, *arguments: str | Path) -> tuple[int, str]:
    """By how many bytes `call` raises the peak of its process, and the GolfError that it ends in or "no error".

    Args:
        imports: statements run before the measurement.
        call: a statement, which finds `arguments` in `sys.argv[1:]`.
    """
    # A process starts with the peak of the one it was made from. The test session's would hide what is measured; a
    # shell's does not.
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    done = subprocess.run(
        [*shell, sys.executable, "-c", _PROGRAM.format(imports=imports, call=call), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    growth, said = done.stdout.rstrip("\n").split(" ", 1)
    return int(growth), said
