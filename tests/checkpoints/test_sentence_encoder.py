"""Sentence encoders in folders of sentence-transformers, compared with plain loops over a text's own states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.checkpoints.tokenizers_of_text import byte_level
from tests.peers.models import fill
from transformer.checkpoints import SentenceEncoder, load_model, load_sentence_encoder, load_tokenizer, save_model
from transformer.errors import ArgumentError, CacheStateError, ConfigurationError, FileFormatError

WIDTH, ROOM = 24, 12
TEXTS = ["The fox", "", "one two two three three three, and over the lazy dog", "東京", "jumps"]
SIZES = {
    "vocab_size": 300,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "max_position_embeddings": 20,
}
MODULES = "sentence_transformers.models."
POOLING = "1_Pooling/config.json"


def tokenizer() -> Tokenizer:
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return made


def written(folder: Path, theirs: PreTrainedModel, files: dict[str, object], *, normal: bool = True) -> Path:
    """A folder as sentence-transformers writes it; `files` are further JSON files."""
    fill(theirs)
    theirs.eval().save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    paths = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if normal else {})
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": MODULES + kind}
        for index, (kind, path) in enumerate(paths.items())
    ]
    for name, content in ({"modules.json": modules} | files).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def expected(theirs: PreTrainedModel, text: str, pooling: str, normal: bool, room: int | None) -> Tensor:
    """Token by token, of one text alone."""
    inner = tokenizer().encode(text, add_special_tokens=False).ids
    tokens = [0, *inner, 1]
    if room is not None and len(tokens) > room:
        tokens = [0, *inner[: room - 2], 1]
    states = theirs.base_model(torch.tensor([tokens])).last_hidden_state[0].tolist()
    chosen = {"cls": states[:1], "lasttoken": states[-1:], "mean": states}[pooling]
    vector = [sum(state[i] for state in chosen) / len(chosen) for i in range(WIDTH)]
    length = sum(number * number for number in vector) ** 0.5 if normal else 1.0
    return torch.tensor([number / length for number in vector])


@pytest.mark.parametrize(
    ("pooling", "options"),
    [
        ("mean", {"word_embedding_dimension": WIDTH}),
        ("cls", {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}),
        ("lasttoken", {"embedding_dimension": WIDTH, "pooling_mode": "lasttoken", "include_prompt": True}),
    ],
)
@torch.no_grad()
def test_vectors_of_an_encoder(pooling: str, options: dict[str, object], tmp_path: Path) -> None:
    theirs, normal = BertModel(BertConfig(**SIZES)), pooling != "cls"
    files = {POOLING: options, "sentence_bert_config.json": {"max_seq_length": ROOM, "do_lower_case": False}}
    ours = load_sentence_encoder(written(tmp_path, theirs, files, normal=normal))
    assert (ours.max_length, ours.training) == (ROOM, False)
    wanted = torch.stack([expected(theirs, text, pooling, normal, ROOM) for text in TEXTS])
    for size in (1, 2, 32):
        torch.testing.assert_close(ours.encode(TEXTS, batch_size=size), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode(TEXTS[0]), wanted[0], rtol=0, atol=1e-5)
    assert ours.encode([]).shape == (0, WIDTH)
    ids, mask = ours.tokenizer.encode_batch(TEXTS, max_length=ROOM)
    torch.testing.assert_close(ours(ids, mask), wanted, rtol=0, atol=1e-5)
    # Padding on the left.
    left = mask.flip(1), torch.stack([row.roll(int((~real).sum())) for row, real in zip(ids, mask, strict=True)])
    torch.testing.assert_close(ours(left[1], left[0]), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_vectors_of_a_decoder_with_a_head(tmp_path: Path) -> None:
    """As of Qwen3-Embedding: the last token's state, and prompts."""
    theirs = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2))
    files = {
        POOLING: {"word_embedding_dimension": WIDTH, "pooling_mode_lasttoken": True},
        "config_sentence_transformers.json": {"prompts": {"query": "over ", "document": ""}},
        "tokenizer_config.json": {"model_max_length": 30},
    }
    ours = load_sentence_encoder(written(tmp_path, theirs, files))
    assert (ours.max_length, ours.model.head) == (30, None)
    headed = SentenceEncoder(load_model(tmp_path), ours.tokenizer, pooling="last", normalize=True, max_length=30)
    assert torch.equal(headed.encode(TEXTS), ours.encode(TEXTS))
    headed.model.enable_cache()
    with pytest.raises(CacheStateError, match="model: expected caches off"):
        headed.encode(TEXTS)
    for prompt, before in ((None, ""), ("document", ""), ("query", "over ")):
        wanted = torch.stack([expected(theirs, before + text, "lasttoken", True, 30) for text in TEXTS])
        torch.testing.assert_close(ours.encode(TEXTS, prompt=prompt), wanted, rtol=0, atol=1e-5)
    with pytest.raises(ArgumentError, match=r"prompt: expected None or one of \['document', 'query'\], got 'answer'"):
        ours.encode(TEXTS, prompt="answer")
    with pytest.raises(ArgumentError, match="prompt: expected None, as this encoder has no prompts, got 'query'"):
        headed.encode(TEXTS, prompt="query")
    for wrong in (["a", 1], {"a": 1}, 7):
        with pytest.raises(ArgumentError, match="texts: expected a list of str"):
            ours.encode(wrong)


