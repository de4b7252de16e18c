"""Muon over ranks: who works on what, and that the ranks together do what one process does."""

from __future__ import annotations

import dataclasses
import os
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from golfmodel.config import Config, resolve
from golfmodel.model.gpt import GPT
from golfmodel.model.parameters import Group, parameter_specs
from golfmodel.optim.groups import Optimizers
from golfmodel.optim.muon import Muon
from golfmodel.optim.sharding import buckets, owners
from golfmodel.runtime.distributed import Ranks, process_group
from kernels.newton_schulz_plan import multiplications

SHAPES = [(6, 6), (4, 9), (9, 4), (16, 8), (1, 5)]  # the last never has a gradient
SPLITS = {2: [2, 2], 4: [1, 1, 1, 1]}
STEPS = 3
OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}


def seed_shapes() -> list[tuple[int, int]]:
    with torch.device("meta"):
        model = GPT(resolve(["--preset", "seed"], {}))
    specs = parameter_specs(model)
    return [tuple(p.shape) for name, p in model.named_parameters() if specs[name].group is Group.MATRIX]


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
def test_every_matrix_has_one_owner_and_no_rank_waits_long(world_size):
    shapes = seed_shapes()
    owner = owners(shapes, world_size)
    assert len(owner) == 49
    assert set(owner) <= set(range(world_size))
    load = [sum(multiplications(*shapes[i]) for i in range(49) if owner[i] == rank) for rank in range(world_size)]
    assert max(load) <= max(1.06 * sum(load) / world_size, *(multiplications(*shape) for shape in shapes))


def test_owners_stay_when_matrices_come():
    first = owners([(4, 4), (4, 4)], 2)
    assert owners([(4, 4), (4, 4), (8, 8)], 2, first)[:2] == first
    assert owners([(8, 8), (4, 4), (4, 4)], 2, [0]) == [0, 1, 1]


def test_buckets_are_in_the_order_of_backward_and_of_about_one_size():
    shapes = seed_shapes()
    several = buckets(shapes)
    assert [index for bucket in several for index in reversed(bucket)] == list(reversed(range(49)))
    sizes = [sum(shapes[index][0] * shapes[index][1] for index in bucket) for bucket in several]
    assert len(sizes) == 3
    assert max(sizes) < 1.15 * sum(sizes) / 3  # a third, and the matrix that the cut is in
    # and a bucket's row, which is as long as the longest of all ranks', is not much longer than a rank's share
    owner = owners(shapes, 8)
    for bucket, size in zip(several, sizes, strict=True):
        shares = [sum(shapes[i][0] * shapes[i][1] for i in bucket if owner[i] == rank) for rank in range(8)]
        assert max(shares) < 1.3 * size / 8
    assert buckets([(4, 4)]) == [[0]]
    assert buckets([(1, 1), (8, 8)]) == [[1], [0]]


def test_cost_is_that_of_the_short_side():
    assert multiplications(2, 3) == multiplications(3, 2) == 2 * 4 * 3 + 8
    assert owners([(4, 4), (8, 8), (4, 4)], 2) == [1, 0, 1]


