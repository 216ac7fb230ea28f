"""Check of a call of an attention module: everything that can be refused is, before anything changes."""

from torch import Tensor

from ..cache import CacheCall, CacheContents, Step, TokenLayout, active_call, active_sequence
from ..errors import ArgumentError, CacheStateError
from ..tracing import is_traced
from . import checks
from .call import Arguments, AttentionCall
from .cross_attention import cross_call
from .heads import CachedHeads
from .layouts import check_serves, refuse_layout, tokens_of
from .self_attention import step_after
from .shared_plan import shared_tokens
from .traced import given_traced_step, traced_step


def checked_call(heads: CachedHeads, caches: CacheCall | None, x: Tensor, given: Arguments) -> AttentionCall:
    """The call with its arguments checked. Raises as `Attention.forward`, before anything changes."""
    layer = None if caches is None else caches.begin(heads)
    # Tensors on the meta device have shapes, by which a cache can count.
    traced = is_traced(x) and (layer is None or not x.is_meta)
    if traced and layer is not None:
        raise CacheStateError(
            "use_kv_cache: expected False in a traced call (torch.export, torch.jit.trace, torch.func, fake "
            "tensors), which cannot count tokens; turn it off, or freeze_layout() to compile or export a step"
        )
    kv, attn_bias, dropout = given.kv, given.attn_bias, heads.dropout if heads.training else 0.0
    if kv is not None:
        generation = None if caches is None else caches.generation
        return cross_call(heads, x, kv, given, layer=layer, dropout=dropout, generation=generation)
    if given.kv_mask is not None or heads.kv_dim != heads.embed_dim:
        checks.check_no_source(given.kv_mask, heads.kv_dim, heads.embed_dim)
    if caches is not None and layer is None and heads.apply_causal_mask:
        caches.check_forgets_nothing(heads)
    contents = None if layer is None else layer.contents
    if given.step is not None:
        step = given.step
        if type(step) is not Step or given.expanding_context is not None or given.attention_mask is not None:
            checks.check_step_alone(step, given.expanding_context, given.attention_mask)
        if given.layout is not None:
            refuse_layout(given.layout, "beside a step, which plan() makes of it")
        if traced:
            step = given_traced_step(heads, x, step)
        else:
            rule = heads.rule(contents, step.new_lengths, step.expanding_context)
            checks.check_step(step, x, rule, layer is not None, False)
            if step.layout is not None:
                check_serves(heads, step, rule, contents, layer is not None)
    elif traced:
        step = traced_step(heads, x, given.expanding_context, given.attention_mask, given.layout)
    else:
        step = new_step(heads, x, contents, given.expanding_context, given.attention_mask, given.layout)
    if attn_bias is not None:
        if step.layout is not None and (step.packed or step.layout.prefix_lengths is not None):
            raise ArgumentError("attn_bias: expected None beside segment_ids or prefix_lengths, got both")
        cached = 0 if contents is None else max(contents.row_cached_lengths)
        checks.check_attn_bias(attn_bias, (step.batch, heads.num_heads, step.tokens, cached + step.tokens), x.device)
    # Without a call of the property where there are none.
    rules = None if heads.mask_rule is None and heads.score_rule is None else heads.rules
    call = AttentionCall(
        heads,
        x,
        layer,
        attn_bias=attn_bias,
        dropout=dropout,
        return_weights=given.return_weights,
        step=step,
        rules=rules,
        sink_logits=heads.sink_logits,
    )
    if layer is None or heads.budget is None:
        return call
    needs = heads.budget.needs_after(contents)
    return call._replace(last_queries=needs.queries, sums_weights=needs.weights)


def new_step(
    heads: CachedHeads,
    x: Tensor,
    contents: CacheContents | None,
    mode: bool | None,
    attention_mask: Tensor | None,
    layout: TokenLayout | None,
) -> Step:
    """The step of a call that was given none."""
    sequence = active_sequence((heads,))
    if sequence is not None:
        refuse_layout(layout, "in a shared sequence")
        tokens = shared_tokens(sequence, (heads,), x, active_call(), mode, attention_mask)
    elif attention_mask is None and layout is None:
        tokens = Step.of(x, None)
    else:
        tokens = tokens_of(x, attention_mask, layout)
    rule = heads.rule(contents, tokens.new_lengths, mode)
    if layout is not None:
        check_serves(heads, tokens, rule, contents, heads.keeps(active_call()))
    return step_after(tokens, contents, rule, mode)
