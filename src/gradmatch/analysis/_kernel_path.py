"""Kernel regression by gradient descent, after every number of steps at once, and three ways to stop it.

For F_{k+1} = F_k - (eta / N) K (F_k - Y) from F_0 = 0 and K / N = U diag(l) U^T, the fit after k steps is

    F_k(x) = sum_r K(x, X) u_r  c_k(l_r)  u_r^T Y / N,     c_k(l) = (1 - (1 - eta l)^k) / l  (eta k where l = 0),

so that one decomposition gives every step. The directions in which K is zero move no function and are left out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradmatch.core import checks

__all__ = ["Kernel", "KernelPath", "RuleStop", "descent_coefficients", "step_grid", "stopping_time"]

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x (n, d), t (n,), x' (m, d), t' (m,)) -> [n, m], the same for each of d outputs, or [n d, m d] with all of them."""
Steps = int | Sequence[int] | Tensor
ZERO = 1e-13
"""Eigenvalues below this share of the largest are rounding in float64 and count as 0."""
RIDGE = 1e-3
"""c over the largest eigenvalue of K, in the norm of a fit: the norm depends on it, so it is reported beside it."""


def descent_coefficients(values: Tensor, eta: float, steps: Tensor) -> Tensor:
    """(1 - (1 - eta l)^k) / l for all steps k and eigenvalues l [steps, values]; eta k where l = 0."""
    base, k = 1 - eta * values, steps.double()[:, None]
    small = base > 0.5  # no digits are lost where the power is near 1
    left = torch.where(small, torch.log1p(-eta * torch.where(small, values, 0.0)), 0.0)
    power = torch.where(small, -torch.expm1(k * left), 1 - base**k)
    return torch.where(values > 0, power / torch.where(values > 0, values, 1.0), eta * k)


def step_grid(most: int) -> Tensor:
    """Steps 1, 2, ... up to ``most``, each at most a twentieth above the one before (or one)."""
    count = math.ceil(math.log(max(most, 2)) / math.log(1.05)) + 1
    steps = torch.logspace(0, math.log10(most), count, dtype=torch.float64).round().long()
    found: Tensor = torch.unique_consecutive(steps)
    return found


def _steps(k: Steps) -> Tensor:
    found = torch.as_tensor(k)
    checks.require(
        found.ndim <= 1 and not found.is_floating_point() and bool((found >= 0).all()),
        f"k is {k}; it must be a number of steps, or several.",
    )
    return found.reshape(-1)


