"""Rotary tables, the document mask, and the attention layer by itself."""

from __future__ import annotations

import math

import pytest
import recipe_model as recipe
import torch
from small_models import random_model, small_config

from golfmodel.model.attention import Rotary, document_mask, rotary_tables
from golfmodel.model.layers import Source, cast_matrices

CPU = torch.device("cpu")


@pytest.mark.parametrize(("length", "head_dim"), [(1, 64), (7, 6), (1024, 64), (1025, 64), (2048, 64), (4096, 128)])
def test_rotary_tables(length, head_dim):
    base = 10000.0
    if length > 1024:
        base *= (length / 1024) ** (head_dim / (head_dim - 2))
    cos, sin = rotary_tables(length, head_dim, 10000.0, CPU)
    assert cos.shape == sin.shape == (length, head_dim // 2)
    assert cos.dtype == sin.dtype == torch.float32
    for position in {0, 1, length // 2, length - 1}:
        if position >= length:
            continue
        for j in range(head_dim // 2):
            angle = position * base ** (-2 * j / head_dim)
            # The angle is rounded to float32 some five times: that many units of its size.
            tolerance = 5 * 2**-24 * max(angle, 1)
            assert float(cos[position, j]) == pytest.approx(math.cos(angle), abs=tolerance)
            assert float(sin[position, j]) == pytest.approx(math.sin(angle), abs=tolerance)


def test_rotary_base_of_the_seed():
    # At 2048 tokens and heads of 64 the base is 10000 * 2^(64/62); the second pair of position 1 shows it.
    _, sin = rotary_tables(2048, 64, 10000.0, CPU)
    assert float(sin[1, 1]) == pytest.approx(math.sin((10000 * 2 ** (64 / 62)) ** (-2 / 64)), abs=1e-6)
    _, unscaled = rotary_tables(1024, 64, 10000.0, CPU)
    assert float(unscaled[1, 1]) == pytest.approx(math.sin(10000 ** (-2 / 64)), abs=1e-6)


def test_rotary_of_heads_of_two_has_no_base_to_rescale():
    cos, _ = rotary_tables(2048, 2, 10000.0, CPU)
    torch.testing.assert_close(cos[:, 0], torch.arange(2048.0).cos())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_are_sliced_for_short_texts_and_remade_for_long_ones(dtype):
    rotary = Rotary(small_config(train_seq_len=2048, train_batch_tokens=2048), dtype)
    trained = [table.to(dtype) for table in rotary_tables(2048, 6, 10000.0, CPU)]
    longer = [table.to(dtype) for table in rotary_tables(3000, 6, 10000.0, CPU)]
    for length, expected in ((2048, trained), (1500, trained), (3, trained), (3000, longer)):
        tables = rotary(length)
        assert [table.dtype for table in tables] == [dtype, dtype]
        assert all(torch.equal(table, full[:length]) for table, full in zip(tables, expected, strict=True))
    assert not rotary.state_dict()


def test_document_mask_is_causal_and_ends_at_document_starts():
    starts = [False, False, True, False, True, True, False]
    mask = document_mask(torch.tensor([starts, [True] + [False] * 6]))
    assert mask.shape == (2, 1, 7, 7)
    for query in range(7):
        for key in range(7):
            visible = key <= query and not any(starts[key + 1 : query + 1])
            assert bool(mask[0, 0, query, key]) == visible
            assert bool(mask[1, 0, query, key]) == (key <= query)


def attention_of(**options):
    """A random attention layer, its input, its rotary tables, and what RECIPE.md says of them."""
    config = small_config(num_layers=1, **options)
    model = random_model(config)
    x_BTD = torch.randn(2, config.train_seq_len, config.model_dim, generator=torch.Generator().manual_seed(1))
    W = recipe.weights_of(model)
    expected = torch.stack([recipe.attention(config, W, "blocks.0.attention", x.double()) for x in x_BTD])
    return model.blocks[0].attention, x_BTD, model.rotary(config.train_seq_len), expected


def attend(attention, x_BTD, *others):
    """The layer by its own matrices, as they are now."""
    joined = (attention.query, attention.key, attention.value)
    return attention(x_BTD, *cast_matrices([Source(joined), Source((attention.output,))], x_BTD.dtype), *others)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_is_that_of_the_recipe(num_kv_heads):
    attention, x_BTD, rotary, expected = attention_of(num_kv_heads=num_kv_heads)
    torch.testing.assert_close(attend(attention, x_BTD, rotary).double(), expected, rtol=0, atol=1e-5)


def test_attention_over_more_than_1024_tokens():
    options = {"model_dim": 8, "num_heads": 2, "num_kv_heads": 1, "train_seq_len": 1100, "train_batch_tokens": 1100}
    attention, x_BTD, rotary, expected = attention_of(**options)
    assert expected.abs().max() > 0.1
    # Angles of a thousand radians are good to 2^-14 or so in float32.
    torch.testing.assert_close(attend(attention, x_BTD, rotary).double(), expected, rtol=0, atol=5e-4)
    unscaled_cos, unscaled_sin = rotary_tables(1024, 4, 10000.0, CPU)
    assert not torch.allclose(rotary[0][:1024], unscaled_cos, rtol=0, atol=1e-2)
    assert not torch.allclose(rotary[1][:1024], unscaled_sin, rtol=0, atol=1e-2)


@pytest.mark.parametrize("mask", ["none", "one document"])
def test_a_row_of_one_document_needs_no_mask(mask):
    attention, x_BTD, rotary, expected = attention_of()
    starts_BT = torch.zeros(2, 16, dtype=torch.bool)
    starts_BT[:, 0] = mask == "one document"
    y_BTD = attend(attention, x_BTD, rotary, document_mask(starts_BT))
    torch.testing.assert_close(y_BTD.double(), expected, rtol=0, atol=1e-5)


def test_scale_of_queries_and_keys_does_not_matter():
    attention, x_BTD, rotary, expected = attention_of()
    with torch.no_grad():
        attention.query.weight *= 7
        attention.key.weight *= 0.3
    torch.testing.assert_close(attend(attention, x_BTD, rotary).double(), expected, rtol=0, atol=1e-5)


def test_each_query_head_has_a_gain():
    attention, x_BTD, rotary, _ = attention_of()
    assert attention.query_gain.shape == (4,)
    with torch.no_grad():
        attention.query_gain[2] += 1
        torch.nn.init.eye_(attention.output.weight)
        before = attend(attention, x_BTD, rotary)
        attention.query_gain[2] -= 1
        after = attend(attention, x_BTD, rotary)
    changed_D = (before - after).abs().amax(dim=(0, 1)) > 1e-4
    assert changed_D.view(4, 6).any(dim=1).tolist() == [False, False, True, False]
