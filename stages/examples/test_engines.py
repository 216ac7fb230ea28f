"""The examples of engines: a composition that transformers trains and runs, and a client of a server."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoTokenizer

from transformer.checkpoints import load_model

from .test_examples import number, printed


@pytest.mark.slow
def test_a_composition_is_tuned_by_transformers_and_saved_for_servers(tmp_path):
    folder = tmp_path / "composed"
    options = ["--steps", "12", "--lora-steps", "6", "--tokens", "24", "--save", str(folder)]
    text = printed("engines/finetune.py", *options)
    untrained = number(r"12 steps: ([\d.]+) bits per byte at first", text)
    assert number(r"after the training: ([\d.]+) bits per byte", text) < untrained - 2
    before = number(r"6 steps of LoRA: ([\d.]+) bits per byte at first", text)
    assert number(r"weights of adapters were trained and merged: ([\d.]+)", text) < before
    assert "both gave the same tokens" in text
    assert text.endswith(f"saved: {folder}\n")

    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ModularForCausalLM"]
    tokenizer, words = AutoTokenizer.from_pretrained(folder), "naïve 東京\t  it's\n"
    tokens = tokenizer(words)["input_ids"]
    assert tokens == list(words.encode())
    assert tokenizer.decode(tokens) == words
    prompt = torch.tensor([list(b"        self._")])
    written = load_model(folder).generate(prompt, max_new_tokens=24)[0].tolist()
    assert bytes(written).decode("utf-8", "replace").rstrip() in text


@pytest.mark.parametrize("options", [["--prompt", ""], ["--steps", "0"], ["--tokens", "0"], ["--lora-steps", "0"]])
def test_the_tuning_refuses_what_it_cannot_do(start, capsys, options):
    with pytest.raises(SystemExit) as end:
        start("engines/finetune.py", *options)
    assert end.value.code == 2
    assert "error: --prompt, --steps, --lora-steps, --tokens: expected" in capsys.readouterr().err


def test_the_tuning_leaves_a_folder_alone(start, capsys, tmp_path):
    with pytest.raises(SystemExit):
        start("engines/finetune.py", "--save", str(tmp_path))
    assert "error: --save: expected a new folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Server(BaseHTTPRequestHandler):
    """Answers as servers of OpenAI's protocol do: with the words of the prompt, one event each."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, asked))
        self.send_response(200 if asked["model"] == "composed" else 400)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in asked["prompt"].split():
            choice = {"text": f" {word}!", "index": 0, "finish_reason": None, "logprobs": None}
            event = {"id": "1", "object": "text_completion", "created": 1, "model": "composed", "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A server on a free port of this machine, with what it was asked."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.asked = []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_the_client_prints_what_a_server_writes(start, capsys, server):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    start("engines/client.py", "--url", url, "--model", "composed", "--prompt", "one two", "--tokens", "7")
    assert capsys.readouterr().out.startswith("one two one! two!\n\n2 pieces in ")
    ((path, asked),) = server.asked
    assert path == "/v1/completions"
    expected = {"model": "composed", "prompt": "one two", "max_tokens": 7, "temperature": 0.0, "stream": True}
    assert asked == expected


def test_the_client_says_what_it_expected_of_a_server(start, server):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(SystemExit, match=rf"{url}: expected a server with the model 'another'"):
        start("engines/client.py", "--url", url, "--model", "another")
    server.shutdown()
    server.server_close()
    with pytest.raises(SystemExit, match=rf"{url}: expected a server with the model 'composed' \(Connection error"):
        start("engines/client.py", "--url", url, "--model", "composed")
