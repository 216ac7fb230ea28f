"""Loss that keeps a router from sending all tokens to few experts, and the router logits that it needs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError
from .mixture import MixtureOfExperts


@contextmanager
def router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list to which each `MixtureOfExperts` in `model` adds its router's logits [B, L, N], inside the `with`.

    They come in the order of calls, with the graph of their gradients; logits at padding mean nothing. Hooks collect
    them, so a model that was compiled before gives none. Raises ArgumentError for a model without a mixture.

        with router_logits(model) as logits:
            output = model(ids, attention_mask, labels=labels)
        loss = output.loss + 0.02 * load_balancing_loss(logits, experts_per_token, attention_mask)
    """
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not mixtures:
        raise ArgumentError(f"model: expected one with a MixtureOfExperts in it, got {type(model).__name__}")
    logits: list[Tensor] = []
    handles = [each.router.register_forward_hook(lambda _, __, out: logits.append(out)) for each in mixtures]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def load_balancing_loss(
    logits: Sequence[Tensor], experts_per_token: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Auxiliary loss that is smallest where all experts are chosen equally often (arXiv 2101.03961, section 2.2).

    The number of experts times the sum over experts of how many choices of a token fall on the expert, times its mean
    probability; means are over the real tokens of all layers. Equal use gives `experts_per_token`. It is the loss of
    Mixtral and Qwen3-MoE in transformers, where its factor is called `router_aux_loss_coef`.

    Args:
        logits: [B, L, N] of each layer's router, from `router_logits`.
        experts_per_token: how many experts each token goes to.
        attention_mask: [B, L], true for real tokens; padding does not count.

    Returns a number with gradients. Raises ArgumentError for no logits, logits of different shapes, more experts for a
    token than there are, or a mask of another shape.
    """
    shapes = {tuple(each.shape) for each in logits}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ArgumentError(f"logits: expected one [B, L, N] for each layer, of one shape, got {sorted(shapes)}")
    batch, length, experts = shapes.pop()
    if type(experts_per_token) is not int or not 1 <= experts_per_token <= experts:
        raise ArgumentError(f"experts_per_token: expected 1 to {experts}, got {experts_per_token!r}")
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, length):
        raise ArgumentError(f"attention_mask: expected {[batch, length]}, got {list(attention_mask.shape)}")
    stacked = torch.stack([each.to(logits[0].device) for each in logits])
    if attention_mask is not None:
        stacked = stacked[:, attention_mask.to(stacked.device).bool()]
    probabilities = stacked.reshape(-1, experts).softmax(-1, torch.promote_types(stacked.dtype, torch.float32))
    choices = F.one_hot(probabilities.topk(experts_per_token).indices, experts).sum(1).to(probabilities.dtype)
    return experts * (choices.mean(0) * probabilities.mean(0)).sum()
