"""Which parameter moves at which rate, how far the gradient is clipped, and starting over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch

from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.model.parameters import Group, parameter_specs
from golfmodel.optim import groups
from golfmodel.optim.groups import Optimizers, state_shapes

CONFIG = Config(
    num_layers=2,
    model_dim=32,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=16,
    bigram_vocab_size=8,
    bigram_dim=8,
    train_seq_len=16,
    train_batch_tokens=16,
    compute_dtype="float32",
    mtp_num_heads=1,
    matrix_lr=0.011,
    scalar_lr=0.013,
    tied_embed_lr=0.017,
    embed_lr=0.019,
    head_lr=0.023,
    muon_wd=0.5,
    adam_wd=0.7,
    grad_clip_norm=0.0,
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


def fresh(config: Config) -> tuple[GPT, Optimizers]:
    """A model whose every weight is not zero, and its optimizers."""
    torch.manual_seed(0)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).clamp(-2, 2) + 3)
    return model, Optimizers(model, config)


def set_gradients(model: GPT, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = gradient.to(parameter.device, parameter.dtype)


def named(model: GPT, group: Group) -> list[str]:
    return [name for name, spec in parameter_specs(model).items() if spec.group is group]


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_every_parameter_is_in_one_group(config):
    model, optimizers = fresh(config)
    grouped = [id(parameter) for group in optimizers.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    in_muon = {id(parameter) for group in optimizers.muon.param_groups for parameter in group["params"]}
    assert in_muon == {id(model.get_parameter(name)) for name in named(model, Group.MATRIX)}


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
def test_adam_moves_each_group_at_its_rate_and_decay(config):
    """Adam's first step is the learning rate times the gradient's sign, whatever its size."""
    model, optimizers = fresh(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_gradients(model, 0)
    signs = {name: parameter.grad.sign() for name, parameter in model.named_parameters()}
    optimizers.step()
    embed_lr = 0.017 if config.tie_embeddings else 0.019
    expected = {Group.EMBEDDING: (embed_lr, 0.7), Group.SCALAR: (0.013, 0.7), Group.HEAD: (0.023, 0.0)}
    for group, (lr, decay) in expected.items():
        for name in named(model, group):
            moved = before[name] * (1 - lr * decay) - lr * signs[name]
            torch.testing.assert_close(model.get_parameter(name).detach(), moved, rtol=1e-5, atol=1e-6)
    assert bool(named(model, Group.HEAD)) != config.tie_embeddings


def test_muon_moves_the_matrices_at_its_rate_and_decay():
    model, optimizers = fresh(CONFIG)
    names = named(model, Group.MATRIX)
    assert len(names) == 2 * 6 + 1 + 1  # blocks, P, a multi-token head
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    set_gradients(model, 0)
    optimizers.step()
    for name in names:
        weight = model.get_parameter(name).detach()
        rows, columns = weight.shape
        update = (before[name] * (1 - 0.011 * 0.5) - weight) / 0.011 / max(1, rows / columns) ** 0.5
        # Newton-Schulz leaves singular values near 1 (0.68 to 1.21 for all but the smallest).
        largest = torch.linalg.matrix_norm(update, ord=2)
        assert 0.7 < largest < 1.25


def test_optimizers_have_the_constants_of_the_config():
    options = {"beta1": 0.7, "beta2": 0.8, "adam_eps": 1e-5, "muon_momentum": 0.6, "muon_backend_steps": 3}
    _, optimizers = fresh(dataclasses.replace(CONFIG, **options))
    for group in optimizers.muon.param_groups:
        assert (group["momentum"], group["nesterov"], group["ns_steps"]) == (0.6, True, 3)
    for group in optimizers.adam.param_groups:
        assert group["betas"] == (0.7, 0.8)
        assert group["eps"] == 1e-5


def test_embeddings_and_their_moments_are_bfloat16_and_the_rest_float32():
    model, optimizers = fresh(dataclasses.replace(UNTIED, compute_dtype="bfloat16"))
    set_gradients(model, 0)
    optimizers.step()
    for name, spec in parameter_specs(model).items():
        parameter = model.get_parameter(name)
        expected = torch.bfloat16 if spec.group is Group.EMBEDDING else torch.float32
        assert parameter.dtype == expected
        state = (optimizers.muon if spec.group is Group.MATRIX else optimizers.adam).state[parameter]
        moments = [value for key, value in state.items() if key != "step"]
        assert moments
        assert all(moment.dtype == expected for moment in moments)


def test_the_schedule_scales_every_rate_from_its_full_value():
    _, optimizers = fresh(UNTIED)
    rates = [group["lr"] for group in optimizers.param_groups]
    full = [float(rate) for rate in rates]
    assert sorted(full) == pytest.approx([0.011, 0.013, 0.019, 0.023])
    for scale, momentum in ((0.5, 0.9), (0.0, 0.99), (1.0, 0.86)):
        optimizers.set_schedule(lr_scale=scale, momentum=momentum)
        assert [float(group["lr"]) for group in optimizers.param_groups] == pytest.approx([lr * scale for lr in full])
        assert [float(group["momentum"]) for group in optimizers.muon.param_groups] == pytest.approx([momentum])
    # where a CUDA graph of a step reads them
    assert all(group["lr"] is rate for group, rate in zip(optimizers.param_groups, rates, strict=True))


def test_rate_zero_moves_nothing():
    model, optimizers = fresh(UNTIED)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizers.set_schedule(lr_scale=0.0, momentum=0.9)
    set_gradients(model, 0)
    optimizers.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def clipped_in_step(model: GPT, optimizers: Optimizers) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every gradient before a first `step`, and as the optimizers saw it, by the momenta that they have of it."""
    before = [parameter.grad.double() for parameter in model.parameters()]
    optimizers.step()
    seen = []
    for parameter in model.parameters():
        if parameter in optimizers.muon.state:
            seen.append(optimizers.muon.state[parameter]["momentum_buffer"].double())
        else:
            group = next(g for g in optimizers.adam.param_groups if any(p is parameter for p in g["params"]))
            seen.append(optimizers.adam.state[parameter]["exp_avg"].double() / (1 - group["betas"][0]))
    return list(zip(before, seen, strict=True))


