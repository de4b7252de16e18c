"""Where the baselines lie that a run is compared with: one file for a GPU and the versions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from golfmodel.runtime.versions import PROJECT_ROOT, versions

DIRECTORY = PROJECT_ROOT / "bench" / "baselines"


def baseline_path(found: dict[str, Any] | None = None) -> Path:
    """`bench/baselines/<GPU>-torch<version>-triton<version>.json` for what is here, or for the versions given."""
    found = versions() if found is None else found
    parts = (found["gpu"] or "CPU", f"torch{found['torch']}", f"triton{found['triton'] or '-none'}")
    return DIRECTORY / ("-".join(re.sub(r"[^\w.]+", "-", part) for part in parts) + ".json")
