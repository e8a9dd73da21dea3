"""LPN: learned proximal networks (Fang, Buchanan, Sulam; ICLR 2024, arXiv 2310.14344).

A denoiser that is a proximal operator exactly. With psi convex, f = grad psi is the prox of some R, possibly not convex
(Gribonval and Nikolova, 2020) ::

    f(y) = argmin_x |x - y|^2 / 2 + R(x),       R(f(y)) = <f(y), y> - |f(y)|^2 / 2 - psi(y)

R is known up to a constant, and what is found by plugging f into a reconstruction (:func:`gradmatch.solve.pnp`) is a
stationary point of data term + R. At an image x, R(x) needs the y with f(y) = x: the minimiser of the convex
psi(y) - <x, y>. Trained by proximal matching (:class:`gradmatch.solve.ProximalMatching`) at noise sigma, R is
-sigma^2 log p of the data, up to a constant.

The strong convexity is alpha |y|^2, as in the released code (not alpha |y|^2 / 2): it adds 2 alpha y to f.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.minimise import Functions, minimise_each
from gradmatch.core.networks import first_floats
from gradmatch.solve._convex_net import ConvexNet

__all__ = ["ConvexNet", "LearnedProx", "Patches", "Prior"]

INVERSIONS = ("auto", "bisection", "convex", "least-squares")
HALVINGS, DOUBLINGS = 200, 60
ROUGH = 1e-4
"""Single precision serves until |f(y) - x| is this share of |x|."""
LEAST = 1e-3
"""Taken for the least eigenvalue of J where nothing is known."""


class Prior(NamedTuple):
    """R of every image, (b,) in float64, up to a constant.

    ``y`` (b, ...) is what f maps to the images, ``residual`` (b,) = |f(y) - x|, and where ``converged`` (b,) is False
    that is above the tolerance: x is not in the range of f, and the value is not to be trusted.
    """

    value: Float[Tensor, " b"]
    y: Float[Tensor, "b ..."]
    residual: Float[Tensor, " b"]
    converged: Bool[Tensor, " b"]


class LearnedProx(nn.Module):
    """The proximal operator f = grad psi of a learned prior.

    Args:
        icnn: psi, (b, ...) -> (b,): a :class:`ConvexNet`, or another module that is convex in its input. Where it has
            ``constrained()``, those weights must not be below 0, and ``project_()`` sees to that in training. Where it
            has ``shape``, inputs must have it (larger images: :class:`Patches`).
        alpha: adds alpha |y|^2 to psi; above 0, f can be inverted everywhere and reconstruction is sure to converge.
            0.01 as published for 28 x 28, 1e-6 for 128 x 128.

    >>> prox = LearnedProx(ConvexNet.dense(2), alpha=0.5)
    >>> prox(torch.ones(3, 2)).shape
    torch.Size([3, 2])
    """

    def __init__(self, icnn: nn.Module, alpha: float = 0.0) -> None:
        super().__init__()
        self.icnn, self.alpha = icnn, checks.nonnegative("alpha", alpha)

    def potential(self, y: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
        """psi(y), with the strong convexity."""
        self._require(y)
        psi: Tensor = self.icnn(y)
        return psi + self.alpha * y.flatten(1).square().sum(1) if self.alpha else psi

    def forward(self, y: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """f(y), with a graph where gradients are enabled.

        Raises:
            InputError: a shape other than that of training, another precision than the network's, or in eval mode
                constrained weights below 0.
        """
        return self._both(y)[1]

    def prox_and_prior(self, y: Float[Tensor, "b ..."]) -> tuple[Tensor, Float[Tensor, " b"]]:
        """f(y), and R of it, which needs no inversion."""
        psi, x = self._both(y)
        flat = x.flatten(1)
        return x, (flat * y.flatten(1)).sum(1) - flat.square().sum(1) / 2 - psi

    def _both(self, y: Tensor) -> tuple[Tensor, Tensor]:
        checks.require(y.is_floating_point(), f"y is {y.dtype}; it must be floating point.")
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            y = y.clone() if y.is_inference() else y
            at = y if y.requires_grad else y.detach().requires_grad_()  # the caller's flag stays
            psi = self.potential(at)
            (x,) = torch.autograd.grad(psi.sum(), at, create_graph=graph)
        return (psi, x) if graph else (psi.detach(), x)

    def project_(self) -> None:
        """Set constrained weights below 0 to 0; to be called after every step of an optimiser."""
        project: Any = getattr(self.icnn, "project_", None)
        if project is not None:
            project()

    def _require(self, y: Tensor) -> None:
        shape = getattr(self.icnn, "shape", None)
        checks.require(
            shape is None or tuple(y.shape[1:]) == tuple(shape),
            f"y has shape {tuple(y.shape[1:])} and the network was made for {shape}; use Patches for other sizes.",
        )
        like = first_floats(self.icnn)
        if like is not None and y.dtype != like.dtype and not torch.is_autocast_enabled(y.device.type):
            checks.refuse(f"y is {y.dtype} and the network {like.dtype}; convert one of them.")
        constrained: Any = getattr(self.icnn, "constrained", None)
        if self.training or constrained is None:
            return
        lowest = float(torch.stack([w.detach().min() for w in constrained()]).min())
        checks.require(
            lowest >= 0,
            f"the network has constrained weights down to {lowest:.2g}; they must not be below 0 (call project_).",
        )

    def prior(
        self, x: Float[Tensor, "b ..."], tol: float = 1e-5, *, method: str = "auto", max_iter: int = 2000
    ) -> Prior:
        """R(x), by inverting f in double precision (single precision stalls near 1e-4).

        Args:
            x: images, as many at once as memory allows.
            tol: for |f(y) - x|, over the whole image.
            method: "convex" minimises psi(y) - <x, y> by L-BFGS, all images at once; "least-squares" minimises
                |f(y) - x|^2 / 2, which is not convex; "bisection" is for one number a sample, where f is monotone;
                "auto" takes that there and "convex" elsewhere.
            max_iter: most steps of an image.

        Warns:
            where an image is not in the range of f; ``converged`` says which.
        """
        checks.one_of("method", method, INVERSIONS)
        flat = checks.floating("x", x).detach().flatten(1).double()
        if method == "auto":
            method = "bisection" if flat.shape[1] == 1 else "convex"
        checks.require(
            method != "bisection" or flat.shape[1] == 1,
            f"method 'bisection' is for one number a sample; x has {flat.shape[1]}.",
        )
        exact = copy.deepcopy(self).double().requires_grad_(False).eval()
        with torch.no_grad():
            if method == "bisection":
                y = _bisected(lambda t: exact(t.reshape(x.shape)).flatten(1), flat)
            else:
                y = self._inverted(exact, flat, x.shape[1:], method, tol, max_iter)
            given = y.reshape(x.shape)
            psi, image = exact._both(given)
        residual = (image.flatten(1) - flat).norm(dim=1)
        converged = residual <= tol
        if not bool(converged.all()):
            warnings.warn(
                f"{int((~converged).sum())} of {len(x)} images have |f(y) - x| above {tol:g} (up to "
                f"{float(residual.max()):.2g}); they are not in the range of f, which alpha above 0 would rule out, "
                f"or max_iter is too low.",
                stacklevel=2,
            )
        return Prior((flat * y).sum(1) - flat.square().sum(1) / 2 - psi, given, residual, converged)

    def _inverted(
        self, exact: LearnedProx, x: Tensor, shape: torch.Size, method: str, tol: float, max_iter: int
    ) -> Tensor:
        """y with f(y) = x, from y = x on; in single precision, if that is the network's, as far as that leads."""

        def functions(net: LearnedProx, dtype: torch.dtype) -> Functions:
            product = net._conjugate if method == "convex" else net._squares

            return lambda y, which: product(y.to(dtype), x[which].to(dtype), shape)

        # the gradient is f(y) - x, or J (f(y) - x) with J >= 2 alpha
        slope = tol if method == "convex" else tol * max(2 * self.alpha, LEAST)
        rough = None
        if next(self.parameters(), x).dtype == torch.float32:
            rough = functions(copy.deepcopy(exact).float(), torch.float32)
        return minimise_each(
            functions(exact, x.dtype), x, tol=slope, max_iter=max_iter, first=1.0,
            rough=rough, rough_tol=max(slope, ROUGH * float(x.norm(dim=1).max())),
        ).x  # fmt: skip

    def _conjugate(self, y: Tensor, x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """psi(y) - <x, y> and its gradient f(y) - x."""
        psi, f = self._both(y.reshape(-1, *shape))
        return psi - (x * y).sum(1), f.flatten(1) - x

    def _squares(self, y: Tensor, x: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """|f(y) - x|^2 / 2 and its gradient J (f(y) - x), J being symmetric."""
        with torch.enable_grad():
            at = y.detach().requires_grad_()
            gap = self(at.reshape(-1, *shape)).flatten(1) - x
            value = gap.square().sum(1) / 2
            (slope,) = torch.autograd.grad(value.sum(), at)
        return value.detach(), slope


def _bisected(f: Callable[[Tensor], Tensor], x: Float[Tensor, "b 1"]) -> Float[Tensor, "b 1"]:
    """y with f(y) = x for a monotone f of one number: a bracket by doubling, then halving."""
    width = torch.ones_like(x)
    low, high = x - width, x + width
    for _ in range(DOUBLINGS):
        too_high, too_low = f(low) > x, f(high) < x
        if not bool((too_high | too_low).any()):
            break
        width = 2 * width
        low, high = torch.where(too_high, x - width, low), torch.where(too_low, x + width, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = f(middle) < x
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        if bool((high - low <= 2 * torch.finfo(x.dtype).eps * high.abs()).all()):
            break
    return (low + high) / 2


class Patches(nn.Module):
    """A prox on images larger than it was made for: on overlapping patches, averaged where they overlap.

    That is again a gradient, of the patches' potentials, only up to the number of patches that cover a pixel: near
    the border, where fewer do, it is a heuristic.

    Args:
        prox: on images of ``size``.
        size: side of a patch, or (height, width).
        stride: between patches; the last ones end at the border.
        batch: patches at once.

    Raises:
        InputError: a stride beyond the size, which would leave gaps.
    """

    def __init__(
        self,
        prox: Callable[[Tensor], Tensor],
        size: int | tuple[int, int],
        stride: int | None = None,
        batch: int = 256,
    ) -> None:
        super().__init__()
        self.prox = prox
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.stride = checks.whole("stride", stride or max(1, min(self.size) // 2), 1, min(self.size))
        self.batch = checks.whole("batch", batch)

    def forward(self, y: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The averaged prox."""
        for side, least in zip(y.shape[2:], self.size, strict=True):
            checks.require(
                side >= least, f"y has {tuple(y.shape[2:])} pixels; patches have {self.size} and must fit in."
            )
        places = [(i, j) for i in self._starts(y.shape[2], 0) for j in self._starts(y.shape[3], 1)]
        h, w = self.size
        cut = torch.cat([y[:, :, i : i + h, j : j + w] for i, j in places])
        done = torch.cat([self.prox(part) for part in torch.split(cut, self.batch)])
        total, count = torch.zeros_like(y), torch.zeros_like(y[:1, :1])
        for (i, j), part in zip(places, torch.split(done, len(y)), strict=True):
            total = total + F.pad(part, (j, y.shape[3] - j - w, i, y.shape[2] - i - h))
            count[:, :, i : i + h, j : j + w] += 1
        return total / count

    def _starts(self, side: int, axis: int) -> Iterator[int]:
        last = side - self.size[axis]
        yield from range(0, last, self.stride)
        yield last
