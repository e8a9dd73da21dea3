"""The nuisance generators against what they say of themselves."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.checks import InputError
from gradmatch.core.examples import Examples
from gradmatch.datasets import find_fashion_mnist
from gradmatch.datasets.nuisance import (
    CLOTHES,
    add_patches,
    add_pattern,
    clothes,
    photograph_patches,
    shared_direction,
)


def _images(n: int = 40, channels: int = 1) -> Examples:
    g = torch.Generator().manual_seed(0)
    return Examples(torch.randn(n, channels, 8, 9, generator=g), torch.arange(n) % 2, 2)


@pytest.mark.parametrize("ratio", [3.0, 30.0])
def test_shared_direction_has_the_stated_parts(ratio: float) -> None:
    split = shared_direction(ratio, per_class=4000, test_per_class=3, seed=1)
    x, y = split.train.x.double(), split.train.y
    assert split.train.x.shape == (20_000, 50)
    assert len(split.test) == 15
    mean = x.mean(0)
    assert float(mean.norm()) == pytest.approx(3 * ratio, rel=0.03)
    b = mean / mean.norm()
    own = torch.stack([x[y == c].mean(0) for c in range(5)]) - mean
    own = own - torch.outer(own @ b, b)  # along b the means are noisy: that is what the shared part does
    assert float(own.norm(dim=1).mean()) == pytest.approx(3, rel=0.1)
    assert float((x @ b).std()) == pytest.approx((1 + (0.5 * 3 * ratio) ** 2) ** 0.5, rel=0.05)
    rest = x - torch.outer(x @ b, b) - own[y]
    assert float(rest.square().sum(1).mean()) == pytest.approx(49, rel=0.05)


def test_a_classifier_blind_to_the_shared_direction_is_right() -> None:
    split = shared_direction(30.0)
    x = split.train.x - split.train.x.mean(0)
    b = torch.linalg.svd(x, full_matrices=False).Vh[0]
    means = torch.stack([(x - torch.outer(x @ b, b))[split.train.y == c].mean(0) for c in range(5)])
    test = split.test.x - split.train.x.mean(0)
    guess = torch.cdist(test - torch.outer(test @ b, b), means).argmin(1)
    assert float((guess == split.test.y).float().mean()) > 0.9


def test_pattern_is_one_and_its_strength_varies() -> None:
    examples = _images(4000)
    pattern = photograph_patches(1, (8, 9))[0]
    out = add_pattern(examples, pattern, 3.0, scale=2.0, seed=4)
    added = (out.x - examples.x).flatten(1)
    strength = added @ pattern.flatten() / pattern.square().sum()
    torch.testing.assert_close(added, torch.outer(strength, pattern.flatten()), atol=1e-4, rtol=1e-4)
    assert float(strength.mean()) == pytest.approx(6, rel=0.03)
    assert float(strength.std()) == pytest.approx(3, rel=0.05)
    steady = add_pattern(examples, pattern, 3.0, spread=0.0).x - examples.x
    assert float(steady.std(0).max()) < 1e-5
    assert float(steady[0].std() / examples.x.std()) == pytest.approx(3, rel=1e-3)


def test_patches_differ_and_their_strength_does_not() -> None:
    examples = _images(30, channels=3)
    added = add_patches(examples, 2.0, scale=0.5, seed=1).x - examples.x
    torch.testing.assert_close(added[:, 0], added[:, 2], atol=1e-5, rtol=0)
    torch.testing.assert_close(added[:, 0].flatten(1).std(1), torch.ones(30), atol=1e-4, rtol=0)
    assert len(added[:, 0].flatten(1).unique(dim=0)) > 25


def test_same_seed_same_data_and_another_seed_another() -> None:
    makers = (
        lambda s: shared_direction(3.0, seed=s).test.x,
        lambda s: add_patches(_images(), seed=s).x,
        lambda s: add_pattern(_images(), torch.ones(1, 8, 9), seed=s).x,
    )
    state = torch.random.get_rng_state()
    for make in makers:
        assert torch.equal(make(0), make(0))
        assert not torch.equal(make(0), make(1))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.skipif(find_fashion_mnist() is None, reason="Fashion-MNIST is not on this machine")
def test_clothes_are_five_classes_of_fashion_mnist() -> None:
    from gradmatch.datasets import fashion_mnist

    small, whole = clothes(14), fashion_mnist()
    assert small.shape == (1, 14, 14)
    assert torch.bincount(small.train.y).tolist() == [6000] * 5
    assert torch.bincount(small.test.y).tolist() == [1000] * 5
    first = whole.train.x[whole.train.y == CLOTHES[3]][0]
    mine = small.train.x[small.train.y == 3][0]
    assert small.names[3] == "Coat"
    torch.testing.assert_close(mine[0, 5, 6], first[0, 10:12, 12:14].mean())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: shared_direction(-1.0), "ratio is -1"),
        (lambda: shared_direction(1.0, classes=1), "classes is 1"),
        (lambda: clothes(20), "size is 20"),
        (lambda: add_pattern(_images(), torch.ones(1, 3, 3)), "pattern has shape"),
        (lambda: add_pattern(_images(), torch.full((1, 8, 9), float("nan"))), "pattern has 72 NaN"),
        (lambda: add_patches(shared_direction(1.0).train), "images"),
        (lambda: photograph_patches(2, (200, 3)), "size is"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
