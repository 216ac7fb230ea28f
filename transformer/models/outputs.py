"""Outputs of whole models beside logits, where a call asks for them: loss, attention weights and hidden states."""

from typing import Any, NamedTuple

from torch import Tensor

from ..blocks import StackOutput
from ..errors import ArgumentError, shown


class ModelOutput(NamedTuple):
    """Result of a model's call with `labels`, `output_attentions=True` or `output_hidden_states=True`.

    A named tuple: `output.loss`. Names of fields, and number and order of their entries, are those of transformers'
    models; of the fields themselves the first one is `logits`, and `loss` the last. A field that
    the model does not have, or that was not asked for, is None. The fields without `encoder_` are the decoder's in a
    model that has both.
    """

    logits: Tensor | None
    """[B, L, V], or the last `logits_to_keep` of them; of a classifier [B, N] or [B, L, N]; None in a model without a
    head."""
    last_hidden_state: Tensor
    """[B, L, E], the input of the head, after the last norm."""
    hidden_states: tuple[Tensor, ...] | None = None
    """[B, L, E] each, one more than there are layers: the embeddings with their positions, then the output of each
    layer; the last entry is `last_hidden_state`. Values at padding are undefined."""
    attentions: tuple[Tensor, ...] | None = None
    """[B, H, L, S] of each layer, before dropout. Columns are the tokens in the layer's cache before the call,
    then this call's tokens as given."""
    cross_attentions: tuple[Tensor, ...] | None = None
    """[B, H, L, S] of each decoder layer over the source, before dropout."""
    encoder_last_hidden_state: Tensor | None = None
    """[B, S, E], the output of the encoder."""
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    """[B, S, E] each, as `hidden_states`; None where the call was given the encoder's states."""
    encoder_attentions: tuple[Tensor, ...] | None = None
    """[B, H, S, S] of each encoder layer, before dropout; None where the call was given the encoder's states."""
    loss: Tensor | None = None
    """The mean loss of the labels that count, a number; None without `labels`."""


def requested_outputs(output_attentions: object, output_hidden_states: object) -> dict[str, Any]:
    """Keywords that make a stack return the requested outputs; empty where none are requested.

    Raises ArgumentError for anything but True, False or None.
    """
    if output_attentions is None and output_hidden_states is None:
        return {}
    flags = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
    for name, flag in flags.items():
        if not isinstance(flag, bool | None):
            raise ArgumentError(f"{name}: expected True, False or None, got {shown(flag)}")
    return {name: True for name, flag in flags.items() if flag}


def stack_output(result: Any) -> StackOutput:
    """Result of a stack as a `StackOutput`, also where the stack returned its states only."""
    return result if isinstance(result, StackOutput) else StackOutput(result)
