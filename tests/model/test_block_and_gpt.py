"""The whole model against RECIPE.md told a second time, and what follows from it: causality, documents, precision."""

from __future__ import annotations

import dataclasses

import pytest
import recipe_model as recipe
import torch
import torch.nn.functional as F
from small_models import random_batch, random_model, small_config
from torch import nn

from golfmodel.config import Config
from golfmodel.model.gpt import GPT
from golfmodel.model.layers import rms_norm
from golfmodel.model.parameters import Storage, exported_parameters, parameter_specs
from kernels import dequantize_int6, quantize_int6

VARIANTS = {
    "as the seed, but small": {},
    "untied head": {"tie_embeddings": False},
    "no bigrams": {"bigram_vocab_size": 0},
    "bigrams as wide as the model": {"bigram_dim": 24},
    "one block": {"num_layers": 1},
    "three blocks": {"num_layers": 3},
    "five blocks": {"num_layers": 5},
    "as many key heads as query heads": {"num_kv_heads": 4},
    "one key head": {"num_kv_heads": 1},
    "another rotary base": {"rope_base": 50.0},
    "a tight soft cap": {"logit_softcap": 2.0},
    "odd MLP width": {"mlp_mult": 1.125},
    "document boundaries": {"document_boundaries": True},
    "multi-token heads": {"mtp_num_heads": 2, "mtp_loss_weight": 0.7},
    "everything": {
        "num_layers": 3,
        "tie_embeddings": False,
        "document_boundaries": True,
        "bos_token_id": 3,
        "mtp_num_heads": 3,
        "logit_softcap": 5.0,
    },
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request) -> Config:
    return small_config(**request.param)


def test_logits_are_those_of_the_recipe(variant):
    model = random_model(variant)
    tokens_BT, targets_BT = random_batch(variant, 3, 16)
    W = recipe.weights_of(model)
    expected = torch.stack([recipe.logits(variant, W, row) for row in tokens_BT.tolist()])
    logits_BTV = model.logits(tokens_BT)
    assert logits_BTV.dtype == torch.float32
    # Some hundred roundings of 2^-24 on the way to logits of order 5; a wrong term is off by order 0.1 or more.
    torch.testing.assert_close(logits_BTV.double(), expected, rtol=0, atol=1e-4)
    nats = torch.stack(
        [recipe.cross_entropy(*pair) for pair in zip(expected, targets_BT.tolist(), strict=True)],
    )
    losses_BT = model.token_losses(tokens_BT, targets_BT)
    assert losses_BT.dtype == torch.float32
    torch.testing.assert_close(losses_BT.double(), nats, rtol=0, atol=1e-4)


def test_training_loss_and_every_gradient_are_those_of_the_recipe(variant):
    model = random_model(variant).train()
    tokens_BT, targets_BT = random_batch(variant, 2, 12, seed=1)
    W = recipe.weights_of(model)
    expected = recipe.training_loss(variant, W, tokens_BT.tolist(), targets_BT.tolist())
    expected.backward()
    loss = model(tokens_BT, targets_BT)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        size = W[name].grad.abs().max()
        assert size > 0, name
        torch.testing.assert_close(parameter.grad.double(), W[name].grad, rtol=0, atol=1e-4 * float(size))


