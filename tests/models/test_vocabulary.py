"""Change of a model's number of tokens: rows, ties, configuration, caches and files afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.models.variants import VOCAB, decoder_only, encoder_decoder, ids
from transformer import DecoderOnlyTransformer
from transformer.blocks import BlockStack
from transformer.checkpoints import load_model, save_model
from transformer.errors import ArgumentError, ConfigurationError
from transformer.models import EncoderTransformer, LanguageHead, UMT5Config, UMT5Model, composed, composition_of


def grown(weight: Tensor, size: int) -> Tensor:
    return torch.cat((weight, weight.mean(0).expand(size - weight.shape[0], *weight.shape[1:])))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [VOCAB + 6, VOCAB, VOCAB - 4, 1])
@torch.no_grad()
def test_earlier_tokens_keep_their_logits(tied: bool, size: int) -> None:
    model = decoder_only(tied_embeddings=tied)
    model.embedding.tokens.requires_grad_(False)
    table, weight, tokens = model.embedding.tokens.weight, model.head.proj.weight, ids(2, 5, min(size, VOCAB))
    logits, both = model(tokens), min(size, VOCAB)
    assert model.resize_token_embeddings(size) is model
    assert model.config.vocab_size == model.embedding.tokens.num_embeddings == model.head.proj.out_features == size
    torch.testing.assert_close(model(tokens)[..., :both], logits[..., :both], rtol=0, atol=1e-12)
    assert (model.head.proj.weight is model.embedding.tokens.weight) is tied
    for new, old in ((model.embedding.tokens.weight, table), (model.head.proj.weight, weight)):
        assert new is not old
        assert type(new) is nn.Parameter
        assert (new.dtype, new.requires_grad) == (old.dtype, old.requires_grad)
        assert torch.equal(new[:both], old[:both])
        if size > VOCAB:
            torch.testing.assert_close(new, grown(old, size), rtol=0, atol=1e-12)
    assert not model.embedding.tokens.weight.requires_grad
    assert model.generate(tokens, max_new_tokens=3).max() < size


def test_the_new_tokens_are_trained_and_generated() -> None:
    model, new = decoder_only(tied_embeddings=True).resize_token_embeddings(VOCAB + 2).train(), VOCAB + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    rows = torch.tensor([[1, 2, new, 3, new]])
    for _ in range(40):
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    assert model.eval().generate(rows[:, :2], max_new_tokens=3).tolist() == rows.tolist()


def test_a_running_conversation_stays() -> None:
    model, tokens = decoder_only().enable_cache(), ids(2, 6)
    with torch.no_grad():
        whole = decoder_only()(tokens)
        model(tokens[:, :4])
        model.resize_token_embeddings(VOCAB + 3)
        torch.testing.assert_close(model(tokens[:, 4:])[..., :VOCAB], whole[:, 4:], rtol=0, atol=1e-12)
    assert model.kv_cache.length == 6


def test_files_and_compositions_afterwards(tmp_path: Path) -> None:
    for number, options in enumerate(({}, {"tied_embeddings": True}, {"logit_softcap": 4.0})):
        model = decoder_only(dtype=torch.float32, **options).resize_token_embeddings(VOCAB + 3)
        save_model(model, tmp_path / str(number))
        again = load_model(tmp_path / str(number), torch.float32)
        tokens = ids(2, 5, VOCAB + 3)
        with torch.no_grad():
            assert torch.equal(again(tokens), model(tokens))
        assert composed(composition_of(model)).config.vocab_size == VOCAB + 3


def test_gradients_reach_parameters_made_in_inference_mode() -> None:
    model = decoder_only()
    with torch.inference_mode():
        model.resize_token_embeddings(VOCAB + 1)
    model(ids(2, 3), labels=ids(2, 3)).loss.backward()
    assert model.embedding.tokens.weight.grad is not None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_a_model_by_parts(tied: bool, bias: bool) -> None:
    whole = decoder_only(tied_embeddings=False)
    table, head = nn.Embedding(VOCAB, 16, dtype=torch.float64), nn.Linear(16, VOCAB, bias, dtype=torch.float64)
    if tied:
        head.weight = table.weight
    model = DecoderOnlyTransformer.from_parts(table, BlockStack(whole.decoder.blocks, whole.decoder.norm), head).eval()
    tokens = ids(2, 5)
    logits = model(tokens)
    model.resize_token_embeddings(VOCAB + 3)
    assert (head.weight is table.weight) is tied
    assert model.embedding is table
    torch.testing.assert_close(model(tokens)[..., :VOCAB], logits, rtol=0, atol=1e-12)
    if bias:
        torch.testing.assert_close(head.bias, grown(head.bias[:VOCAB], VOCAB + 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_an_encoder_decoder(tied: bool) -> None:
    model, source, target = encoder_decoder(tied_embeddings=tied), ids(2, 5), ids(2, 4)
    logits = model(source, target)
    model.resize_token_embeddings(VOCAB + 5)
    assert (model.config.src_vocab_size, model.config.tgt_vocab_size) == (VOCAB + 2, VOCAB + 5)
    torch.testing.assert_close(model(source, target)[..., :VOCAB], logits, rtol=0, atol=1e-12)
    assert (model.head.proj.weight is model.target_embedding.tokens.weight) is tied
    model.resize_token_embeddings(VOCAB, src_vocab_size=VOCAB + 9)
    torch.testing.assert_close(model(source, target), logits, rtol=0, atol=1e-12)
    assert model.source_embedding.tokens.weight.shape == (VOCAB + 9, 16)
    assert model.config.src_vocab_size == VOCAB + 9


@torch.no_grad()
def test_shared_embeddings_stay_shared(tmp_path: Path) -> None:
    model = type(encoder_decoder())(VOCAB, VOCAB, 16, 4, 20, 1, shared_embeddings=True).eval()
    source, target = ids(2, 5), ids(2, 4)
    logits = model(source, target)
    model.resize_token_embeddings(VOCAB + 5)
    table = model.target_embedding.tokens.weight
    assert model.source_embedding.tokens.weight is model.head.proj.weight is table
    assert model.config.src_vocab_size == model.config.tgt_vocab_size == VOCAB + 5
    torch.testing.assert_close(model(source, target)[..., :VOCAB], logits)
    save_model(model, tmp_path / "saved")
    assert torch.equal(load_model(tmp_path / "saved", torch.float32)(source, target), model(source, target))
    with pytest.raises(ConfigurationError, match="shared_embeddings"):
        model.resize_token_embeddings(VOCAB, src_vocab_size=VOCAB + 1)
    assert model.config.tgt_vocab_size == VOCAB + 5


@torch.no_grad()
def test_umt5() -> None:
    model, tokens = (
        UMT5Model(UMT5Config(vocab_size=VOCAB, d_model=16, num_heads=2, head_dim=8, d_ff=20, num_layers=1)),
        ids(2, 5),
    )
    logits = model.eval()(tokens, tokens)
    model.resize_token_embeddings(VOCAB + 3)
    torch.testing.assert_close(model(tokens, tokens)[..., :VOCAB], logits)
    assert model.generate(tokens + 3, max_new_tokens=3).shape == (2, 3)


@torch.no_grad()
def test_an_encoder() -> None:
    model, tokens = EncoderTransformer(VOCAB, 16, 4, 20, 1).eval(), ids(2, 5)
    states = model(tokens)
    assert torch.equal(model.resize_token_embeddings(VOCAB + 3)(tokens), states)
    assert model.config.vocab_size == VOCAB + 3


class Rest(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class OwnHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = LanguageHead(16, VOCAB)

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states)


def parametrized() -> DecoderOnlyTransformer:
    model = decoder_only()
    parametrize.register_parametrization(model.head.proj, "weight", Rest())
    return model


def of_own_head() -> DecoderOnlyTransformer:
    whole = decoder_only()
    return DecoderOnlyTransformer.from_parts(whole.embedding, whole.decoder, OwnHead())


@pytest.mark.parametrize(
    ("make", "path"), [(parametrized, "head.proj"), (of_own_head, "head")], ids=["parametrized", "a head of one's own"]
)
def test_other_modules_are_refused_before_anything_changes(make, path: str) -> None:
    model = make()
    before = dict(model.named_parameters())
    with pytest.raises(ConfigurationError, match=rf"^{path}: expected an nn.Embedding or nn.Linear"):
        model.resize_token_embeddings(VOCAB + 1)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.config.vocab_size == VOCAB


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None, "9"])
def test_sizes_are_numbers_of_tokens(size: object) -> None:
    with pytest.raises(ArgumentError, match=r"^vocab_size: expected a whole number"):
        decoder_only().resize_token_embeddings(size)
    with pytest.raises(ArgumentError, match=r"^tgt_vocab_size: expected a whole number"):
        encoder_decoder().resize_token_embeddings(size)


def test_a_start_token_cannot_be_dropped() -> None:
    model = encoder_decoder(start_token=VOCAB - 1)
    with pytest.raises(ConfigurationError, match="start_token"):
        model.resize_token_embeddings(VOCAB - 1)
    assert model.target_embedding.tokens.num_embeddings == VOCAB


def test_sources_that_are_vectors_have_no_vocabulary() -> None:
    model = type(encoder_decoder())(None, VOCAB, 16, 4, 20, 1)
    model.resize_token_embeddings(VOCAB + 1)
    with pytest.raises(ArgumentError, match=r"^src_vocab_size: expected None"):
        model.resize_token_embeddings(VOCAB, src_vocab_size=4)
