"""Labels redrawn: how many, which, and that nothing else changes."""

import pytest
import torch

from gradmatch.core.checks import InputError
from gradmatch.core.examples import Examples
from gradmatch.datasets.label_noise import with_label_noise


def test_a_share_is_redrawn_uniformly_and_a_tenth_of_it_stays_right():
    data = Examples(torch.randn(20_000, 1), torch.arange(20_000) % 10, 10)
    noisy, wrong = with_label_noise(data, 0.5, seed=3)
    assert noisy.x is data.x
    assert torch.equal(wrong, noisy.y != data.y)
    assert abs(float(wrong.double().mean()) - 0.45) < 4 * (0.45 * 0.55 / 20_000) ** 0.5
    drawn = torch.bincount(noisy.y[wrong], minlength=10) / int(wrong.sum())
    assert float((drawn - 0.1).abs().max()) < 0.015
    again, _ = with_label_noise(data, 0.5, seed=3)
    assert torch.equal(again.y, noisy.y)
    assert not torch.equal(with_label_noise(data, 0.5, seed=4)[0].y, noisy.y)


def test_none_and_all():
    data = Examples(torch.zeros(100, 1), torch.zeros(100, dtype=torch.long), 4)
    assert not bool(with_label_noise(data, 0.0)[1].any())
    assert set(with_label_noise(data, 1.0)[0].y.tolist()) == {0, 1, 2, 3}
    assert int(data.y.sum()) == 0
    with pytest.raises(InputError, match="share is 1"):
        with_label_noise(data, 1.5)