@pytest.mark.usefixtures("triton_kernels")
def test_blocks_add_up_the_gradients_of_what_they_pass_on(device, monkeypatch):
    """With the kernels, which the other tests of this file do not run on a CPU."""
    additions = {}
    for layers in (1, 2, 5, 6):
        config = small_config(num_layers=layers)
        model = random_model(config).to(device)
        batch = [each.to(device) for each in random_batch(config, 2, 16)]
        gradients = {}
        for choice in ("reference", "triton"):
            monkeypatch.setenv("GOLF_KERNELS", choice)
            model.zero_grad()
            loss = model(*batch)
            with torch.profiler.profile(record_shapes=True) as profiler:
                loss.backward()
            gradients[choice] = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, gradient in gradients["reference"].items():
            assert (gradients["triton"][name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name
        sums = [event.input_shapes[:2] for event in profiler.events() if event.name in ("aten::add", "aten::add_")]
        additions[layers] = sums.count([[2, 16, config.model_dim]] * 2)
    # x0 is x of the first block too, and the last output of the first half both x and skip of the next block
    assert additions[1] + 1 == additions[2] == additions[5] == additions[6]


def test_rms_norm_has_the_epsilon_of_the_recipe():
    # Mean squares around 2^-23 feel the epsilon most.
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-5], [3e-4], [1e-2], [1.0]])
    torch.testing.assert_close(rms_norm(x).double(), recipe.rms_norm(x.double()), rtol=1e-5, atol=0)
    assert rms_norm(x.bfloat16()).dtype == torch.bfloat16
    assert bool((rms_norm(torch.zeros(2, 3)) == 0).all())


@pytest.mark.parametrize("document_boundaries", [False, True])
def test_no_logit_depends_on_a_later_token(document_boundaries):
    config = small_config(num_layers=3, document_boundaries=document_boundaries)
    model = random_model(config)
    tokens_BT, _ = random_batch(config, 1, 16)
    before = model.logits(tokens_BT)[0]
    for changed in range(16):
        other_BT = tokens_BT.clone()
        other_BT[0, changed] = (other_BT[0, changed] + 5) % config.vocab_size
        after = model.logits(other_BT)[0]
        assert torch.equal(after[:changed], before[:changed])
        assert not torch.equal(after[changed], before[changed])


PACKED = [1, 5, 3, 7, 1, 9, 9, 2, 6, 4, 1, 1, 8, 0, 10, 2]


def documents_alone(model: GPT, tokens: list[int]) -> torch.Tensor:
    starts = [i for i, token in enumerate(tokens) if i == 0 or token == 1]
    pieces = [tokens[a:b] for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    return torch.cat([model.logits(torch.tensor([piece]))[0] for piece in pieces])


@pytest.mark.parametrize("tokens", [PACKED, [6, *PACKED[1:]]], ids=["row starts a document", "row starts within one"])
def test_documents_in_one_row_do_not_see_each_other(tokens):
    model = random_model(small_config(num_layers=3, document_boundaries=True))
    torch.testing.assert_close(
        model.logits(torch.tensor([tokens]))[0], documents_alone(model, tokens), rtol=0, atol=1e-4
    )


def test_documents_see_each_other_without_the_option():
    model = random_model(small_config(num_layers=3))
    difference_TV = model.logits(torch.tensor([PACKED]))[0] - documents_alone(model, PACKED)
    # Each token after the first document is touched: by the smear and the hash at its start, by attention later.
    assert bool((difference_TV.abs().amax(dim=1)[4:] > 1e-2).all())
    assert bool((difference_TV.abs().amax(dim=1)[:4] < 1e-4).all())


def test_rows_of_a_batch_are_independent():
    config = small_config(document_boundaries=True)
    model = random_model(config)
    tokens_BT, _ = random_batch(config, 4, 16)
    together = model.logits(tokens_BT)
    for row, alone in enumerate(tokens_BT.split(1)):
        torch.testing.assert_close(together[row], model.logits(alone)[0], rtol=0, atol=1e-5)


def test_soft_cap_bounds_every_logit():
    config = small_config(logit_softcap=3.0)
    model = random_model(config)
    with torch.no_grad():
        model.input.token.weight *= 100
    logits_BTV = model.logits(random_batch(config, 2, 8)[0])
    assert 2.9 < logits_BTV.abs().max() <= 3.0


def test_soft_cap_is_computed_in_float32():
    config = small_config(compute_dtype="bfloat16", logit_softcap=3.0)
    model = random_model(config)
    tokens_BT, _ = random_batch(config, 2, 8)
    product_BTV = model.hidden(tokens_BT) @ model.input.token.weight.T
    assert product_BTV.dtype == torch.bfloat16
    expected = recipe.capped(config, product_BTV.double())
    torch.testing.assert_close(model.logits(tokens_BT).double(), expected, rtol=0, atol=1e-5)


def test_multi_token_heads_are_no_part_of_a_score():
    config = small_config(mtp_num_heads=2)
    model = random_model(config)
    plain = GPT(dataclasses.replace(config, mtp_num_heads=0))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("future_heads")})
    batch = random_batch(config, 2, 8)
    assert torch.equal(model.logits(batch[0]), plain.logits(batch[0]))
    assert torch.equal(model.token_losses(*batch), plain.token_losses(*batch))
    assert model(*batch) > plain(*batch)


