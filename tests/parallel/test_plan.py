"""Plan of tensor parallelism: words by class of module, patterns of layers, and shares that add up to the whole."""

import copy
from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer import EncoderDecoderTransformer, GroupQueryAttention
from transformer.attention import MultiHeadAttention
from transformer.blocks import BlockStack, DecoderBlock, FeedForward, GatedFeedForward, RMSNorm
from transformer.errors import ArgumentError
from transformer.models import DecoderOnlyTransformer, EncoderTransformer, LanguageHead
from transformer.parallel import tensor_plan

ATTENTION = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "out_proj": "rowwise"}
NORMS = {"q_norm": "replicated_with_grad_allreduce", "k_norm": "replicated_with_grad_allreduce"}
PLAIN = {"up_proj": "colwise", "down_proj": "rowwise"}
GATED = {"gate_proj": "colwise", **PLAIN}
TABLE = {"embedding.tokens": "embedding_rowwise"}


def under(prefix: str, words: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": word for name, word in words.items()}


def block(feed_forward: nn.Module, qk_norm: bool = False) -> DecoderBlock:
    attention = MultiHeadAttention(16, 4, True, qk_norm=RMSNorm if qk_norm else None)
    return DecoderBlock(attention, feed_forward, RMSNorm)


def test_modules_alone_have_words_by_their_class() -> None:
    assert tensor_plan(GroupQueryAttention(16, 4, 2, True)) == ATTENTION
    assert tensor_plan(MultiHeadAttention(16, 4, False, qk_norm=RMSNorm)) == ATTENTION | NORMS
    assert tensor_plan(FeedForward(16, 32)) == PLAIN
    assert tensor_plan(GatedFeedForward(16, 32)) == GATED
    assert tensor_plan(block(GatedFeedForward(16, 32))) == under("attention", ATTENTION) | under("feed_forward", GATED)


def test_a_model_of_equal_layers_has_one_pattern_for_all() -> None:
    model = DecoderOnlyTransformer(50, 16, 4, 32, 3, position="rotary", feed_forward="gated", qk_norm=True)
    layer = under("decoder.blocks.*.attention", ATTENTION | NORMS) | under("decoder.blocks.*.feed_forward", GATED)
    assert tensor_plan(model) == layer | TABLE | {"head.proj": "colwise_gather_output"}


def test_a_linear_head_of_a_composed_model_has_the_word_of_a_head() -> None:
    def composed(head: nn.Module) -> DecoderOnlyTransformer:
        stack = BlockStack([block(FeedForward(16, 32))])
        return DecoderOnlyTransformer.from_parts(nn.Embedding(50, 16), stack, head)

    table = {"embedding": "embedding_rowwise"}
    layer = table | under("decoder.blocks.*.attention", ATTENTION) | under("decoder.blocks.*.feed_forward", PLAIN)
    linear = composed(nn.Linear(16, 50, bias=False))
    assert tensor_plan(linear) == layer | {"head": "colwise_gather_output"}
    assert tensor_plan(nn.ModuleDict({"inner": linear}))["inner.head"] == "colwise_gather_output"
    assert tensor_plan(composed(LanguageHead(16, 50))) == layer | {"head.proj": "colwise_gather_output"}
    # What else a head of one's own does is not known, and neither is which of its layers gives the logits.
    assert tensor_plan(composed(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 50)))) == layer


def test_encoders_and_encoder_decoders_have_words_for_each_of_their_parts() -> None:
    layer = under("encoder.blocks.*.attention", ATTENTION) | under("encoder.blocks.*.feed_forward", PLAIN)
    assert tensor_plan(EncoderTransformer(50, 16, 4, 32, 2, feed_forward="plain")) == layer | TABLE
    plan = tensor_plan(EncoderDecoderTransformer(50, 50, 16, 4, 32, 2, feed_forward="plain"))
    decoder = under("decoder.blocks.*.attention", ATTENTION) | under("decoder.blocks.*.feed_forward", PLAIN)
    reads = under("decoder.blocks.*.cross_attention", ATTENTION)
    tables = {f"{name}_embedding.tokens": "embedding_rowwise" for name in ("source", "target")}
    assert plan == layer | decoder | reads | tables | {"head.proj": "colwise_gather_output"}


