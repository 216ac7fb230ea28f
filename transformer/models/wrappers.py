"""Attributes and keywords that wrappers made for transformers' models look for, such as peft with a `task_type`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..errors import ArgumentError


class ForWrappers(nn.Module):
    """A model with what such wrappers read of one before they pass its own forward and generate on."""

    generation_config: ClassVar[Any] = None

    def prepare_inputs_for_generation(self, *_: Any, **__: Any) -> None:
        """Refused: wrappers look for it, and generation here does not need it."""
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
"""What a wrapper hands over as None where nothing was given."""


def check_unused(unused: Mapping[str, object]) -> None:
    """Raises ArgumentError, naming it, for a keyword that is unknown, or is given a value."""
    for name, value in unused.items():
        if name not in OF_TRANSFORMERS:
            raise ArgumentError(f"{name}: expected no such argument; forward takes those of its signature")
        if value is not None:
            raise ArgumentError(
                f"{name}: expected None, got {type(value).__name__}; forward takes ids and masks by the names of its "
                "signature and returns logits"
            )
