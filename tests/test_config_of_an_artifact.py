"""The options that an artifact stores: which they are, there and back, and what an untrusted file can do with them."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from golfmodel.config import Config
from golfmodel.runtime.errors import ConfigError

ARTIFACT_FIELDS = Config().artifact_fields()


def test_artifact_fields_round_trip_through_json():
    config = Config(num_layers=5, tie_embeddings=False, mlp_mult=2.0, document_boundaries=True, eval_stride=32)
    stored = json.loads(json.dumps(config.artifact_fields()))
    rebuilt = Config.from_artifact_fields(stored)
    assert rebuilt.artifact_fields() == config.artifact_fields()
    assert rebuilt.num_layers == 5
    assert rebuilt.document_boundaries


@pytest.mark.parametrize("length", [2, 1000, 2**17])
def test_artifact_fields_of_any_row_length_round_trip(length):
    """Whatever batch they were trained with: the default one is neither 1,000s nor as long as the longest row."""
    config = Config(train_seq_len=length, train_batch_tokens=100 * length, micro_batch_tokens=length)
    assert Config.from_artifact_fields(config.artifact_fields()).artifact_fields() == config.artifact_fields()


def test_artifact_fields_hold_what_rebuilds_and_scores_a_model():
    assert ARTIFACT_FIELDS.keys() == {
        *("num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "vocab_size", "tie_embeddings"),
        *("bigram_vocab_size", "bigram_dim", "rope_base", "logit_softcap", "document_boundaries", "bos_token_id"),
        *("compute_dtype", "embed_storage"),
        *("train_seq_len", "val_batch_size", "eval_seq_len", "eval_stride"),
    }


def test_no_text_in_an_artifact_can_be_a_path():
    texts = [each for each in dataclasses.fields(Config) if each.metadata["in_artifact"] and each.type == "str"]
    assert {each.name for each in texts} == {"compute_dtype", "embed_storage"}
    assert all(each.metadata["choices"] for each in texts)


@pytest.mark.parametrize("name", ARTIFACT_FIELDS)
def test_a_missing_artifact_field_is_named(name):
    values = {key: value for key, value in ARTIFACT_FIELDS.items() if key != name}
    with pytest.raises(ConfigError, match=name):
        Config.from_artifact_fields(values)


@pytest.mark.parametrize("name", ["zebra", "seed", "matrix_lr"])
def test_an_extra_artifact_field_is_named(name):
    with pytest.raises(ConfigError, match=name):
        Config.from_artifact_fields({**ARTIFACT_FIELDS, name: 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", True),
        ("num_layers", 9.0),
        ("num_layers", "9"),
        ("num_layers", None),
        ("num_layers", [9]),
        ("num_layers", 0),
        ("num_layers", -1),
        ("num_layers", 2**63),
        pytest.param("num_layers", 10**400, id="num_layers-too-large-for-a-float"),
        ("model_dim", 2**40),
        ("mlp_mult", 3),
        ("mlp_mult", math.nan),
        ("mlp_mult", math.inf),
        ("mlp_mult", 1e300),
        ("rope_base", -math.inf),
        ("rope_base", 1.0),
        ("logit_softcap", math.nan),
        ("tie_embeddings", 1),
        ("tie_embeddings", "true"),
        ("compute_dtype", "float64"),
        ("compute_dtype", ["bfloat16"]),
        ("embed_storage", "fp32"),
        ("eval_stride", 4096),
    ],
)
def test_a_hostile_artifact_field_is_a_config_error(name, value):
    with pytest.raises(ConfigError, match=name.upper()):
        Config.from_artifact_fields({**ARTIFACT_FIELDS, name: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"\n\x1b[2J" * 1000: 1},
        {f"option{number}": 1 for number in range(1000)},
        {"num_layers": "\n" * 10**5},
        {"num_layers": [["\n"] * 1000] * 1000},
        {"compute_dtype": "\n\x1b" * 10**5},
    ],
    ids=["a name", "names", "a text for a number", "lists for a number", "a choice"],
)
def test_what_a_hostile_artifact_says_stays_in_one_short_line(changes):
    with pytest.raises(ConfigError) as caught:
        Config.from_artifact_fields({**ARTIFACT_FIELDS, **changes})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(changes=st.dictionaries(st.sampled_from(sorted(ARTIFACT_FIELDS)), JSON_VALUES, min_size=1, max_size=3))
@example(changes={"num_layers": 1, "model_dim": 8, "num_heads": 1, "num_kv_heads": 1})
def test_artifact_fields_from_anywhere_give_a_valid_config_or_a_config_error(changes):
    values = {**ARTIFACT_FIELDS, **changes}
    try:
        config = Config.from_artifact_fields(values)
    except ConfigError:
        return
    assert config.artifact_fields() == values
