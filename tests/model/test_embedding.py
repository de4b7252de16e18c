"""The token row, the hashed bigram row, and what of them resets at a document start."""

from __future__ import annotations

import pytest
import recipe_model as recipe
import torch
from small_models import random_batch, random_model, small_config

from golfmodel.model.embedding import InputStage
from golfmodel.model.parameters import Storage, parameter_specs

BOS = 1


def stage_of(**options) -> tuple[InputStage, recipe.Weights]:
    model = random_model(small_config(**options))
    return model.input, recipe.weights_of(model)


@pytest.mark.parametrize(
    "options",
    [{}, {"bigram_vocab_size": 0}, {"bigram_dim": 24}, {"bigram_vocab_size": 2}, {"vocab_size": 60_000}],
    ids=["projected", "none", "as wide as the model", "two buckets", "large tokens"],
)
def test_input_stage_is_that_of_the_recipe(options):
    stage, W = stage_of(**options)
    config = small_config(**options)
    tokens_BT, _ = random_batch(config, 3, 16)
    expected = torch.stack([recipe.input_stage(config, W, row) for row in tokens_BT.tolist()])
    torch.testing.assert_close(stage(tokens_BT).double(), expected, rtol=0, atol=1e-5)


def test_hash_of_the_seed():
    # By hand: 36313 * 1000 = 36313000 and 27191 * 999 = 27163809; XOR and modulus of non-negative numbers.
    assert recipe.bigram_bucket(1000, 999, 2048) == (36313000 ^ 27163809) % 2047
    # 36313 * 60000 = 2178780000 is above 2^31 and becomes negative; the modulus rounds down.
    assert recipe.int32(36313 * 60000) == 2178780000 - 2**32
    assert recipe.bigram_bucket(60000, 1, 2048) == ((2178780000 - 2**32) ^ 27191) % 2047
    assert recipe.bigram_bucket(5, None, 2048) == 2047


def test_smear_and_hash_reset_at_a_document_start():
    stage, W = stage_of()
    config = small_config()
    first, second = [BOS, 5, 3], [BOS, 7, 2, 9]
    tokens_BT = torch.tensor([first + second])
    starts_BT = tokens_BT == BOS
    expected = torch.cat([recipe.input_stage(config, W, first), recipe.input_stage(config, W, second)])
    torch.testing.assert_close(stage(tokens_BT, starts_BT)[0].double(), expected, rtol=0, atol=1e-5)
    difference_T = (stage(tokens_BT)[0] - expected).abs().amax(dim=1)
    # Without the reset, token 3 takes another bucket and smears token 2 in; token 4 smears token 3 in.
    assert (difference_T > 1e-2).tolist() == [False, False, False, True, True, False, False]


def test_the_hash_resets_by_itself():
    stage, _ = stage_of()
    with torch.no_grad():
        stage.smear.gate.fill_(-1e9)  # no smear
    tokens_BT = torch.tensor([[BOS, 5, BOS, 7]])
    changed_T = (stage(tokens_BT) - stage(tokens_BT, tokens_BT == BOS)).abs().amax(dim=2)[0]
    assert (changed_T > 1e-3).tolist() == [False, False, True, False]


def test_the_smear_resets_by_itself():
    stage, _ = stage_of(bigram_vocab_size=0)
    tokens_BT = torch.tensor([[BOS, 5, BOS, 7]])
    changed_T = (stage(tokens_BT) - stage(tokens_BT, tokens_BT == BOS)).abs().amax(dim=2)[0]
    assert (changed_T > 1e-3).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("model_dim", "bigram_dim", "storage"),
    [(512, 128, Storage.FP16), (512, 136, Storage.INT6), (64, 1024, Storage.FP16), (64, 1032, Storage.INT6)],
)
def test_projection_is_int6_only_above_65536_elements(model_dim, bigram_dim, storage):
    with torch.device("meta"):
        stage = InputStage(small_config(model_dim=model_dim, bigram_dim=bigram_dim), torch.float32)
    assert parameter_specs(stage)["bigram.projection.weight"].storage is storage


def test_no_projection_at_the_width_of_the_model():
    stage, _ = stage_of(bigram_dim=24)
    assert stage.bigram.projection is None
    assert stage.bigram.table.shape == (7, 24)


def test_no_bigrams_at_all():
    stage, _ = stage_of(bigram_vocab_size=0)
    assert [name for name, _ in stage.named_parameters()] == ["token.weight", "smear.gate"]
