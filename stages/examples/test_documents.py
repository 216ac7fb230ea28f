"""The example of many documents: a loop and Ray give equal scores, also where a worker is killed in mid run."""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from .conftest import EXAMPLES
from .test_examples import number, printed, run

FOLDER = EXAMPLES / "parallel"

KILLED_ONCE = """
import os
import signal
import sys
from pathlib import Path

import documents

folder, marker = map(Path, sys.argv[1:])
rows = [{"name": str(number), "text": f"{number}! " * 40 * number} for number in range(20)]


class KilledOnce(documents.Scorer):
    def __call__(self, batch):
        if "9" in batch["name"] and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


bits = documents.by_loop(folder, rows)
assert len(bits) == 20 and bits["0"] == 0.0 and min(bits[row["name"]] for row in rows[1:]) > 0.0
assert documents.by_ray(folder, rows, workers=1, scorer=KilledOnce) == bits
assert marker.exists()
print("all came out")
"""


@pytest.fixture
def texts(tmp_path):
    """Documents of no, one and many bytes; one is longer than a window and a chunk."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in {"none": "", "one": "a", "few": "naïve 東京", "many": "to be or not " * 300}.items():
        (folder / name).write_text(text, "utf-8")
    return folder


@pytest.fixture
def cluster(monkeypatch) -> Iterator[None]:
    """The settings of a cluster of a test: files in a folder of its own, with a name short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        # Else a token would be made in the home of the user.
        monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.mark.slow
def test_a_loop_scores_documents_of_any_length(texts):
    text = printed("parallel/documents.py", "--steps", "2", "--documents", str(texts))
    assert "4 documents of 0 to 3,900 bytes" in text
    assert number(r"([\d.]+)  none", text) == number(r"([\d.]+)  one", text) == 0.0
    assert 0.0 < number(r"([\d.]+)  many", text) < 9.0
    assert text.endswith("one callable class scored 4 documents of any length, in a plain loop.\n")


@pytest.mark.slow
def test_workers_of_ray_give_the_scores_of_the_loop(texts, cluster):
    text = printed("parallel/documents.py", "--steps", "2", "--documents", str(texts), "--ray", "--workers", "2")
    assert "both gave the same scores" in text
    assert text.endswith("in a plain loop and on workers of Ray, with equal results.\n")


@pytest.mark.slow
def test_a_worker_that_is_killed_in_mid_run_loses_nothing(tmp_path, cluster):
    saved = tmp_path / "model"
    make = f"import sys; sys.path += [{str(EXAMPLES)!r}]\n"
    make += "import byte_model, torch\nfrom transformer.checkpoints import save_model\ntorch.manual_seed(0)\n"
    make += f"save_model(byte_model.new_model('gqa', 2, 32), {str(saved)!r})\n"
    subprocess.run([sys.executable, "-c", make], timeout=120, check=True)
    program = tmp_path / "killed_once.py"
    program.write_text(KILLED_ONCE, "utf-8")
    paths = os.pathsep.join([str(FOLDER), str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(program), str(saved), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all came out\n")


@pytest.mark.parametrize("options", [["--steps", "0"], ["--workers", "0"], ["--documents", "no such folder"]])
def test_the_documents_refuse_what_they_cannot_do(start, capsys, options):
    with pytest.raises(SystemExit) as end:
        start("parallel/documents.py", *options)
    assert end.value.code == 2
    assert f"{options[0]}" in capsys.readouterr().err.partition("error:")[2]


def test_without_a_file_there_is_nothing_to_score(tmp_path):
    done = run("parallel/documents.py", "--documents", str(tmp_path))
    assert done.returncode == 2
    assert "--documents: expected a folder with files" in done.stderr
