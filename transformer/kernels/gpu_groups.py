"""Groups on a GPU: whether the kernel that PyTorch takes for a call shares keys within a group, as PyTorch answers.

Flash attention and cuDNN do, in 16 bits; every other kernel would have keys repeated, or form all scores.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from .biases import HALF_DTYPES

SHARING = SDPBackend.FLASH_ATTENTION.value, SDPBackend.CUDNN_ATTENTION.value

MAX_BIASED_HEAD_DIM = 128
"""head_dim up to which every version of cuDNN takes a bias."""


def shares_keys(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, traced: bool) -> bool:
    """Whether SDPA shares keys of `query` [B, H, L, D] over `key`, `value` [B, G, S, D], given as groups.

    Beside a bias cuDNN alone does so, and it compiles for each new length (43 ms): there this is for compiled steps,
    whose sizes stay. One query over 2,048 keys, NVIDIA H200, 2026-11-28: 9.7 instead of 45.8 microseconds.
    """
    if query.dtype not in HALF_DTYPES or (traced and bias is not None):
        return False
    if torch.compiler.is_dynamo_compiling():
        if bias is not None and (query.shape[3] > MAX_BIASED_HEAD_DIM or query.shape[3] % 8):
            return False
        return bool(_shares_in_graph(query.device.index, query.dtype, bias is not None))
    if bias is not None or traced:
        return False
    return int(torch._fused_sdp_choice(query, key, value, enable_gqa=True)) in SHARING


def _shares_in_graph(device: int, dtype: torch.dtype, biased: bool) -> bool:
    query = torch.empty(1, 2, 1, 64, dtype=dtype, device=torch.device("cuda", device))
    key, bias = query.new_empty(1, 1, 64, 64), query.new_zeros(1, 1, 1, 64) if biased else None
    return int(torch._fused_sdp_choice(query, key, key, bias, enable_gqa=True)) in SHARING


# A compiler calls this as it is, and the answer stays in its graph, as SDPA's own does. The mark is that of
# `torch.compiler.assume_constant_result`, which imports the compiler.
_shares_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]
