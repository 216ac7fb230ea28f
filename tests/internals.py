"""Private names of the library, for the few tests that no public figure can serve: no other test uses them.

A change inside the caches, the kernels or the tables of positions is followed here. `tests/test_internals.py` finds
a private name in any other file of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from transformer import LayerCache
from transformer.cache import files
from transformer.cli import chat
from transformer.cli.interrupts import Interrupts
from transformer.cli.lines import LineReader
from transformer.kernels import cpu_linear, sdpa, tuning
from transformer.kernels.compiled import switch
from transformer.kernels.inputs import AttentionInputs
from transformer.kernels.matmul import MatmulAttention
from transformer.positions.angles import Angles
from transformer.positions.constant import Constant

# --- caches -----------------------------------------------------------------------------------------------------------


def buffers(cache: LayerCache) -> list[Tensor]:
    """Every tensor that a cache keeps: keys, values, those of the sinks, and the projected source."""
    state, source = cache.contents.state, cache.contents.source
    kept = [] if state is None else [*state.buffers.tensors]
    return kept if source is None else [*kept, source.key, source.value]


def static_tensors(cache: LayerCache) -> list[Tensor]:
    """Those tensors of a frozen cache that compiled steps read and write where they lie."""
    state, source = cache.contents.state, cache.contents.source
    return [state.buffers.key, state.length_at] if state else [source.key, source.kv.tensor]


def poison_dead_slots(module: nn.Module, poison: float = float("nan")) -> int:
    """Fills every slot without a token, of a cache whose rows are alike; gives how many slots of a row that were."""
    state = module.kv_cache.contents.state
    (start,), (length,), (offset,) = state.start, state.length, state.offset
    kept, filled = state.buffers, 0
    with torch.no_grad():
        for tensor in (kept.key, kept.value):
            tensor[:, :, : start - offset] = poison
            tensor[:, :, length - offset :] = poison
            filled = tensor.shape[2] - (length - start)
        for sinks in kept.tensors[2:]:
            sinks[:, :, length:] = poison
    return filled


def stand_further(module: nn.Module, position: int) -> None:
    """Moves what a cache of equal rows holds as if `position` more tokens had gone before it; rotated keys too."""
    state = module.kv_cache.contents.state
    further = {name: getattr(state, name) + position for name in ("offset", "start", "length")}
    module.kv_cache.contents = module.kv_cache.contents._replace(state=state._replace(**further))
    keys = state.buffers.key
    keys.copy_(module.position.rotate(keys, module.position.table(range(position, position + 1), keys)))


def truncated_aside(cache: LayerCache, length: int) -> LayerCache:
    """A cache of what `truncate(length)` would leave. No fork: `cache` still appends in place."""
    aside = LayerCache.of(cache.spec)
    aside.put(cache.contents.truncated(length))
    return aside


def digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """The digest that a saved cache of this content must have."""
    return files._digest(metadata, tensors)


# --- kernels ----------------------------------------------------------------------------------------------------------


def without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on as where numba is missing."""
    monkeypatch.setattr(switch, "are_available", lambda: False)


def as_where_mkl_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on projections of a few hundred dimensions have faster ways than `F.linear`."""
    monkeypatch.setattr(tuning, "active", replace(tuning.DEFAULT, min_linear_weights=1 << 17))


def sliced_products(monkeypatch: pytest.MonkeyPatch, ran: Callable[[], object]) -> None:
    """From now on `ran()` is called where a linear of few rows uses slices of its weight."""
    sliced = cpu_linear._sliced
    monkeypatch.setattr(cpu_linear, "_sliced", lambda *given: (ran(), sliced(*given))[1])


def matmul_tiles(monkeypatch: pytest.MonkeyPatch, ran: Callable[[AttentionInputs], object]) -> None:
    """From now on `ran(tile)` is called for each tile that attention by matmuls works on."""
    attend = MatmulAttention._attend
    monkeypatch.setattr(
        MatmulAttention, "_attend", lambda kernel, tile, *rest: (ran(tile), attend(kernel, tile, *rest))[1]
    )


def sdpa_of_other_devices(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """SDPA in the shapes that devices other than the CPU get: groups are rows of the batch."""
    return sdpa.sdpa(*sdpa._folded(query, key, value, bias), scale, fold=False)


# --- positions --------------------------------------------------------------------------------------------------------


def constants(module: nn.Module) -> list[list[Tensor]]:
    """The copies, one for each device, of every constant that position schemes below a module keep."""
    values = [value for child in module.modules() for value in vars(child).values()]
    angles = [value for value in values if isinstance(value, Angles)]
    found = [value for value in values if isinstance(value, Constant)]
    for each in angles:
        found += [each._radians, each._turns]
    return [copies(constant) for constant in found]


def copies(constant: Constant) -> list[Tensor]:
    """The copies of a constant, one for each device that has asked for it."""
    return constant._copies


def keeps_no_table(module: nn.Module) -> bool:
    """Whether no position scheme below a module keeps a block of its table."""
    tables = [vars(child)["_table"] for child in module.modules() if "_table" in vars(child)]
    return all(not table._blocks for table in tables)


# --- commands ---------------------------------------------------------------------------------------------------------


def run_chat(session: chat.ChatSession, read_line: LineReader, interrupts: Interrupts) -> None:
    """Runs the entries of a chat, without loading a model for it."""
    chat._run_chat(session, read_line, interrupts)
