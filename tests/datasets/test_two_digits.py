"""Numbers composed of digits: each half is a digit of its class, from its own part of the split."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.checks import InputError
from gradmatch.datasets.digits import digits
from gradmatch.datasets.two_digits import two_digits


def test_every_half_is_a_digit_of_its_class_and_part() -> None:
    found, single = two_digits(400, 200, seed=3), digits(seed=3)
    assert found.train.classes == 100
    assert found.names[7] == "07"
    for part, source in ((found.train, single.train), (found.test, single.test)):
        assert torch.equal(torch.bincount(part.y), torch.full((100,), len(part) // 100))
        known = {image.numpy().tobytes(): int(y) for image, y in zip(source.x, source.y, strict=True)}
        for image, y in zip(part.x, part.y.tolist(), strict=True):
            halves = image[:, :, :8], image[:, :, 8:]
            assert [known[h.contiguous().numpy().tobytes()] for h in halves] == [y // 10, y % 10]


def test_seeds_and_refusals() -> None:
    a, b, c = (two_digits(100, 100, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.train.x, b.train.x)
    assert not torch.equal(a.train.x, c.train.x)
    assert len(set(a.train.x.flatten(1).sum(1).tolist())) > 50
    with pytest.raises(InputError, match="train is 150"):
        two_digits(150)
