"""Detection of traced calls, in which the host cannot read the values of tensors.

A traced call uses tensors only: no `.item()`, no Python number per length, no private operator, no kept result.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad

T = TypeVar("T")


def is_compiling() -> bool:
    """True if `torch.compile` or `torch.export` traces the current call of this thread.

    PyTorch's own flag belongs to the process: it is also set while another thread compiles.
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
        or _is_jit_tracing()
    )


def is_plain_eager(x: Tensor) -> bool:
    """True for a plain tensor in a call that is not traced, and that no `TorchDispatchMode` observes.

    False inside `forward_ad.dual_level()`, also without gradients: tensors may carry tangents.
    """
    return not (
        type(x) is not Tensor
        or x.is_meta
        or torch.compiler.is_dynamo_compiling()
        or _transformed() is not None
        or _modes()
        or forward_ad._current_level >= 0
        or _is_jit_tracing()
    )


def is_fake(x: Tensor) -> bool:
    """True for fake tensors and inside a fake tensor mode, as in `torch.export`, where real tensors are an error."""
    return _mode(_FAKE) is not None or (type(x) is not Tensor and isinstance(x, fake_tensor.FakeTensor))


def is_transformed(*tensors: Tensor) -> bool:
    """True inside a transform of `torch.func`, which supports public operators only."""
    if is_compiling():
        return any(map(_is_batched, tensors))
    return _transformed() is not None


def is_one(size: int) -> bool:
    """True if a size in a traced call is known to be 1. A size that may change is not asked for, and stays open."""
    return is_known(size == 1)


def is_known(condition: Any) -> bool:
    """True if a condition of sizes in a traced call is known to hold. One that depends on a size that may change is
    not asked for, and stays open."""
    if not torch.compiler.is_dynamo_compiling():
        if type(condition) is bool:
            return condition
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return False
    # Imported here: it brings sympy along, which only compilers need.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def break_graph() -> None:
    """Ends the graph that is being compiled here; the compiler names the reason where it may not end one."""
    torch._dynamo.graph_break(msg="a cache counts on the host; for one graph turn it off, or freeze_layout() first")


def run_eagerly(function: Callable[..., T], *args: Any) -> T:
    """The result of `function`, run outside of what is being compiled.

    A cache counts in Python integers, for each of which the compiler would compile again.
    """
    break_graph()
    return torch.compiler.disable(function)(*args)  # type: ignore[no-any-return,no-untyped-call]


# Private functions of PyTorch, probed once. Without them `torch.func` and fake modes are recognised by tensors only.
_is_jit_tracing = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
_transformed = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
_is_batched = getattr(torch._C._functorch, "is_batchedtensor", lambda _: False)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: True)
_mode = getattr(torch._C, "_get_dispatch_mode", lambda _: None)
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_PROXY = torch._C._TorchDispatchModeKey.PROXY

real_tensors = getattr(fake_tensor, "unset_fake_temporarily", nullcontext)
"""Context manager in which new tensors are real, also inside a fake tensor mode."""
