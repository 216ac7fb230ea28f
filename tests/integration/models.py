"""Models and wrappers of users: modules around ours that this library does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.conversations import cache_snapshot
from tests.models.variants import VOCAB
from tests.setups import fill
from transformer import GroupQueryAttention
from transformer.attention import Attention
from transformer.blocks import DecoderBlock
from transformer.positions import RotaryEmbedding


class Adapter(nn.Module):
    """Around a module of ours: what comes out, plus a small learned part (0 here). No attribute of the inner one."""

    def __init__(self, inner: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.inner = inner
        self.up = nn.Linear(width, width, dtype=torch.float64)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        out = self.inner(x, *given, **named)
        return out + self.up(out)


class ForwardingAdapter(Adapter):
    """The same, and it hands out the attributes of the inner module."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class OwnBlock(nn.Module):
    """A block of the user's own that holds our attention, and hands the step on."""

    def __init__(self, block: DecoderBlock) -> None:
        super().__init__()
        self.norm, self.mixer = block.attention_residual, block.attention
        self.reader, self.network = block.cross_attention, block.feed_forward
        self.network_norm = block.feed_forward_residual
        self.reader_norm = None if self.reader is None else block.cross_attention_residual

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        expanding_context: bool | None = None,
        *,
        attention_mask: Tensor | None = None,
        source_mask: Tensor | None = None,
        step: Any = None,
    ) -> Tensor:
        x = self.norm(x, lambda y: self.attend(y, expanding_context, attention_mask, step))
        if self.reader is not None:
            x = self.reader_norm(x, lambda y: self.reader(y, kv=source, kv_mask=source_mask))
        return self.network_norm(x, self.network)

    def attend(self, y: Tensor, mode: bool | None, mask: Tensor | None, step: Any) -> Tensor:
        return self.mixer(y, None, mode, attention_mask=mask, step=step)


class OwnBlockWithoutStep(OwnBlock):
    """It drops the step: its attention works out the facts of the call by itself."""

    def attend(self, y: Tensor, mode: bool | None, mask: Tensor | None, step: Any) -> Tensor:
        return self.mixer(y, None, mode, attention_mask=mask)


class HidingBlock(OwnBlockWithoutStep):
    """Its attention is in a plain list, so `modules()` does not find it."""

    def __init__(self, block: DecoderBlock) -> None:
        super().__init__(block)
        self.hidden = [self.mixer]
        del self.mixer

    def attend(self, y: Tensor, mode: bool | None, mask: Tensor | None, step: Any) -> Tensor:
        return self.hidden[0](y, None, mode, attention_mask=mask)


class LowRank(nn.Module):
    """An adapter in place of a projection, as LoRA's: the base layer, plus a product of two thin matrices."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2, seed: int = 7) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, rank, bias=False, dtype=base_layer.weight.dtype)
        self.up = nn.Linear(rank, base_layer.out_features, bias=False, dtype=base_layer.weight.dtype)
        fill(self.down, seed), fill(self.up, seed)
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        return out + self.up(self.down(x)) if self.active else out


class Around(nn.Module):
    """A module of the user's around a whole model of ours; it counts the columns of tokens that it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.columns: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.columns.append(input_ids.shape[1])
        return self.model(input_ids, attention_mask=attention_mask)


class Custom(nn.Module):
    """A model of the user's own around two attention modules of ours."""

    def __init__(self, cached: tuple[bool, bool] = (True, True), causal: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.first, self.second = (
            GroupQueryAttention(16, 4, 2, causal, own, position=RotaryEmbedding(4)) for own in cached
        )
        self.head = nn.Linear(16, VOCAB)
        fill(self, 0)
        self.double().eval()

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for attention in (self.first, self.second):
            x = x + attention(x, attention_mask=attention_mask)
        return self.head(x)


def attentions(model: nn.Module) -> list[Attention]:
    """Every attention module of ours in a model."""
    return [module for module in model.modules() if isinstance(module, Attention)]


def all_caches(model: nn.Module) -> list[object]:
    """The content of all caches of its attention modules, as bytes: equal if nothing changed."""
    return [cache_snapshot(attention) for attention in attentions(model)]


def assert_without_caches(model: nn.Module) -> None:
    """No cache is on, and nothing is kept."""
    found = attentions(model)
    assert found
    assert [(a.use_kv_cache, a.kv_cache) for a in found] == [(False, None)] * len(found)