def global_norm(gradients: Iterable[torch.Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_global_gradient_norm_is_clipped(compute_dtype, scale):
    model, optimizers = fresh(dataclasses.replace(UNTIED, grad_clip_norm=0.3, compute_dtype=compute_dtype))
    set_gradients(model, 0, scale)
    before, after = map(global_norm, zip(*clipped_in_step(model, optimizers), strict=True))
    # The moments of embeddings, and the norm taken of their gradients, are rounded to bf16.
    rounding = 1e-5 if compute_dtype == "float32" else 2**-8
    assert (before < 0.3) == (scale == 1e-4)
    assert after == pytest.approx(min(before, 0.3), rel=rounding)


def test_clipping_keeps_the_direction():
    model, optimizers = fresh(dataclasses.replace(CONFIG, grad_clip_norm=0.3))
    set_gradients(model, 0)
    ratios = torch.cat([(new / old).flatten() for old, new in clipped_in_step(model, optimizers)])
    assert ratios.std() < 1e-6
    assert 0 < ratios.mean() < 1


def test_no_clipping_at_zero():
    model, optimizers = fresh(dataclasses.replace(CONFIG, grad_clip_norm=0.0))
    set_gradients(model, 0, 1e4)
    for old, new in clipped_in_step(model, optimizers):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=0)


def test_a_step_is_that_of_clipped_gradients():
    """The weights, not only the momenta: beside a step that clips with PyTorch before it."""
    models = []
    for clip in (0.3, 0.0):
        model, optimizers = fresh(dataclasses.replace(UNTIED, grad_clip_norm=clip))
        set_gradients(model, 0)
        if not clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizers.step()
        models.append(model)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adam_moves_as_by_its_own_step(monkeypatch):
    """To the bit, also where one parameter gets its first gradient late, and another has none for once."""
    config = dataclasses.replace(UNTIED, grad_clip_norm=0.3, compute_dtype="bfloat16")
    late, absent = named(GPT(config), Group.SCALAR)[:2]

    def step_itself(adam: torch.optim.AdamW, by_group: object, grad_scale: torch.Tensor) -> None:
        adam.grad_scale = grad_scale
        adam.step()

    found = []
    for step_adam in (groups._step_adam, step_itself):
        monkeypatch.setattr(groups, "_step_adam", step_adam)
        model, optimizers = fresh(config)
        for step in range(5):
            optimizers.set_schedule(lr_scale=1 - step / 5, momentum=0.9)
            set_gradients(model, step)
            if step < 2:
                model.get_parameter(late).grad = None
            if step == 3:
                model.get_parameter(absent).grad = None
            optimizers.step()
        found.append({**dict(model.named_parameters()), **optimizers.state_tensors()})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (float(ours[f"{late}.step"]), float(ours[f"{absent}.step"])) == (3, 4)


def test_gradients_are_freed():
    model, optimizers = fresh(UNTIED)
    set_gradients(model, 0)
    optimizers.step()
    assert all(parameter.grad is None for parameter in model.parameters())


def take_steps(model: GPT, optimizers: Optimizers) -> list[torch.Tensor]:
    for step, (scale, momentum) in enumerate([(1.0, 0.85), (0.5, 0.5), (0.25, 0.95)]):
        optimizers.set_schedule(lr_scale=scale, momentum=momentum)
        set_gradients(model, step)
        optimizers.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_steps_with_the_kernels_are_as_near_the_truth_as_with_the_reference(compute_dtype, device, monkeypatch):
    """Clipping, both optimizers, the schedule; on a GPU where there is one. The truth is the reference in float64."""
    config = dataclasses.replace(CONFIG, grad_clip_norm=0.3, compute_dtype=compute_dtype, muon_wd=0.05)

    def moved(implementation: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("GOLF_KERNELS", implementation)
        model = fresh(config)[0].to(device, dtype)
        start = [parameter.detach().to(torch.float64, copy=True) for parameter in model.parameters()]
        end = take_steps(model, Optimizers(model, config))
        names = [name for name, _ in model.named_parameters()]
        return {name: last.double() - first for name, first, last in zip(names, start, end, strict=True)}

    truth, reference, kernels = moved("reference", torch.float64), moved("reference"), moved("triton")

    def error(found: dict[str, torch.Tensor], name: str) -> float:
        return float((found[name] - truth[name]).norm() / truth[name].norm())

    assert any(not torch.equal(kernels[name], reference[name]) for name in truth)  # else both ran the same
    for name in truth:
        assert error(kernels, name) <= 2 * error(reference, name) + 1e-5, name


def test_reset_is_as_if_no_step_had_been_taken():
    model, optimizers = fresh(UNTIED)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    first = take_steps(model, optimizers)
    optimizers.reset()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
    second = take_steps(model, optimizers)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, start, strict=True))


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(UNTIED, compute_dtype="bfloat16")])
def test_state_goes_on_where_it_was_taken(config):
    """Two steps, the state into another model's optimizers, a third step on both: the same bits."""
    model, optimizers = fresh(config)
    for seed in (1, 2):
        set_gradients(model, seed)
        optimizers.step()
    tensors = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with torch.device("meta"):
        assert shapes == state_shapes(GPT(config))
    other, others = fresh(config)
    other.load_state_dict(model.state_dict())
    others.load_state_tensors(tensors)
    for each, its in ((model, optimizers), (other, others)):
        set_gradients(each, 3)
        its.step()
    for (name, one), (_, another) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, another), name
    # what was loaded is the optimizers' own
    assert all(torch.equal(tensor, tensors[name]) is False for name, tensor in others.state_tensors().items())


def test_a_parameter_without_gradients_has_no_state():
    model, optimizers = fresh(CONFIG)
    set_gradients(model, 1)
    parameters = dict(model.named_parameters())
    without = [named(model, group)[0] for group in (Group.MATRIX, Group.SCALAR)]
    for name in without:
        parameters[name].grad = None
    optimizers.step()
    tensors = optimizers.state_tensors()
    assert {name.rpartition(".")[0] for name in tensors} == parameters.keys() - set(without)
    _, others = fresh(CONFIG)
    others.load_state_tensors(tensors)
    assert others.state_tensors().keys() == tensors.keys()
