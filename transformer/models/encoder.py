"""Bidirectional encoder: BERT and its successors."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import Self

from ..errors import ArgumentError, ShapeError
from ..initialization import reset_children
from ..signatures import configured_by, typed_as
from .config import EncoderConfig
from .inputs import layout_of, named_mask
from .layers import encoder_stack, input_positions
from .outputs import ModelOutput, requested_outputs, stack_output
from .signatures import encoder_call
from .tied import TiedModel
from .tokens import TokenEmbedding, checked_ids
from .vocabulary import check_vocab_size, resize
from .wrappers import check_unused


class EncoderTransformer(TiedModel):
    """Bidirectional encoder: token ids to states, each over the whole sequence (BERT, arXiv 1810.04805).

    Args:
        vocab_size, d_model, num_heads, d_ff, num_layers: `V`, `E`, `H`, the inner width of the feed-forward networks,
            and the number of blocks.
        options: those of `EncoderConfig` and `LayerOptions`, such as `position="learned", max_length=512`.

    Raises ConfigurationError, naming the option, for what cannot work.
    """

    @configured_by(EncoderConfig)
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model, config.embedding_scale)
        self.token_types = None
        if config.num_token_types:
            self.token_types = TokenEmbedding(config.num_token_types, config.d_model)
        self.positions = input_positions(config)
        self.encoder = encoder_stack(config)
        if not config.first_norm:
            first: Any = self.encoder.blocks[0]
            first.attention_residual.norm_before = None

    @classmethod
    def from_config(cls, config: EncoderConfig) -> "EncoderTransformer":
        """A new model of that configuration."""
        return cls(**config.to_dict())

    @typed_as(encoder_call)
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **unused: None,
    ) -> Tensor | ModelOutput:
        """States [B, L, E] of `input_ids` int64 [B, L]; values at padding are undefined.

        Args:
            attention_mask: [B, L], true for a real token; padding on either side.
            token_type_ids: int64 [B, L]; by default all tokens are of type 0.
            segment_ids: int [B, L] in place of a mask: each run of equal numbers is a document, which sees no other and
                begins at position 0; 0 is padding. BERT's segments of one text are `token_type_ids`.
            position_ids: int [B, L], positions in place of the counted ones.
            output_attentions, output_hidden_states: whether to return a `ModelOutput`, with the attention weights of
                each layer (before dropout), or with the embeddings and the output of each layer.
            unused: names that transformers' models take and this one does not, such as `labels`: None each.

        Raises ArgumentError for ids outside of their vocabulary, ShapeError or DtypeError for what does not fit.
        """
        check_unused(unused)
        requested = requested_outputs(output_attentions, output_hidden_states)
        layout = layout_of(segment_ids, None, position_ids)
        mask = named_mask(layout, attention_mask)
        x = self.embedding(checked_ids("input_ids", input_ids, self.config.vocab_size, *mask))
        if self.token_types is not None:
            x = x + self._types(input_ids, mask, token_type_ids)
        elif token_type_ids is not None:
            raise ArgumentError(
                f"token_type_ids: expected None, as num_token_types is 0, got {type(token_type_ids).__name__}"
            )
        steps = self.encoder.plan(x, None, attention_mask, layout)
        read = stack_output(self.encoder(self.positions(x, steps[0]), steps=steps, **requested))
        return ModelOutput(None, *read[:3]) if requested else read.states

    def _types(self, input_ids: Tensor, mask: tuple[str, Tensor | None], types: Tensor | None) -> Tensor:
        if types is None:
            types = input_ids.new_zeros(input_ids.shape)
        elif not isinstance(types, Tensor):
            raise ArgumentError(
                f"token_type_ids: expected a tensor int64 {list(input_ids.shape)}, got {type(types).__name__}"
            )
        elif types.shape != input_ids.shape:
            raise ShapeError(f"token_type_ids: expected {list(input_ids.shape)}, as input_ids, got {list(types.shape)}")
        types = checked_ids("token_type_ids", types, self.config.num_token_types, *mask)
        out: Tensor = self.token_types(types)  # type: ignore[misc]  # asked for only where there are types
        return out

    def resize_token_embeddings(self, vocab_size: int) -> Self:
        """Changes the number of tokens, of the embedding and of `config.vocab_size`, as in a decoder-only model."""
        check_vocab_size("vocab_size", vocab_size)
        config = replace(self.config, vocab_size=vocab_size)
        resize(self, {"embedding.tokens": (self.embedding.tokens, vocab_size)})
        self.config = config
        return self

    def reset_parameters(self) -> None:
        """Initialises all parameters again, as in a new model; for use after `to_empty()`."""
        reset_children(self)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...
