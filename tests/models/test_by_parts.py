"""Models that a user composes of modules: those that options build, with the caches, files and checks of these."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.conversations import assert_same
from tests.models.own_blocks import WIDTH, block, mixed
from tests.models.variants import SHAPE, VARIANTS, VOCAB, decoder_only, ids, kept
from tests.setups import padding
from transformer import KVCache, MultiQueryAttention, cache_bytes
from transformer.blocks import BlockStack, DecoderBlock, FeedForward, RMSNorm
from transformer.cli.inspect import described
from transformer.errors import ArgumentError, ConfigurationError
from transformer.models import (
    ComposedConfig,
    DecoderOnlyTransformer,
    InputPositions,
    LanguageHead,
    TokenEmbedding,
    compare_generation,
)
from transformer.positions import ALiBi, LearnedPositions, SinusoidalPositions


def by_parts(variant: str) -> tuple[DecoderOnlyTransformer, DecoderOnlyTransformer]:
    """A model by options, and one by parts of the same weights."""
    expected, parts = decoder_only(variant), decoder_only(variant)
    model = DecoderOnlyTransformer.from_parts(parts.embedding, parts.decoder, parts.head, parts.positions)
    return expected, model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_model_by_parts_is_the_one_by_options(variant: str) -> None:
    """In its logits, its names, its caches and every way to generate; padded rows too."""
    expected, model = by_parts(variant)
    tokens, real = ids(2, 6), padding([(0, 6), (2, 3)], 6)
    assert type(model.config) is ComposedConfig
    assert list(model.state_dict()) == list(expected.state_dict())
    assert torch.equal(model(tokens, real), expected(tokens, real))
    assert model.max_positions == expected.max_positions
    assert cache_bytes(model, 2, 9) == cache_bytes(expected, 2, 9)
    for options in ({}, {"num_beams": 3}, {"use_cache": False}, {"temperature": 0.8, "num_return_sequences": 2}):
        results = []
        for each in (model, expected):
            generator = torch.Generator().manual_seed(5) if "temperature" in options else None
            results.append(each.generate(tokens, real, max_new_tokens=6, generator=generator, **options))
        assert torch.equal(*results)
    assert torch.equal(
        torch.stack([*model.stream(tokens, real, max_new_tokens=5)], 1),
        expected.generate(tokens, real, max_new_tokens=5)[:, 6:],
    )
    for each in (model, expected):
        each.enable_cache(20)
        each(tokens[:, :4])
    assert kept(model) == kept(expected)
    assert torch.equal(model(tokens[:, 4:]), expected(tokens[:, 4:]))


@pytest.mark.parametrize("positions", [None, LearnedPositions(32, WIDTH), SinusoidalPositions(WIDTH)])
@torch.no_grad()
def test_own_and_wrapped_blocks_generate_as_an_uncached_loop(positions: nn.Module | None) -> None:
    model = mixed(positions=positions)

    def loop(tokens: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
        return tokens

    first = loop(ids(2, 3), 8)
    question = ids(2, 4, seed=1)
    second = loop(torch.cat((first, question), 1), 6)
    assert torch.equal(model.generate(ids(2, 3), max_new_tokens=8), first)
    model.enable_cache()
    assert torch.equal(model.generate(ids(2, 3), max_new_tokens=8), first)
    conversation = model.kv_cache.fork()
    for _ in range(2):
        assert torch.equal(model.generate(question, max_new_tokens=6), second[:, 11:])
        model.clear_cache().kv_cache = conversation


@torch.no_grad()
def test_conversations(tmp_path) -> None:
    """Truncated, saved and installed again, and all or nothing."""
    model, tokens = mixed(), ids(2, 9)
    whole = model(tokens)
    model.enable_cache()
    assert_same(model(tokens[:, :4]), whole[:, :4])
    assert_same(model(tokens[:, 4:6]), whole[:, 4:6])
    model.kv_cache.truncate(4)
    assert_same(model(tokens[:, 4:7]), whole[:, 4:7])
    model.kv_cache.save(tmp_path / "conversation")
    model.clear_cache()
    model.kv_cache = KVCache.load(tmp_path / "conversation")
    before = kept(model)
    handle = model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens[:, 7:])
    handle.remove()
    assert kept(model) == before
    assert_same(model(tokens[:, 7:]), whole[:, 7:])


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_decoding_over_a_frozen_layout() -> None:
    expected, model = by_parts("gqa relative, pattern")
    tokens = ids(2, 12)
    model.enable_cache(max_length=12)
    outs = [model(tokens[:, :4])]
    model.kv_cache.freeze_layout()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    outs += [compiled(tokens[:, at : at + 1]) for at in range(4, 12)]
    assert_same(torch.cat(outs, 1), expected(tokens))


def test_the_parts_are_the_submodules() -> None:
    embedding, stack, head = TokenEmbedding(VOCAB, WIDTH), BlockStack([block()]), LanguageHead(WIDTH, VOCAB)
    learned = LearnedPositions(8, WIDTH)
    model = DecoderOnlyTransformer.from_parts(embedding, stack, head, learned)
    assert (model.embedding, model.decoder, model.head) == (embedding, stack, head)
    assert model.positions.positions is learned
    positions = InputPositions(SinusoidalPositions(WIDTH), 0.5)
    assert DecoderOnlyTransformer.from_parts(embedding, stack, head, positions).positions is positions


def test_caches_are_off_in_a_new_model() -> None:
    """Modules that were built with caches would else keep the tokens of a training step."""
    attention = MultiQueryAttention(WIDTH, 4, True, use_kv_cache=True)
    stack = BlockStack([DecoderBlock(attention, FeedForward(WIDTH, 20), RMSNorm)])
    model = DecoderOnlyTransformer.from_parts(nn.Embedding(VOCAB, WIDTH), stack, nn.Linear(WIDTH, VOCAB))
    model(ids(1, 3))
    assert attention.kv_cache is None
    model.eval().enable_cache()
    model(ids(1, 3))
    assert attention.kv_cache["key"].shape[2] == 3


@torch.no_grad()
def test_tied_weights_stay_one_parameter() -> None:
    model = mixed()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.head.weight is other.embedding.weight
        assert torch.equal(other(ids(1, 4)), model(ids(1, 4)))
    state = {name: value for name, value in model.state_dict().items() if name != "head.weight"}
    other = mixed().to_empty(device="meta").to_empty(device="cpu")
    other.load_state_dict(state, assign=True)
    assert other.config.tied_embeddings
    assert other.head.weight is other.embedding.weight
    other.head.weight = nn.Parameter(other.head.weight.clone())
    other.tie_weights()
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other(ids(1, 4)), model(ids(1, 4)))
    model.reset_parameters()
    # As an embedding: a linear layer begins with a standard deviation of 0.14.
    assert float(model.embedding.weight.std()) > 0.5
    untied = mixed(tied=False)
    untied.tie_weights()
    assert not untied.config.tied_embeddings
    assert untied.head.weight is not untied.embedding.weight


def test_parameters_from_meta() -> None:
    """Another embedding than ours has no `reset_parameters` to call last."""

    class Factorised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.widen = nn.Embedding(VOCAB, 4), nn.Linear(4, WIDTH)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.widen(self.narrow(tokens))

    with torch.device("meta"):
        model = DecoderOnlyTransformer.from_parts(
            Factorised(), BlockStack([block()], RMSNorm(WIDTH)), nn.Linear(WIDTH, VOCAB)
        )
    assert model.config.vocab_size == VOCAB
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.reset_parameters()
    assert bool(model(ids(1, 5)).isfinite().all())


@torch.no_grad()
def test_stop_tokens_of_the_configuration() -> None:
    model = mixed()
    expected = model.generate(ids(1, 3), max_new_tokens=9)
    model.config = replace(model.config, stop_tokens=(int(expected[0, 6]),), pad_token=0)
    ended = model.generate(ids(1, 3), max_new_tokens=9)
    stop = expected[0, 3:].tolist().index(int(expected[0, 6])) + 4
    assert torch.equal(ended, expected[:, :stop])
    with pytest.raises(ConfigurationError, match="stop_tokens"):
        replace(model.config, stop_tokens=(-1,))
    with pytest.raises(ConfigurationError, match=r"^config: expected a DecoderOnlyConfig, got ComposedConfig"):
        DecoderOnlyTransformer.from_config(model.config)


def test_without_a_head() -> None:
    model = DecoderOnlyTransformer.from_parts(nn.Embedding(VOCAB, WIDTH), BlockStack([block()]), None).eval()
    assert not model.config.has_head
    assert model(ids(2, 3)).shape == (2, 3, WIDTH)
    with pytest.raises(ArgumentError, match="expected a model with a head"):
        model.generate(ids(1, 2))


def test_tools_take_a_model_by_parts() -> None:
    model = mixed(positions=LearnedPositions(24, WIDTH))
    assert all(row.equal for row in compare_generation(model, lengths=[3], runs=1, prompt_length=4))
    lines = "\n".join(described(model, [8], 1))
    assert f"vocabulary: {VOCAB} tokens; context: at most 24 tokens" in lines
    assert f"{cache_bytes(model, 1, 8):,}" in lines


def parts(**changes: object) -> dict[str, object]:
    return {
        "embedding": TokenEmbedding(VOCAB, WIDTH),
        "stack": BlockStack([block()]),
        "head": LanguageHead(WIDTH, VOCAB),
        **changes,
    }


def reader() -> BlockStack:
    attention = [MultiQueryAttention(WIDTH, 4, causal) for causal in (True, False)]
    return BlockStack([DecoderBlock(attention[0], FeedForward(WIDTH, 20), RMSNorm, cross_attention=attention[1])])


def not_causal() -> BlockStack:
    return BlockStack([DecoderBlock(MultiQueryAttention(WIDTH, 4), FeedForward(WIDTH, 20), RMSNorm)])


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("embedding: .*exactly one nn.Embedding.*got Tensor", {"embedding": torch.zeros(VOCAB, WIDTH)}),
        ("embedding: .*got ReLU", {"embedding": nn.ReLU()}),
        ("embedding: .*got Sequential with 0, 1", {"embedding": nn.Sequential(nn.Embedding(3, 2), nn.Embedding(3, 2))}),
        ("embedding: expected embedding_dim=16.*got 8", {"embedding": TokenEmbedding(VOCAB, 8)}),
        ("stack: expected a BlockStack, got DecoderBlock", {"stack": block()}),
        ("stack: .*without cross-attention, got it in block 0", {"stack": reader()}),
        ("stack: .*causal order", {"stack": not_causal()}),
        ("head: expected LanguageHead.*got int", {"head": VOCAB}),
        ("head: expected in_features=16.*got 8", {"head": LanguageHead(8, VOCAB)}),
        (f"head: expected out_features={VOCAB}.*got 5", {"head": nn.Linear(WIDTH, 5)}),
        ("positions: expected None.*got ALiBi", {"positions": ALiBi(4)}),
        ("positions: expected embed_dim=16.*got 8", {"positions": SinusoidalPositions(8)}),
        ("positions: expected embed_dim=16.*got 8", {"positions": InputPositions(LearnedPositions(4, 8), 0.0)}),
    ],
)
def test_refusals_name_the_argument(message: str, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        DecoderOnlyTransformer.from_parts(**parts(**changes))
    assert DecoderOnlyTransformer.from_parts(**parts()).config.num_layers == 1


def test_options_are_shared_by_inheritance() -> None:
    """Each field of a composed model's configuration is one of a model by options, with the same default."""
    options = DecoderOnlyTransformer(VOCAB, **SHAPE).config
    composed = ComposedConfig(VOCAB, SHAPE["d_model"], SHAPE["num_layers"])
    assert composed.to_dict().items() <= options.to_dict().items()
    assert composed.model_type == options.model_type
