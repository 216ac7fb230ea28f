"""Special tokens of a tokenizer's class, compared with transformers on the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from tests.checkpoints.test_special_tokens import HELLO, NAMES, TEXT, written
from tests.checkpoints.tokenizers_of_text import byte_level
from transformer.checkpoints import load_tokenizer

CLASSES = [
    (None, "gpt2"),
    (None, "qwen2"),
    (None, "qwen3"),
    (None, "llama"),
    (None, "opt"),
    (None, "phi"),
    (None, "starcoder2"),
    (None, "gpt_neox"),
    (None, "stablelm"),
    ("GPTNeoXTokenizerFast", "stablelm"),
    ("GPT2TokenizerFast", "llama"),
    ("Qwen2Tokenizer", "gpt2"),
    ("PreTrainedTokenizerFast", "gpt2"),
    ("LlamaTokenizerFast", "qwen2"),
    ("PreTrainedTokenizerFast", "qwen3"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model"), CLASSES)
def test_tokens_that_only_the_class_names(tmp_path: Path, kind: str | None, model: str) -> None:
    """As in the folder of the first GPT-2, whose files name none."""
    backend = byte_level()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<|endoftext|>", "<|padding|>")])
    if model == "gpt_neox":
        backend.post_processor = processors.ByteLevel()  # Its class in transformers leaves out what a file adds.
    kind_of = {} if kind is None else {"tokenizer_class": kind}
    nulls = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"))
    cases = [{"tokenizer_config": kind_of | names} for names in ({}, {"eos_token": "</s>"}, nulls)]
    cases.append({"tokenizer_config": kind_of, "special_tokens_map": {"eos_token": "</s>", "pad_token": None}})
    for number, files in enumerate((*cases, {})):
        files = files and files | {"tokenizer_config": files["tokenizer_config"] | {"chat_template": NAMES}}
        folder = written(tmp_path / str(number), backend, **files, config={"model_type": model})
        ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        tokens = ours.encode(TEXT + "<|endoftext|>")
        assert tokens == theirs.encode(TEXT + "<|endoftext|>")
        assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
        assert ours.stop_tokens == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
        if files:
            assert ours.template.render(HELLO) == theirs.apply_chat_template(HELLO, tokenize=False)


def test_a_class_adds_no_token(tmp_path: Path) -> None:
    folder = written(tmp_path, byte_level(), tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    assert load_tokenizer(folder).stop_tokens == ()


def of_words(kind: str) -> Tokenizer:
    """Of T5, Gemma, BERT or RoBERTa: the model of its tokenizer, and its special tokens."""
    special = {
        "t5": ["<pad>", "</s>", "<unk>"],
        "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    }[kind]
    letters = "abcdefgh"
    if kind == "bert":
        pieces = [*special, *letters, *(f"##{letter}" for letter in letters)]
        tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif kind == "t5":
        tokenizer = Tokenizer(models.Unigram([*((name, 0.0) for name in special), *((x, -2.0) for x in letters)], 2))
    else:
        vocabulary = {piece: i for i, piece in enumerate((*special, "▁", *letters))}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("t5", None),
        ("mt5", None),
        ("umt5", None),
        ("t5", "T5TokenizerFast"),
        ("t5", "PreTrainedTokenizerFast"),
        ("gemma", None),
        ("gemma2", "GemmaTokenizer"),
        ("gemma", "PreTrainedTokenizerFast"),
        ("bart", None),
        ("bart", "BartTokenizerFast"),
        ("bert", None),
        ("bert", "BertTokenizer"),
        ("bert", "PreTrainedTokenizerFast"),
        ("distilbert", None),
        ("roberta", None),
        ("roberta", "RobertaTokenizerFast"),
    ],
)
def test_names_of_other_classes(tmp_path: Path, model: str, kind: str | None) -> None:
    config = {"chat_template": NAMES + "{{ cls_token }}{{ sep_token }}{{ mask_token }}{{ unk_token }}"}
    config |= {} if kind is None else {"tokenizer_class": kind}
    backend = of_words(
        {"mt5": "t5", "umt5": "t5", "gemma2": "gemma", "distilbert": "bert", "bart": "roberta"}.get(model, model)
    )
    folder = written(tmp_path, backend, tokenizer_config=config, config={"model_type": model})
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.stop_tokens == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.template.render(HELLO) == theirs.apply_chat_template(HELLO, tokenize=False)