def stopping_time(
    eigenvalues: Tensor, eta: float, sigma: float, norm: float, *, n: int | None = None
) -> int | None:
    """The last step k with R_N(1 / sqrt(eta k)) <= B / (2 e sigma eta k); None where there is no noise to fit.

    R_N(s) = sqrt((1/N) sum_i min(l_i, s^2)) is the complexity of the kernel at scale s (after Raskutti, Wainwright
    and Yu, JMLR 2014). eta k R_N grows with k, so the last step that keeps it is found by bisection.

    Args:
        eigenvalues: l_i of K / N, not of K.
        eta: step size.
        sigma: deviation of the label noise, of one coordinate.
        norm: B, of the wanted function in the kernel's space; the theory takes 1.
        n: N, where not all N eigenvalues are given.

    >>> stopping_time(torch.tensor([1.0, 0.1]), 1.0, sigma=0.1, norm=1.0)
    2
    """
    values = checks.finite("eigenvalues", torch.as_tensor(eigenvalues)).double().clamp(min=0)
    checks.require(len(values) > 0, "eigenvalues is empty; at least one is needed.")
    checks.positive("eta", eta), checks.nonnegative("sigma", sigma), checks.nonnegative("norm", norm)
    count = len(values) if n is None else checks.whole("n", n)
    if sigma == 0 or not bool((values > 0).any()):
        return None
    limit = norm / (2 * math.e * sigma)

    def keeps(k: int) -> bool:
        time = eta * k
        return time * math.sqrt(float(values.clamp(max=1 / time).sum()) / count) <= limit

    if not keeps(1):
        return 0
    low, high = 1, 2
    while keeps(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class RuleStop:
    """Where the theory's rule stops.

    Attributes:
        step: the step, 0 if even the first is one too many, None without noise.
        sigma, norm: deviation of the label noise and B, given or estimated.
        ridge: c over the largest eigenvalue of K, on which an estimated norm depends.
        pilot: the step at which the hold-out stops, from which both are estimated.
    """

    step: int | None
    sigma: float
    norm: float
    ridge: float
    pilot: int


class KernelPath:
    """Every step of kernel gradient descent on N labels, by one eigendecomposition in float64.

    Args:
        kernel: see :data:`Kernel`.
        inputs: x (N, d) and t (N,).
        labels: (N, d).
        eta: step size; default 1 / the largest eigenvalue of K / N.
        landmarks: take Nystrom's approximation on so many inputs drawn at random: K(., L) K(L, L)^{-1} K(L, .).
        memory: GiB that the kernel's decomposition may take.
        seed: of the landmarks.

    Raises:
        InputError: shapes that do not belong together, a kernel above ``memory``, or eta above 2 / the largest
            eigenvalue, where gradient descent diverges.

    >>> linear = lambda x, t, x2, t2: x @ x2.T
    >>> x, y = torch.eye(3).double(), torch.tensor([[1.0], [2.0], [3.0]]).double()
    >>> KernelPath(linear, (x, torch.ones(3)), y, eta=3.0).fit_at(1).flatten().tolist()
    [1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        kernel: Kernel,
        inputs: tuple[Tensor, Tensor],
        labels: Tensor,
        *,
        eta: float | None = None,
        landmarks: int | None = None,
        memory: float = 2.0,
        seed: int = 0,
    ) -> None:
        x, t = (checks.finite(k, v).double() for k, v in zip(("x", "t"), inputs, strict=True))
        self.kernel, self.n, self.width = kernel, len(x), labels.shape[-1]
        checks.require(
            x.ndim == 2 and t.shape == (self.n,) and labels.ndim == 2 and len(labels) == self.n > 0,
            f"x is {tuple(x.shape)}, t {tuple(t.shape)} and labels {tuple(labels.shape)}; they must be (N, d), (N,) "
            "and (N, outputs).",
        )
        self.per = len(self._block((x[:1], t[:1]), (x[:1], t[:1])))
        checks.require(
            self.per in (1, self.width),
            f"the kernel has {self.per} rows an input; it must have 1 or {self.width}, as the labels.",
        )
        kept = self.n if landmarks is None else min(self.n, checks.whole("landmarks", landmarks))
        need = 24 * kept * self.per * max(kept * self.per, self.n if landmarks else 0) / 2**30
        checks.require(
            need <= checks.positive("memory", memory),
            f"the kernel of {self.n} inputs takes {need:.1f} GiB, more than memory={memory:g}; give landmarks "
            "(Nystrom).",
        )
        order = torch.arange(self.n)
        if landmarks is not None:
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed))[:kept].sort().values
        self.points = x[order.to(x.device)], t[order.to(x.device)]
        self._train = self._decompose((x, t), landmarks is not None)
        self.weights = self._weights(labels)
        top = float(self.eigenvalues[-1])
        self.eta = 1 / top if eta is None else checks.positive("eta", eta)
        checks.require(
            self.eta <= 2 / top,
            f"eta is {self.eta:.4g}; above 2 / {top:.4g} = {2 / top:.4g} gradient descent diverges.",
        )

    def _weights(self, labels: Tensor) -> Tensor:
        rows = checks.finite("labels", labels).double().reshape(len(self._train), -1)
        return self._train.T @ rows / self.n

    def with_labels(self, labels: Tensor) -> KernelPath:
        """The path for other labels (N, outputs) of the same inputs; the decomposition is shared."""
        checks.require(
            labels.shape == (self.n, self.width),
            f"labels is {tuple(labels.shape)}; it must be ({self.n}, {self.width}).",
        )
        other = copy.copy(self)
        other.weights = self._weights(labels)
        return other

    def _block(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        return checks.finite("the kernel", self.kernel(*a, *b).double())

    def _decompose(self, train: tuple[Tensor, Tensor], landmarks: bool) -> Tensor:
        """Eigenvalues of K / N, and features whose inner products are K along them; those of the inputs."""
        middle = self._block(self.points, self.points)
        scale = 1.0 if landmarks else self.n
        values, vectors = torch.linalg.eigh(middle / scale)
        keep = values > ZERO * values[-1].clamp(min=0)
        checks.require(bool(keep.any()), "the kernel is zero on all inputs; there is nothing to fit.")
        values, vectors = values[keep], vectors[:, keep]
        root = (scale * values).sqrt()
        self.map: Tensor = vectors / root
        if not landmarks:
            self.eigenvalues: Tensor = values
            own: Tensor = vectors * root
            return own
        rough = self._block(train, self.points) @ self.map
        self.eigenvalues, turn = torch.linalg.eigh(rough.T @ rough / self.n)
        self.eigenvalues = self.eigenvalues.clamp(min=0)
        self.map = self.map @ turn
        turned: Tensor = rough @ turn
        return turned

    def fit_at(self, k: Steps) -> Tensor:
        """Fit at the training inputs after k steps: (N, outputs), or one for each of several steps."""
        steps = _steps(k)
        return self._shaped(self._train @ self._moved(steps).flatten(1), k)

    def predict(self, x: Tensor, t: Tensor, k: Steps) -> Tensor:
        """Fit at other inputs after k steps: (n, outputs), or (steps, n, outputs)."""
        moved = self._moved(_steps(k)).flatten(1)
        block = self._block((x.double(), t.double()), self.points)
        few = moved.shape[1] < len(block)  # the cheaper order of three factors
        return self._shaped(block @ (self.map @ moved) if few else (block @ self.map) @ moved, k)

    def _moved(self, steps: Tensor) -> Tensor:
        """Weights of the features after each of the steps [r, steps, columns]."""
        c = descent_coefficients(self.eigenvalues, self.eta, steps.to(self.eigenvalues.device))
        moved: Tensor = c.T[:, :, None] * self.weights[:, None]
        return moved

    def _shaped(self, found: Tensor, k: Steps) -> Tensor:
        """[n per, steps columns] as (steps, n, outputs), or without the first axis for one step."""
        columns = self.weights.shape[1]
        apart = found.reshape(len(found), -1, columns).transpose(0, 1)
        apart = apart.reshape(len(apart), len(found) // self.per, self.width)
        return apart[0] if torch.as_tensor(k).ndim == 0 else apart

    def loss(self, x: Tensor, t: Tensor, y: Tensor, k: Steps) -> Tensor:
        """Mean squared distance to ``y`` (n, outputs) after each of the steps, summed over outputs."""
        return (self.predict(x, t, k) - y).square().sum(-1).mean(-1)

    def holdout(self, x: Tensor, t: Tensor, y: Tensor, most: int = 100_000) -> int:
        """The step, among :func:`step_grid`, with the least loss on labels held out."""
        grid = step_grid(checks.whole("most", most))
        return int(grid[self.loss(x, t, y, grid).argmin().cpu()])

    def norm_of_fit(self, k: int, ridge: float = RIDGE) -> float:
        """sqrt(max over outputs of F_k^T (K + c I)^{-1} F_k), c = ``ridge`` times the largest eigenvalue of K.

        Of a kernel with all outputs, the mean over outputs in place of the largest.
        """
        scale = self.n * self.eigenvalues
        moved = self._moved(_steps(k))[:, 0]
        squares = moved.square() * (scale / (scale + ridge * scale[-1]))[:, None]
        return float((squares.sum(0) / self.per).max().sqrt())

    def rule(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        sigma: float | None = None,
        norm: float | None = None,
        ridge: float = RIDGE,
        most: int = 100_000,
    ) -> RuleStop:
        """Stop by :func:`stopping_time`; what is not given is estimated from the fit at the hold-out's own stop.

        Args:
            x, t, y: inputs and labels held out.
            sigma: default the root of the mean squared residual there, over points and outputs.
            norm: default :meth:`norm_of_fit` there.
            ridge: of that norm.
            most: steps the hold-out looks at.
        """
        pilot = self.holdout(x, t, y, most)
        if sigma is None:
            sigma = math.sqrt(float(self.loss(x, t, y, pilot)) / self.width)
        norm = self.norm_of_fit(pilot, ridge) if norm is None else norm
        step = stopping_time(self.eigenvalues, self.eta, sigma, norm, n=self.n * self.per)
        return RuleStop(step, sigma, norm, ridge, pilot)
