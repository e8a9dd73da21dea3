"""f-divergences against their second derivatives, and the weights of estimated ratios."""

from __future__ import annotations

import math

import pytest
import torch

from gradmatch.core.checks import InputError
from gradmatch.core.divergence import DIVERGENCES, RatioWeight, divergence, ratio_of

R = torch.tensor([0.05, 0.3, 1.0, 2.5, 17.0], dtype=torch.float64)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_weight_is_the_second_derivative_times_the_squared_ratio(name: str) -> None:
    found = divergence(name)
    r = R.clone().requires_grad_()
    (first,) = torch.autograd.grad(found.f(r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    assert torch.allclose(second * R.square(), found.weight(R), rtol=1e-9)
    assert float(found.f(torch.ones(1, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)


def test_an_unknown_divergence_is_refused_with_all_names() -> None:
    with pytest.raises(InputError, match="'rkl', 'sf', 'js', 'sh', 'kl', 'jf', 'neyman'"):
        RatioWeight("tv", (0.0, 1.0))


def naive(
    logits: torch.Tensor, t: torch.Tensor, name: str, bins: int, clip: tuple[float, float]
) -> list[float]:
    ratios = [min(clip[1], max(clip[0], math.exp(min(10, max(-10, float(row.mean())))))) for row in logits]
    places = [min(bins - 1, int(float(u) * bins)) for u in t]
    means = {b: [r for r, p in zip(ratios, places, strict=True) if p == b] for b in set(places)}
    scaled = [
        r / (sum(means[p]) / (len(means[p]) + 1e-6) + 1e-6) for r, p in zip(ratios, places, strict=True)
    ]
    h = [float(divergence(name).weight(torch.tensor(s, dtype=torch.float64))) for s in scaled]
    return [v / (sum(h) / len(h) + 1e-6) for v in h]


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n != "rkl"])
def test_weights_equal_a_loop(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    logits, t = 2 * torch.randn(64, 3, generator=g), torch.rand(64, generator=g)
    weigh = RatioWeight(name, (0.0, 1.0), bins=4, clip=(0.1, 20.0))
    h = weigh(ratio_of(logits), t)
    assert h.tolist() == pytest.approx(naive(logits, t, name, 4, (0.1, 20.0)), rel=1e-5)
    assert float(h.mean()) == pytest.approx(1, abs=1e-5)
    assert not h.requires_grad


def test_reverse_kl_weighs_one_whatever_the_ratio() -> None:
    h = RatioWeight("rkl", (0.0, 1.0))(torch.tensor([1e-9, 3.0, 1e9]), torch.rand(3))
    assert h.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_constant_shift_of_logits_in_a_bin_changes_nothing(name: str) -> None:
    g = torch.Generator().manual_seed(1)
    logits, t = 0.5 * torch.randn(200, 1, generator=g), torch.rand(200, generator=g)
    shift = torch.tensor([0.7, -0.9, 0.3, 0.0])[(t * 4).long()].unsqueeze(1)
    plain, moved = (
        RatioWeight(name, (0.0, 1.0), bins=4, clip=None)(ratio_of(x), t) for x in (logits, logits + shift)
    )
    assert torch.allclose(plain, moved, atol=1e-5, rtol=1e-5)
    if name != "rkl":
        unbinned = RatioWeight(name, (0.0, 1.0), bins=0, clip=None)(ratio_of(logits + shift), t)
        assert not torch.allclose(unbinned, plain, atol=1e-2)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_huge_logits_stay_within_what_the_clip_allows(name: str) -> None:
    logits = torch.tensor([[1e4], [-1e4], [0.0]])
    h = RatioWeight(name, (0.0, 1.0), bins=0)(ratio_of(logits), torch.rand(3))
    assert bool(h.isfinite().all())
    w = divergence(name).weight(torch.tensor([0.1, 20.0]))
    low, high = float(w.min() / w.max()), float(w.max() / w.min())
    assert bool(((h >= low - 1e-5) & (h <= high + 1e-5)).all())


def test_the_running_mean_of_a_bin() -> None:
    weigh = RatioWeight("kl", (2.0, 4.0), bins=2, ema=0.5, clip=None)
    weigh(torch.tensor([3.0, 5.0]), torch.tensor([2.1, 2.2]))
    assert weigh.means.tolist() == pytest.approx([0.5 + 0.5 * 4, 1.0])  # the empty bin keeps its own
    weigh(torch.tensor([2.0]), torch.tensor([4.0]))  # the end belongs to the last bin
    assert weigh.means.tolist() == pytest.approx([2.5, 1.5], rel=1e-5)
    assert "means" in weigh.state_dict()


def test_means_are_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with half of a batch weighs its half as one with the whole does."""
    ratio, t = torch.tensor([1.0, 3.0, 8.0, 0.5]), torch.tensor([0.1, 0.9, 0.2, 0.3])
    whole = RatioWeight("js", (0.0, 1.0), bins=2)
    expected = whole(ratio, t)[:2]
    scaled = ratio[2:] / whole.means[(t[2:] * 2).long()]
    others = [
        torch.tensor([[2.0, 0.0], [8.5, 0.0]]),  # counts and sums of the other half's bins
        torch.tensor([float((scaled / (1 + scaled)).sum()), 2.0]),  # its weights
    ]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(others.pop(0)))
    half = RatioWeight("js", (0.0, 1.0), bins=2)
    assert half(ratio[:2], t[:2]).tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert torch.equal(half.means, whole.means)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ema": 1.0}, "ratio_ema"),
        ({"bins": -1}, "time_bins"),
        ({"clip": (0.0, 2.0)}, "ratio_clip"),
        ({"clip": (3.0, 2.0)}, "must rise"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        RatioWeight("js", (0.0, 1.0), **options)
