"""Inverting a learned prox at 50 images together, against scipy one image at a time; and the cost of a step of pnp.

The network is the released one for 28 x 28 with 16 channels, after 150 steps on Fashion-MNIST (or on noise, where
that is not installed); the images are in its range. All reach |f(y) - x| <= 1e-4 of the same images in double
precision, and the R of ours and of scipy must agree: ``fmin_cg``, as the released code calls it, and ``L-BFGS-B`` on
value and gradient in one pass, both from y = x. ``GRADMATCH_PEER_LPN`` names a checkout of the official repository
(ZhenghanFang/learned-proximal-networks): its ``invert_cvx_cg`` gets the same network in its own single precision, and
stops where that lets it.

A step of proximal gradients costs one f and two small products; deepinv's gradient-step denoiser would be the peer.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.optimize import fmin_cg, minimize
from torch import Tensor

from _timer import figure, main, missing, race
from gradmatch.core.checks import InputError
from gradmatch.datasets import fashion_mnist
from gradmatch.solve import ConvexNet, LearnedProx, ProximalMatching, Stage, pnp

COUNT, TOL = 50, 1e-4


def data() -> Tensor:
    try:
        return fashion_mnist().train.x[:5000]
    except InputError:
        return torch.rand(500, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@lru_cache(maxsize=1)
def model() -> LearnedProx:
    prox = LearnedProx(ConvexNet.conv((1, 28, 28), 16), alpha=0.01)
    ProximalMatching(prox, 0.1, schedule=[Stage("l1", 150, 2e-3)]).fit(data(), 32)
    return prox.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def images() -> Tensor:
    """In the range of f, in double precision."""
    noise = 0.1 * torch.randn(COUNT, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model()(data()[:COUNT] + noise).double()


@lru_cache(maxsize=1)
def exact() -> LearnedProx:
    import copy

    return copy.deepcopy(model()).double()


def together() -> np.ndarray:
    found = model().prior(images(), tol=TOL)
    assert bool(found.converged.all())
    return found.value.numpy()


def one_by_one(method: str) -> np.ndarray:
    values = []
    for x in images():
        flat = x.flatten().numpy()

        def psi(y: np.ndarray, x: Tensor = x, flat: np.ndarray = flat) -> float:
            with torch.no_grad():
                return float(exact().potential(torch.from_numpy(y).reshape(1, *x.shape))) - float(y @ flat)

        def slope(y: np.ndarray, x: Tensor = x, flat: np.ndarray = flat) -> np.ndarray:
            with torch.no_grad():
                return exact()(torch.from_numpy(y).reshape(1, *x.shape)).flatten().numpy() - flat

        def both(y: np.ndarray, x: Tensor = x, flat: np.ndarray = flat) -> tuple[float, np.ndarray]:
            with torch.no_grad():
                value, f = exact()._both(torch.from_numpy(y).reshape(1, *x.shape))
            return float(value) - float(y @ flat), f.flatten().numpy() - flat

        if method == "fmin_cg":
            y = fmin_cg(psi, flat, slope, gtol=TOL, norm=2, disp=False)
        else:
            y = minimize(both, flat, jac=True, method="L-BFGS-B", options={"gtol": TOL / 28, "ftol": 0.0}).x
        values.append(-psi(y) - float(flat @ flat) / 2)
    return np.array(values)


def official() -> Any:
    folder = os.environ.get("GRADMATCH_PEER_LPN")
    if folder is None or not (Path(folder) / "lpn/utils/invert_model/invert_cvx_cg.py").is_file():
        return None
    sys.path.insert(0, str(Path(folder) / "lpn/utils"))
    invert = importlib.import_module("invert_model.invert_cvx_cg").invert_cvx_cg
    net = model()

    class Wrapped:
        """The same network by the names that the official code uses."""

        def scalar(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return net.potential(x)[:, None]

        def parameters(self) -> Any:
            return net.parameters()

        def __call__(self, x: Tensor) -> Tensor:
            return net(x)

    def run() -> np.ndarray:
        with contextlib.redirect_stdout(io.StringIO()):
            y = torch.from_numpy(invert(images().numpy(), Wrapped()))
        with torch.no_grad():
            psi, f = exact()._both(y)
        flat, at = images().flatten(1), y.flatten(1)
        figure("official, largest |f(y) - x|", norm=float((f.flatten(1) - flat).norm(dim=1).max()))
        return ((flat * at).sum(1) - flat.square().sum(1) / 2 - psi).numpy()

    return run


def same(mine: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(mine - theirs).max() < 1e-3, f"R differs by {np.abs(mine - theirs).max()}"


def run() -> None:
    model(), images(), exact()
    for peer in ("L-BFGS-B", "fmin_cg"):
        race(f"R of {COUNT} images", together, lambda peer=peer: one_by_one(peer), peer=f"scipy's {peer}, one by one",
             rounds=2, warmup=0, check=same, target=10.0, unit="s")  # fmt: skip
    theirs = official()
    if theirs is None:
        missing("official invert_cvx_cg", "GRADMATCH_PEER_LPN names no checkout of it")
    else:
        race(f"R of {COUNT} images", together, theirs, peer="official invert_cvx_cg", rounds=1, warmup=0,
             check=same, target=10.0, unit="s")  # fmt: skip
    against_deepinv()


def against_deepinv() -> None:
    """Twenty steps of proximal gradients on 32 noisy images."""
    x = images()[:32].float()
    state = SimpleNamespace(steps=20)

    def ours() -> Tensor:
        return pnp(x, lambda v: v, lambda v: v, model(), eta=0.9, iters=state.steps).x

    def bare() -> Tensor:
        v = x
        with torch.no_grad():
            for _ in range(state.steps):
                v = model()(v - 0.9 * (v - x))
        return v

    def close(mine: Tensor, theirs: Tensor) -> None:
        assert torch.allclose(mine, theirs, atol=1e-5)

    race("20 steps of pnp on 32 images", ours, bare, peer="the bare loop", rounds=3, check=close)
    try:
        importlib.import_module("deepinv")
    except ImportError as error:
        missing("deepinv's gradient-step denoiser", str(error))


if __name__ == "__main__":
    main(run)
