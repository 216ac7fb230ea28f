"""Generation with models that ranks share: the tokens of one process, on every rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.parallel.sharing import OPTIONS, V, assert_equal_on_ranks, both, decoder, mesh_of, unsettled
from tests.ranks import on_ranks
from transformer import EncoderDecoderTransformer
from transformer.cache.policies import KeyNorm
from transformer.errors import ArgumentError, RanksError, ShapeError
from transformer.models import UMT5Config, UMT5Model, init_cache

RANKS = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])


@RANKS
def test_greedy_sampled_and_searched_tokens_are_those_of_one_process(ranks: int) -> None:
    on_ranks(ranks, _generates)


def _generates(_rank: int) -> None:
    mesh = mesh_of(torch.distributed.get_world_size())
    ids, mask = torch.randint(V, (3, 7)), torch.ones(3, 7, dtype=torch.bool)
    mask[1, :3] = False
    for name in ("gqa, gated, qk_norm", "window and sinks", "alibi, soft caps", "relative, both norms"):
        whole, shared = (each.eval() for each in both(lambda name=name: decoder(**OPTIONS[name]), mesh))
        for options in (
            {"temperature": 0.0},
            {"temperature": 0.0, "use_cache": False},
            {"temperature": 0.9, "top_k": 20, "num_return_sequences": 2},
            {"num_beams": 3, "num_return_sequences": 2},
        ):
            results = []
            for model in (whole, shared):
                torch.manual_seed(5)
                results.append(model.generate(ids, mask, max_new_tokens=8, **options))
            assert torch.equal(*results), (name, options)
            assert_equal_on_ranks(results[1])
        with_seed = []
        for model in (whole, shared):
            generator = torch.Generator().manual_seed(3)
            with_seed.append(list(model.stream(ids, max_new_tokens=6, temperature=1.0, generator=generator)))
        assert torch.equal(*map(torch.stack, with_seed))
        budget = (5, KeyNorm())
        assert torch.equal(
            *(m.enable_cache(cache_budget=budget).generate(ids, max_new_tokens=8) for m in (whole, shared))
        )


def test_targets_of_sources_and_what_their_caches_keep() -> None:
    on_ranks(2, _targets)


def _targets(_rank: int) -> None:
    mesh = mesh_of(2)
    sources = torch.randint(V, (2, 9))

    def make() -> EncoderDecoderTransformer:
        return unsettled(EncoderDecoderTransformer(V, V, 32, 8, 48, 2, qk_norm=True, tied_embeddings=True))

    whole, shared = (each.eval() for each in both(make, mesh))
    for options in ({"temperature": 0.0}, {"num_beams": 3}):
        assert torch.equal(*(each.generate(sources, max_new_tokens=7, **options) for each in (whole, shared)))
    states, ids = whole.encode(sources).detach(), torch.randint(V, (2, 4))
    expected, found = (_read_beside_new_weights(each, states, ids) for each in (whole, shared))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def _read_beside_new_weights(model: EncoderDecoderTransformer, states: Tensor, ids: Tensor) -> Tensor:
    """Logits of targets in turns; before the last one, a weight that projects the source changes."""
    reader = model.enable_cache().decoder.blocks[0].cross_attention
    logits = [model(target_ids=ids[:, :2], encoder_hidden_states=states)]
    kept = reader.kv_cache.contents.source
    logits.append(model(target_ids=ids[:, 2:3], encoder_hidden_states=states))
    # The same weights and the same source: nothing is projected again.
    assert reader.kv_cache.contents.source is kept
    reader.k_proj.weight.mul_(1.5)
    logits.append(model(target_ids=ids[:, 3:], encoder_hidden_states=states))
    assert reader.kv_cache.contents.source is not kept
    return torch.cat(logits, 1)


def test_the_parts_of_umt5() -> None:
    on_ranks(2, _umt5)


@torch.no_grad()
def _umt5(_rank: int) -> None:
    mesh, sources = mesh_of(2), torch.randint(V, (2, 9))
    config = UMT5Config(vocab_size=V, d_model=32, num_heads=4, head_dim=8, d_ff=48, num_layers=2)
    whole, shared = (each.eval() for each in both(lambda: unsettled(UMT5Model(config)), mesh))
    assert torch.equal(*(each.generate(sources, max_new_tokens=6) for each in (whole, shared)))
    ids = torch.randint(V, (2, 3))
    own = replace(shared.config, num_heads=2)
    states = []
    for model, cache in ((whole, init_cache(config, 2, 8, 9)), (shared, init_cache(own, 2, 8, 9))):
        encoded = model.encoder(sources)
        for place in range(3):
            last = model.decoder(ids[:, place : place + 1], encoded, cache=cache, use_cache=True)
        states.append(last)
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=0)
    with pytest.raises(ShapeError, match="cache: expected 2 heads in each layer, got 4"):
        shared.decoder(ids, encoded, cache=init_cache(config, 2, 8, 9), use_cache=True)


def test_what_ranks_cannot_generate_together_is_refused_on_every_rank() -> None:
    on_ranks(2, _refused)


def _refused(rank: int) -> None:
    mesh = mesh_of(2)
    _, shared = both(lambda: decoder().eval(), mesh)
    ids = torch.randint(V, (1, 5))
    with pytest.raises(RanksError, match="input_ids"):
        shared.generate(ids + rank, max_new_tokens=3)
    with pytest.raises(RanksError, match="max_new_tokens"):
        shared.generate(ids, max_new_tokens=3 + rank)
    torch.manual_seed(rank)
    with pytest.raises(RanksError, match=r"random generator \(seed it alike"):
        shared.generate(ids, max_new_tokens=3, temperature=1.0)
    assert_equal_on_ranks(shared.generate(ids, max_new_tokens=3, temperature=1.0, seed=4))
    with pytest.raises(ArgumentError, match="max_time: expected None"):
        shared.generate(ids, max_new_tokens=3, max_time=1.0)
    with pytest.raises(ArgumentError, match="assistant_model: expected None where ranks share"):
        shared.generate(ids, max_new_tokens=3, assistant_model=decoder())
    with pytest.raises(ArgumentError, match="assistant_model: expected a model of this process alone"):
        decoder().eval().generate(ids, max_new_tokens=3, assistant_model=shared)
    assert_equal_on_ranks(shared.generate(ids.repeat(1, 3), max_new_tokens=9, prompt_lookup_num_tokens=3))
    generator = torch.Generator().manual_seed(4)
    assert_equal_on_ranks(shared.generate(ids, max_new_tokens=3, temperature=1.0, generator=generator))
    _, cut = both(lambda: decoder().eval(), mesh, gather_logits=False)
    with pytest.raises(ArgumentError, match="gather_logits=True"):
        cut.generate(ids, max_new_tokens=3)
    with pytest.raises(ArgumentError, match="gather_logits=True"):
        cut.stream(ids, max_new_tokens=3)
