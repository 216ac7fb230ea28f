"""Tensor parallelism: outputs and gradients of models that ranks share, as those of one process."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

from tests.parallel.sharing import (
    CLOSE,
    OPTIONS,
    V,
    assert_equal_on_ranks,
    assert_same_gradients,
    both,
    decoder,
    mesh_of,
    unsettled,
)
from tests.ranks import on_ranks
from transformer import EncoderDecoderTransformer, GroupQueryAttention, MultiHeadAttention
from transformer.blocks import BlockStack, DecoderBlock, EncoderBlock, FeedForward, GatedFeedForward, LayerNorm, RMSNorm
from transformer.errors import ConfigurationError, DtypeError
from transformer.models import (
    DecoderOnlyTransformer,
    EncoderTransformer,
    LanguageHead,
    TokenEmbedding,
    composition_of,
)
from transformer.positions import ALiBi, RelativePositionBias

EXACT = 1e-11

PADDING = 40
"""A token whose row no gradient reaches; of two ranks the second one has it."""

RANKS = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])


@RANKS
def test_models_of_every_option_give_the_logits_and_gradients_of_one_process(ranks: int) -> None:
    on_ranks(ranks, _decoders)


def _decoders(_rank: int) -> None:
    mesh = mesh_of(torch.distributed.get_world_size())
    ids, mask = torch.randint(V, (2, 13)), torch.ones(2, 13, dtype=torch.bool)
    mask[0, :4] = False
    layouts = {"segment_ids": torch.tensor([1, 2]).repeat_interleave(torch.tensor([5, 8])).expand(2, 13)}
    for name, options in OPTIONS.items():
        whole, shared = both(lambda options=options: decoder(**options), mesh)
        for each, said in ((None, layouts), (None, {"prefix_lengths": torch.tensor([5, 0])}), (None, {}), (mask, {})):
            expected, found = whole(ids, each, **said), shared(ids, each, **said)
            torch.testing.assert_close(found, expected, atol=CLOSE * expected.abs().max().item(), rtol=0, msg=name)
        assert_equal_on_ranks(found)
        for model, logits in ((whole, expected), (shared, found)):
            model.zero_grad()
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        assert_same_gradients(whole, shared)
        assert all(isinstance(each, DTensor) for each in shared.parameters()), name


@RANKS
def test_logits_that_stay_cut_serve_the_parallel_loss(ranks: int) -> None:
    on_ranks(ranks, _losses)


def _losses(_rank: int) -> None:
    mesh = mesh_of(torch.distributed.get_world_size())
    ids, mask = torch.randint(V, (2, 13)), torch.ones(2, 13, dtype=torch.bool)
    mask[0, :4] = False
    for name in ("gqa, gated, qk_norm", "tied, layer norms", "alibi, soft caps"):
        whole, shared = both(lambda name=name: decoder(**OPTIONS[name]), mesh, gather_logits=False)
        expected = F.cross_entropy(whole(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        expected.backward()
        with loss_parallel():
            logits = shared(ids)
            assert isinstance(logits, DTensor)
            assert logits.shape == (2, 13, V)
            torch.testing.assert_close(shared(ids, mask).full_tensor()[1], whole(ids, mask)[1], atol=1e-5, rtol=0)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
        torch.testing.assert_close(loss.full_tensor(), expected, atol=CLOSE, rtol=0)
        assert_same_gradients(whole, shared)


@RANKS
def test_modules_alone_and_in_other_compositions(ranks: int) -> None:
    on_ranks(ranks, _compositions)


class Own(nn.Module):
    """A user's model: a table tied to a head, blocks with a network of the user's, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, 32)
        position = ALiBi(8)

        def attention() -> MultiHeadAttention:
            return MultiHeadAttention(32, 8, True, position=position, qk_norm=nn.LayerNorm(4))

        own = nn.Sequential(nn.Linear(32, 40), nn.GELU(), nn.Linear(40, 32))
        blocks = [DecoderBlock(attention(), FeedForward(32, 48), nn.LayerNorm), DecoderBlock(attention(), own, RMSNorm)]
        self.stack = BlockStack(blocks, nn.RMSNorm(32, eps=1e-6))
        self.shift = nn.Parameter(torch.zeros(32))
        self.torch = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.head = LanguageHead(32, V, bias=True)
        self.head.proj.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.torch(self.stack(self.table(ids) + self.shift)))
        return logits


def composed() -> DecoderOnlyTransformer:
    position = RelativePositionBias(8)
    blocks = [
        DecoderBlock(GroupQueryAttention(32, 8, 4, True, position=position), GatedFeedForward(32, 48), RMSNorm)
        for _ in range(2)
    ]
    embedding = nn.Sequential(nn.Embedding(V, 24, padding_idx=PADDING), nn.Linear(24, 32))
    return DecoderOnlyTransformer.from_parts(embedding, BlockStack(blocks), nn.Linear(32, V))


