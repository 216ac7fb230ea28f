"""Sequences that ranks share: each rank has a part of a long sequence and of its keys."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..attention import Attention
from ..cache import SequenceLayout, SharedSequence, readers, sharing
from ..errors import ArgumentError, RanksError, ShapeError
from .checks import check_mesh
from .ranks import Ranks

MOST_NUMBERS = 16
"""Numbers that a rank says of its call."""


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

    Refused in it, with a sentence and before anything changes: `labels` and `logits_to_keep` in a call of a part, whose
    next and last tokens other ranks have; returned weights and `attn_bias`; padding on the left,
    and any padding with caches; generation without caches; gradients through caches; `cache_dtype`, `cache_budget` and
    a `max_cache_length` without a window; compiled and exported calls; files and copies of a part; ranks whose calls
    differ (RanksError). Raises ArgumentError for another `model` or `mesh`.
    """
    modules = _shared_modules(model)
    check_mesh(mesh)
    with sharing(_SequenceOfRanks(Ranks(mesh), modules)):
        yield


def parts_of(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part [B, L / n, ...] of a `tensor` [B, L, ...], the same on all n ranks: ids, targets or masks.

    It is chunk r and chunk 2n - 1 - r of 2n equal ones. Raises ShapeError unless L is a multiple of 2n: pad the rows on
    the right to the next one, with an `attention_mask`, and targets that the loss ignores.
    """
    check_mesh(mesh)
    _check_tensor(tensor)
    if tensor.ndim < 2:
        raise ShapeError(f"tensor: expected a tensor [B, L, ...], got {list(tensor.shape)}")
    ranks = mesh.size()
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
    ranks' gradients of parameters is right here too. Raises ShapeError for anything but a part, and RanksError for
    parts of different shapes or dtypes.
    """
    check_mesh(mesh)
    _check_tensor(tensor)
    if tensor.ndim < 2 or tensor.shape[1] % 2:
        raise ShapeError(f"tensor: expected a part [B, L, ...] of two equal chunks, got {list(tensor.shape)}")
    ranks = Ranks(mesh)
    ranks.check_equal({"shape and dtype of tensor": f"{list(tensor.shape)} {tensor.dtype}"})
    layout = SequenceLayout(tensor.shape[1] * ranks.number, ranks.number)
    return layout.gathered(_SequenceOfRanks(ranks, frozenset()), tensor)


class _SequenceOfRanks(SharedSequence):
    """The sequences of some modules, which the ranks of a mesh share."""

    def __init__(self, ranks: Ranks, modules: frozenset[Attention]) -> None:
        self.rank, self.ranks = ranks.rank, ranks.number
        self._exchange, self._covered = ranks, modules
        said = sorted(f"{type(each).__name__} {each.extra_repr()} {type(each.position).__name__}" for each in modules)
        self._layers = zlib.crc32("\n".join(said).encode())

    def covers(self, module: object) -> bool:
        return module in self._covered

    def gathered(self, tensor: Tensor) -> Tensor:
        return self._exchange.gathered(tensor)

    def check_alike(self, numbers: Mapping[str, int], equal: Tensor | None) -> None:
        # Numbers in one tensor: `Ranks.check_equal` exchanges objects, which takes longer.
        named = {"kind of call (digest)": zlib.crc32(" ".join(numbers).encode()), **numbers}
        named["options of layers (digest)"] = self._layers
        named["content"] = 0 if equal is None else _fingerprint(equal)
        # As many from every rank, whatever its call is: the backend would end processes that exchange unequal sizes.
        padded = [*named.values(), *[0] * (MOST_NUMBERS - len(named))]
        every = self._exchange.gathered(torch.tensor(padded, dtype=torch.int64, device=self._exchange.mesh.device_type))
        for place, name in enumerate(named):
            found = every[:, place].tolist()
            if len({*found}) == 1:
                continue
            if name == "content":
                raise RanksError(
                    "share_sequence: expected every rank to give the same tokens to a call with caches, got others on "
                    "some ranks; seed all ranks alike, and give each the whole prompt"
                )
            raise RanksError(f"share_sequence: expected the same call on every rank, got {name}: {found} by rank")


def _check_tensor(tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"tensor: expected a tensor [B, L, ...], got {type(tensor).__name__}")


def _shared_modules(model: object) -> frozenset[Attention]:
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


def _fingerprint(tensor: Tensor) -> int:
    """A number that differs where the content [B, L, E] does, except for rare coincidences."""
    batch, length, width = tensor.shape
    each = torch.linspace(0.5, 1.5, width, device=tensor.device, dtype=tensor.dtype)
    places = torch.linspace(0.5, 1.5, batch * length, device=tensor.device, dtype=torch.float64)
    return int((places @ (tensor.detach() @ each).flatten().double()).view(torch.int64))
