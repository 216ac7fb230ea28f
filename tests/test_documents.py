"""Checks of documents by the root conftest.py, and tests of these checks."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

DOCUMENT_RUNNER = (Path(__file__).parent.parent / "conftest.py").read_text(encoding="utf-8")


@pytest.fixture
def run_document(pytester: pytest.Pytester):
    def run(text: str) -> pytest.RunResult:
        pytester.makeconftest(DOCUMENT_RUNNER)
        (pytester.path / "README.md").write_text(text, encoding="utf-8")
        return pytester.runpytest_inprocess("README.md", "-p", "no:cacheprovider")

    return run


def test_blocks_share_a_namespace_and_print_what_is_claimed(run_document):
    result = run_document(
        "```python\nx = 2\nprint('unclaimed')\n```\n"
        "```python\nprint(f'   {x}   \\n  {x + 1}\\n')\n```\n\n"
        "```text\n   2\n  3\n```\n"
        "```python\nprint('took 12.3 ms,', 'cache on')\n```\n"
        "```output\ntook ... ms, cache on\n```\n"
    )
    result.assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("source", "claimed"),
    [
        ("print(1)", "2"),
        ("print(1)", "1\n2"),
        ("print('a b')", "a  b"),
        ("print('  a')", "a"),
        ("print('a')\nprint('b')", "a...b"),
        ("print('1.5')", "1?5"),
        ("pass", "something"),
        ("print('something')", ""),
    ],
)
def test_another_output_than_the_claimed_one_fails(run_document, source, claimed):
    result = run_document(f"```python\n{source}\n```\n```text\n{claimed}\n```\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*The document says (-), the block printed (+):*"])


def test_an_exception_in_a_block_fails_and_names_its_line(run_document):
    result = run_document("# Title\n\n```python\nx = 1\nraise ValueError(x)\n```\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*README.md:5: ValueError*"])


def test_other_languages_and_distant_text_are_left_alone(run_document):
    result = run_document(
        "```bash\nexit 1\n```\n```text\nnothing ran\n```\n"
        "```python\nprint(1)\n```\nOn one machine the timing was:\n```text\n3 ms\n```\n"
    )
    result.assert_outcomes(passed=1)
