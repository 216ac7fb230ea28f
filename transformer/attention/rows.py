"""Self-attention of a flat run row by row: each row's queries over its own keys, as if it were alone.

Nothing is computed for padding, and no mask tells rows apart. This serves the CPU, where a call of a kernel costs
little; a device that waits for launches is given all rows at once. Packed documents, which are rows here, and prefixes
take this way everywhere: a row with a prefix has two pieces of queries, of which the first sees the prefix in both
directions, and the second follows it in causal order.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from ..cache import EMPTY, CacheContents, FlatRun, KeyValueView, Lengths, PlacedTokens, Step, uncached_view
from ..kernels import tuning, use_float32
from ..positions import ScoreBias
from .call import AttentionCall, SharedHeads
from .over_view import attend_over_view


def in_pieces(step: Step) -> bool:
    """True if rows can only be served one by one: documents of one given row, or prefixes."""
    return step.packed or step.prefix is not None


def use_rows(call: AttentionCall, step: Step) -> bool:
    """True if the rows of this flat run are faster one by one, and nothing is asked for that is laid out in rows."""
    run = step.run
    if run is not None and in_pieces(step):
        return True
    if run is None or step.batch == 1 or call.return_weights or call.attn_bias is not None or not call.x.is_cpu:
        return False
    if step.rule.num_sinks or (call.layer is not None and torch.is_grad_enabled()):
        return False
    if call.last_queries or call.sums_weights:
        return False
    if call.layer is not None and call.layer.contents.is_compressed:
        return False
    return run.given.shape[0] >= step.batch * tuning.active.min_row_tokens


def attend_by_row(
    call: AttentionCall, run: FlatRun, heads: SharedHeads
) -> tuple[Tensor, Tensor | None, CacheContents | None]:
    """Attended heads [1, H, N, D] of flat heads [1, H or G, N, D], weights [B, H, L, L] where asked for, and the
    contents of the cache after the call."""
    step, contents, view = call.step, None, None
    if step is None:
        raise RuntimeError("attend_by_row: expected a call with a step")
    position, window = call.heads.position, step.rule.window
    score_bias = position if isinstance(position, ScoreBias) else None
    query, key, value, unrotated = heads
    dtype, first, rows = query.dtype, max(step.past_lengths) == 0, len(run.lengths)
    pieces = _pieces(step, run, score_bias)
    if call.layer is not None:
        view, contents = call.layer.append(run.aligned_heads(key), run.aligned_heads(value), step, beside_prefix=True)
        if view.coding is not None and step.prefix is not None:
            # Pieces are cut from the new tokens as they lie, with the numbers that their records stand for.
            key, value = view.coding.decoded(*view.coding.encoded(key, value))
            view = None
    # New tokens that are stored as records are read as they are stored.
    as_given = view is None or (first and view.coding is None)
    if as_given and first and use_float32(query, run.width):
        query, key, value = query.float(), key.float(), value.float()
        unrotated = None if unrotated is None else unrotated.float()
    if view is None or as_given:
        # Rows that see their new tokens alone, as they lie. Split, not cut: gradients are then joined in one pass.
        pairs = zip(key.split_with_sizes(run.lengths, 2), value.split_with_sizes(run.lengths, 2), strict=True)
        views: Iterable[KeyValueView] = _views_of_pieces(pieces, pairs, _flat_ids(step, run, score_bias))
    else:
        views = _views_of_rows(view.decoded(), rows)
    widths = [piece.width for row in pieces for piece in row]
    queries = query.split_with_sizes(widths, 2)
    before = (None,) * len(queries) if unrotated is None else unrotated.split_with_sizes(widths, 2)
    kernel, outputs, weights = partial(call.heads.kernel, dropout=call.dropout), [], []
    unruled = score_bias is None and call.rules is None and call.sink_logits is None and not call.return_weights
    parts = zip(chain.from_iterable(pieces), views, queries, before, strict=True)
    for piece, piece_view, piece_query, piece_unrotated in parts:
        # Then the kernel's own order is the whole rule.
        plain = unruled and max(piece.past_lengths) == 0 and (window is None or piece.width <= window)
        if piece.width and plain:
            out, _ = kernel(piece_query, piece_view.key, piece_view.value, causal=piece.rule.causal)
        elif piece.width:
            alone = call._replace(step=piece, layer=None)
            out, own, _ = attend_over_view(alone, piece_view, piece_query, piece_unrotated)
            weights.append(own)
        else:
            continue
        outputs.append(out.transpose(1, 2))
    attended = torch.cat(outputs, 1).to(dtype).transpose(1, 2)
    return attended, _given_weights(run, pieces, weights) if call.return_weights else None, contents


def _pieces(step: Step, run: FlatRun, score_bias: ScoreBias | None) -> list[list[Step]]:
    """Steps of the pieces of each row alone. Those of a learned bias serve one call, the others whenever this step
    does."""
    if score_bias is None or not score_bias.learned:
        return step.once("pieces of rows", partial(_new_pieces, step, run))

    def for_one_call() -> list[list[Step]]:
        return [[piece.for_one_call() for piece in row] for row in _new_pieces(step, run)]

    return step.once_in_call("pieces of rows", for_one_call)


def _new_pieces(step: Step, run: FlatRun) -> list[list[Step]]:
    rows, rule = len(run.lengths), step.rule
    prefixes = EMPTY if step.prefix is None else step.prefix
    lengths = zip(step.past_lengths.expand(rows), prefixes.expand(rows), run.lengths, strict=True)

    def piece(past: int, new: int, both_directions: bool = False) -> Step:
        own = rule._replace(causal=False) if both_directions else rule
        return Step(own, 1, new, Lengths((past,)), Lengths((new,)), step.device)

    return [
        [piece(past, new)]
        if not prefix
        else [piece(0, prefix, True), *([piece(prefix, new - prefix)] * (new > prefix))]
        for past, prefix, new in lengths
    ]


def _flat_ids(step: Step, run: FlatRun, score_bias: ScoreBias | None) -> Tensor | None:
    """Positions of the caller's, int64 [1, N], where distances are between them."""
    return None if step.position_ids is None or score_bias is None else run.take(step.position_ids)


