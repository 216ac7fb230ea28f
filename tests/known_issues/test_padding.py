"""Padding, which takes a slot or a position in other libraries."""

from __future__ import annotations

import pytest
import torch

from tests.conversations import assert_same
from tests.oracle import Options
from tests.setups import SCHEMES, build, padding, tokens

SCHEME_NAMES = ("none", "rotary halves", "alibi", "t5 causal")


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 0), (3, 2)])
def test_padding_pushes_no_token_out_of_a_window(window: int, sinks: int, grad: bool) -> None:
    """Issues: mlx-lm#439 #735, unsloth#3699. Padding filled a sliding window and pushed real tokens out."""
    module = build(Options(window_size=window, num_sinks=sinks))
    with torch.set_grad_enabled(grad):
        module(tokens(2, 9, 16))
        before = {name: tensor.clone() for name, tensor in module.kv_cache.items()}
        # Row 0 gains nothing, row 1 one token: a hundred padded ones go by.
        for step in range(10):
            mask = padding([(0, 0), (4, 1 if step == 5 else 0)], 10)
            out = module(tokens(2, 10, 16, seed=step + 1), attention_mask=mask)
            assert not out[~mask].any()
    held = window + sinks
    assert module.kv_cache.cached_lengths.tolist() == [held, held]
    assert module.kv_cache.lengths.tolist() == [9, 10]
    for name, tensor in module.kv_cache.items():
        assert torch.equal(tensor[0], before[name][0])
        assert torch.equal(tensor[1, :, sinks:-1], before[name][1, :, sinks + 1 :]), "one in, one out"
        assert torch.equal(tensor[1, :, :sinks], before[name][1, :, :sinks])


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_padding_does_not_make_its_row_slide(grad: bool) -> None:
    """Issues: mlx-lm#439, unsloth#3699. The same where rows hold more than a window since they were fed without one.
    The row that gains a token slides, the one that is padded keeps everything, and slides with its own next token."""
    module = build(Options(window_size=2))
    with torch.set_grad_enabled(grad):
        module(tokens(2, 5, 16), None, True)
        kept = module.kv_cache["value"][0].clone()
        module(tokens(2, 3, 16, seed=1), attention_mask=padding([(0, 0), (1, 1)], 3))
        assert module.kv_cache.cached_lengths.tolist() == [5, 2]
        assert torch.equal(module.kv_cache["value"][0], kept)
        module(tokens(2, 1, 16, seed=2))
    assert module.kv_cache.cached_lengths.tolist() == [2, 2]
    assert torch.equal(module.kv_cache["value"][0, :, 0], kept[:, -1])


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_the_first_real_token_stands_at_zero(scheme: str, window: int | None, cached: bool) -> None:
    """Issues: transformers#22161, x-transformers#292. Rows of a padded batch got wrong positions. Five tokens, with
    padding on the left, on the right, on both sides and between them, give the outputs and the keys of the five
    alone."""
    options = Options(num_groups=2, scheme=SCHEMES[scheme], window_size=window, cached=cached)
    alone, batch = build(options), build(options)
    five = tokens(1, 5, 16)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0]] * 2).bool()
    mask[3:] = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 1], [0, 1, 1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0, 1]]).bool()
    x = tokens(6, 8, 16, seed=1)
    x[mask] = five.expand(6, -1, -1).reshape(-1, 16)
    with torch.no_grad():
        expected, out = alone(five), batch(x, attention_mask=mask)
        assert not out[~mask].any()
        assert_same(out[mask].view(6, 5, 16), expected.expand(6, -1, -1))
        if cached:
            for name, tensor in batch.kv_cache.items():
                assert_same(tensor, alone.kv_cache[name].expand_as(tensor))
            token = tokens(1, 1, 16, seed=2)
            assert_same(batch(token.expand(6, -1, -1)), alone(token).expand(6, -1, -1))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_prompts_of_different_lengths_decoded_together(scheme: str, window: int | None) -> None:
    """Issues: mlx-lm#735, unsloth#3699, transformers#22161. A left-padded batch decoded token by token, one row
    finished on the way, gives what each row gives alone."""
    options = Options(scheme=SCHEMES[scheme], window_size=window)
    batch, alone = build(options), [build(options) for _ in range(3)]
    counts, longest = (7, 2, 4), 7
    x = tokens(3, longest, 16)
    mask = padding([(longest - count, count) for count in counts], longest)
    with torch.no_grad():
        out = batch(x, attention_mask=mask)
        for row, count in enumerate(counts):
            own = x[row : row + 1, longest - count :]
            assert_same(out[row : row + 1, longest - count :], alone[row](own))
        for step in range(8):
            x = tokens(3, 1, 16, seed=step + 1)
            finished = torch.tensor([[True], [step < 3], [True]])
            out = batch(x, attention_mask=finished if step >= 3 else None)
            for row in range(3):
                if bool(finished[row]):
                    assert_same(out[row : row + 1], alone[row](x[row : row + 1]))
                else:
                    assert not out[row].any()
    assert batch.kv_cache.lengths.tolist() == [15, 5, 12]
    assert batch.kv_cache.cached_lengths.tolist() == [module.kv_cache.cached_length for module in alone]
