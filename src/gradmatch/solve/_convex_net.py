"""Networks that are convex in their input (Amos, Xu, Kolter; ICML 2017), dense and convolutional."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from gradmatch.core import checks
from gradmatch.core.networks import seeded

Activation = Callable[[Tensor], Tensor]
POSITIVITY = ("clamp", "softplus")
INITIAL = (-10.0, 0.1)
"""Mean and deviation of the logarithms of non-negative weights at the start, as released: nearly zero."""
LINEAR_ABOVE = 40.0
"""softplus is the identity above this; the default of PyTorch, 20, leaves a step of 2e-9 in the gradient."""


class ConvexNet(nn.Module):
    """psi(y), convex in y ::

        z_1 = act(H_1 y),   z_{k+1} = act(W_k z_k + H_{k+1} y + b_{k+1}),   psi = w^T z_K (+ a^T y + c)

    with no entry of W_k and w below 0 and ``act`` convex and increasing; H, a and the biases are free. In the
    convolutional form y is resized (bilinearly) to each layer's input. Made by :meth:`dense` and :meth:`conv`.

    Args:
        first: H_1.
        cores, skips: W_k and H_{k+1} by layer; a linear one flattens what comes.
        out: w.
        direct: (a, c), or None.
        shape: of one y.
        beta: act(t) = log(1 + exp(beta t)) / beta.
        activation: another act; it must be convex and increasing, and smooth where the gradient is to be trained.
        positivity: "clamp" (as released: :meth:`project_` sets what is below 0 to 0 after every step of an optimiser)
            or "softplus" (weights are softplus of free ones, always above 0).
        seed: of the initial constrained weights, the others are as their layers made them.

    Raises:
        InputError: an activation that is not convex or not increasing.

    >>> psi = ConvexNet.dense(2, hidden=(8, 8))
    >>> psi(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        first: nn.Module,
        cores: Sequence[nn.Module],
        skips: Sequence[nn.Module],
        out: nn.Linear,
        direct: nn.Linear | None,
        *,
        shape: tuple[int, ...],
        beta: float = 10.0,
        activation: Activation | None = None,
        positivity: str = "clamp",
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.same_length("cores", cores, "skips", skips)
        self.first, self.cores, self.skips = first, nn.ModuleList(cores), nn.ModuleList(skips)
        self.out, self.direct, self.shape = out, direct, shape
        self.beta, self.activation = checks.positive("beta", beta), activation
        self.positivity = checks.one_of("positivity", positivity, POSITIVITY)
        _require_convex(self.act)
        self._initialise(seed)
        if positivity == "softplus":
            for layer in (*self.cores, self.out):
                parametrize.register_parametrization(layer, "weight", _Softplus())

    @staticmethod
    def dense(
        size: int | tuple[int, ...],
        hidden: Sequence[int] = (50, 50, 50, 50, 50),
        *,
        direct: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> ConvexNet:
        """For vectors of ``size`` numbers, or for images of that shape, flattened; ``options`` as for the class.

        The defaults are the released 1-D network: its four layers follow a first one, and psi has the linear term.
        """
        shape = (size,) if isinstance(size, int) else tuple(size)
        n = int(torch.Size(shape).numel())
        widths = [checks.whole("hidden", w) for w in hidden]
        checks.require(len(widths) > 0, "hidden is empty; a convex network needs one hidden layer at least.")
        pairs = list(itertools.pairwise(widths))
        with seeded(checks.whole("seed", seed, 0)):
            first = nn.Sequential(nn.Flatten(), nn.Linear(n, widths[0], bias=False))
            cores = [nn.Linear(a, b, bias=False) for a, b in pairs]
            skips = [nn.Linear(n, b) for _, b in pairs]
            out, linear = nn.Linear(widths[-1], 1, bias=False), nn.Linear(n, 1) if direct else None
        return ConvexNet(first, cores, skips, out, linear, shape=shape, seed=seed, **options)

    @staticmethod
    def conv(
        shape: tuple[int, int, int],
        channels: int = 64,
        strides: Sequence[int] = (1, 2, 1, 2),
        last: int = 64,
        *,
        seed: int = 0,
        **options: Any,
    ) -> ConvexNet:
        """For images (c, h, w): 3 x 3 convolutions, then ``last`` units on what is left; ``options`` as for the class.

        The defaults are the released network for 28 x 28; that for 128 x 128 has 256 channels, strides
        (1, 2, 1, 2, 1, 2) and beta 100.
        """
        c, h, w = shape
        shrunk = 2 ** sum(s == 2 for s in strides)
        checks.require(
            len(strides) > 0 and strides[0] == 1 and all(s in (1, 2) for s in strides),
            f"strides are {tuple(strides)}; they must be 1 or 2, the first of them 1.",
        )
        checks.require(
            h % shrunk == 0 and w % shrunk == 0,
            f"shape has {h} x {w} pixels; strides {tuple(strides)} need multiples of {shrunk}.",
        )
        rest = (h // shrunk) * (w // shrunk)
        with seeded(checks.whole("seed", seed, 0)):
            first = nn.Conv2d(c, channels, 3, 1, 1, bias=False)
            cores = [nn.Conv2d(channels, channels, 3, s, 1, bias=False) for s in strides[1:]]
            skips = [nn.Conv2d(c, channels, 3, s, 1) for s in strides[1:]]
            end, beside = nn.Linear(channels * rest, last, bias=False), nn.Linear(c * rest, last)
            out = nn.Linear(last, 1, bias=False)
        return ConvexNet(first, [*cores, end], [*skips, beside], out, None, shape=shape, seed=seed, **options)

    def act(self, t: Tensor) -> Tensor:
        """The activation."""
        return F.softplus(t, self.beta, LINEAR_ABOVE) if self.activation is None else self.activation(t)

    def forward(self, y: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
        """psi of every y."""
        z = self.act(self.first(y))
        for core, skip in zip(self.cores, self.skips, strict=True):
            given = y
            if z.ndim > 2 and z.shape[2:] != y.shape[2:]:
                given = F.interpolate(y, z.shape[2:], mode="bilinear", align_corners=False)
            if isinstance(core, nn.Linear):
                z, given = z.flatten(1), given.flatten(1)
            z = self.act(core(z) + skip(given))
        psi: Tensor = self.out(z)
        return (psi if self.direct is None else psi + self.direct(y.flatten(1)))[:, 0]

    def constrained(self) -> Iterator[Tensor]:
        """The weights that may not be below 0: W_k and w."""
        for layer in (*self.cores, self.out):
            yield layer.weight

    @torch.no_grad()
    def project_(self) -> None:
        """Set constrained weights below 0 to 0."""
        if self.positivity == "clamp":
            for weight in self.constrained():
                weight.clamp_(min=0)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
        for weight in self.constrained():
            weight.copy_(torch.empty(weight.shape).normal_(*INITIAL, generator=generator).exp_())


class _Softplus(nn.Module):
    def forward(self, free: Tensor) -> Tensor:
        return F.softplus(free)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.expm1().log()


def _require_convex(act: Activation) -> None:
    """On a grid, in double precision: values must rise and their differences too."""
    values = act(torch.linspace(-8, 8, 4001, dtype=torch.float64))
    slack = 1e-12 * float(values.abs().max())
    steps = values.diff()
    checks.require(
        bool((steps >= -slack).all()) and bool((steps.diff() >= -slack).all()),
        "activation is not convex and increasing; psi would not be convex.",
    )
