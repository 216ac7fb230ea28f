"""Generation over conversations of one's own: a model's adapter and session, apart from what the model has cached."""

from itertools import chain

import torch
from torch import nn

from ..cache import readers
from ..errors import ArgumentError
from .model_adapter import ForwardAdapter
from .session import Session


def separate_adapter(model: nn.Module) -> ForwardAdapter:
    """The adapter of a decoder-only model. Raises ArgumentError for others."""
    adapter = ForwardAdapter(model)
    if any(True for _ in readers(model)):
        raise ArgumentError(
            "model: expected a decoder-only model, got one with cross-attention, each of whose prompts has a source; "
            "generate() takes several sources at once"
        )
    return adapter


def separate_session(adapter: ForwardAdapter) -> Session:
    """A session of a conversation that begins, separate from the model's own. Raises ArgumentError without caches."""
    return adapter.session(True, 2).separated()


def device_of(model: nn.Module) -> torch.device:
    """The device of the first weight."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
