"""Text from the standard library."""

from __future__ import annotations

from gradmatch.datasets import pydoc_text


def test_paragraphs_are_split_shuffled_and_each_once() -> None:
    text = pydoc_text()
    every = [*text.train, *text.held]
    assert len(set(every)) == len(every) > 5000
    assert 1e6 < sum(map(len, every)) < 5e6
    assert abs(len(text.held) / len(every) - 0.05) < 0.001
    assert all(len(p.strip()) >= 20 for p in every)
    assert text == pydoc_text()
    other = pydoc_text(seed=1)
    assert other.held != text.held
    assert other.digest == text.digest
    assert sum(" the " in p for p in every) > 1000
