"""Both ways through the kernel give the same result, and soft caps and sinks are what they say."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.internals import matmul_tiles
from transformer.attention import kernels, matmul, split_kv
from transformer.attention.biases import as_bias, is_fully_masked
from transformer.attention.kernels import Kernel
from transformer.attention.matmul import AttentionInputs, MatmulAttention, Sinks


def heads(groups: int, length: int, keys: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(2, 4, length, 8), (2, groups, keys, 8), (2, groups, keys, 8)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def both(kernel: Kernel, *inputs: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused way (where nothing forbids it) and the products that weights ask for."""
    return kernel(*inputs, **options)[0], kernel(*inputs, **options, return_weights=True)[0]


def largest_result(run: Callable[[], object]) -> int:
    """Bytes of the largest tensor that any operation of a call gives."""
    largest = 0

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            # A view shows what was there before.
            if isinstance(result, torch.Tensor) and not func.is_view:
                largest = max(largest, result.nbytes)
            return result

    with Watching():
        run()
    return largest


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("shape", [None, (1, 6), (5, 6), (4, 1, 6), (2, 1, 1, 6), (2, 4, 5, 6), (1, 4, 5, 1)])
def test_fused_equals_products(groups: int, length: int, shape: tuple[int, ...] | None) -> None:
    inputs = heads(groups, length, 6)
    bias = None
    if shape is not None:
        if length == 1 and len(shape) > 1:
            shape = (*shape[:-2], 1, shape[-1])
        bias = torch.randn(shape, dtype=torch.float64)
    fused, reference = both(Kernel(0.3), *inputs, bias)
    torch.testing.assert_close(fused, reference, rtol=0, atol=1e-12)
    if bias is not None:
        # What devices other than this one take for groups and a mask.
        torch.testing.assert_close(Kernel(0.3)._folded(*inputs, bias, 0.0), reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_causal_order_is_the_lower_triangle(groups: int) -> None:
    inputs = heads(groups, 6, 6)
    bias = as_bias(torch.ones(6, 6, dtype=torch.bool).tril()).double()
    for out in both(Kernel(0.3), *inputs, causal=True):
        torch.testing.assert_close(out, Kernel(0.3)(*inputs, bias)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [4, 1])
def test_the_quick_way_over_many_keys(groups: int) -> None:
    """The same over few keys at a time, where the other way is chosen, merged by hand."""
    keys = kernels.MIN_MATMUL_KEYS + 3
    query, key, value = heads(groups, 1, keys)
    out, weights = Kernel(0.3)(query, key, value, return_weights=True)
    quick = Kernel(0.3)(query, key, value)[0]
    torch.testing.assert_close(quick, out, rtol=0, atol=1e-12)
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("shape", [None, (1, 1), (4, 2, 1), (2, 1, 1, 1), (2, 4, 2, 1), (1, 4, 1, 300)])
@pytest.mark.parametrize("at_once", [1, 2500, 1 << 23])
def test_products_in_turns_are_products(
    at_once: int, shape: tuple[int, ...] | None, groups: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head at a time, several, or a few rows; 16-bit keys in blocks of which the last is shorter, float32 by
    oneDNN."""
    monkeypatch.setattr(matmul, "TILE_BYTES", at_once)
    monkeypatch.setattr(matmul, "UPCAST_KEYS", 128)
    monkeypatch.setattr(matmul, "MIN_ONEDNN_KEYS", 300)
    query, key, value = heads(groups, 2, 302, dtype)
    bias = None if shape is None else torch.randn(shape, dtype=torch.float64)
    sinks = Sinks(query.flip(-1), key[:, :, :2], value[:, :, :2], bias if bias is None else bias[..., :1])
    operands = AttentionInputs(query, key[:, :, 2:], value[:, :, 2:], bias, sinks)
    whole = MatmulAttention(0.3, softcap=5.0)(operands)[0]
    with torch.no_grad():
        turns = MatmulAttention(0.3, softcap=5.0).tiled(operands)
    assert turns.dtype == dtype
    # Widened sums may end on the other side of a rounding.
    tolerance = 1e-12 if dtype is torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(turns.double(), whole.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("batch", "groups", "at_once"), [(8, 1, 7), (1, 8, 7), (4, 2, 7), (1, 9, 4)])
def test_turns_are_of_one_size(batch: int, groups: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that was left alone had one core work for it while the other waited: a fourth of a step."""
    monkeypatch.setattr(matmul, "TILE_BYTES", 4 * 50 * at_once)
    query, key = torch.randn(batch, groups, 1, 4), torch.randn(batch, groups, 50, 4)
    sizes = []
    matmul_tiles(monkeypatch, sizes.append)
    with torch.no_grad():
        MatmulAttention(0.3).tiled(AttentionInputs(query, key, key))
    heads_each = [part.key.shape[0] * part.key.shape[1] for part in sizes]
    assert sum(heads_each) == batch * groups
    assert max(heads_each) <= at_once
    assert max(heads_each) - min(heads_each) <= 1


@pytest.mark.parametrize(("groups", "per_group"), [(1, 4), (1, 17), (2, 1), (3, 5)])
def test_very_many_keys(groups: int, per_group: int) -> None:
    """Values are summed by oneDNN, or in parts where one head has many rows."""
    query, (key, value) = (
        torch.randn(1, groups * per_group, 1, 8),
        torch.randn(2, 1, groups, matmul.MIN_ONEDNN_KEYS + 9, 8),
    )
    key[:, :, -1] = 4.0 * query[:, :groups, 0]
    with torch.no_grad():
        out = Kernel(0.3)(query, key[:, :, 2:], value[:, :, 2:])[0]
    exact = Kernel(0.3)(*(x.double() for x in (query, key[:, :, 2:], value[:, :, 2:])), return_weights=True)[0]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [4, 2])
def test_products_in_turns_take_little_memory(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the scores nor the widened keys of all heads exist at once."""
    monkeypatch.setattr(matmul, "TILE_BYTES", 4 * 512 * 8)
    monkeypatch.setattr(matmul, "UPCAST_KEYS", 512)
    operands = AttentionInputs(*heads(groups, 1, 4096, torch.bfloat16))
    with torch.no_grad():
        largest = largest_result(lambda: MatmulAttention(0.3).tiled(operands))
    assert largest <= max(4 * 512 * 8, 4 * (4 // groups) * 4096)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("rest", range(split_kv.PARTS))
def test_keys_in_parts(rest: int, batch: int, groups: int, dtype: torch.dtype) -> None:
    """Flash decoding, also with keys that no part has room for."""
    room = split_kv.MIN_SPLIT_KEYS + 9
    query = torch.randn(batch, 6, 1, 8).to(dtype)
    key, value = (torch.randn(batch, groups, room, 8).to(dtype) for _ in range(2))
    # A buffer with room, and the largest score of all among the last keys.
    key, value = (x[:, :, : split_kv.MIN_SPLIT_KEYS + rest] for x in (key, value))
    key[:, :, -1] = 4.0 * query[:, :1, 0]
    with torch.no_grad():
        out = Kernel(0.3)(query, key, value)[0]
    exact = Kernel(0.3)(query.double(), key.double(), value.double(), return_weights=True)[0]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize(("new", "held"), [(2, split_kv.MIN_PREFIX), (70, split_kv.MIN_PREFIX + 3), (3, 5)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_chunk_that_ends_its_keys(dropout: float, new: int, held: int, groups: int, dtype: torch.dtype) -> None:
    """Causal order over what was held and over the chunk itself, merged, equals the mask that says the same; and with
    dropout some of it is missing."""
    query = torch.randn(2, 6, new, 8).to(dtype)
    room = torch.randn(2, 2, groups, held + new + 4, 8).to(dtype)
    key, value = room[:, :, :, : held + new]
    # The largest scores among the chunk's own keys, and behind them for all but the last query.
    key[:, :, -1] = 4.0 * query[:, :1, 0]
    mask = torch.ones(new, held + new, dtype=torch.bool).tril(held)
    exact = Kernel(0.3)(query.double(), key.double(), value.double(), as_bias(mask).double(), return_weights=True)[0]
    with torch.no_grad():
        out = Kernel(0.3)(query, key, value, causal=True, dropout=dropout)[0]
        if dropout:
            assert not torch.allclose(out.double(), exact, atol=0.05)
            return
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)


def test_one_token_over_many_keys_is_dropped_out_too() -> None:
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 1, split_kv.MIN_SPLIT_KEYS, 8)
    with torch.no_grad():
        kept, dropped = (Kernel(0.3)(query, key, key, dropout=share)[0] for share in (0.0, 0.5))
    assert not torch.allclose(kept, dropped, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_products_work_in_float32(dtype: torch.dtype) -> None:
    inputs = heads(2, 3, 40, dtype)
    exact = Kernel(0.3)(*(x.double() for x in inputs))[0]
    for out in both(Kernel(0.3), *inputs):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_softcap_bounds_the_scores() -> None:
    query, key, value = heads(4, 1, 6)
    _, weights = Kernel(100.0, softcap=2.0)(query, key, value, return_weights=True)
    assert weights is not None
    scores = 2.0 * torch.tanh(100.0 * (query @ key.transpose(-1, -2)) / 2.0)
    torch.testing.assert_close(weights, scores.softmax(-1))


def test_sinks_share_one_softmax() -> None:
    query, key, value = heads(2, 3, 6)
    sinks = Sinks(query, key[:, :, :2], value[:, :, :2], None)
    apart, weights = Kernel(0.3)(query, key[:, :, 2:], value[:, :, 2:], sinks=sinks, return_weights=True)
    together, expected = Kernel(0.3)(query, key, value, return_weights=True)
    torch.testing.assert_close(apart, together)
    torch.testing.assert_close(weights, expected)


def test_sees_nothing() -> None:
    hidden = float("-inf")
    bias = torch.tensor([[hidden, 0.0], [hidden, hidden]])
    assert is_fully_masked(bias).tolist() == [[False], [True]]
    assert is_fully_masked(bias, torch.tensor([[hidden], [0.0]])).tolist() == [[False], [False]]
