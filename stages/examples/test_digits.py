"""The reader of digit strips, with settings so small that it learns nothing."""

import gzip
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "digits"


@pytest.fixture(autouse=True)
def _as_the_examples_run(monkeypatch):
    """Importable, and on one thread: tensors this small gain nothing from more."""
    monkeypatch.syspath_prepend(FOLDER)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_reader():
    from model import DigitReader, Size

    torch.manual_seed(0)
    reader = DigitReader(Size(cell=10, width=32, heads=2, hidden=32)).double().eval()
    # An untrained reader says its last token again; with larger weights what it says depends on the strip.
    for weight in reader.parameters():
        if weight.ndim > 1:
            weight.data.mul_(3)
    return reader


def some_strips(length, count=12):
    from strips import held_out_strips, load_scans

    strips = held_out_strips(load_scans(None)[1], length, times=1)
    return strips.images[:count].double(), strips.digits[:count]


def new_training(epochs=4):
    from model import Size
    from train import Training

    return Training(Size(cell=10, width=32, heads=2, hidden=32), epochs, batch_size=4, longest=3, seed=5)


def start(monkeypatch, program, *options):
    """Runs a program's `main`, as from the command line."""
    module = __import__(program)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, options)])
    module.main()


# --- strips -------------------------------------------------------------------------------------------------------


def test_no_held_out_scan_is_learnt_from():
    from strips import load_scans

    learnt, held_out = load_scans(None)
    assert (len(learnt), len(held_out)) == (1497, 300)
    assert learnt.images.shape[1:] == held_out.images.shape[1:] == (8, 8)
    for scans in (learnt, held_out):
        assert scans.digits.unique().tolist() == list(range(10))
        assert (float(scans.images.min()), float(scans.images.max())) == (0.0, 1.0)
    known = {tuple(image.flatten().tolist()) for image in learnt.images}
    assert not any(tuple(image.flatten().tolist()) in known for image in held_out.images)
    again = load_scans(None)[1]
    assert torch.equal(again.images, held_out.images)


def test_each_digit_of_a_strip_is_its_scan_shifted_by_up_to_a_pixel():
    from strips import join, load_scans

    scans = load_scans(None)[0]
    rows = torch.randint(len(scans), (40, 3))
    strips = join(scans, rows, torch.Generator().manual_seed(0))
    assert torch.equal(strips.digits, scans.digits[rows])
    assert strips.images.shape == (40, 10, 30)
    shifts = set()
    for strip, scanned in zip(strips.images, rows.tolist(), strict=True):
        for place, scan in enumerate(scanned):
            cell = strip[:, 10 * place : 10 * place + 10]
            fits = []
            for down in range(3):
                for right in range(3):
                    expected = torch.zeros(10, 10)
                    expected[down : down + 8, right : right + 8] = scans.images[scan]
                    if torch.equal(cell, expected):
                        fits.append((down, right))
            assert len(fits) == 1
            shifts.update(fits)
    assert len(shifts) == 9


def test_held_out_strips_ask_for_each_scan_equally_often():
    from strips import Scans, held_out_strips

    scans = Scans(torch.arange(1.0, 13).view(12, 1, 1).expand(12, 2, 2), torch.arange(12) % 10)
    images = held_out_strips(scans, 4, times=3).images
    assert images.shape == (9, 4, 16)
    # Four pixels of each scan, three times.
    assert images[images > 0].unique(return_counts=True)[1].tolist() == [12] * 12


def idx(numbers, kind=8):
    numbers = torch.as_tensor(numbers, dtype=torch.uint8)
    header = struct.pack(f">HBB{numbers.ndim}I", 0, kind, numbers.ndim, *numbers.shape)
    return header + bytes(numbers.flatten().tolist())


