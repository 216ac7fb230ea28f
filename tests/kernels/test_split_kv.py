"""Keys in parts, and a chunk after its prefix: merged, they are one attention."""

from collections.abc import Iterator

import pytest
import torch

from transformer.kernels import Kernel
from transformer.kernels.biases import as_bias
from transformer.kernels.tuning import DEFAULT


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("rest", range(DEFAULT.split_kv_parts))
@pytest.mark.usefixtures("two_threads")
def test_keys_in_parts(rest: int, batch: int, groups: int, dtype: torch.dtype) -> None:
    """Flash decoding, also with keys that do not fit into equal parts."""
    room = DEFAULT.min_split_keys + 9
    query = torch.randn(batch, 6, 1, 8).to(dtype)
    key, value = (torch.randn(batch, groups, room, 8).to(dtype) for _ in range(2))
    # A buffer with room, and the largest score of all among the last keys.
    key, value = (x[:, :, : DEFAULT.min_split_keys + rest] for x in (key, value))
    key[:, :, -1] = 4.0 * query[:, :1, 0]
    with torch.no_grad():
        out = Kernel(0.3)(query, key, value)[0]
    exact = Kernel(0.3)(query.double(), key.double(), value.double(), return_weights=True)[0]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize(("new", "held"), [(2, DEFAULT.min_prefix), (70, DEFAULT.min_prefix + 3), (3, 5)])
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
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 1, DEFAULT.min_split_keys, 8)
    with torch.no_grad():
        kept, dropped = (Kernel(0.3)(query, key, key, dropout=share)[0] for share in (0.0, 0.5))
    assert not torch.allclose(kept, dropped, atol=1e-3)