def _views_of_pieces(
    pieces: list[list[Step]], pairs: Iterable[tuple[Tensor, Tensor]], ids: Tensor | None
) -> Iterator[KeyValueView]:
    """The keys and values that each piece may look at: those of its row up to its own end."""
    begin = 0
    for row, (key, value) in zip(pieces, pairs, strict=True):
        for piece in row:
            (past,), (end,) = piece.past_lengths, piece.total_lengths
            own = (key, value) if end == key.shape[2] else (key.narrow(2, 0, end), value.narrow(2, 0, end))
            view = uncached_view(*own, piece)
            if ids is not None:
                placed = ids[:, begin : begin + end]
                view = view._replace(placed=PlacedTokens(placed[:, past:], placed))
            yield view
        begin += key.shape[2]


def _given_weights(run: FlatRun, pieces: list[list[Step]], weights: list[Tensor | None]) -> Tensor:
    """Weights [1, H, width, S] of pieces at their places in [B, H, L, L]."""
    given, own = None, iter(weights)
    begin = 0
    for row, length in zip(pieces, run.lengths, strict=True):
        places = run.given.narrow(0, begin, length)
        column, begin = places % run.columns, begin + length
        for piece in row:
            part = next(own) if piece.width else None
            if part is None:
                continue
            (past,), (end,) = piece.past_lengths, piece.total_lengths
            if given is None:
                given = part.new_zeros(run.given_rows * run.columns, part.shape[1], run.columns)
            index = places[past:end].unsqueeze(1), column[:end]
            given[index[0], :, index[1]] = part[0].permute(1, 2, 0)
    if given is None:
        raise RuntimeError("attend_by_row: expected a token")
    return given.view(run.given_rows, run.columns, *given.shape[1:]).transpose(1, 2)


def _views_of_rows(view: KeyValueView, batch: int) -> Iterator[KeyValueView]:
    """The keys and values of each row alone, without the columns that it does not use.

    A prefix that it shares is copied to its own tokens, of one row at a time.
    """
    bounds, prefix = (
        zip(view.first.expand(batch), view.start.expand(batch), view.end.expand(batch), strict=True),
        view.prefix,
    )
    for row, (first, start, end) in enumerate(bounds):
        key, value = (x[row : row + 1].narrow(2, start - first, end - start) for x in (view.key, view.value))
        if prefix is not None:
            number, own = prefix.rows[row], (key, value)
            both = zip(prefix.tensors, own, strict=True)
            key, value = (torch.cat((shared[number : number + 1, :, :start], x), 2) for shared, x in both)
            start = 0
        yield KeyValueView(key, value, Lengths((start,)), Lengths((start,)), Lengths((end,)))