def test_a_table_that_is_the_weight_of_a_head_has_a_word_wherever_it_stands() -> None:
    model = nn.ModuleDict({"mine": nn.Embedding(50, 16), "types": nn.Embedding(50, 16), "head": LanguageHead(16, 50)})
    model["head"].proj.weight = model["mine"].weight
    assert tensor_plan(model) == {"mine": "embedding_rowwise", "head.proj": "colwise_gather_output"}


def test_layers_that_differ_are_named_one_by_one_where_they_do() -> None:
    class Own(nn.Module):
        """A network of a user, with the same names but of another class: whole on each rank."""

        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Linear(16, 32)
            self.down_proj = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            down: Tensor = self.down_proj(F.relu(self.up_proj(x)))
            return down

    stack = BlockStack([block(GatedFeedForward(16, 32)), block(Own()), block(FeedForward(16, 32), qk_norm=True)])
    plan = tensor_plan(nn.ModuleDict({"mine": stack}))
    assert plan == (
        under("mine.blocks.*.attention", ATTENTION | NORMS)
        | under("mine.blocks.*.feed_forward", {"gate_proj": "colwise"})
        | under("mine.blocks.0.feed_forward", PLAIN)
        | under("mine.blocks.2.feed_forward", PLAIN)
    )
    modules = [name for name, _ in stack.named_modules(prefix="mine")]
    matched = {name for name in modules if any(fnmatch(name, key) for key in plan)}
    assert "mine.blocks.2.attention.q_norm" in matched
    assert "mine.blocks.1.feed_forward.up_proj" not in matched


def test_a_module_in_two_places_has_a_word_in_both() -> None:
    shared = block(FeedForward(16, 32))
    assert tensor_plan(nn.ModuleDict({"first": shared, "second": shared})) == tensor_plan(
        nn.ModuleDict({"first": shared, "second": block(FeedForward(16, 32))})
    )


def test_a_model_without_modules_of_this_library_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"model: expected .* got Linear"):
        tensor_plan(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match=r"model: expected .* got str"):
        tensor_plan("model")  # type: ignore[arg-type]


def share(module: nn.Module, rank: int, ranks: int) -> dict[str, Tensor]:
    """The weights of `module` that the plan gives to one rank."""
    plan, weights = tensor_plan(module), {}
    for name, weight in module.state_dict().items():
        path, _, kind = name.rpartition(".")
        word = plan[path]
        if word == "colwise":
            weight = weight.chunk(ranks)[rank]
        elif word == "rowwise" and kind == "weight":
            weight = weight.chunk(ranks, dim=1)[rank]
        elif word == "rowwise" and rank:
            weight = torch.zeros_like(weight)
        weights[name] = weight
    return weights


def test_outputs_and_gradients_of_the_shares_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    options = {"head_dim": 4, "bias": True, "out_bias": True, "qk_norm": RMSNorm}
    pairs = [
        (GroupQueryAttention(16, 4, 2, True, **options), GroupQueryAttention(16, 2, 1, True, **options)),
        (GatedFeedForward(16, 32, bias=True), GatedFeedForward(16, 16, bias=True)),
        (FeedForward(16, 32), FeedForward(16, 16)),
    ]
    for whole, half in pairs:
        for parameter in whole.parameters():
            nn.init.normal_(parameter, std=0.5)
        halves = [copy.deepcopy(half) for _ in range(2)]
        for rank, part in enumerate(halves):
            part.load_state_dict(share(whole, rank, 2))
        expected, added = whole(x), halves[0](x) + halves[1](x)
        torch.testing.assert_close(added, expected, rtol=1e-5, atol=1e-5)
        expected.square().sum().backward()
        added.square().sum().backward()
        for name, word in tensor_plan(whole).items():
            if word == "replicated_with_grad_allreduce":
                summed = sum(part.get_parameter(f"{name}.weight").grad for part in halves)
                torch.testing.assert_close(summed, whole.get_parameter(f"{name}.weight").grad, rtol=1e-4, atol=1e-4)


def test_transformers_knows_each_word() -> None:
    styles = pytest.importorskip("transformers.distributed.tensor_parallel").ALL_PARALLEL_STYLES
    model = DecoderOnlyTransformer(50, 16, 4, 32, 1, position="rotary", qk_norm=True)
    words = set(tensor_plan(model).values())
    assert len(words) == 5
    assert words <= set(styles.keys())
