"""The parallel training: the losses of one process, and of a run that was killed and started again."""

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from .conftest import EXAMPLES

PROGRAM = EXAMPLES / "parallel" / "train.py"
LINE = re.compile(r"^step +(\d+): ([\d.]+) bits per byte$", re.MULTILINE)
SHORT = ("--rows", "4", "--tokens", "8")
LONG = ("--steps", "120", "--every", "10")


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "small.txt"
    path.write_text("".join(f"{count} times {count} is {count**2}\n" for count in range(300)), "utf-8")
    return str(path)


def started(processes: int, *options: str) -> subprocess.Popen[str]:
    """The program, by torchrun where it is more than one process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else ("-W", "error")), str(PROGRAM), *SHORT, *options]
    # Unbuffered, so that a line can be read while the program runs.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", env=environment)


def printed(processes: int, *options: str) -> str:
    with started(processes, *options) as running:
        out, error = running.communicate(timeout=300)
    assert running.returncode == 0, error
    return out


def losses(text: str) -> list[tuple[int, float]]:
    return [(int(step), float(loss)) for step, loss in LINE.findall(text)]


def killed(processes: int, how: signal.Signals, *options: str) -> str:
    """What a run printed until it was killed, after its first checkpoint and before its end."""
    with started(processes, *options) as running:
        lines = []
        for line in running.stdout:
            lines.append(line)
            if LINE.match(line):
                running.send_signal(how)
                break
        lines += running.stdout.readlines()
        running.stderr.read()
        running.wait(timeout=60)
    assert running.returncode != 0
    return "".join(lines)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the one checkpoint in a folder."""
    (checkpoint,) = folder.iterdir()
    sizes = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {name: torch.empty(each.size) for name, each in sizes.items() if hasattr(each, "size")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a load without processes
        dcp.load(state, checkpoint_id=checkpoint)
    return state


def is_continued_after_a_kill(processes: int, how: signal.Signals, text: str, tmp_path: Path, *options: str) -> None:
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    given = ("--text", text, *LONG, *options)
    expected = losses(printed(processes, *given, "--folder", str(straight)))
    assert [step for step, _ in expected] == list(range(10, 121, 10))
    before = losses(killed(processes, how, *given, "--folder", str(interrupted)))
    assert before == expected[: len(before)]
    # As if it had been killed while it wrote.
    (interrupted / "000115.part").mkdir()
    out = printed(processes, *given, "--folder", str(interrupted))
    done = int(re.search(r"; (\d+) of 120 steps are done", out)[1])
    assert 10 <= done < 120
    assert losses(out) == [each for each in expected if each[0] > done]
    ours, theirs = saved(interrupted), saved(straight)
    assert len(ours) > 50
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_one_process_is_continued_after_a_kill(text: str, tmp_path: Path) -> None:
    is_continued_after_a_kill(1, signal.SIGKILL, text, tmp_path)


@pytest.mark.slow
def test_two_processes_are_continued_after_torchrun_was_ended(text: str, tmp_path: Path) -> None:
    is_continued_after_a_kill(2, signal.SIGTERM, text, tmp_path)


@pytest.mark.slow
def test_a_run_that_is_done_writes_its_text_again(text: str, tmp_path: Path) -> None:
    given = ("--text", text, "--steps", "2", "--every", "2", "--folder", str(tmp_path / "done"))
    first, again = printed(1, *given).splitlines(), printed(1, *given).splitlines()
    assert "; 2 of 2 steps are done" in again[0]
    assert again[1:] == first[2:]


@pytest.mark.slow
def test_two_and_four_processes_have_the_losses_of_one(text: str, tmp_path: Path) -> None:
    def run(processes: int, name: str, *options: str) -> list[tuple[int, float]]:
        out = printed(
            processes, "--text", text, "--steps", "12", "--every", "4", "--folder", str(tmp_path / name), *options
        )
        assert "bits per byte of held-out text; 8 bytes after 'When a function is called, ':" in out
        return losses(out)

    one = run(1, "one")
    assert [step for step, _ in one] == [4, 8, 12]
    assert one[2][1] < one[0][1]
    for name, processes, *numbers in (
        ("data", 2),
        ("tensor", 2, "--tensor", "2"),
        ("both", 4, "--data", "2", "--tensor", "2"),
    ):
        found = run(processes, name, *numbers)
        assert [step for step, _ in found] == [4, 8, 12]
        assert all(abs(loss - other) < 2e-3 for (_, loss), (_, other) in zip(found, one, strict=True)), name


@pytest.mark.slow
def test_another_number_of_processes_continues(text: str, tmp_path: Path) -> None:
    given = ("--text", text, *LONG)
    expected = losses(printed(1, *given, "--folder", str(tmp_path / "one")))
    killed(1, signal.SIGKILL, *given, "--folder", str(tmp_path / "other"))
    found = losses(printed(2, *given, "--folder", str(tmp_path / "other"), "--tensor", "2"))
    assert 0 < len(found) < len(expected)
    for (step, loss), (other_step, other) in zip(found, expected[-len(found) :], strict=True):
        assert step == other_step
        assert abs(loss - other) < 2e-3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            ["--data", "2"],
            "--data, --tensor: expected numbers whose product is 1, the number of processes, got 2 and 1",
        ),
        (["--tensor", "0"], "--data, --tensor"),
        (["--rows", "0"], "--rows: expected a multiple of --data=1, got 0"),
        (["--steps", "0"], "--steps, --every, --tokens, --prompt: expected at least one of each"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(capsys, start, tmp_path, options, complaint):
    with pytest.raises(SystemExit) as end:
        start("parallel/train.py", "--folder", str(tmp_path / "run"), *options)
    assert end.value.code == 2
    assert f"error: {complaint}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
