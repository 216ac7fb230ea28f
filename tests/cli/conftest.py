"""Fixtures of the command line: tiny models in folders, one thread, and a terminal with prepared input."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints.tokenizers_of_text import TEMPLATE, byte_level
from tests.checkpoints.tokenizers_of_text import save as save_tokenizer
from transformer import DecoderOnlyTransformer
from transformer.checkpoints import save_model
from transformer.cli import main

WINDOW = 12


@pytest.fixture(autouse=True, scope="package")
def _single() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(folder: Path, vocabulary: int = 256, **options: object) -> Path:
    """A model whose next token depends on much of what came before."""
    torch.manual_seed(0)
    model = DecoderOnlyTransformer(vocabulary, 16, 4, 32, 2, **{"attention": "gqa", "num_groups": 2} | options)
    for parameter in model.decoder.parameters():
        parameter.data.mul_(3)
    save_model(model.double(), folder)
    return folder


@pytest.fixture(scope="session")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It sees everything."""
    return saved(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture(scope="session")
def with_window(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It sees a few bytes."""
    return saved(tmp_path_factory.mktemp("models") / "window", window_size=WINDOW)


@pytest.fixture(scope="session")
def with_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has words, and a chat template."""
    folder = saved(tmp_path_factory.mktemp("models") / "words", byte_level().get_vocab_size())
    return save_tokenizer(byte_level(), folder, chat_template=TEMPLATE)


class Run:
    """What a command did."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def run(*arguments: object, typed: str = "") -> Run:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Run(status, *capsys.readouterr())

    return run
