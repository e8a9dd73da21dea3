"""Two-digit numbers 00 to 99: two of scikit-learn's digits side by side, a hundred classes without a download."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.examples import Examples
from gradmatch.datasets._load import Split
from gradmatch.datasets.digits import digits


def two_digits(train: int = 6000, test: int = 2000, seed: int = 0) -> Split:
    """Images (n, 1, 8, 16) float32 in [0, 1] of the numbers 00..99, equally many of each.

    Training and test numbers are composed of disjoint digits: those of :func:`gradmatch.datasets.digits`'s two
    parts under the same seed. Each number draws its two digits at random, with replacement.

    Args:
        train, test: how many of each, multiples of 100.
        seed: of the split and the draws.

    Raises:
        InputError: counts that are no multiples of 100.

    >>> two_digits(200, 100).train.x.shape
    torch.Size([200, 1, 8, 16])
    """
    single = digits(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, count, source in (("train", train, single.train), ("test", test, single.test)):
        checks.require(
            checks.whole(name, count) % 100 == 0, f"{name} is {count}; it must be a multiple of 100."
        )
        parts.append(_numbers(source, count // 100, generator))
    return Split(parts[0], parts[1], tuple(f"{k:02d}" for k in range(100)), "two-digits")


def _numbers(source: Examples, each: int, generator: torch.Generator) -> Examples:
    labels = torch.arange(100).repeat_interleave(each)
    halves = [_draw(source, place, generator) for place in (labels // 10, labels % 10)]
    return Examples(torch.cat(halves, dim=3), labels, 100)


def _draw(source: Examples, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """A random image of every wanted digit."""
    images = torch.empty(len(wanted), *source.x.shape[1:])
    for digit in range(10):
        rows, of = torch.nonzero(wanted == digit).flatten(), source.of_class(digit)
        images[rows] = source.x[of[torch.randint(len(of), (len(rows),), generator=generator)]]
    return images