def _compositions(_rank: int) -> None:
    mesh = mesh_of(torch.distributed.get_world_size())
    # In float64, where only a wrong sum shows.
    x, source, bias = (torch.randn(*shape).double() for shape in ((2, 7, 32), (2, 9, 24), (2, 8, 7, 7)))
    ids = torch.randint(V, (2, 7))
    ids[0, 0] = PADDING
    qk_norm = {"qk_norm": LayerNorm(4)}
    cases = [
        (lambda: MultiHeadAttention(32, 8, True, **qk_norm), (x,), {}),
        (lambda: GroupQueryAttention(32, 8, 4, position=ALiBi(8)), (x,), {"attn_bias": bias}),
        (lambda: GroupQueryAttention(32, 8, 4), (x,), {"attn_bias": bias[:1, :1] > 0}),
        (lambda: MultiHeadAttention(32, 8, kv_dim=24, qk_norm=RMSNorm, out_bias=False), (x, source), {}),
        (lambda: FeedForward(32, 48), (x,), {}),
        (lambda: GatedFeedForward(32, 48, bias=True), (x,), {}),
        (lambda: EncoderBlock(MultiHeadAttention(32, 8), FeedForward(32, 48), nn.LayerNorm), (x,), {}),
        (
            lambda: DecoderBlock(
                MultiHeadAttention(32, 8, True),
                FeedForward(32, 48),
                RMSNorm,
                cross_attention=MultiHeadAttention(32, 8, kv_dim=24, qk_norm=RMSNorm),
            ),
            (x, source),
            {},
        ),
        (lambda: nn.ModuleDict({"t": TokenEmbedding(3, 32, 2.0)})["t"], (ids % 3,), {}),
        (Own, (ids,), {}),
        (composed, (ids,), {}),
        (lambda: EncoderTransformer(V, 32, 8, 48, 2, position="learned", max_length=9, num_token_types=2), (ids,), {}),
        (lambda: EncoderDecoderTransformer(V, V, 32, 8, 48, 2, tied_embeddings=True), (ids, ids.flip(0)), {}),
        (
            lambda: EncoderDecoderTransformer(V, 50, 32, 8, 48, 1, position="relative", shared_embeddings=False),
            (ids % 50, ids.flip(0) % 50),
            {},
        ),
    ]
    for number, (make, arguments, keywords) in enumerate(cases):
        whole, shared = both(lambda make=make: unsettled(make().double()), mesh)
        inputs = [tuple(a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments) for _ in "12"]
        expected, found = whole(*inputs[0], **keywords), shared(*inputs[1], **keywords)
        torch.testing.assert_close(found, expected, atol=EXACT, rtol=EXACT, msg=f"{number}")
        weights = torch.randn_like(expected)
        for result in (expected, found):
            (result * weights).sum().backward()
        assert_same_gradients(whole, shared, EXACT)
        for one, other in zip(*inputs, strict=True):
            if one.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, atol=EXACT * one.grad.abs().max().item(), rtol=EXACT)


def test_what_is_sent_in_a_step() -> None:
    on_ranks(2, _sent)


def _sent(_rank: int) -> None:
    ids = torch.randint(V, (2, 5))
    _, shared = both(lambda: decoder(qk_norm=True), mesh_of(2))
    with CommDebugMode() as forward:
        loss = shared(ids).square().mean()
    with CommDebugMode() as backward:
        loss.backward()
    with CommDebugMode() as without_gradients, torch.no_grad():
        shared(ids)
    # Of 2 layers: attention and network each; the embedding; logits are joined.
    for counted in (forward, without_gradients):
        assert sorted(counted.get_comm_counts().values()) == [1, 5]
    # The same backward, from the head instead of the embedding, and two norms of each layer's heads.
    assert list(backward.get_comm_counts().values()) == [5 + 4]


def test_weights_are_returned_of_all_heads() -> None:
    on_ranks(2, _weights)


def _weights(_rank: int) -> None:
    mesh, x = mesh_of(2), torch.randn(2, 7, 32)
    whole, shared = both(lambda: unsettled(GroupQueryAttention(32, 8, 4, True)), mesh)
    for one, other in zip(whole(x, return_weights=True), shared(x, return_weights=True), strict=True):
        torch.testing.assert_close(other, one, atol=CLOSE, rtol=0)
    model, other = both(lambda: decoder(), mesh)
    ids = torch.randint(V, (2, 5))
    expected, found = (each(ids, output_attentions=True).attentions for each in (model, other))
    for one, another in zip(expected, found, strict=True):
        torch.testing.assert_close(another, one, atol=CLOSE, rtol=0)


def test_a_shared_model_is_copied_pickled_and_trained_like_any() -> None:
    on_ranks(2, _handled)


def _handled(_rank: int) -> None:
    mesh = mesh_of(2)
    ids = torch.randint(V, (2, 9))
    whole, shared = both(lambda: decoder(**OPTIONS["tied, layer norms"]), mesh)
    assert list(whole.state_dict()) == list(shared.state_dict())
    assert isinstance(shared.decoder.blocks[0].attention, MultiHeadAttention)
    assert shared.head.proj.weight is shared.embedding.tokens.weight
    for copied in (copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert copied.head.proj.weight is copied.embedding.tokens.weight
        torch.testing.assert_close(copied(ids), shared(ids), atol=0, rtol=0)
    wide = copy.deepcopy(shared).double()
    assert wide.head.proj.weight is wide.embedding.tokens.weight
    torch.testing.assert_close(wide(ids), copy.deepcopy(whole).double()(ids), atol=EXACT, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(shared(ids), whole(ids), atol=CLOSE, rtol=0)
    with pytest.raises(DtypeError, match=r"x: expected torch\.float32, as the module's weights"):
        shared.decoder.blocks[0].attention(torch.randn(1, 2, 32).double())
    with pytest.raises(ConfigurationError, match="VocabParallelEmbedding"):
        composition_of(shared)
    weights = {name: each.clone() for name, each in whole.state_dict().items()}
    set_model_state_dict(shared, weights, options=StateDictOptions(full_state_dict=True))
    # Several steps of a fused loop over all parameters, with clipping.
    models = (whole, shared)
    for _ in range(3):
        norms = []
        for model in models:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
            optimizer.zero_grad()
            F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            optimizer.step()
        torch.testing.assert_close(norms[1], norms[0], atol=CLOSE, rtol=1e-5)
    torch.testing.assert_close(shared(ids), whole(ids), atol=2e-5, rtol=0)
