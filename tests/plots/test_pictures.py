"""The pictures of docs/plots.md are those of the code above them, and the library itself does without matplotlib."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transformer.extras import install_hint
from transformer.plots import plot_attention

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
MOST_BYTES = 40_000


@pytest.mark.slow
def test_the_script_draws_what_the_page_shows(tmp_path):
    run = subprocess.run(
        [sys.executable, DOCS / "draw_pictures.py", tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    drawn = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    shown = re.findall(r"\(images/(.+?)\)", (DOCS / "plots.md").read_text("utf-8"))
    assert sorted(drawn) == sorted(shown)
    assert max(drawn.values()) < MOST_BYTES
    for name in shown:
        assert (DOCS / "images" / name).stat().st_size < MOST_BYTES


def test_each_function_stands_in_the_page():
    page = (DOCS / "plots.md").read_text("utf-8")
    for name in ("plot_attention", "plot_visibility", "plot_cache", "plot_cache_bytes"):
        assert f"ax = {name}(" in page


@pytest.mark.slow
def test_the_library_itself_does_not_load_matplotlib():
    code = "import sys, transformer, transformer.models; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_missing_matplotlib_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        plot_attention(torch.rand(2, 2))
    assert str(caught.value) == f"plot_attention needs matplotlib: {install_hint('plots')}"
