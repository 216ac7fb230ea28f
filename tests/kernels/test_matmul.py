"""Matrix products: in tiles or at once, with soft caps, sinks and weights."""

import pytest
import torch

from tests.internals import matmul_tiles
from tests.kernels.heads import both, heads, largest_result
from transformer.kernels import Kernel, Sinks, tuned
from transformer.kernels.inputs import AttentionInputs
from transformer.kernels.matmul import MatmulAttention
from transformer.kernels.tuning import DEFAULT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("shape", [None, (1, 1), (4, 2, 1), (2, 1, 1, 1), (2, 4, 2, 1), (1, 4, 1, 300)])
@pytest.mark.parametrize("at_once", [1, 2500, 1 << 23])
def test_tiles_are_one_product(at_once: int, shape: tuple[int, ...] | None, groups: int, dtype: torch.dtype) -> None:
    """One head at a time, several, or a few rows; 16-bit keys in blocks of which the last is shorter, float32 by
    oneDNN."""
    query, key, value = heads(groups, 2, 302, dtype)
    bias = None if shape is None else torch.randn(shape, dtype=torch.float64)
    sinks = Sinks(query.flip(-1), key[:, :, :2], value[:, :, :2], bias if bias is None else bias[..., :1])
    operands = AttentionInputs(query, key[:, :, 2:], value[:, :, 2:], bias, sinks)
    whole = MatmulAttention(0.3, softcap=5.0)(operands)[0]
    with torch.no_grad(), tuned(tile_bytes=at_once, upcast_keys=128, min_onednn_keys=300):
        turns = MatmulAttention(0.3, softcap=5.0).tiled(operands)
    assert turns.dtype == dtype
    # Widened sums may end on the other side of a rounding.
    tolerance = 1e-12 if dtype is torch.float64 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(turns.double(), whole.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("batch", "groups", "at_once"), [(8, 1, 7), (1, 8, 7), (4, 2, 7), (1, 9, 4)])
def test_tiles_have_equal_size(batch: int, groups: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that was left alone had one core work for it while the other waited: a fourth of a step."""
    query, key = torch.randn(batch, groups, 1, 4), torch.randn(batch, groups, 50, 4)
    sizes = []
    matmul_tiles(monkeypatch, sizes.append)
    with torch.no_grad(), tuned(tile_bytes=4 * 50 * at_once):
        MatmulAttention(0.3).tiled(AttentionInputs(query, key, key))
    heads_each = [part.key.shape[0] * part.key.shape[1] for part in sizes]
    assert sum(heads_each) == batch * groups
    assert max(heads_each) <= at_once
    assert max(heads_each) - min(heads_each) <= 1


@pytest.mark.parametrize("groups", [4, 2])
def test_tiles_take_little_memory(groups: int) -> None:
    """Neither the scores nor the widened keys of all heads exist at once."""
    operands = AttentionInputs(*heads(groups, 1, 4096, torch.bfloat16))
    with torch.no_grad(), tuned(tile_bytes=4 * 512 * 8, upcast_keys=512):
        largest = largest_result(lambda: MatmulAttention(0.3).tiled(operands))
    assert largest <= max(4 * 512 * 8, 4 * (4 // groups) * 4096)


@pytest.mark.parametrize("groups", [4, 1])
def test_the_quick_way_over_many_keys(groups: int) -> None:
    """The same over few keys at a time, where the other way is chosen, merged by hand."""
    keys = DEFAULT.min_matmul_keys + 3
    query, key, value = heads(groups, 1, keys)
    out, weights = Kernel(0.3)(query, key, value, return_weights=True)
    quick = Kernel(0.3)(query, key, value)[0]
    torch.testing.assert_close(quick, out, rtol=0, atol=1e-12)
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 1, dtype=torch.float64))


@pytest.mark.parametrize(("groups", "per_group"), [(1, 4), (1, 17), (2, 1), (3, 5)])
def test_very_many_keys(groups: int, per_group: int) -> None:
    """Values are summed by oneDNN, or in parts where one head has many rows."""
    query, (key, value) = (
        torch.randn(1, groups * per_group, 1, 8),
        torch.randn(2, 1, groups, DEFAULT.min_onednn_keys + 9, 8),
    )
    key[:, :, -1] = 4.0 * query[:, :groups, 0]
    with torch.no_grad():
        out = Kernel(0.3)(query, key[:, :, 2:], value[:, :, 2:])[0]
    exact = Kernel(0.3)(*(x.double() for x in (query, key[:, :, 2:], value[:, :, 2:])), return_weights=True)[0]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


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
