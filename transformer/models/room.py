"""Room for a generation in the caches of fixed size, and the message where there is too little."""

from collections.abc import Sequence

from ..attention import Attention
from ..cache import Lengths
from ..errors import CacheFullError
from ..generation.row_options import UNLIMITED_TOKENS


def check_cache_room(
    attention: Attention,
    cached: Lengths,
    prompts: Sequence[int],
    adds: tuple[int, ...],
    new: Sequence[int],
    unread: int,
) -> None:
    """Raises CacheFullError where a layer that has so many tokens `cached` would hold too many.

    `prompts` and `adds` are the tokens of the prompt, and all that are read, of each row; `new` those that are asked
    for, of which `unread` are not.
    """
    most, budget = attention.max_cache_length, attention.budget
    if most is None or attention.window_size is not None:
        return
    after_prompt, after_all = cached + tuple(prompts), cached + adds
    if budget is not None and max(after_prompt) > most:
        raise CacheFullError(
            f"input_ids: expected at most {most} tokens in the cache, which a prompt is in as a whole before "
            f"cache_budget applies, got {max(after_prompt)} with this prompt; shorten it"
            f"{', clear the cache' if max(cached) else ''}, or enable_cache() with a larger max_length"
        )
    peak = after_all if budget is None else budget.max_cached_lengths(after_prompt, after_all)
    if max(peak) > most:
        longest = max(after_all)
        message = too_long(f"caches hold at most {most} tokens", most - longest, longest + unread, new, max(cached))
        raise CacheFullError(f"{message}, or enable_cache() with a larger max_length")


def too_long(reason: str, room: int, longest: int, new: Sequence[int], kept: int) -> str:
    """Message for a row of `longest` tokens, `new` and `kept` cached ones among them, which are `-room` too many."""
    asked = max(new)
    most = max(asked + room, 0)
    got = f"{asked:,}" if asked < UNLIMITED_TOKENS // 2 else "any number"
    advice = ("ask for less" if most else "shorten the prompt") + (", clear the cache" if kept else "")
    return (
        f"max_new_tokens: expected at most {most} beside the {longest - asked:,} tokens of the longest row, as "
        f"{reason}, got {got} (by max_new_tokens, or max_length less the prompt); {advice}"
    )
