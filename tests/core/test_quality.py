from __future__ import annotations

import pytest
import torch

from gradmatch.core.checks import InputError
from gradmatch.core.quality import frechet_distance, noise_floor, precision_recall, shares


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    n = 200_000
    a, b = randn(n, 2), randn(n, 2, seed=1) * torch.tensor([2.0, 0.5]) + torch.tensor([1.0, -1.0])
    assert frechet_distance(a, b) == pytest.approx(2 + (2 - 1) ** 2 + (0.5 - 1) ** 2, rel=0.01)
    assert frechet_distance(a, a) < 1e-9


def test_frechet_distance_equals_the_square_root_of_the_product() -> None:
    from scipy.linalg import sqrtm

    mix = randn(6, 6, seed=2)
    a, b = randn(300, 6), randn(400, 6, seed=1) @ mix
    first, second = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    cross = sqrtm(first @ second).real
    wanted = float((a.mean(0) - b.mean(0)).square().sum()) + (first + second - 2 * cross).trace()
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(wanted, rel=1e-8)
    turned = torch.linalg.qr(mix).Q
    assert frechet_distance(a @ turned, b @ turned) == pytest.approx(wanted, rel=1e-8)
    flat = torch.cat([a, torch.zeros(300, 1)], 1)  # a singular covariance
    assert frechet_distance(flat, flat) < 1e-9


def test_precision_and_recall_see_missing_and_wild_samples() -> None:
    real = torch.cat([randn(200, 2), randn(200, 2, seed=1) + 50])
    half = randn(200, 2, seed=2)
    assert precision_recall(real, half)[0] > 0.9
    assert precision_recall(real, half)[1] < 0.55
    wild = torch.cat([randn(100, 2, seed=3), randn(100, 2, seed=4) + 1000])
    assert precision_recall(real, wild)[0] < 0.55
    x, y = randn(30, 3), randn(30, 3, seed=5)
    distance = lambda a, b: float((a - b).square().sum().sqrt())  # noqa: E731
    inside = 0
    for point in y:
        radii = [sorted(distance(c, o) for o in x)[2 + 1] for c in x]
        inside += any(distance(point, c) <= r for c, r in zip(x, radii, strict=True))
    assert precision_recall(x, y, k=3)[0] == pytest.approx(inside / 30)
    assert precision_recall(y, x, k=3)[1] == pytest.approx(inside / 30)


def test_noise_floor_compares_disjoint_halves() -> None:
    seen = []

    def metric(a: torch.Tensor, b: torch.Tensor) -> float:
        seen.append((a, b))
        return float(len(seen))

    assert noise_floor(metric, torch.arange(20.0)[:, None], 8, repeats=3) == (2.0, 1.0)
    for a, b in seen:
        assert a.shape == b.shape == (8, 1)
        assert not set(a.flatten().tolist()) & set(b.flatten().tolist())
    floor, spread = noise_floor(frechet_distance, randn(4000, 4), 1000)
    assert 0 < floor < 0.05
    assert spread < floor


def test_shares() -> None:
    assert shares(torch.tensor([0, 0, 2, 0]), 3).tolist() == [0.75, 0.0, 0.25]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: frechet_distance(torch.zeros(1, 2), torch.zeros(4, 2)), "a is of shape"),
        (lambda: frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3)), "a has 2 features and b 3"),
        (lambda: frechet_distance(torch.zeros(4, 2) / 0, torch.zeros(4, 2)), "a has 8 NaN"),
        (lambda: precision_recall(torch.zeros(3, 2), torch.zeros(9, 2)), "real is of shape"),
        (lambda: noise_floor(frechet_distance, torch.zeros(9, 2), 5), "two disjoint draws of 5 need 10"),
        (lambda: shares(torch.zeros(0, dtype=torch.long), 3), "labels is empty"),
    ],
)
def test_refusals(make, says) -> None:
    with pytest.raises(InputError, match=says):
        make()


@pytest.mark.parametrize("labels", [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])])
def test_labels_out_of_range_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"it must be whole numbers in 0\.\.2"):
        shares(labels, 3)
