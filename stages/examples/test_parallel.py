"""The examples of several processes, each run as one rank; tests/parallel has more of them."""

import pytest

from .test_examples import number, printed


@pytest.mark.slow
def test_a_long_sequence_is_read_continued_and_trained_on():
    text = printed("parallel/long_sequence.py", "--tokens", "600", "--new", "4", "--train")
    assert number(r"rank 0: ([\d,]+) of 606 tokens cached", text) == 606
    assert "equal on all ranks" in text
    assert 7 < number(r"the loss is ([\d.]+) bits", text) < 12


@pytest.mark.parametrize("options", [["--tokens", "0"], ["--new", "0"]])
def test_the_long_sequence_refuses_what_it_cannot_do(start, capsys, options):
    with pytest.raises(SystemExit) as ended:
        start("parallel/long_sequence.py", *options)
    assert ended.value.code == 2
    assert "expected at least 1" in capsys.readouterr().err