@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_mnist_are_read(tmp_path, zipped):
    from strips import load_scans

    images = {part: torch.randint(256, (count, 6, 6)) for part, count in (("train", 5), ("t10k", 3))}
    for part, pixels in images.items():
        for name, numbers in (("images-idx3", pixels), ("labels-idx1", range(len(pixels)))):
            raw = idx(numbers)
            path = tmp_path / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(raw) if zipped else raw)
    for scans, part in zip(load_scans(tmp_path), images, strict=True):
        assert torch.equal((scans.images * 255).round().long(), images[part])
        assert scans.digits.tolist() == list(range(len(images[part])))
        assert scans.cell == 8


def test_other_files_are_not_taken_for_mnist(tmp_path):
    from strips import read_mnist

    path = tmp_path / "train-images-idx3-ubyte"
    labels = tmp_path / "train-labels-idx1-ubyte"
    with pytest.raises(SystemExit, match=r"expected train-images-idx3-ubyte or train-images-idx3-ubyte\.gz"):
        read_mnist(tmp_path, "train")
    whole = idx(torch.zeros(2, 4, 4))
    labels.write_bytes(idx([1, 2]))
    for raw in (b"", b"some text", whole[:-1], whole + b"1", idx(torch.zeros(2, 4, 4), kind=13)):
        path.write_bytes(raw)
        with pytest.raises(SystemExit, match="expected an idx file of bytes"):
            read_mnist(tmp_path, "train")
    for images, digits in ((torch.zeros(2, 4, 5), [1, 2]), (torch.zeros(2, 4, 4), [1, 2, 3])):
        path.write_bytes(idx(images))
        labels.write_bytes(idx(digits))
        with pytest.raises(SystemExit, match=r"expected train images \[N, side, side\] and labels \[N\]"):
            read_mnist(tmp_path, "train")


# --- the reader ---------------------------------------------------------------------------------------------------


def test_no_place_resembles_another():
    from model import Places

    places = Places(32)
    places.begin(32, anywhere=True, device=torch.device("cpu"))
    likeness = places.cells @ places.cells.T
    assert torch.allclose(likeness, 16 * torch.eye(32), atol=1.01)
    with pytest.raises(ValueError, match="expected at most 31 digits, got 32"):
        places.begin(33, anywhere=False, device=torch.device("cpu"))


@pytest.mark.parametrize("length", [1, 5, 20])
def test_the_caches_change_no_answer(length):
    reader, (images, _) = small_reader(), some_strips(length)
    cached, plain = (reader.read(images, use_kv_cache=way, stop_tokens=()) for way in (True, False))
    assert cached == plain
    assert len({tuple(row) for row in cached}) > 1, "an answer that does not depend on its strip shows nothing"
    # And each strip by itself.
    assert [reader.read(image[None], stop_tokens=())[0] for image in images] == cached


def test_reading_is_taking_the_likeliest_token_each_time():
    from strips import STOP

    reader, (images, _) = small_reader(), some_strips(6)
    answers = reader.read(images)
    for image, answer in zip(images, answers, strict=True):
        # The forward gives all tokens at once, each after the true ones before it.
        likeliest = reader(image[None], torch.tensor([answer + [0] * (6 - len(answer))])[:, :6]).argmax(-1)[0].tolist()
        assert [*answer, STOP][:7] == likeliest[: len(answer) + 1]


def test_training_begins_anywhere_and_reading_at_the_start():
    reader, (images, digits) = small_reader(), some_strips(3)
    assert torch.equal(reader(images, digits), reader(images, digits))
    reader.train()
    firsts = set()
    for _ in range(5):
        reader(images, digits)
        firsts.add(reader.places.first)
    assert len(firsts) > 1
    reader.eval().read(images)
    assert reader.places.first == 0


# --- training -----------------------------------------------------------------------------------------------------


