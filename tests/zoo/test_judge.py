"""The shipped judge: small, frozen, and as good as its file says."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.checks import InputError
from gradmatch.core.store import load_tensors
from gradmatch.datasets import fashion_mnist, find_fashion_mnist
from gradmatch.zoo import fashion_judge
from gradmatch.zoo.judge import WEIGHTS, seen


def test_the_shipped_weights_are_small_and_load_frozen() -> None:
    assert WEIGHTS.stat().st_size < 1_000_000
    _, facts = load_tensors(WEIGHTS)
    assert facts["test_accuracy"] > 0.9
    net = fashion_judge()
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert net.embed(torch.zeros(2, 1, 28, 28)).shape == (2, 64)


def test_features_and_labels_do_not_depend_on_blocks() -> None:
    net, x = fashion_judge(), torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    whole, parts = seen(net, x), seen(net, x, block=3)
    assert torch.allclose(whole[0], parts[0], atol=1e-5)
    assert torch.equal(whole[1], parts[1])
    with pytest.raises(InputError, match="images has 1 NaN"):
        seen(net, torch.full((1, 1, 1, 1), torch.nan))


@pytest.mark.skipif(find_fashion_mnist() is None, reason="Fashion-MNIST is not on this machine")
def test_accuracy_floors_and_scores_on_real_images() -> None:
    from gradmatch.evidence._judges import judge

    test = fashion_mnist().test
    x, y = test.x[:1000], test.y[:1000]
    found = judge()
    assert float((found.labels(x) == y).double().mean()) > 0.88
    scores, floor = found.scores(x), found.floor(500, 2)
    assert scores.frechet < floor["frechet"][0]
    assert floor["precision"][0] > 0.8
    assert sum(scores.shares) == pytest.approx(1)
    noise = found.scores(torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert noise.frechet > 20 * floor["frechet"][0]
    assert noise.recall < 0.1
