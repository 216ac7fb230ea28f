"""Whether a call is traced: its tensors stand for values that the host cannot read.

A traced call works with tensors alone: no `.item()`, no Python number per length, no private operator, nothing kept.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch._subclasses import fake_tensor


def is_compiling() -> bool:
    """True where this thread is inside what `torch.compile` or `torch.export` works on.

    PyTorch's own flag is one for the whole process: it also tells that some other thread compiles.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and (_mode(_FAKE) is not None or _mode(_PROXY) is not None)


def is_traced(x: Tensor) -> bool:
    """True under `torch.compile`, `torch.export`, `torch.jit.trace`, `torch.func` and `make_fx`, and for fake and meta
    tensors."""
    return (
        torch.compiler.is_dynamo_compiling()
        or x.is_meta
        or _transformed() is not None
        or (_modes() and (_mode(_FAKE) is not None or _mode(_PROXY) is not None))
        or (type(x) is not Tensor and isinstance(x, fake_tensor.FakeTensor))
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )


def is_fake(x: Tensor) -> bool:
    """True for fake tensors and within a mode of them, as in `torch.export`: real tensors are then out of place."""
    return _mode(_FAKE) is not None or (type(x) is not Tensor and isinstance(x, fake_tensor.FakeTensor))


def is_transformed(*tensors: Tensor) -> bool:
    """True within a transform of `torch.func`, whose rules know public operators alone."""
    if is_compiling():
        return any(map(_is_batched, tensors))
    return _transformed() is not None


# Private, and asked for at each call: without them `torch.func` and fake modes are told by the tensors alone.
_transformed = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
_is_batched = getattr(torch._C._functorch, "is_batchedtensor", lambda _: False)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: True)
_mode = getattr(torch._C, "_get_dispatch_mode", lambda _: None)
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_PROXY = torch._C._TorchDispatchModeKey.PROXY

real_tensors = getattr(fake_tensor, "unset_fake_temporarily", nullcontext)
"""A context in which new tensors have numbers, also within a mode of fake ones."""
