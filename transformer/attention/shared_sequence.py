"""Self-attention over a sequence that ranks share: a part over gathered keys, or all queries over keys in parts."""

from typing import NamedTuple

from torch import Tensor

from ..cache import CacheContents, SelfAttentionState, Step
from ..errors import ArgumentError
from .call import AttentionCall, SharedHeads
from .gathered_keys import attend_over_gathered_keys
from .keys_in_parts import attend_over_keys_in_parts


class OverRanks(NamedTuple):
    """Attended heads [B, H, L, D], and the contents of the module's cache after the call; None: as before."""

    out: Tensor
    contents: CacheContents | None


def attend_over_ranks(
    call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, unrotated: Tensor | None
) -> OverRanks | None:
    """The result of a call over a shared sequence; None where every rank has all tokens and attends by itself."""
    step, layer = call.step, call.layer
    if step is None or step.sequence is None:
        raise RuntimeError("attend_over_ranks: expected a step of a shared sequence")
    if call.attn_bias is not None or call.return_weights:
        name = "attn_bias: expected None" if call.attn_bias is not None else "return_weights: expected False"
        raise ArgumentError(f"{name} in a shared sequence, of which a rank has a part; call outside of share_sequence")
    sequence, heads = step.sequence, SharedHeads(query, key, value, unrotated)
    in_parts = layer is not None and keeps_parts(layer.contents, step)
    if sequence.is_part:
        return OverRanks(*attend_over_gathered_keys(call, step, sequence, heads, in_parts))
    if layer is None or not in_parts:
        return None
    return OverRanks(*attend_over_keys_in_parts(call, layer, step, sequence, heads))


def keeps_parts(contents: CacheContents, step: Step) -> bool:
    """True if each rank caches a part of the tokens. Every rank caches all of a window's, which are few, and goes on
    with all of what was read whole."""
    state = contents.state
    if isinstance(state, SelfAttentionState) and max(state.length):
        return state.part is not None
    return step.rule.window is None