def with_int6_weights(model: GPT) -> GPT:
    """A model without QAT that holds what the artifact of `model` would hold in its int6 tensors."""
    plain = GPT(dataclasses.replace(model.config, qat_enabled=False))
    state = model.state_dict()
    for name, (weight, storage) in exported_parameters(model).items():
        if storage is Storage.INT6:
            state[name] = dequantize_int6(*quantize_int6(weight), torch.float32)
            assert not torch.equal(state[name], weight)
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("untied", [False, True])
def test_qat_trains_on_what_the_artifact_will_hold(compute_dtype, untied):
    config = small_config(qat_enabled=True, compute_dtype=compute_dtype, tie_embeddings=not untied, mtp_num_heads=1)
    model = random_model(config).train()
    plain = with_int6_weights(model).train()
    batch = random_batch(config, 2, 12)
    loss, expected = model(*batch), plain(*batch)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    # Straight through: the gradient of a weight is that of its rounded value.
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name
        assert parameter.grad.abs().max() > 0, name


def test_qat_fakes_a_large_bigram_projection_which_is_int6_too():
    config = small_config(qat_enabled=True, model_dim=264, num_heads=4, bigram_dim=256, num_layers=1)
    model = random_model(config).train()
    assert parameter_specs(model)["input.bigram.projection.weight"].storage is Storage.INT6
    batch = random_batch(config, 1, 8)
    assert torch.equal(model(*batch), with_int6_weights(model).train()(*batch))


def test_qat_scores_the_weights_as_they_are():
    config = small_config(qat_enabled=True)
    model = random_model(config).eval()
    plain = GPT(dataclasses.replace(config, qat_enabled=False))
    plain.load_state_dict(model.state_dict())
    tokens_BT, _ = random_batch(config, 2, 12)
    assert torch.equal(model.logits(tokens_BT), plain.logits(tokens_BT))
    assert not torch.equal(model.train().logits(tokens_BT), plain.logits(tokens_BT))


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("documents", [False, True])
def test_the_compiler_is_for_what_has_no_kernel(monkeypatch, kernels, documents):
    monkeypatch.setenv("GOLF_KERNELS", kernels)
    model = random_model(small_config(document_boundaries=documents))
    assert model.gains_from_compiling == (documents or kernels == "reference")


FP8 = {"mlp_fp8": True, "compute_dtype": "bfloat16"}


def test_fp8_scores_as_bfloat16_does():
    config = small_config(**FP8)
    model = random_model(config).eval()
    plain = GPT(dataclasses.replace(config, mlp_fp8=False))
    plain.load_state_dict(model.state_dict())
    tokens_BT, _ = random_batch(config, 2, 12)
    assert torch.equal(model.logits(tokens_BT), plain.eval().logits(tokens_BT))
    assert not torch.equal(model.train().logits(tokens_BT), plain.logits(tokens_BT))


