"""Generation of a decoder-only model: the tokens after a prompt, a stream of them, and the scores of given tokens."""

from collections.abc import Iterator

from torch import Tensor
from typing_extensions import Unpack

from ..cache import KnownInputs, run_uncached
from ..generation import Generated, GenerationKeywords, next_log_probabilities, run_generate, stream
from ..generation.shared_by_ranks import check_logits_are_whole
from ..signatures import typed_as
from .generate_signatures import decoder_only_generate
from .tokens import check_has_head, checked_ids
from .vocabulary import OneVocabularyModel


class TextModel(OneVocabularyModel):
    """A decoder-only model that generates."""

    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Log probabilities [B, L - 1] of each of `input_ids` int64 [B, L] after the tokens before it; 0 at padding.

        Caches are neither read nor changed. Gradients are recorded as in any forward. Raises as `forward`, and
        ArgumentError where the model has no head.
        """
        check_has_head("score", self.head)
        check_logits_are_whole(self)
        ids = checked_ids("input_ids", input_ids, self.config.vocab_size, "attention_mask", attention_mask)
        logits = run_uncached(KnownInputs(), self, ids, attention_mask)
        return next_log_probabilities(logits, ids, attention_mask)

    @typed_as(decoder_only_generate)
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        return_scores: bool = False,
        **options: Unpack[GenerationKeywords],
    ) -> Tensor | Generated:
        """The prompt and the new tokens after it: int64 [B * num_return_sequences, L + N].

        `options` are those of `GenerationOptions`: `max_new_tokens=`, `temperature=`, `num_beams=`, .... Stop and pad
        tokens are by default those of the configuration. With `return_scores=True` the result is a `Generated`, with
        the log probabilities of the new tokens too. While caches are on the conversation continues: give the new
        tokens only. The model must be in `eval()` mode. Raises as `generation.generate` does, and ArgumentError where
        the model has no head.

        With `inputs_embeds` [B, L, E] in place of `input_ids` the result has the new tokens alone, which are all that
        processors see.
        """
        options = self.generating(options)
        return run_generate(
            self,
            input_ids,
            attention_mask,
            options,
            inputs_embeds=inputs_embeds,
            before=input_ids,
            return_scores=return_scores,
        )

    def stream(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> Iterator[Tensor]:
        """The new tokens as they come, int64 [B * num_return_sequences] each; see `generation.stream`."""
        return stream(self, input_ids, attention_mask, inputs_embeds=inputs_embeds, **self.generating(options))

    def generating(self, options: GenerationKeywords) -> GenerationKeywords:
        """The options of a generation, with stop and pad tokens of the configuration where they give no others.

        Raises ArgumentError where the model has no head.
        """
        check_has_head("generate, stream", self.head)
        completed: GenerationKeywords = self.config.generating(options)
        return completed

    def embedded(self, tokens: Tensor) -> Tensor:
        """The vectors [B, L, E] that the model reads for ids int64 [B, L]."""
        out: Tensor = self.embedding(tokens)
        return out
