"""Labels that are partly wrong, in exactly known places."""

from __future__ import annotations

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.examples import Examples

__all__ = ["with_label_noise"]


def with_label_noise(examples: Examples, share: float, seed: int = 0) -> tuple[Examples, Tensor]:
    """A share of the labels redrawn uniformly from all classes, so that one in C of those stays right.

    Args:
        share: of the examples whose label is drawn anew, chosen at random; 1 makes all labels random.
        seed: of the choice and of the labels.

    Returns:
        The examples with the labels given, and a mask (n,) of those whose label is now wrong.

    >>> data = Examples(torch.zeros(1000, 2), torch.arange(1000) % 10, 10)
    >>> noisy, wrong = with_label_noise(data, 0.5)
    >>> bool((noisy.y != data.y).eq(wrong).all()), 0.4 < float(wrong.double().mean()) < 0.5
    (True, True)
    """
    checks.fraction("share", share, zero=True)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, least=0))
    redrawn = torch.randperm(len(examples), generator=generator)[: round(share * len(examples))]
    y = examples.y.clone()
    y[redrawn] = torch.randint(examples.classes, (len(redrawn),), generator=generator).to(y.device)
    return Examples(examples.x, y, examples.classes), y != examples.y
