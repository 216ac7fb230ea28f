"""A model that is parallelized on the meta device, and filled by each rank with its part alone."""

from __future__ import annotations

import torch

from tests.parallel.sharing import OPTIONS, V, decoder, mesh_of
from tests.ranks import on_ranks
from transformer import DecoderOnlyTransformer
from transformer.parallel import own_part, parallelize


def test_each_rank_fills_its_part() -> None:
    on_ranks(2, _filled)


@torch.no_grad()
def _filled(_rank: int) -> None:
    mesh, ids = mesh_of(2), torch.randint(V, (2, 5))
    for name in ("gqa, gated, qk_norm", "relative, both norms", "tied, layer norms"):
        whole = decoder(**OPTIONS[name])
        with torch.device("meta"):
            shared = DecoderOnlyTransformer(V, 32, 8, 48, 2, **OPTIONS[name])
        parallelize(shared, mesh)
        assert all(each.is_meta for each in shared.parameters())
        shared.to_empty(device="cpu")
        expected = whole.state_dict()
        for path, parameter in shared.named_parameters():
            parameter.to_local().copy_(expected[path][own_part(parameter)])
        assert shared.config.tied_embeddings == (shared.head.proj.weight is shared.embedding.tokens.weight)
        torch.testing.assert_close(shared(ids), whole(ids), atol=1e-5, rtol=0)
        held = sum(each.to_local().numel() for each in shared.parameters())
        assert held < 0.6 * sum(each.numel() for each in whole.parameters())
