"""Attributes and keywords that wrappers of transformers' models expect, such as peft with a `task_type`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..errors import ArgumentError


class ForWrappers(nn.Module):
    """A model with the attributes that such wrappers read before they use its own forward and generate."""

    generation_config: ClassVar[Any] = None

    def prepare_inputs_for_generation(self, *_: Any, **__: Any) -> None:
        """Raises ArgumentError: wrappers check that it exists, and generation does not use it."""
        raise ArgumentError(
            "prepare_inputs_for_generation: expected no call of it; call generate() of the model itself"
        )


OF_TRANSFORMERS = frozenset(
    {
        "decoder_attention_mask",
        "decoder_input_ids",
        "decoder_inputs_embeds",
        "attention_mask",
        "input_ids",
        "inputs_embeds",
        "labels",
        "return_dict",
    }
)
"""Keywords that wrappers pass as None where the user gave nothing."""


def check_unused(unused: Mapping[str, object]) -> None:
    """Raises ArgumentError, naming the keyword, for one that is unknown or has a value."""
    for name, value in unused.items():
        if name not in OF_TRANSFORMERS:
            raise ArgumentError(f"{name}: expected no such argument; forward takes those of its signature")
        if value is not None:
            raise ArgumentError(
                f"{name}: expected None, got {type(value).__name__}; forward takes ids and masks by the names of its "
                "signature and returns logits"
            )
