"""Families of checkpoints: saved by transformers, loaded here with equal outputs, and saved again for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.checkpoints.theirs import CASES, LENGTH, ids, saved
from transformer import DecoderOnlyTransformer
from transformer.checkpoints import load_model, save_model

NEW_TOKENS = 64


class Pair(NamedTuple):
    ours: DecoderOnlyTransformer
    theirs: PreTrainedModel

    def close(self, ours: Tensor, theirs: Tensor) -> None:
        capped = self.ours.config.softcap is not None
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4 * theirs.abs().max().item() if capped else 1e-5)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("theirs")
    theirs = saved(CASES[request.param], folder)
    return Pair(load_model(folder), theirs)


@torch.no_grad()
def test_logits(pair: Pair) -> None:
    prompt = ids(3, LENGTH)
    theirs = pair.theirs(prompt).logits
    assert theirs.std() > 0.1
    pair.close(pair.ours(prompt), theirs)


@pytest.mark.slow
@torch.no_grad()
def test_greedy_tokens(pair: Pair) -> None:
    # Models of random weights repeat themselves; without the repetition each token is another choice.
    prompt, options = ids(2, 5), {"max_new_tokens": NEW_TOKENS, "no_repeat_ngram_size": 2}
    theirs = pair.theirs.generate(prompt, do_sample=False, **options)
    assert pair.ours.generate(prompt, **options).tolist() == theirs.tolist()


@torch.no_grad()
def test_cached_is_uncached(pair: Pair) -> None:
    prompt = ids(2, LENGTH)
    whole = pair.ours(prompt)
    pair.ours.enable_cache()
    try:
        parts = [pair.ours(part) for part in prompt.split([9, 1, 1, 12, 1, LENGTH - 24], 1)]
    finally:
        pair.ours.disable_cache()
    pair.close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_padded_rows_are_the_rows_alone(pair: Pair, left: bool) -> None:
    prompt, lengths = ids(3, LENGTH), [LENGTH, 11, 1]
    batch, mask = torch.zeros_like(prompt), torch.zeros_like(prompt)
    for row, length in enumerate(lengths):
        real = slice(LENGTH - length, None) if left else slice(length)
        batch[row, real], mask[row, real] = prompt[row, :length], 1
    logits = pair.ours(batch, mask)
    for row, length in enumerate(lengths):
        pair.close(logits[row][mask[row] == 1], pair.theirs(prompt[row : row + 1, :length]).logits[0])


@pytest.mark.slow
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 9000])
@torch.no_grad()
def test_written_back(pair: Pair, shard_bytes: int, tmp_path: Path) -> None:
    """Read by transformers it gives the very logits of the first model, and read by us the very same weights."""
    save_model(pair.ours, tmp_path / "ours", shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 1) == (shard_bytes == 9000)
    prompt = ids(2, LENGTH)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(theirs(prompt).logits, pair.theirs(prompt).logits)
    ours = load_model(tmp_path / "ours")
    assert torch.equal(ours(prompt), pair.ours(prompt))
