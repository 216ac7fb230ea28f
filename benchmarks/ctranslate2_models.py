"""Models in CTranslate2, converted from what `save_model` wrote, in float32 and with int8 weights.

CTranslate2 quantises float32 weights to int8 when it loads them. Its ids are those of the tokenizer, which here has one
word for each of them.
"""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .case import Candidate
from .own_process import OwnProcess

FLOAT32, INT8 = "CTranslate2", "CTranslate2, int8"
COMPUTE_TYPES = {FLOAT32: "float32", INT8: "int8"}
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


@cache
def converted(folder: Path, vocab_size: int) -> str:
    """The folder of CTranslate2's model, beside the one that `save_model` wrote."""
    ids = {token: index for index, token in enumerate(_tokens(vocab_size))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    return TransformersConverter(str(folder)).convert(f"{folder}-converted", quantization="float32")


def writing(folder: Path, vocab_size: int, name: str, prompts: list[list[int]], new: int, **options: Any) -> Candidate:
    """Generation of `new` tokens after each prompt: greedy, or by the options of `generate_batch`."""
    options |= {"min_length": new, "max_length": new, "include_prompt_in_result": False}
    process = _loaded("Generator", converted(folder, vocab_size), name, _named(prompts, vocab_size), options)
    return Candidate(lambda: _checked(process.ask(), new))


def translating(folder: Path, vocab_size: int, name: str, sources: list[list[int]], new: int) -> Candidate:
    """Greedy generation of `new` tokens for each source."""
    options = {"beam_size": 1, "min_decoding_length": new, "max_decoding_length": new}
    process = _loaded("Translator", converted(folder, vocab_size), name, _named(sources, vocab_size), options)
    return Candidate(lambda: _checked(process.ask(), new))


def encoding(folder: Path, vocab_size: int, name: str, rows: list[list[int]], **wanted: bool) -> Candidate:
    """The states of all rows, which CTranslate2 pads itself; they are handed over with `states=True` only."""
    process = _loaded("Encoder", converted(folder, vocab_size), name, rows, {})
    return Candidate(lambda: process.ask(**wanted))


def _loaded(kind: str, folder: str, name: str, rows: list[Any], options: dict[str, Any]) -> OwnProcess:
    """A process with a model: in this one its OpenMP would slow PyTorch's for good (33 % of a step of 135M in int8)."""
    process = OwnProcess("ctranslate2_process.py")
    process.ask(kind=kind, folder=folder, settings=_settings(name), rows=rows, options=options)
    return process


def real_ids(ids: Tensor, mask: Tensor | None = None) -> list[list[int]]:
    """The ids of each row, without its padding."""
    if mask is None:
        return ids.tolist()
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def _settings(name: str) -> dict[str, Any]:
    threads = {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
    return {"device": "cpu", "compute_type": COMPUTE_TYPES[name], **threads}


def _tokens(vocab_size: int) -> list[str]:
    special = list(SPECIAL.values())
    return [*special, *(f"w{index}" for index in range(len(special), vocab_size))]


def _named(rows: list[list[int]], vocab_size: int) -> list[list[str]]:
    tokens = _tokens(vocab_size)
    return [[tokens[index] for index in row] for row in rows]


def _checked(rows: list[list[Any]], new: int) -> list[list[Any]]:
    if any(len(row) != new for row in rows):
        raise RuntimeError(f"CTranslate2: expected {new} new tokens in each row, got {[len(row) for row in rows]}")
    return rows


# It says so for each conversion that a model has no sampling defaults.
logging.getLogger("ctranslate2").setLevel(logging.ERROR)