def test_fp8_trains_as_bfloat16_does():
    """Twenty steps that take a nat off: the losses go the same way, further apart than none and closer than a step."""
    config = small_config(**FP8)
    batch = random_batch(config, 8, 16)
    losses = []
    for each in (config, dataclasses.replace(config, mlp_fp8=False)):
        model = random_model(each).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    ours, plain = losses
    assert plain[-1] < plain[0] - 1
    assert ours != plain
    # Of each product's result some 5 % is noise of rounding, of each gradient 10 %.
    assert abs(ours[0] - plain[0]) < 0.05 * plain[0]
    assert abs(ours[-1] - plain[-1]) < 0.1 * (plain[0] - plain[-1])


def test_activations_stay_in_bfloat16_and_logits_are_float32(monkeypatch):
    """What goes into and out of every module, and into every product and attention."""
    config = small_config(compute_dtype="bfloat16", document_boundaries=True, tie_embeddings=False, num_layers=3)
    model = random_model(config)
    seen = []

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        tensors = [x for x in (*inputs, *(output if isinstance(output, tuple) else (output,))) if torch.is_tensor(x)]
        seen.extend((type(module).__name__, x.dtype) for x in tensors if x.is_floating_point() and x.dim() == 3)

    def noted(name: str) -> None:
        function = getattr(F, name)

        def wrapper(*arguments: object, **options: object) -> torch.Tensor:
            seen.extend((name, x.dtype) for x in arguments if torch.is_tensor(x))
            return function(*arguments, **options)

        monkeypatch.setattr(F, name, wrapper)

    for module in model.modules():
        module.register_forward_hook(note)
    noted("linear")
    noted("scaled_dot_product_attention")
    tokens_BT, _ = random_batch(config, 2, 8)
    assert model.hidden(tokens_BT).dtype == torch.bfloat16
    expected = {"InputStage", "Attention", "MLP", "Block", "linear", "scaled_dot_product_attention"}
    assert expected <= {name for name, _ in seen}
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    assert model.logits(tokens_BT).dtype == torch.float32


def test_bfloat16_computes_the_same_loss_to_its_precision():
    config = small_config(compute_dtype="bfloat16", num_layers=3)
    model = random_model(config)
    exact = GPT(dataclasses.replace(config, compute_dtype="float32"))
    exact.load_state_dict(model.state_dict())
    batch = random_batch(config, 16, 16)
    losses_BT, expected_BT = model.token_losses(*batch), exact.token_losses(*batch)
    # bf16 keeps 8 bits: each rounding moves a value by up to 2^-9, some ten of them in a row a nat or so by 2^-5.
    assert (losses_BT - expected_BT).square().mean().sqrt() < 2**-4
    assert abs(losses_BT.mean() - expected_BT.mean()) < 2**-6
    assert not torch.equal(losses_BT, expected_BT)


@pytest.fixture
def compiled():
    """Compiles a function as one graph; a graph break is an error."""
    torch.compiler.reset()
    yield lambda function: torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.compiler.reset()


@pytest.mark.parametrize(
    "options",
    [
        {"compute_dtype": "bfloat16"},
        {"document_boundaries": True, "tie_embeddings": False, "qat_enabled": True, "mtp_num_heads": 2},
        FP8,
    ],
    ids=["as the seed", "every option", "FP8"],
)
def test_compiled_as_one_graph_it_is_the_same(options, compiled):
    model = random_model(small_config(**options)).train()
    batch = random_batch(model.config, 2, 12)
    results = []
    for function in (model, compiled(model)):
        model.zero_grad()
        loss = function(*batch)
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    tolerance = 2**-7 if model.config.compute_dtype == "bfloat16" else 1e-5
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=tolerance)
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=float(tolerance * theirs.abs().max()))


def test_scoring_compiles_as_one_graph_too(compiled):
    model = random_model(small_config(document_boundaries=True)).eval()
    batch = random_batch(model.config, 2, 12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model.token_losses)(*batch), model.token_losses(*batch), rtol=0, atol=1e-5)