def parameters_of(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients_of(step: int, rank: int) -> list[Tensor]:
    """What one of four parts of a batch gives; a rank of two has the mean of two of them."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES[:-1]]


def mean(parts: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(several).mean(dim=0) for several in zip(*parts, strict=True)]


def train(optimizer: Muon, parameters: list[nn.Parameter], parts: list[int], steps: range) -> None:
    for step in steps:
        gradients = mean([gradients_of(step, part) for part in parts])
        for parameter, gradient in zip(parameters, gradients, strict=False):
            parameter.grad = gradient
        optimizer.step()


def tensors_of(state: dict, parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    found = {f"weight.{index}": parameter.detach().clone() for index, parameter in enumerate(parameters)}
    found.update({f"momentum.{index}": entry["momentum_buffer"] for index, entry in state["state"].items()})
    return found


def small_config() -> Config:
    return Config(
        num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, vocab_size=16, bigram_vocab_size=8, bigram_dim=8,
        train_seq_len=16, eval_seq_len=16, train_batch_tokens=64, micro_batch_tokens=64, compute_dtype="float32",
        grad_clip_norm=0.3, eval_stride=16,
    )  # fmt: skip


def train_model(ranks, parts: list[int], *, overlapped: bool = False) -> dict[str, Tensor]:
    """Three clipped steps of everything, on this rank's part of four batches."""
    torch.manual_seed(0)
    model = GPT(small_config())
    optimizers = Optimizers(model, small_config(), ranks)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 16, (STEPS, 4, 2, 17), generator=generator)
    for step in range(STEPS):
        for part in parts:
            rows = tokens[step, part]
            loss = model(rows[:, :-1], rows[:, 1:]) / len(parts)
            with optimizers.reducing() if part == parts[-1] and overlapped else nullcontext():
                loss.backward()
            # of the matrices, those that are on their way have no gradient left
            sent = sum(parameter.grad is None for parameter in model.parameters())
            assert (sent > 0) == (overlapped and part == parts[-1] and ranks is not None)
        optimizers.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def run_rank(rank: int, world_size: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    per_rank = 4 // world_size
    parts = list(range(rank * per_rank, (rank + 1) * per_rank))
    with process_group("cpu", os.environ) as ranks:
        parameters = parameters_of()
        optimizer = Muon(parameters, **OPTIONS, ranks=ranks)
        train(optimizer, parameters, parts, range(STEPS))
        kept = sum(parameter in optimizer.state for parameter in parameters)
        state = optimizer.state_dict()
        save_file(tensors_of(state, parameters), Path(directory, f"muon-{rank}.safetensors"))

        others = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        restored = Muon(others, lr=0.9, ranks=ranks)
        restored.load_state_dict(state)
        train(restored, others, parts, range(STEPS, STEPS + 1))
        save_file(tensors_of(restored.state_dict(), others), Path(directory, f"restored-{rank}.safetensors"))
        save_file(
            {"kept": torch.tensor(kept), "restored": torch.tensor(len(restored.state))},
            Path(directory, f"counts-{rank}.safetensors"),
        )
        # one matrix for all ranks: most have nothing to send, and before the first step nobody has
        alone = [nn.Parameter(torch.ones(2, 3))]
        single = Muon(alone, **OPTIONS, ranks=ranks)
        assert single.state_dict()["state"] == {}
        single.step()
        alone[0].grad = torch.full((2, 3), float(rank + 1))
        single.step()
        save_file(
            {"weight": alone[0].detach(), **tensors_of(single.state_dict(), [])},
            Path(directory, f"single-{rank}.safetensors"),
        )
        save_file(train_model(ranks, parts), Path(directory, f"model-{rank}.safetensors"))
        save_file(train_model(ranks, parts, overlapped=True), Path(directory, f"overlapped-{rank}.safetensors"))
    os._exit(0)  # as ranks leave: gloo's threads may abort a process while Python shuts down


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    """What each rank of 2 and of 4 wrote, by name."""
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(request.param, free_port(), str(directory)), nprocs=request.param)
    return {
        name: [load_file(directory / f"{name}-{rank}.safetensors") for rank in range(request.param)]
        for name in ("muon", "restored", "counts", "single", "model", "overlapped")
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-6, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_ranks_together_do_what_one_process_does(results):
    parameters = parameters_of()
    optimizer = Muon(parameters, **OPTIONS)
    train(optimizer, parameters, [0, 1, 2, 3], range(STEPS))
    expected = tensors_of(optimizer.state_dict(), parameters)
    for found in results["muon"]:
        # Means summed in another order may round an input of Newton-Schulz to the next bfloat16 number.
        assert_close(found, expected, atol=1e-3)


def test_all_ranks_have_the_same_bits(results):
    for name in ("muon", "restored", "model", "overlapped"):
        first, *others = results[name]
        for other in others:
            assert other.keys() == first.keys()
            assert all(torch.equal(other[key], first[key]) for key in first)


def test_momentum_is_kept_by_owners_alone(results):
    counts = results["counts"]
    assert sum(int(count["kept"]) for count in counts) == len(SHAPES) - 1
    assert sum(int(count["restored"]) for count in counts) == len(SHAPES) - 1


def test_a_state_of_many_ranks_goes_on_in_one(results):
    """And the other way round: what the ranks restored is what one process goes on to."""
    found = results["muon"][0]
    parameters = [nn.Parameter(found[f"weight.{index}"].clone()) for index in range(len(SHAPES))]
    optimizer = Muon(parameters, **OPTIONS)
    state = optimizer.state_dict()
    momenta = {index: found[f"momentum.{index}"].clone() for index in range(len(SHAPES) - 1)}
    state["state"] = {index: {"momentum_buffer": momentum} for index, momentum in momenta.items()}
    optimizer.load_state_dict(state)
    train(optimizer, parameters, [0, 1, 2, 3], range(STEPS, STEPS + 1))
    assert_close(results["restored"][0], tensors_of(optimizer.state_dict(), parameters), atol=1e-3)


def test_ranks_without_a_matrix_take_part(results):
    world_size = len(results["single"])
    for found in results["single"]:
        assert torch.allclose(found["momentum.0"], torch.full((2, 3), (world_size + 1) / 2))
        assert torch.equal(found["weight"], results["single"][0]["weight"])
        assert not torch.equal(found["weight"], torch.ones(2, 3))


def test_averaging_during_backward_gives_the_same_bits(results):
    for found, expected in zip(results["overlapped"], results["model"], strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_bucket_is_sent_as_soon_as_it_and_those_before_it_are_complete():
    """On one process that counts as two: what is sent when, while a backward goes through three layers."""
    events: list[str] = []
    layers = [nn.Parameter(torch.eye(8)) for _ in range(3)]
    optimizer = sharded(layers, events)
    x = torch.ones(1, 8, requires_grad=True)
    x.register_hook(lambda _: events.append("input"))
    y = x
    for number, layer in enumerate(layers):
        y = y @ layer.T
        y.register_hook(lambda _, number=number: events.append(f"output of {number}"))
    with optimizer.reducing():
        y.sum().backward()
    assert events.index("sent") < events.index("output of 0") < len(events) - 1 - events[::-1].index("sent")
    assert events.count("sent") == 3
    # without the middle one: the buckets behind it wait until the step, and it has no update
    optimizer.step()
    before = [layer.detach().clone() for layer in layers]
    events.clear()
    with optimizer.reducing():
        (x @ layers[0].T @ layers[2].T).sum().backward()
    assert events.count("sent") == 1
    optimizer.step()
    assert events.count("sent") == 3
    assert torch.equal(layers[1], before[1])


def sharded(parameters: list[nn.Parameter], events: list[str]) -> Muon:
    """On one process that counts as the first of two; `events` hears of what is sent."""

    class Recording(Ranks):
        def start_mean_of_rows(self, rows_WL: Tensor):
            events.append("sent")
            return lambda: rows_WL.mean(dim=0)

        def start_gathering_rows(self, own_L: Tensor):
            return lambda: torch.stack((own_L, torch.zeros_like(own_L)))

    return Muon(parameters, **OPTIONS, ranks=Recording(rank=0, world_size=2, device=torch.device("cpu")))


def test_an_error_in_backward_before_anything_is_sent_is_as_if_there_had_been_none():
    events: list[str] = []
    layers = [nn.Parameter(torch.eye(8)) for _ in range(3)]
    optimizer = sharded(layers, events)
    with pytest.raises(ZeroDivisionError), optimizer.reducing():
        raise ZeroDivisionError
    torch.ones(1, 8).mm(layers[2]).sum().backward()
    assert events == []
    optimizer.step()
    assert events == ["sent"] * 3


def test_after_an_error_in_backward_when_something_was_sent_there_is_no_step():
    """On the other ranks there may have been no error, and what they send next is the rest of that backward."""
    events: list[str] = []
    layers = [nn.Parameter(torch.eye(8)) for _ in range(3)]
    optimizer = sharded(layers, events)
    with pytest.raises(ZeroDivisionError), optimizer.reducing():
        torch.ones(1, 8).mm(layers[2]).sum().backward()
        raise ZeroDivisionError
    assert events == ["sent"]
    with pytest.raises(RuntimeError, match="the ranks are out of step"):
        optimizer.step()
    optimizer.abandon()
    torch.ones(1, 8).mm(layers[2]).sum().backward()
    optimizer.step()
    assert events == ["sent"] * 4


def test_a_gradient_that_comes_too_late_is_an_error():
    layers = [nn.Parameter(torch.eye(8)) for _ in range(3)]
    optimizer = sharded(layers, [])
    with optimizer.reducing():
        torch.ones(1, 8).mm(layers[2]).sum().backward()
    with pytest.raises(RuntimeError, match="`step` follows `reducing`"):
        torch.ones(1, 8).mm(layers[1]).sum().backward()


@pytest.mark.parametrize("layers", [6, 8, 9, 12])
@pytest.mark.parametrize("bigrams", [0, 64])
def test_no_part_of_a_model_waits_for_blocks_of_the_next(layers, bigrams):
    """Between two blocks of backward: what is sent by then, and whose gradients it was."""
    config = dataclasses.replace(small_config(), num_layers=layers, bigram_vocab_size=bigrams)
    torch.manual_seed(0)
    model = GPT(config)
    specs = parameter_specs(model)
    matrices = {name: p for name, p in model.named_parameters() if specs[name].group is Group.MATRIX}
    names = list(matrices)
    several = buckets([tuple(p.shape) for p in matrices.values()])
    first_blocks = []  # of each bucket: the first block that its sending must not wait for
    for bucket in several:
        blocks = [int(names[index].split(".")[1]) for index in bucket if names[index].startswith("blocks.")]
        first_blocks.append(min(blocks, default=0))
    events: list[str] = []
    optimizer = sharded(list(matrices.values()), events)
    for index, block in enumerate(model.blocks):
        block.register_full_backward_hook(lambda *_, index=index: events.append(f"block {index}"))
    tokens = torch.randint(0, 16, (2, 17))
    with optimizer.reducing():
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert events.count("sent") == len(several)
    sent = [number for number, event in enumerate(events) if event == "sent"]
    for place, first in zip(sent, first_blocks, strict=True):
        # the hook of a block may come just before the casts' gradients of its own part, never two blocks before
        assert f"block {first - 2}" not in events[:place]


def test_a_whole_model_trains_as_in_one_process(results):
    """The yardstick is one process that adds up the parts of its gradients in another order."""
    expected, reordered = (train_model(None, parts) for parts in ([0, 1, 2, 3], [3, 1, 2, 0]))

    def apart(found: dict[str, Tensor]) -> float:
        return float(torch.cat([(found[name] - expected[name]).flatten() for name in expected]).norm())

    assert apart(reordered) > 0
    assert all(apart(found) <= 2 * apart(reordered) for found in results["model"])
