"""Sequences that ranks share: each rank has a part of a long sequence and of its keys."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..attention import Attention
from ..cache import SequenceLayout, SharedSequence, readers, sharing
from ..errors import ArgumentError, ConcurrentUseError, ShapeError


@contextmanager
def share_sequence(model: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
    """Context in which the ranks of `mesh` share the sequences that `model` reads; every rank enters it.

    *Without caches*, as in training, each rank gives its part, `model(parts_of(ids, mesh))`, and gets the part of the
    logits. Positions are the true ones. Keys and values of all ranks are gathered once in each layer; of a window that
    is shorter than a chunk, only the ends of chunks. Parts are equally long, so the mean of a loss over all tokens is
    the mean of the ranks' means, and its gradients are the mean of the ranks' gradients: what DDP and FSDP2 over this
    mesh compute, as for parts of a batch. Inputs and targets are cut alike: shift targets first, then `parts_of` both.

    *With caches*, in calls and in `generate`, every rank gives all tokens, and gets all logits, with equal bits. Of a
    long call, such as a prompt, a rank computes its part. Each rank caches a part of the keys and values: chunks of a
    long call, and blocks of 64 of the tokens that come later. `kv_cache` shows this rank's; its `length` is that of the
    sequence. All of a window, which is short, is on every rank. New tokens are attended over the parts, whose results
    are merged by their log-sum-exp. A conversation goes on over the same ranks only.

    Cross-attention reads a whole source on each rank: share the decoder of an encoder-decoder alone, as
    `share_sequence(model.decoder, mesh)`. Dropout draws each rank's own numbers.

    Args:
        model: a module with attention of this library in it: a whole model, a stack, or one attention module. Modules
            outside of it are not affected.
        mesh: a one-dimensional mesh, such as `mesh["sequence"]`. Other ranks, such as those of tensor parallelism or of
            copies of the data, are in other dimensions.

    Refused in it, with a sentence and before anything changes: returned weights and `attn_bias`; padding on the left,
    and any padding with caches; generation without caches; gradients through caches; `cache_dtype`, `cache_budget` and
    a `max_cache_length` without a window; compiled and exported calls; files and copies of a part; ranks whose calls
    differ. Raises ArgumentError for another `model` or `mesh`.
    """
    modules = _shared_modules(model)
    with sharing(_Ranks(mesh, modules)):
        yield


def parts_of(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part [B, L / n, ...] of a `tensor` [B, L, ...], the same on all n ranks: ids, targets or masks.

    It is chunk r and chunk 2n - 1 - r of 2n equal ones. Raises ShapeError unless L is a multiple of 2n: pad the rows on
    the right to the next one, with an `attention_mask`, and targets that the loss ignores.
    """
    ranks = _checked(mesh)
    if tensor.ndim < 2:
        raise ShapeError(f"tensor: expected a tensor [B, L, ...], got {list(tensor.shape)}")
    chunks = 2 * ranks
    if tensor.shape[1] % chunks:
        raise ShapeError(
            f"tensor: expected a length that is a multiple of {chunks}, two chunks for each of {ranks} ranks, got "
            f"{tensor.shape[1]}; pad it on the right to {-(-tensor.shape[1] // chunks) * chunks}, and give an "
            "attention_mask"
        )
    return SequenceLayout(tensor.shape[1], ranks).taken(tensor, mesh.get_local_rank())