def test_a_resumed_training_is_the_one_that_was_never_interrupted(tmp_path, monkeypatch):
    import train
    from strips import load_scans

    monkeypatch.setattr(train, "BATCHES", 2)
    scans, path = load_scans(None)[0], tmp_path / "half.safetensors"
    straight, interrupted = new_training(), new_training()
    losses = [straight.run_epoch(scans) for _ in range(4)]
    for _ in range(2):
        interrupted.run_epoch(scans)
    interrupted.save(path)
    resumed = train.Training.resume(path)
    assert resumed.plan == straight.plan
    assert [resumed.run_epoch(scans) for _ in range(2)] == losses[2:]
    weights = resumed.reader.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in straight.reader.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_another_file_is_no_training_and_no_reader(tmp_path):
    from model import load
    from train import Training

    missing, noise, other = (tmp_path / name for name in ("missing", "noise", "other"))
    noise.write_bytes(b"something else")
    save_file({"weight": torch.zeros(1)}, other)
    for path in (missing, noise, other):
        with pytest.raises(SystemExit, match=rf"{path.name}: expected a training that train\.py saved"):
            Training.resume(path)
        with pytest.raises(SystemExit, match=rf"{path.name}: expected a reader that train\.py saved"):
            load(path)


def test_judging_counts_digits_in_their_places():
    from strips import Scans, held_out_strips, load_scans
    from train import judge

    class Forgetful(torch.nn.Module):
        """Reads right, but leaves out the first digit of every other strip."""

        def read(self, images, use_kv_cache):
            rows = [wanted[tuple(image.flatten().tolist())] for image in images]
            return [row[1:] if index % 2 else row for index, row in enumerate(rows)]

    held_out = load_scans(None)[1]
    held_out = Scans(held_out.images[:40], torch.arange(40) % 10)
    strips = held_out_strips(held_out, 2, times=75)
    wanted = {
        tuple(image.flatten().tolist()): row for image, row in zip(strips.images, strips.digits.tolist(), strict=True)
    }
    shares = judge(Forgetful(), held_out, 2, use_kv_cache=True)
    same = (strips.digits[1::2, 0] == strips.digits[1::2, 1]).float().mean().item()
    assert shares["strips"] == 0.5
    assert shares["digits"] == pytest.approx(0.5 + same / 4, abs=1e-6)


# --- the programs -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_programs_work_together(tmp_path, monkeypatch, capsys):
    import benchmark
    import train

    monkeypatch.setattr(train, "BATCHES", 2)
    monkeypatch.setattr(train, "JUDGED", 1)
    monkeypatch.setattr(benchmark, "LENGTHS", (2, 3))
    monkeypatch.setattr(benchmark, "STRIPS", 30)
    checkpoint, picture, curve = (tmp_path / name for name in ("reader.safetensors", "strips.png", "time.png"))
    saved = "--checkpoint", checkpoint

    start(monkeypatch, "train", *saved, "--epochs", 1, "--batch-size", 2, "--longest", 2)
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if line.count("%") == 2] == ["5", "10", "12", "20"]
    with pytest.raises(SystemExit, match="expected at least 99% of the digits and 95% of the strips of 5 right"):
        start(monkeypatch, "train", *saved, "--resume", "--no-kv-cache", "--check")
    assert capsys.readouterr().out == text, "neither resuming what is done nor reading without caches changes anything"

    start(monkeypatch, "read", *saved, "--digits", 3, "--strips", 4, "--picture", picture)
    answers = capsys.readouterr().out.splitlines()[:4]
    assert all("wrong, it is" in line for line in answers)
    start(monkeypatch, "benchmark", *saved, "--small", "--rounds", 1, "--plot", curve)
    text = capsys.readouterr().out
    assert "30 of 30 strips are read the same" in text
    assert re.findall(r"^\| +(\d+) \|", text, re.MULTILINE) == ["2", "3"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (picture, curve))


@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("train", ["--epochs", "0"]),
        ("train", ["--checkpoint", "no such folder/reader.safetensors"]),
    ],
)
def test_the_programs_refuse_what_they_cannot_do(monkeypatch, capsys, program, options):
    with pytest.raises(SystemExit) as refusal:
        start(monkeypatch, program, *options)
    assert refusal.value.code == 2
    assert f"error: {options[0]}" in capsys.readouterr().err
