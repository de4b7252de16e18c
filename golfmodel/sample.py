"""Text from an artifact: `python -m golfmodel.sample PATH --prompt "def "`, streamed as it comes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

import torch

from golfmodel.artifact.container import read_artifact
from golfmodel.artifact.readback import unpack_model
from golfmodel.config import Config
from golfmodel.data.tokenizer import Tokenizer
from golfmodel.model.gpt import GPT
from golfmodel.runtime.distributed import process_group
from golfmodel.runtime.errors import ArtifactError, ConfigError, front_door

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for bytes that are not yet a whole character


@torch.no_grad()
def sample_tokens(
    model: GPT,
    prompt: Sequence[int],
    *,
    count: int,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yields up to `count` tokens that follow `prompt`, one at a time; stops before a new document.

    Each is drawn from `softmax(logits / temperature)` over the `top_k` likeliest (0: all), or is the likeliest when
    the temperature is 0. The model sees the last `TRAIN_SEQ_LEN` tokens.

    Args:
        model: as `unpack_model` gives it.
        prompt: ids, at least one (such as BOS).
        count: tokens at most.
        temperature: at least 0.
        top_k: at least 0.
        generator: on the model's device; fixes the draw.

    Raises:
        ArtifactError: the logits are not finite, as weights of a foreign artifact can make them.
    """
    device = next(model.parameters()).device
    tokens = list(prompt)
    for _ in range(count):
        window = torch.tensor([tokens[-model.config.train_seq_len :]], device=device)
        logits_V = model.logits(window)[0, -1]
        if not bool(logits_V.isfinite().all()):
            raise ArtifactError("the model's logits are not finite: its weights are too large for what it computes")
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            if 0 < top_k < len(logits_V):
                smallest = logits_V.topk(top_k).values[-1]
                logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
            probabilities_V = torch.softmax(logits_V / temperature, dim=-1)
            token = int(torch.multinomial(probabilities_V, 1, generator=generator))
        if token == model.config.bos_token_id:
            return
        tokens.append(token)
        yield token


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """The text that each token adds to the prompt's; a character of several byte pieces comes when it is whole."""
    seen = list(prompt)
    shown = tokenizer.decode(seen)
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen)
        if text.endswith(UNFINISHED):
            continue
        yield text[len(shown) :]
        shown = text
    rest = tokenizer.decode(seen)[len(shown) :]
    if rest:
        yield rest


@front_door
def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    for name, value in (
        ("--tokens", options.tokens),
        ("--top-k", options.top_k),
        ("--temperature", options.temperature),
    ):
        if not value >= 0:
            raise ConfigError(f"{name} is {value}: must be at least 0")
    with process_group(options.device, {}) as ranks:
        artifact = read_artifact(options.artifact)
        model = unpack_model(artifact, ranks.device, options.artifact)
        tokenizer = Tokenizer(options.tokenizer_path, model.config.vocab_size)
        tokenizer.require(artifact.tokenizer_digest, options.artifact)
        prompt = [tokenizer.bos_id, *tokenizer.encode(options.prompt)]
        generator = torch.Generator(device=ranks.device).manual_seed(options.seed)
        tokens = sample_tokens(
            model,
            prompt,
            count=options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            generator=generator,
        )
        sys.stdout.write(options.prompt)
        for piece in stream_text(tokenizer, prompt, tokens):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m golfmodel.sample",
        description="Writes text that an artifact's model makes up, as it comes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("artifact", help="the artifact file, such as runs/<RUN_ID>/model.golf")
    parser.add_argument(
        "--tokenizer-path",
        default=os.environ.get("TOKENIZER_PATH", Config.tokenizer_path),
        help="the SentencePiece model the artifact was trained with",
    )
    parser.add_argument("--prompt", default="", help="how the text begins")
    parser.add_argument("--tokens", type=int, default=200, help="tokens at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0: from all")
    parser.add_argument("--seed", type=int, default=1337, help="of the draw")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to run")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
