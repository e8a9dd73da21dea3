"""scikit-learn's handwritten digits: 1,797 images of 8 x 8, ten classes, installed with the library."""

from __future__ import annotations

import torch

from gradmatch.core.examples import Examples
from gradmatch.datasets._load import Split, split


def digits(test: float = 0.25, seed: int = 0) -> Split:
    """The digits as (n, 1, 8, 8) float32 in [0, 1], split by class.

    Args:
        test: share of each class held out; default a quarter.
        seed: of the split.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    return split(Examples(x, torch.from_numpy(bunch.target).long(), 10), test, seed, name="digits")
