"""Token embedding, input positions and language head of a model, and checks of token ids."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attention import real_tokens
from ..cache import FlatRun, active_call
from ..cache.snapshot import FLOATS
from ..errors import ArgumentError, DtypeError, ShapeError, shown
from ..initialization import reset_children
from ..kernels import project
from ..plain import has_global_hooks, is_hooked, is_token_wise
from ..positions import AbsolutePositions, TokenPositions
from ..signatures import typed_as
from ..tracing import is_traced, real_tensors
from .tied import tie


class TokenEmbedding(nn.Module):
    """Token embedding: rows of the table `tokens` [V, E], times `scale`.

    The table is initialised with standard deviation `E ** -0.5`, so that logits of a tied head have one of about 1.
    `scale` is rounded to the dtype, as Gemma was trained (arXiv 2403.08295): the root of 3072 is 55.5 in bfloat16.
    """

    def __init__(self, vocab_size: int, embed_dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, embed_dim)
        self._scales = None if scale == 1.0 else in_each_dtype(scale)
        self.reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` int64 [B, L] to [B, L, E]."""
        x: Tensor = self.tokens(ids)
        return x if self._scales is None else x * self._scales[x.dtype]

    @property
    def scale(self) -> float:
        """Factor of the rows."""
        return 1.0 if self._scales is None else self._scales[torch.float64]

    def reset_parameters(self) -> None:
        """Initialises the table."""
        nn.init.normal_(self.tokens.weight, std=self.tokens.embedding_dim**-0.5)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


def in_each_dtype(number: float) -> dict[torch.dtype, float]:
    """The number as each float dtype rounds it, on the host, so that no step reads from a device."""
    with real_tensors():
        exact = torch.tensor(number, dtype=torch.float64, device="cpu")
        return {dtype: exact.to(dtype).item() for dtype in FLOATS}


class InputPositions(nn.Module):
    """Input of the first block: embeddings, with absolute positions and a norm where the model has them; dropout."""

    def __init__(self, positions: AbsolutePositions | None, dropout: float, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.positions = positions
        self.norm = norm
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, step: TokenPositions) -> Tensor:
        """`x` [B, L, E] at the positions of `step`, to the same shape."""
        if self.positions is not None:
            x = self.positions(x, step)
        if self.norm is not None:
            x = self.norm(x)
        dropout = self.dropout
        if type(dropout) is nn.Dropout and not (dropout.training or is_hooked(dropout) or has_global_hooks()):
            # Without its call, which takes 5 us of a step to do nothing.
            return x
        out: Tensor = dropout(x)
        return out

    @property
    def positions_limit(self) -> int | None:
        """Number of positions; None: no limit."""
        return self.positions.positions_limit if isinstance(self.positions, AbsolutePositions) else None

    def reset_parameters(self) -> None:
        """Initialises the positions and the norm."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


class LanguageHead(nn.Module):
    """Language head: states [..., E] times `scale` to logits [..., V], capped as `softcap * tanh(logits / softcap)`."""

    token_wise = True

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        *,
        bias: bool = False,
        tied: TokenEmbedding | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(embed_dim, vocab_size, bias)
        if tied is not None:
            self.tie_weights(tied)
        self.scale = scale
        self.softcap = softcap

    def forward(self, states: Tensor) -> Tensor:
        """`states` [B, L, E] to [B, L, V]."""
        if self.scale != 1.0:
            states = states * self.scale
        logits = project(self.proj, states)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def tie_weights(self, embedding: TokenEmbedding) -> None:
        """Makes the table of `embedding` the weight of the projection: one parameter of both modules.

        Raises ConfigurationError where a wrapper or a parametrization has replaced one of the two.
        """
        tie(self.proj, embedding.tokens, "head.proj")

    def reset_parameters(self) -> None:
        """Initialises the projection. In a tied head that is the table, which the embedding initialises otherwise."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...


def check_has_head(name: str, head: nn.Module | None) -> None:
    """Raises ArgumentError, naming what needs it, for a model without a head."""
    if head is None:
        raise ArgumentError(
            f"{name}: expected a model with a head, got one with has_head=False; its forward gives states"
        )


def check_logits_to_keep(logits_to_keep: int) -> None:
    """Raises ArgumentError unless this is a whole number of at least 0."""
    if type(logits_to_keep) is not int or logits_to_keep < 0:
        raise ArgumentError(
            "logits_to_keep: expected 0 for all, or how many of the last tokens get logits, got "
            f"{shown(logits_to_keep)}"
        )


def last_states(states: Tensor, logits_to_keep: int) -> Tensor:
    """The last `logits_to_keep` of `states` [B, L, E]; 0: all."""
    return states[:, -logits_to_keep:] if logits_to_keep else states


def logits_of(head: nn.Module, states: Tensor, logits_to_keep: int, run: FlatRun | None) -> Tensor:
    """Logits [B, L, V] of `states` [B, L, E], or [B, n, V] of the last `logits_to_keep`.

    `run`: where the real tokens are. Where the head works token by token they alone have logits, and padding has 0.
    """
    if logits_to_keep or run is None or run.width == 0 or not is_token_wise(head):
        logits: Tensor = head(last_states(states, logits_to_keep))
        return logits
    return run.put_back(head(run.take(states)))


def check_vectors(name: str, vectors: object, embed_dim: int) -> None:
    """Raises ArgumentError, ShapeError or DtypeError unless these are float vectors [B, S, embed_dim]."""
    if not isinstance(vectors, Tensor):
        raise ArgumentError(f"{name}: expected vectors [B, S, {embed_dim}], got {type(vectors).__name__}")
    if vectors.ndim != 3 or vectors.shape[2] != embed_dim:
        raise ShapeError(f"{name}: expected vectors [B, S, {embed_dim}], got {list(vectors.shape)}")
    if not vectors.is_floating_point():
        raise DtypeError(f"{name}: expected vectors of a float dtype, got {vectors.dtype}")


def checked_ids(name: str, ids: Tensor, vocab_size: int, mask_name: str, mask: Tensor | None) -> Tensor:
    """The ids as int64 [B, L], 0 at padding. Ids that generation knows to be in the vocabulary are not checked again.

    `name` and `mask_name` are the names of the two in the caller's signature. On another device than the CPU the range
    of the ids is asserted there, and the host does not wait.

    Raises ArgumentError, ShapeError, DtypeError or DeviceError; ArgumentError also for a real token outside of the
    vocabulary.
    """
    call = active_call()
    if call is not None and call.inputs.tokens is ids:
        return ids
    if not isinstance(ids, Tensor):
        raise ArgumentError(
            f"{name}: expected a tensor int64 [B, L], got {type(ids).__name__}; give torch.as_tensor(ids)"
        )
    if ids.ndim != 2:
        raise ShapeError(f"{name}: expected [B, L], got {list(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"{name}: expected int64 token ids, got {ids.dtype}")
    ids = ids.long()
    real = real_tokens(mask_name, mask, ids.shape[0], ids.shape[1], ids.device)
    if real is not None:
        ids = ids.masked_fill(~real, 0)
    if is_traced(ids) or not ids.numel():
        return ids
    expected, remedy = f"token ids from 0 to {vocab_size - 1}", "check that the tokenizer is the model's"
    if not ids.is_cpu:
        # A device assert: the host does not wait for the ids.
        in_range = ((ids >= 0) & (ids < vocab_size)).all()
        torch._assert_async(in_range, f"{name}: expected {expected}; {remedy}")
        return ids
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ArgumentError(f"{name}: expected {expected}, got ids from {least} to {most}; {remedy}")
    return ids
