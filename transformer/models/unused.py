"""Keywords of other libraries' forwards that a model here does not take.

Wrappers that expect a model of transformers, such as peft with a `task_type`, hand all of these over, as None where
nothing was given.
"""

from collections.abc import Mapping

from ..errors import ArgumentError

OF_TRANSFORMERS = frozenset(
    {
        "decoder_attention_mask",
        "decoder_input_ids",
        "decoder_inputs_embeds",
        "attention_mask",
        "input_ids",
        "inputs_embeds",
        "labels",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    }
)


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
