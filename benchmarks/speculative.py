"""Speculative decoding beside plain decoding: an assistant that is mostly right, a text that repeats, a trained pair.

Agreement of untrained models is arranged: each does its whole work, and then the next token is that of a list.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from transformer import DecoderOnlyTransformer
from transformer.generation import generate

from .case import Candidate, Case, Setup
from .grid import Grid
from .our_models import decoder_only
from .saved import seeded

KIND = "Speculative decoding"
PLAIN = "ours, plain"
ACCEPTED = "guessed tokens, of all new ones"
EQUAL = "equal tokens"
ARRANGED, LOOKUP, TRAINED = "assistant, 4 of 5 right", "lookup, text repeats", "trained assistant"

NEW, PROMPT = 64, 32
PERIOD = 12
"""Tokens after which the text that repeats begins anew."""
WRONG = 5
"""The assistant is wrong in each token of this number."""
TRAINED_MODEL, PAIR, HEADS, LENGTH = "8 layers of 256, trained", ((8, 256), (2, 128)), 4, 128
"""A pair of byte models: layers and widths, heads, and bytes of a row in training."""


class Following(nn.Module):
    """A model whose logits are largest at the token that follows in a list of different tokens, which is a circle.

    Args:
        model: the model, which does its whole work.
        tokens: int64 [n].
        wrong: the token after each multiple of this number of tokens is another one; 0: none.
    """

    def __init__(self, model: DecoderOnlyTransformer, tokens: Tensor, wrong: int = 0) -> None:
        super().__init__()
        self.model = model
        size = model.config.vocab_size
        self._following = torch.zeros(size, dtype=torch.int64, device=tokens.device)
        self._following[tokens] = tokens.roll(-1)
        if wrong:
            erring = tokens[::wrong]
            self._following[erring] = (self._following[erring] + 1) % size

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, logits_to_keep: int = 0) -> Tensor:
        """The model's logits, with a larger one at the token that follows."""
        logits: Tensor = self.model(tokens, attention_mask=attention_mask, logits_to_keep=logits_to_keep)
        next_token = self._following[tokens[:, -logits.shape[1] :]].unsqueeze(-1)
        return logits.scatter(-1, next_token, logits.amax(-1, keepdim=True) + 1)


def cases(grid: Grid) -> Iterator[Case]:
    """One row with each source of guesses; float32."""
    for model, guesses, build in (
        (grid.llama.name, ARRANGED, arranged),
        (grid.llama.name, LOOKUP, lookup),
        (TRAINED_MODEL, TRAINED, trained),
    ):
        yield Case(KIND, {"model": model, "guesses by": guesses, "new tokens": NEW}, partial(build, grid), 8.0)


def arranged(grid: Grid) -> Setup:
    """A model, and one of an eighth of its weights that guesses four tokens of five right."""
    place = grid.place()
    model, small = decoder_only(grid.llama, place), decoder_only(grid.assistant, place)
    tokens = torch.randperm(grid.llama.vocab_size, device=place.device)[: PROMPT + NEW]
    return _setup(Following(model, tokens), tokens[None, :PROMPT], assistant_model=Following(small, tokens, WRONG))


def lookup(grid: Grid) -> Setup:
    """A model whose text repeats."""
    place = grid.place()
    tokens = torch.randperm(grid.llama.vocab_size, device=place.device)[:PERIOD]
    prompt = tokens.repeat(PROMPT // PERIOD + 1)[None, :PROMPT]
    return _setup(Following(decoder_only(grid.llama, place), tokens), prompt, prompt_lookup_num_tokens=10)


def trained(grid: Grid) -> Setup:
    """Byte models, trained here on the text of the examples, that continue text they have not seen; greedy."""
    # The examples are programs, and no package.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    from byte_model import train  # type: ignore[import-not-found]
    from byte_text import read_bytes  # type: ignore[import-not-found]

    (text, cut), models = read_bytes(None), []
    for layers, width in PAIR:
        shape = 256, width, HEADS, 2 * width, layers
        model = seeded(partial(DecoderOnlyTransformer, *shape, attention="gqa", num_groups=2))
        with torch.enable_grad():
            train(model, text[:cut], LENGTH, grid.pair_steps)
        models.append(model.eval())
    return _setup(models[0], text[None, cut : cut + LENGTH], assistant_model=models[1])


def _setup(model: nn.Module, prompt: Tensor, **guesses: object) -> Setup:
    """Both ways, and once what they give."""

    def written(**options: object) -> Tensor:
        return generate(model, prompt, max_new_tokens=NEW, **options)  # type: ignore[arg-type,return-value]

    result = generate(model, prompt, max_new_tokens=NEW, return_scores=True, **guesses)  # type: ignore[arg-type]
    accepted = sum(result.accepted or ()) / NEW
    equal = torch.equal(result.tokens, written())
    return Setup(
        Candidate(lambda: written(**guesses)),
        others={PLAIN: Candidate(written)},
        tokens=NEW,
        details=lambda: {ACCEPTED: accepted, EQUAL: float(equal)},
    )
