"""What each parameter is, how the artifact stores it, who trains it, and where it starts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from small_models import small_config
from torch import Tensor, nn

from golfmodel.config import Config, resolve
from golfmodel.model.gpt import GPT
from golfmodel.model.layers import initial_matrix
from golfmodel.model.parameters import Group, Storage, declare, exported_parameters, parameter_specs

SEED = resolve(["--preset", "seed"], {})


def outline(config: Config) -> GPT:
    """A model without values: shapes, dtypes and specs."""
    with torch.device("meta"):
        return GPT(config)


def kinds_of(model: GPT) -> Counter:
    specs = parameter_specs(model)
    return Counter(
        (specs[name].storage, specs[name].group, tuple(parameter.shape), parameter.dtype)
        for name, parameter in model.named_parameters()
    )


def started(**options) -> GPT:
    """A freshly initialised model, all of whose matrices have both sides of at least 64."""
    torch.manual_seed(0)
    options = {"num_layers": 3, "model_dim": 128, "num_heads": 2, "num_kv_heads": 1, "vocab_size": 256, **options}
    return GPT(small_config(bigram_vocab_size=96, bigram_dim=64, mlp_mult=3.0, **options))


def test_size_of_the_seed():
    assert sum(parameter.numel() for parameter in outline(SEED).parameters()) == 19_745_345


def test_every_parameter_of_the_seed():
    int6 = (Storage.INT6, Group.MATRIX)
    control = (Storage.FP32, Group.SCALAR)
    f32, bf16 = torch.float32, torch.bfloat16
    assert kinds_of(outline(SEED)) == {
        (Storage.FP16, Group.EMBEDDING, (1024, 512), bf16): 1,
        (Storage.INT8, Group.EMBEDDING, (2048, 128), bf16): 1,
        (Storage.FP16, Group.MATRIX, (512, 128), f32): 1,  # P, of exactly 65,536 elements
        (*int6, (512, 512), f32): 2 * 8,  # query, output
        (*int6, (256, 512), f32): 2 * 8,  # key, value
        (*int6, (1536, 512), f32): 8,
        (*int6, (512, 1536), f32): 8,
        (*control, (), f32): 1,  # the bigrams' scale
        (*control, (512,), f32): 1 + 4 * 8 + 4,  # smear; two mixes and two scales a block; skips
        (*control, (8,), f32): 8,  # query gains
    }
    assert sum(spec.storage is Storage.INT6 for spec in parameter_specs(outline(SEED)).values()) == 48


def test_an_untied_head_is_int8_and_has_its_own_group():
    tied, untied = (kinds_of(outline(small_config(tie_embeddings=tied))) for tied in (True, False))
    assert untied - tied == {(Storage.INT8, Group.HEAD, (11, 24), torch.float32): 1}
    assert not tied - untied


def test_multi_token_heads_are_trained_by_muon_and_never_exported():
    plain, model = (outline(small_config(mtp_num_heads=number)) for number in (0, 3))
    assert kinds_of(model) - kinds_of(plain) == {(Storage.NONE, Group.MATRIX, (11, 24), torch.float32): 3}
    assert exported_parameters(model).keys() == exported_parameters(plain).keys()


@pytest.mark.parametrize("storage", ["fp16", "int8"])
def test_the_token_embedding_is_stored_as_asked(storage):
    specs = parameter_specs(outline(small_config(embed_storage=storage)))
    assert specs["input.token.weight"].storage is Storage(storage)


@pytest.mark.parametrize(("layers", "skips"), [(1, 0), (2, 1), (3, 1), (8, 4), (9, 4)])
def test_half_of_the_blocks_have_a_skip(layers, skips):
    model = outline(small_config(num_layers=layers))
    assert len(list(model.skips.parameters())) == skips


def test_specs_follow_the_order_of_the_parameters():
    model = outline(small_config(num_layers=3, tie_embeddings=False, mtp_num_heads=1))
    assert list(parameter_specs(model)) == [name for name, _ in model.named_parameters()]


def test_an_undeclared_parameter_is_an_error():
    model = outline(small_config())
    model.blocks[0].mlp.register_parameter("bias", nn.Parameter(torch.zeros(3)))
    with pytest.raises(KeyError, match=r"bias.*MLP"):
        parameter_specs(model)
    declare(model.blocks[0].mlp, "bias", torch.zeros(3), Storage.FP32, Group.SCALAR)
    assert parameter_specs(model)["blocks.0.mlp.bias"].storage is Storage.FP32


def is_orthogonal(weight: Tensor, gain: float = 1.0) -> bool:
    """Whether the rows, or the columns where they are fewer, are orthogonal and `gain` long, up to bf16 rounding."""
    wide = weight.double() if weight.size(0) <= weight.size(1) else weight.double().T
    gram = wide @ wide.T / gain**2
    # Each entry is off by at most 2^-9 of itself, so an inner product of unit rows by at most 2 * 2^-9.
    return bool(((gram - torch.eye(len(gram))).abs() < 2**-8).all())


def test_matrices_start_orthogonal_and_output_projections_zero():
    for block in started().blocks:
        for matrix in (block.attention.query, block.attention.key, block.attention.value, block.mlp.up):
            assert is_orthogonal(matrix.weight)
        for matrix in (block.attention.output, block.mlp.down):
            assert not matrix.weight.any()


def test_two_matrices_do_not_start_alike():
    first, second = started().blocks[:2]
    assert not torch.equal(first.attention.query.weight, first.attention.value.weight)
    assert not torch.equal(first.mlp.up.weight, second.mlp.up.weight)


@pytest.mark.parametrize("layers", [3, 8])
def test_the_projection_starts_orthogonal_and_scaled(layers):
    weight = started(num_layers=layers).input.bigram.projection.weight
    assert weight.shape == (128, 64)
    assert is_orthogonal(weight, gain=(2 * layers) ** -0.5)


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "mtp_num_heads": 1}])
def test_matrices_start_at_bfloat16_values_in_float32(options):
    for name, parameter in started(**options).named_parameters():
        if parameter.ndim == 2 and not name.startswith(("input.token", "input.bigram.table")):
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, parameter.bfloat16().float())


def test_small_matrices_start_as_a_linear_layer_does():
    weight = initial_matrix(4000, 63)
    bound = 63**-0.5
    assert weight.abs().max() <= bound * (1 + 2**-8)
    assert weight.abs().max() > 0.99 * bound
    # Uniform, not merely bounded: the variance is bound^2 / 3.
    assert float(weight.var()) == pytest.approx(bound**2 / 3, rel=0.02)
    assert not is_orthogonal(weight)
    assert is_orthogonal(initial_matrix(64, 64))


def test_tied_embedding_starts_small():
    weight = started(vocab_size=1024).input.token.weight.detach()
    assert float(weight.std()) == pytest.approx(0.005, rel=0.02)
    assert abs(float(weight.mean())) < 1e-4
    wider = started(tied_embed_init_std=0.02).input.token.weight.detach()
    assert float(wider.std()) == pytest.approx(0.02, rel=0.02)


def test_untied_embedding_starts_at_order_1_and_the_head_at_zero():
    model = started(tie_embeddings=False)
    assert float(model.input.token.weight.detach().std()) == pytest.approx(1.0, rel=0.02)
    assert not model.head.weight.any()


def test_everything_else_starts_as_the_recipe_says():
    model = started(qk_gain_init=1.75, mtp_num_heads=2)
    assert not model.input.bigram.table.any()
    assert model.input.bigram.scale.item() == pytest.approx(0.05)
    assert not model.input.smear.gate.any()
    for block in model.blocks:
        assert bool((block.attention.query_gain == 1.75).all())
        assert bool((block.residual_mix == 1).all())
        assert not block.input_mix.any()
        assert bool((block.attention_scale == 1).all())
        assert bool((block.mlp_scale == 1).all())
    assert all(bool((weight == 1).all()) for weight in model.skips.parameters())
    assert not any(head.weight.any() for head in model.future_heads)


def test_at_the_start_the_blocks_add_nothing_but_the_skips():
    # Zero output projections: the first half hands on x0, each skip adds x0 once, and the final norm hides the sum.
    model = started(num_layers=4)
    tokens_BT = torch.randint(256, (2, 16))
    x0_BTD = model.input(tokens_BT)
    expected = torch.nn.functional.rms_norm(3 * x0_BTD, (128,), eps=2.0**-23)
    torch.testing.assert_close(model.hidden(tokens_BT), expected)


def test_the_seed_fixes_the_start():
    first, second = started(), started()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
