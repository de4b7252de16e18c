"""Tokenizers of a few pieces, trained in a moment."""

from __future__ import annotations

import io

import sentencepiece


def train(**options: object) -> bytes:
    """A SentencePiece model of 40 pieces or as `options` say."""
    corpus = ["the cat sat on the mat", "a dog ran at the cat", "the dog sat"] * 4
    model = io.BytesIO()
    settings = {"model_type": "bpe", "vocab_size": 40, "num_threads": 1, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=model, **settings)
    return model.getvalue()
