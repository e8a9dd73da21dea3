"""The experiment on tiny settings, the known answers it compares with, and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gradmatch.core.examples import Examples
from gradmatch.datasets import Split
from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.solve import _lpn_images as images
from gradmatch.evidence.solve import _lpn_toys as toys
from gradmatch.evidence.solve import lpn as experiment


def test_what_the_losses_would_learn_at_best() -> None:
    """Quadrature gives the gaps of the posterior mean and median, and a gap that falls with gamma."""
    soft = toys.soft_threshold(toys.AT)
    gaps = [
        float(np.abs(toys.ideal(*loss) - soft).max())
        for loss in (("l2", None), ("l1", None), ("proximal", 0.5), ("proximal", 0.1))
    ]
    assert gaps == pytest.approx([0.50, 0.43, 0.31, 0.11], abs=0.02)


def test_the_mixture_and_its_proximal_operator() -> None:
    x = toys.mixture(20_000, torch.Generator().manual_seed(0)).numpy()
    assert abs(float(x.std()) - np.hypot(1, 0.3)) < 0.02
    y = np.array([-2.0, -0.5, 0.5, 2.0])
    found = toys.mixture_prox(y)
    assert np.allclose(found, -found[::-1], atol=2e-3)
    slope = toys.MIXTURE_SIGMA**2 * (found - np.sign(y)) / toys.SPREAD**2  # one mode, far from the other
    assert np.allclose(found + slope, y, atol=2e-2)
    hull, raw = toys.mixture_hull(toys.BETWEEN), toys.mixture_prior(toys.BETWEEN)
    shift = (hull - raw)[0]
    assert bool((hull <= raw + shift + 1e-3).all())
    assert hull[52] < raw[52] + shift - 0.3  # the prox jumps over 0
    assert experiment._barrier(hull) == pytest.approx(0.368, abs=0.01)


def test_laplace_draws_have_their_law() -> None:
    x = toys.laplace(50_000, torch.Generator().manual_seed(0))
    assert bool(x.isfinite().all())
    assert abs(float(x.abs().mean()) - 1) < 0.02
    assert abs(float(x.mean())) < 0.02


def test_measurements_are_linear_and_their_maps_symmetric() -> None:
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for task, share in (("deblurring", 1.0), ("filling in", 0.25)):
        y, A = images.measured(x, task, 0)
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose((A(x) * v).sum(), (x * A(v)).sum(), rtol=1e-4)
        assert abs(float((y != 0).float().mean()) - share) < 0.03
        assert abs(float((y - A(x))[y != 0].std()) - images.NOISE) < 2e-3


def test_disturbed_images_begin_with_the_images() -> None:
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = images.disturbed(x, 0)
    assert {k: [s for s, _ in v] for k, v in found.items()} == {
        "noise": [0, 0.05, 0.1, 0.2, 0.3], "blur": [0, 0.5, 1, 1.5, 2], "mixing": [0, 0.1, 0.2, 0.3, 0.4, 0.5],
    }  # fmt: skip
    assert all(torch.allclose(v[0][1], x) for v in found.values())
    assert torch.allclose(found["mixing"][-1][1], (x + x.flip(0)) / 2)


def test_asymmetry_tells_gradients_from_other_maps() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    assert images.asymmetry(lambda v: v @ (A + A.T), x, 0) < 1e-5
    assert images.asymmetry(lambda v: v @ A, x, 0) > 0.1


def test_the_two_denoisers_are_about_as_large() -> None:
    prox = experiment.ConvexNet.conv((1, 28, 28), experiment.CHANNELS)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (prox, images.PlainDenoiser())]
    assert 0.8 < sizes[0] / sizes[1] < 1.25


@pytest.mark.filterwarnings("ignore:.*not in the range of f", "ignore:the stage with gamma")
def test_a_tiny_run_gives_every_row_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "PLAIN_SHARE": 2e-4, "LADDER_SHARE": 5e-4, "MIXTURE_STEPS": 2, "BATCH": 20, "CHANNELS": 2, "IMAGE_BATCH": 4,
        "PRETRAIN": 3, "STAGE_STEPS": 1, "ITERATIONS": 2, "HELD_OUT": 2, "TESTED": 4, "READ": 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(experiment, name, value)
    x = torch.rand(30, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    data = Examples(x, torch.arange(30) % 10, 10)
    monkeypatch.setattr(experiment, "fashion_mnist", lambda: Split(data, data, (), "noise"))
    monkeypatch.setattr(toys, "ideal", lambda loss, gamma=None: toys.soft_threshold(toys.AT))
    monkeypatch.setattr(images, "total_variation", lambda iters: {"none": lambda y, A, task: y})
    whole = experiment._images
    made = whole(0)
    monkeypatch.setattr(experiment, "_images", lambda seed: made)
    result = experiment.run(Settings(seeds=2, out=tmp_path, runs=tmp_path / "runs", workers=1, quiet=True))
    assert result.pictures[0][1].startswith(b"\x89PNG")
    for method in ("Laplace, error of R, gamma 0.1", "mixture, error of f", "mean R less that of the images, blur 1.5",
                   "PSNR in dB, filling in, classical", "largest rise of the objective, deblurring"):  # fmt: skip
        assert len(result.row(method).values) == 2
    assert "of 8 conditions met" in result.reason


def rows(**changed: float) -> list[Row]:
    """Every condition met, but for what is changed."""
    value: dict[str, float] = {
        "squares": 0.5, "absolute": 0.43, "matched": 0.2, "off": 0.05, "R": 0.15, "mixture": 0.1, "height": 1.0,
        "rise": 1.0, "LPN": 1e-7, "plain": 0.3, "tv": 1.0, "old": 1.0, "behind": 0.5, "objective": 0.0,
    } | changed  # fmt: skip
    found = {
        "Laplace, error of f, squares": value["squares"],
        "Laplace, error of f, absolute": value["absolute"],
        "Laplace, error of f, gamma 0.1": value["matched"],
        "Laplace, error of R, squares": 0.6,
        "Laplace, error of R, absolute": 0.5,
        "Laplace, error of R, gamma 0.1": value["R"],
        "mixture, error of f": value["mixture"],
        "mixture, R between the modes over what it should be": value["height"],
        "asymmetry of the Jacobian, LPN": value["LPN"],
        "asymmetry of the Jacobian, plain denoiser": value["plain"],
    }
    found |= {
        f"Laplace, f less its best, {n}": value["off"]
        for n in ("squares", "absolute", "gamma 0.5", "gamma 0.2")
    }
    for way in ("noise", "blur", "mixing"):
        name = f"mean R less that of the images, {way}"
        found |= {f"{name} 0": 0.0, f"{name} 1": 1.0}
        found[f"{name} 2"] = 1.0 + (value["rise"] if way == "blur" else 1.0)
    for task in experiment.TASKS:
        apart = task == "filling in"
        found |= {
            f"PSNR in dB, {task}, LPN": 20.0,
            f"PSNR in dB, {task}, total variation": 20.0 - (value["tv"] if apart else 1.0),
            f"PSNR in dB, {task}, classical": 20.0 - (value["old"] if apart else 1.0),
            f"PSNR in dB, {task}, plain denoiser": 20.0 + (value["behind"] if apart else 0.0),
            f"largest rise of the objective, {task}": value["objective"] if apart else 0.0,
        }
    return [Row(name, (v,) * 3) for name, v in found.items()]


@pytest.mark.parametrize(
    "changed",
    [
        {"squares": 0.37},
        {"absolute": 0.37},
        {"matched": 0.26},
        {"off": 0.09},
        {"R": 0.55},
        {"mixture": 0.26},
        {"height": 0.4},
        {"height": 2.1},
        {"rise": -0.1},
        {"LPN": 1e-3},
        {"plain": 1e-3},
        {"tv": -0.1},
        {"old": -0.1},
        {"behind": 1.1},
        {"objective": 1e-3},
    ],
)
def test_the_rule_reads_every_condition(changed: dict[str, float]) -> None:
    assert experiment.judged(rows()).verdict == "holds"
    result = experiment.judged(rows(**changed))
    assert result.verdict == "holds in part"
    assert "7 of 8" in result.reason


def test_the_plain_denoiser_keeps_the_size() -> None:
    y: Tensor = torch.rand(2, 1, 28, 28)
    assert images.PlainDenoiser(2)(y).shape == y.shape