def test_it_is_trained(tmp_path: Path) -> None:
    """Two texts that mean the same come nearer; the options of the class say what files would."""
    options = {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": True}
    written(tmp_path, BertModel(BertConfig(**SIZES)), {POOLING: options})
    ours = SentenceEncoder(load_model(tmp_path), load_tokenizer(tmp_path), pooling="cls", lowercase=True)
    torch.testing.assert_close(ours.encode("The FOX"), ours.encode("the fox"))
    assert ours.max_length == 20
    for option in ({"pooling": "max"}, {"max_length": 0}, {"default_prompt": "query"}):
        with pytest.raises(ArgumentError, match="expected"):
            SentenceEncoder(ours.model, ours.tokenizer, **option)
    ids, mask = ours.tokenizer.encode_batch(TEXTS[:2])
    optimizer, distances = torch.optim.Adam(ours.parameters(), 1e-3), []
    for _ in range(5):
        first, second = ours(ids, mask)
        distance = (first - second).square().sum()
        distances.append(distance.item())
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
    assert distances[-1] < 0.7 * distances[0]
    # Saved beside the other files of its folder.
    save_model(ours.model, tmp_path / "trained")
    for file in ("modules.json", "tokenizer.json", "1_Pooling"):
        (tmp_path / file).rename(tmp_path / "trained" / file)
    again = load_sentence_encoder(tmp_path / "trained")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(ours(ids, mask), dim=-1)
    torch.testing.assert_close(again.encode(TEXTS[:2]), expected, rtol=0, atol=1e-6)


REFUSED: list[tuple[str, str, object]] = [
    (POOLING, "pooling_mode_max_tokens", {"pooling_mode_max_tokens": True}),
    (POOLING, "pooling_mode_mean_tokens", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}),
    (POOLING, "pooling_mode", {"pooling_mode": "weightedmean"}),
    (POOLING, "pooling_mode", {"pooling_mode": ["cls", "mean"]}),
    (POOLING, "include_prompt", {"include_prompt": False}),
    (POOLING, "word_embedding_dimension", {"word_embedding_dimension": 8}),
    ("2_Normalize/config.json", "module_input_name", {"module_input_name": "token_embeddings"}),
    ("sentence_bert_config.json", "max_seq_length", {"max_seq_length": 0}),
    ("sentence_bert_config.json", "transformer_task", {"transformer_task": "fill-mask"}),
    ("sentence_bert_config.json", "query_length", {"query_length": 32}),
    ("config_sentence_transformers.json", "model_type", {"model_type": "SparseEncoder"}),
    ("config_sentence_transformers.json", "prompts.query", {"prompts": {"query": 3}}),
    ("modules.json", "type", [{"type": MODULES + "Transformer", "path": ""}]),
    ("modules.json", "type", [{"type": MODULES + kind, "path": ""} for kind in ("Transformer", "Pooling", "Dense")]),
]


@pytest.fixture(scope="module")
def model() -> BertModel:
    return BertModel(BertConfig(**SIZES))


@pytest.mark.parametrize(("name", "key", "content"), REFUSED, ids=str)
def test_what_would_give_other_vectors_is_refused(
    name: str, key: str, content: object, model: BertModel, tmp_path: Path
) -> None:
    written(tmp_path, model, {name: content})
    with pytest.raises(ConfigurationError, match=rf"^{tmp_path / name}, {key}: expected"):
        load_sentence_encoder(tmp_path)


def test_other_folders_are_refused(model: BertModel, tmp_path: Path) -> None:
    written(tmp_path, model, {"modules.json": {}})
    with pytest.raises(FileFormatError, match=r"modules.json: expected a JSON list of objects"):
        load_sentence_encoder(tmp_path)
    outside = [{"type": MODULES + "Transformer", "path": ""}, {"type": MODULES + "Pooling", "path": "../x"}]
    (tmp_path / "modules.json").write_text(json.dumps(outside))
    with pytest.raises(FileFormatError, match=r"expected names of subfolders, got '../x'"):
        load_sentence_encoder(tmp_path)
    (tmp_path / "modules.json").unlink()
    with pytest.raises(FileFormatError, match=r"expected a folder with modules.json.*SentenceEncoder\(load_model"):
        load_sentence_encoder(tmp_path)
    with pytest.raises(ArgumentError, match="max_length: expected room for 2 special tokens"):
        load_tokenizer(tmp_path).encode_batch(TEXTS, max_length=1)


@pytest.mark.parametrize(
    "processor",
    [
        processors.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]),
        processors.TemplateProcessing(single="<s> <s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]),
    ],
)
def test_texts_are_cut_as_transformers_cuts_them(processor: object, tmp_path: Path) -> None:
    made = byte_level()
    made.post_processor = processor
    made.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = load_tokenizer(tmp_path), PreTrainedTokenizerFast(tokenizer_object=made, pad_token="</s>")
    for room in (3, 4, 9, 20, None):
        ids, mask = ours.encode_batch(TEXTS, max_length=room)
        cut = theirs(TEXTS, truncation=room is not None, max_length=room)["input_ids"]
        assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == cut