def gather_parts(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The whole [B, L, ...] on every rank, from each rank's part [B, L / n, ...]: the inverse of `parts_of`.

    Gradients flow back: those of all ranks are summed, and each gets the part of its own, so that the mean of the
    ranks' gradients of parameters is right here too. Raises ShapeError for anything but parts of one shape.
    """
    ranks = _checked(mesh)
    if tensor.ndim < 2 or tensor.shape[1] % 2:
        raise ShapeError(f"tensor: expected a part [B, L, ...] of two equal chunks, got {list(tensor.shape)}")
    sequence = _Ranks(mesh, frozenset())
    sequence.check_alike({f"size of dimension {place}": size for place, size in enumerate(tensor.shape)}, None)
    return SequenceLayout(tensor.shape[1] * ranks, ranks).gathered(sequence, tensor)


class _Ranks(SharedSequence):
    """The ranks of a mesh, which share the sequences of some modules."""

    def __init__(self, mesh: DeviceMesh, modules: frozenset[nn.Module]) -> None:
        self.ranks = _checked(mesh)
        self.rank = mesh.get_local_rank()
        self._group = mesh.get_group()
        self._covered = modules

    def covers(self, module: object) -> bool:
        return module in self._covered

    def gathered(self, tensor: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(tensor, self._group)  # type: ignore[no-untyped-call]
        return gathered

    def check_alike(self, numbers: Mapping[str, int], equal: Tensor | None) -> None:
        named = dict(numbers)
        if equal is not None:
            named["content"] = _digest(equal)
        own = torch.tensor([*named.values()], dtype=torch.int64, device=_device_of(self._group))
        every = _of_all(own, self._group)
        for place, name in enumerate(named):
            found = every[:, place].tolist()
            if len({*found}) == 1:
                continue
            if name == "content":
                raise ArgumentError(
                    "share_sequence: expected every rank to give the same tokens to a call with caches, got others on "
                    f"some ranks (digests {found}); seed all ranks alike, and give each the whole prompt"
                )
            raise ShapeError(f"share_sequence: expected the same call on every rank, got {name}: {found} by rank")


# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _of_all(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: the tensor of each rank. Raises ConcurrentUseError where one does not come within the timeout."""
    gathered = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    try:
        _all_gather(gathered, tensor.contiguous().unsqueeze(0), group=group)
    except RuntimeError as error:
        raise ConcurrentUseError(
            "share_sequence: expected all ranks of the mesh to make the same call, but some rank did not come to it, "
            f"or ended; its own error says why. PyTorch says: {error!s:.300}"
        ) from error
    return gathered


class _Gather(torch.autograd.Function):
    """Tensors of all ranks, next to each other; backward sums the gradients that the ranks have for each of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _of_all(tensor, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(1, *gradient.shape[1:])
        _reduce_scatter(own, gradient.contiguous(), group=ctx.group)
        return own[0], None


def _checked(mesh: object) -> int:
    """How many ranks a mesh has. Raises ArgumentError unless it has one dimension, and this rank is in it."""
    if not isinstance(mesh, DeviceMesh):
        raise ArgumentError(f"mesh: expected a DeviceMesh, as init_device_mesh gives it, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ArgumentError(
            f"mesh: expected one dimension, got {mesh.ndim} ({mesh.mesh_dim_names}); give one of them, as "
            'mesh["sequence"]'
        )
    if mesh.get_coordinate() is None:
        raise ArgumentError("mesh: expected one that this rank is in, got one of other ranks")
    return mesh.size()


def _shared_modules(model: object) -> frozenset[nn.Module]:
    """The self-attention modules of a model. Raises ArgumentError where their sequence cannot be shared."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    reading = {id(reader) for reader in readers(model)}
    found = [module for module in model.modules() if isinstance(module, Attention) and id(module) not in reading]
    if not found:
        raise ArgumentError(
            f"model: expected one with self-attention of this library in it, got {type(model).__name__}"
        )
    if reading and len({module.apply_causal_mask for module in found}) > 1:
        raise ArgumentError(
            "model: expected a decoder or an encoder, got a model of both, whose sequences are two; share that of the "
            "decoder, as share_sequence(model.decoder, mesh)"
        )
    return frozenset(found)


def _digest(tensor: Tensor) -> int:
    """A number that differs where the content [B, L, E] does, except for rare coincidences."""
    batch, length, width = tensor.shape
    each = torch.linspace(0.5, 1.5, width, device=tensor.device, dtype=tensor.dtype)
    places = torch.linspace(0.5, 1.5, batch * length, device=tensor.device, dtype=torch.float64)
    return int((places @ (tensor.detach() @ each).flatten().double()).view(torch.int64))


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """The device on which a process group exchanges tensors."""
    return torch.device("cpu" if dist.get_backend(group) == "gloo" else "cuda")
