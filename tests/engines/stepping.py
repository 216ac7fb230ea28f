"""Models with random weights for the tests of stateless steps, and the greedy loop that a user of a step writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, GroupQueryAttention
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock, FeedForward, LayerNorm, RMSNorm
from transformer.engines import DecodeStep
from transformer.models import UMT5Config, UMT5Model, t5_config
from transformer.positions import ALiBi, LearnedPositions, RotaryEmbedding, YaRNScaling

VOCAB = 61
TOKENS = 40
"""New tokens of each row in the loops."""

Run = Callable[..., tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]]


def filled(model: nn.Module, seed: int = 0) -> Any:
    """The model in eval(), with weights that spread its choices over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.eval()


def decoder(**options: Any) -> DecoderOnlyTransformer:
    shape = {"d_model": 32, "num_heads": 4, "d_ff": 48, "num_layers": 3, "tied_embeddings": False}
    return filled(DecoderOnlyTransformer(VOCAB, **(shape | options)))


def encoder_decoder(**options: Any) -> EncoderDecoderTransformer:
    shape = {"d_model": 32, "num_heads": 4, "d_ff": 48, "num_layers": 2, "tied_embeddings": False}
    vocabularies = {"src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB}
    return filled(EncoderDecoderTransformer(**(vocabularies | shape | options)))


def t5() -> EncoderDecoderTransformer:
    config = t5_config(VOCAB, 32, 4, 48, 2, head_dim=8, relative_buckets=8, relative_max_distance=16)
    return filled(EncoderDecoderTransformer.from_config(config))


def umt5(num_layers: int = 2) -> UMT5Model:
    shape = {"d_model": 32, "num_heads": 4, "head_dim": 8, "d_ff": 48, "num_layers": num_layers}
    return filled(UMT5Model(UMT5Config(vocab_size=VOCAB, relative_buckets=8, relative_max_distance=16, **shape)))


def by_parts() -> DecoderOnlyTransformer:
    """Layers of other heads, widths of heads, positions and windows; one of them twice."""
    rotary = RotaryEmbedding(6, rotary_dim=4, interleaved=True, scaling=YaRNScaling(4.0, 32))
    attend = partial(GroupQueryAttention, 32, 4, apply_causal_mask=True)
    feed_forward = partial(FeedForward, 32, 48)
    sliding = DecoderBlock(
        attend(2, head_dim=6, position=rotary, window_size=5, num_sinks=2), feed_forward(), RMSNorm, placement="both"
    )
    biased = EncoderBlock(attend(1, position=ALiBi(4), softcap=4.0), feed_forward(), LayerNorm)
    plain = DecoderBlock(attend(4, head_dim=4, scale=0.3, qk_norm=RMSNorm), feed_forward(), RMSNorm, placement="after")
    stack = BlockStack([sliding, biased, plain, sliding], LayerNorm(32))
    embedding, head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)
    return filled(DecoderOnlyTransformer.from_parts(embedding, stack, head, LearnedPositions(64, 32)))


def with_rules() -> DecoderOnlyTransformer:
    """Layers with windows and sinks under a rule of visibility, by which some query sees nothing, and one of scores."""
    model = decoder(window_size=6, num_sinks=2, layer_pattern="sliding full")
    for block in model.decoder.blocks[:2]:
        block.attention.mask_rule = lambda q, k: ((q - k) % 2 == 0) & (q != 5)
        block.attention.score_rule = lambda scores, q, k: scores - torch.log1p((q - k).to(scores.dtype))
    model.decoder.blocks[2].attention.mask_rule = lambda q, k: (k == q) & (q != 7)
    return model


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def prompts(lengths: Sequence[int]) -> tuple[list[list[int]], Tensor, Tensor]:
    """Prompts of these lengths, and the same as ids and mask with padding on the left."""
    longest = max(lengths)
    ids = token_ids(len(lengths), longest)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths).unsqueeze(-1)
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)], ids, mask


def greedy(run: Run, step: DecodeStep, rows: Sequence[Sequence[int]], length: int, *source: Any) -> Tensor:
    """The tokens [B, TOKENS] after each row, over buffers of `length` slots: all rows end together, at positions of
    their own. A shorter row reads its first token again until it is its turn."""
    longest, rows = max(map(len, rows)), [list(row) for row in rows]
    begins = [longest - len(row) for row in rows]
    keys, values = step.empty_buffers(len(rows), length)
    for time in range(longest + TOKENS - 1):
        positions = [max(time - begin, 0) for begin in begins]
        ids = [[row[position]] for row, position in zip(rows, positions, strict=True)]
        logits, keys, values = run(torch.tensor(ids), torch.tensor(positions), keys, values, *source)
        if time >= longest - 1:
            for row, token in zip(rows, logits[:, -1].argmax(-1).tolist(), strict=True):
                row.append(token)
    return torch.tensor([row[-TOKENS:] for row in rows])


class OnnxModule:
    """An exported program of tensors and tuples of them, written as ONNX and run by onnxruntime."""

    def __init__(self, program: ExportedProgram, path: Path) -> None:
        torch.onnx.export(program, f=path, dynamo=True, verbose=False, external_data=False)
        self.session = onnxruntime.InferenceSession(path)
        self.names = [each.name for each in self.session.get_inputs()]

    def __call__(self, *inputs: Tensor | Sequence[Tensor]) -> Any:
        """The first output as it is where there is an odd number of them, and the others in two tuples."""
        flat = [each for given in inputs for each in ([given] if isinstance(given, Tensor) else given)]
        fed = {name: each.numpy() for name, each in zip(self.names, flat, strict=True)}
        outputs = list(map(torch.from_numpy, self.session.run(None, fed)))
        first = outputs[: len(outputs) % 2]
        middle = len(first) + len(outputs) // 2
        return (*first, outputs[len(first) : middle], outputs[middle:])
