"""Operators of PyTorch that are not documented: each is probed once, at import, and has a public way beside it.

They are looked for by their schema, not by a call: a call at import could start threads, which forked processes lose.
"""

from typing import Any

import torch
from torch import Tensor


def _operator_schema(name: str, key: str) -> Any:
    """The schema of the operator `namespace::name`; None where PyTorch has none for this dispatch key."""
    namespace, _, operator = name.partition("::")
    try:
        schema = getattr(getattr(torch.ops, namespace), operator).default._schema
        return schema if torch._C._dispatch_has_kernel_for_dispatch_key(name, key) else None
    except (AttributeError, RuntimeError):
        return None


def has_operator(name: str, schema: str) -> bool:
    """Whether PyTorch has the operator `namespace::name` on the CPU, with exactly these arguments and results."""
    return str(_operator_schema(name, "CPU")) == name + schema


def begins_with(name: str, key: str, arguments: str) -> bool:
    """Whether PyTorch has the operator `namespace::name` for a dispatch key, with these names as its first arguments.

    Newer versions add others with a default.
    """
    schema, wanted = _operator_schema(name, key), arguments.split()
    return schema is not None and [each.name for each in schema.arguments[: len(wanted)]] == wanted


ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and has_operator(  # type: ignore[no-untyped-call]
    "mkldnn::_linear_pointwise",
    "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y",
)
"""Whether this build has oneDNN's linear in float32, which PyTorch's compiler calls and its `F.linear` does not."""

SDPA_WITH_LSE = has_operator(
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, *, Tensor? attn_mask=None, "
    "float? scale=None) -> (Tensor output, Tensor logsumexp)",
)
"""Whether this build has the operator behind SDPA on the CPU, which alone gives the sums that merging needs."""


FLASH_ON_GPU = torch.backends.cuda.is_flash_attention_available() and begins_with(
    "aten::_flash_attention_forward",
    "CUDA",
    "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask scale window_size_left "
    "window_size_right seqused_k",
)
"""Whether this build has the operator behind `torch.nn.attention.varlen`, which gives it rows [N, H, D] alone. Builds
without the kernels, as those for Windows, have its name as well."""


def _says(name: str) -> bool:
    """The answer of one of PyTorch's questions about the processor; False where this build lacks the question."""
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):
        return False


FUSED_HALF_DTYPES = frozenset(
    dtype
    for dtype, name in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    )
    if _says(name)
)
"""The 16-bit dtypes that this processor multiplies itself, as SDPA on the CPU then does; in others it is slow."""


HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
"""Whether the processor multiplies whole tiles of bfloat16 numbers (AMX), as SDPA then does for many query rows."""


_AVX512_ALONE = torch.backends.cpu.get_cpu_capability() == "AVX512" and not (
    HAS_AMX or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)()
)

EMULATED_DTYPES = frozenset({torch.bfloat16} if _AVX512_ALONE else ())
"""The dtypes among these that a processor with AVX-512 multiplies as float32 numbers, in several passes."""


def _processor() -> str:
    """The name of the processor, as PyTorch says it; empty where it does not."""
    said: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(said.get("cpu_name", ""))


MKL_IS_QUICK = torch.backends.mkl.is_available() and "Intel" in _processor()  # type: ignore[no-untyped-call]
"""Whether `F.linear` runs on MKL on a processor of MKL's maker; on others MKL takes a slower way."""


def use_onednn() -> bool:
    """Whether oneDNN's linear is there and `torch.backends.mkldnn.flags` leaves it on."""
    return ONEDNN_LINEAR and bool(torch.backends.mkldnn.enabled)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [..., in] times `weight` [out, in], and a bias: float32 on the CPU, where no gradients are recorded."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def sdpa_with_lse(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """SDPA's output [B, H, L, D], and the logarithms [B, H, L] of the sums of its exponentials: on the CPU."""
    # It takes the numbers of a head to be contiguous, without a check: SDPA itself looks, and takes another way.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: tuple[Tensor, Tensor] = kernel(query, key, value, 0.0, causal, scale=scale)
    return out


# Whether `torch.nn.attention.sdpa_kernel` and its kin leave both of the CPU's backends of SDPA on. A compiler cannot
# look through the public functions, which ask the same. The answer stays in its graph, as SDPA's does.
flash_is_on = getattr(torch._C, "_get_flash_sdp_enabled", torch.backends.cuda.flash_sdp_enabled)
math_is_on = getattr(torch._C, "_get_math_sdp_enabled", torch.backends.cuda.math_sdp_enabled)
