"""Every op in `kernels`: the model's shapes and others, forward and backward, by every provider."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from bench.ceilings import Ceilings
from bench.comparison import Row, compare, providers
from bench.subjects import Subject, subjects

ON_GPU = torch.cuda.is_available()


def _parameters() -> Iterator[object]:
    """Providers of one comparison next to each other, so that one measurement serves them all and can then go."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    for subject in subjects(on_gpu=ON_GPU):
        for direction in subject.directions:
            for provider in providers(subject, device):
                yield pytest.param(subject, direction, provider, id=f"{subject.label}-{direction}-{provider}")


@pytest.fixture(scope="module")
def measured(device: torch.device, ceilings: Ceilings) -> Callable[[Subject, str], dict[str, Row]]:
    latest: dict[tuple[str, str], dict[str, Row]] = {}

    def rows_of(subject: Subject, direction: str) -> dict[str, Row]:
        key = (subject.label, direction)
        if key not in latest:
            latest.clear()
            latest[key] = compare(subject, direction, device, ceilings)
        return latest[key]

    return rows_of


@pytest.mark.parametrize(("subject", "direction", "provider"), list(_parameters()))
def test_op(
    subject: Subject,
    direction: str,
    provider: str,
    measured: Callable[[Subject, str], dict[str, Row]],
    record: Callable[[Row], None],
) -> None:
    row = measured(subject, direction)[provider]
    record(row)
    assert not row.equivalence.startswith("failed"), row.equivalence
