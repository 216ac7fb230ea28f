"""Generation of an encoder-decoder: the targets of sources, a stream of them, and the scores of given targets."""

from collections.abc import Iterator

from torch import Tensor
from typing_extensions import Unpack

from ..cache import KnownInputs, run_uncached
from ..generation import (
    Generated,
    GenerationKeywords,
    generation_options,
    next_log_probabilities,
    run_generate,
    stream,
)
from ..signatures import typed_as
from .generate_signatures import encoder_decoder_generate
from .source_reader import Source, Target, begin_targets
from .tokens import checked_ids
from .vocabulary import TwoVocabulariesModel


class TargetModel(TwoVocabulariesModel):
    """An encoder-decoder that generates."""

    def score(
        self,
        source_ids: Tensor,
        target_ids: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Log probabilities [B, L - 1] of each of `target_ids` int64 [B, L] after those before it; 0 at padding.

        The first target id is most often the start token. Caches are neither read nor changed. Gradients are recorded
        as in any forward. Raises as `forward`.
        """
        ids = checked_ids("target_ids", target_ids, self.config.tgt_vocab_size, "target_mask", target_mask)
        logits = run_uncached(KnownInputs(), self, source_ids, ids, source_mask, target_mask)
        return next_log_probabilities(logits, ids, target_mask)

    @typed_as(encoder_decoder_generate)
    def generate(
        self,
        source_ids: Tensor | None = None,
        source_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        target_ids: Tensor | None = None,
        target_mask: Tensor | None = None,
        return_scores: bool = False,
        **options: Unpack[GenerationKeywords],
    ) -> Tensor | Generated:
        """The target tokens of each source, without the start token: int64 [B * num_return_sequences, N].

        Args:
            source_ids, source_mask, inputs_embeds: as in `forward`.
            target_ids: int64 [B, L], a prompt for the decoder, behind the start token, which it may begin with itself.
                The result is then these and the new tokens, [B * num_return_sequences, L + N].
            target_mask: [B, L], true for a real token of this prompt.
            return_scores: True gives a `Generated`, with the log probabilities of the new tokens too.
            options: those of `GenerationOptions`: `max_new_tokens=`, `temperature=`, `num_beams=`, .... Start, stop and
                pad tokens are by default those of the configuration.

        Every call begins new targets. The model must be in `eval()` mode. Raises as `generation.generate` does.
        """
        options = self.config.generating(options)
        source = Source.given(source_ids, source_mask, inputs_embeds, self.config.src_vocab_size)
        target = Target(target_ids, target_mask, self.config.tgt_vocab_size)
        begun = begin_targets(self, source, target, self.config.start_token, options)
        return run_generate(*begun, options, before=target_ids, return_scores=return_scores)

    def stream(
        self,
        source_ids: Tensor | None = None,
        source_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        target_ids: Tensor | None = None,
        target_mask: Tensor | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> Iterator[Tensor]:
        """The new target tokens as they come, int64 [B * num_return_sequences] each; see `generation.stream`."""
        options = self.config.generating(options)
        generation_options(options).check_streams()
        source = Source.given(source_ids, source_mask, inputs_embeds, self.config.src_vocab_size)
        target = Target(target_ids, target_mask, self.config.tgt_vocab_size)
        return stream(*begin_targets(self, source, target, self.config.start_token, options), **options)
