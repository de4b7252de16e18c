"""Two gloo ranks, started once, do everything that ranks do together; each test looks at one of the results."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from golfmodel.runtime.distributed import Ranks, process_group, world_size_of
from golfmodel.runtime.errors import ConfigError

WORLD_SIZE = 2
MEGABYTE = bytes(range(256)) * 4096
EXACT = 0.1 + 2**-50  # needs all of float64

# Each rank's gradients, and values, by rank.
FLOAT_GRADIENTS = ([1.0, -2.0, 3.0], [0.5, 2.0, 1e-3])
BF16_GRADIENTS = ([1.0, 256.0], [1.0078125, 3.0])
COUNTS = ([1.0, 10.0], [2.0, -5.0])


def tensor(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def parameter(rank_values: tuple[list[float], list[float]], rank: int, dtype: torch.dtype) -> torch.Tensor:
    """A parameter of shape `[1, n]` with this rank's gradient."""
    gradient = tensor(rank_values[rank], dtype)[None]
    result = torch.zeros_like(gradient, requires_grad=True)
    result.grad = gradient
    return result


def speak(ranks: Ranks) -> dict[str, Any]:
    """One call of everything; what this rank got."""
    first, second = parameter(FLOAT_GRADIENTS, ranks.rank, torch.float32), torch.zeros(3, requires_grad=True)
    third = parameter(BF16_GRADIENTS, ranks.rank, torch.bfloat16)
    ranks.average_gradients([first, second, third])
    counts = tensor(COUNTS[ranks.rank], torch.float64)
    weights = [
        torch.full((2, 2), ranks.rank + 0.1, requires_grad=True),
        torch.full((3,), ranks.rank + 0.1, dtype=torch.bfloat16, requires_grad=True),
    ]
    got = {
        "identity": [ranks.rank, ranks.world_size, ranks.is_main, ranks.device.type],
        "gradients": [first.grad.tolist(), second.grad, third.grad.tolist(), str(third.grad.dtype)],
        "sum": ranks.reduce_sum(counts).tolist(),
        "min": ranks.reduce_min(counts).tolist(),
        "untouched": counts.tolist(),
        "gathered": ranks.gather_host(torch.tensor([ranks.rank, 7], dtype=torch.uint8)).tolist(),
        "number": ranks.broadcast_number(EXACT if ranks.is_main else -1.0),
        "bytes": hashlib.sha256(ranks.broadcast_bytes(MEGABYTE if ranks.is_main else None)).hexdigest(),
    }
    ranks.broadcast_parameters(weights)
    got["weights"] = [weight.float().flatten().tolist() for weight in weights]
    try:
        got["no_bytes"] = ranks.broadcast_bytes(b"" if ranks.is_main else None).hex()
    except (ValueError, RuntimeError) as error:  # last: a rank that fails alone would leave the other one waiting
        got["no_bytes"] = repr(error)
    return got


def run_rank(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD_SIZE}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with process_group("cpu", os.environ) as ranks:
        got = speak(ranks)
    got["group_left"] = not dist.is_initialized()
    Path(directory, f"{rank}.json").write_text(json.dumps(got))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank got."""
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(free_port(), str(directory)), nprocs=WORLD_SIZE)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def test_ranks_know_who_they_are(results):
    assert [result["identity"] for result in results] == [[0, 2, True, "cpu"], [1, 2, False, "cpu"]]


def test_gradients_become_their_mean(results):
    expected = (tensor(FLOAT_GRADIENTS[0]) + tensor(FLOAT_GRADIENTS[1])) / 2
    for result in results:
        assert result["gradients"][0] == [expected.tolist()]


def test_a_parameter_without_a_gradient_keeps_none(results):
    assert [result["gradients"][1] for result in results] == [None, None]


def test_bf16_gradients_stay_bf16_and_are_rounded_once(results):
    expected = ((tensor(BF16_GRADIENTS[0]) + tensor(BF16_GRADIENTS[1])) / 2).bfloat16().tolist()
    for result in results:
        assert result["gradients"][2:] == [[expected], "torch.bfloat16"]


def test_sum_and_minimum_over_ranks(results):
    for rank, result in enumerate(results):
        assert result["sum"] == [3.0, 5.0]
        assert result["min"] == [1.0, -5.0]
        assert result["untouched"] == COUNTS[rank]


def test_a_number_arrives_exactly(results):
    assert [result["number"] for result in results] == [EXACT, EXACT]


def test_every_rank_gets_what_each_has_on_its_host(results):
    assert [result["gathered"] for result in results] == [[[0, 7], [1, 7]]] * 2


def test_a_megabyte_arrives(results):
    assert [result["bytes"] for result in results] == [hashlib.sha256(MEGABYTE).hexdigest()] * 2


def test_no_bytes_arrive_as_no_bytes(results):
    assert [result["no_bytes"] for result in results] == ["", ""]


def test_parameters_become_those_of_rank_0(results):
    expected = [[tensor([0.1]).item()] * 4, [tensor([0.1], torch.bfloat16).item()] * 3]
    assert [result["weights"] for result in results] == [expected, expected]


def test_the_group_is_left_at_the_end(results):
    assert all(result["group_left"] for result in results)


def test_one_rank_needs_no_group_and_changes_nothing():
    with process_group("cpu", {}) as ranks:
        assert ranks == Ranks(rank=0, world_size=1, device=torch.device("cpu"))
        assert not dist.is_initialized()
        only = parameter(FLOAT_GRADIENTS, 0, torch.float32)
        ranks.average_gradients([only])
        ranks.broadcast_parameters([only])
        assert only.grad.tolist() == [FLOAT_GRADIENTS[0]]
        assert ranks.reduce_sum(tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert ranks.reduce_min(tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert ranks.broadcast_number(EXACT) == EXACT
        assert ranks.gather_host(torch.tensor([3])).tolist() == [[3]]
        assert ranks.broadcast_bytes(b"") == b""


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("text", "size"), [(None, 1), ("1", 1), ("8", 8), ("384", 384)])
def test_world_size(text, size):
    assert world_size_of({} if text is None else {**TORCHRUN, "WORLD_SIZE": text}) == size


@pytest.mark.parametrize("absent", sorted(TORCHRUN))
def test_several_ranks_need_all_that_torchrun_sets(absent):
    environment = {name: value for name, value in TORCHRUN.items() if name != absent}
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is 2 but {absent} is not set"):
        world_size_of({**environment, "WORLD_SIZE": "2"})
    assert world_size_of({**environment, "WORLD_SIZE": "1"}) == 1


@pytest.mark.parametrize("text", ["", "0", "-1", "2.0", "two", "²"])
def test_world_size_that_cannot_be(text):
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is '{text}'"):
        world_size_of({"WORLD_SIZE": text})


def test_more_ranks_than_gpus_are_told_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with (
        pytest.raises(ConfigError, match=r"local rank 4.*4.*--nproc_per_node=4"),
        process_group("cuda", {**TORCHRUN, "WORLD_SIZE": "8", "RANK": "4", "LOCAL_RANK": "4"}),
    ):
        pass


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError) as caught, process_group("cuda", {}):
        pass
    assert "DEVICE" in str(caught.value)
    assert "--nproc_per_node 0" not in str(caught.value)


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with process_group("auto", {}) as ranks:
        assert ranks.device.type == "cpu"
