"""Tokens at both ends of a model: ids to vectors, and vectors to the logits of what comes next."""

import torch
from torch import Tensor, nn

from ..attention import project
from ..errors import ArgumentError, DeviceError, DtypeError, ShapeError
from ..positions import AbsolutePositions, TokenPositions


class TokenEmbedding(nn.Module):
    """Vectors of ids, times `scale`: the rows of the table `tokens` [V, E].

    Its numbers begin at the size `E ** -0.5`, so that a head that shares it makes logits of size one.
    """

    def __init__(self, vocab_size: int, embed_dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, embed_dim)
        self.scale = scale
        nn.init.normal_(self.tokens.weight, std=embed_dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """`ids` int64 [B, L] to [B, L, E]."""
        x: Tensor = self.tokens(ids)
        return x if self.scale == 1.0 else x * self.scale


class InputPositions(nn.Module):
    """What is done to vectors before the first block: absolute positions and a norm, where there are, and dropout."""

    def __init__(self, positions: AbsolutePositions | None, dropout: float, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.positions = positions
        self.norm = norm
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, step: TokenPositions) -> Tensor:
        """`x` [B, L, E] at the positions of a call, same shape."""
        if self.positions is not None:
            x = self.positions(x, step)
        if self.norm is not None:
            x = self.norm(x)
        out: Tensor = self.dropout(x)
        return out


class LanguageHead(nn.Module):
    """Vectors [..., E] to logits [..., V]: times `scale`, and within `softcap * tanh(logits / softcap)` where given."""

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        *,
        tied: TokenEmbedding | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(embed_dim, vocab_size, bias=False)
        if tied is not None:
            self.proj.weight = tied.tokens.weight
        self.scale = scale
        self.softcap = softcap

    def forward(self, states: Tensor) -> Tensor:
        """`states` [B, L, E] to [B, L, V]."""
        logits = project(self.proj, states)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def last(self, states: Tensor) -> Tensor:
        """Logits [B, V] after the last of `states` [B, L, E]; those of the others are not formed."""
        logits: Tensor = self(states[:, -1:])
        return logits[:, 0]


def checked_ids(name: str, ids: Tensor, vocab_size: int, mask: Tensor | None) -> Tensor:
    """The ids int64 [B, L], 0 at padding.

    Raises ShapeError, DtypeError, DeviceError, or ArgumentError for a real token outside of the vocabulary, before
    anything is read.
    """
    if ids.ndim != 2:
        raise ShapeError(f"{name}: expected [B, L], got {list(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"{name}: expected int64 token ids, got {ids.dtype}")
    ids = ids.long()
    if mask is not None:
        if mask.shape != ids.shape:
            raise ShapeError(f"mask of {name}: expected {list(ids.shape)}, as {name}, got {list(mask.shape)}")
        if mask.device != ids.device:
            raise DeviceError(f"mask of {name}: expected a tensor on {ids.device}, as {name}, got {mask.device}")
        ids = ids.masked_fill(mask == 0, 0)
    if ids.numel() and not torch.compiler.is_compiling():
        least, most = ids.aminmax()
        if int(least) < 0 or int(most) >= vocab_size:
            raise ArgumentError(
                f"{name}: expected token ids from 0 to {vocab_size - 1}, got ids from {int(least)} to {int(most)}; "
                "check that the tokenizer is the model's"
            )
    return ids
