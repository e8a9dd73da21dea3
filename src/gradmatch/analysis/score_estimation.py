"""Neural Network-Based Score Estimation in Diffusion Models: Optimization and Generalization.

Han, Razaviyayn, Xu; ICLR 2024, arXiv 2401.15604. With X_t | X_0 ~ N(a_t X_0, h_t I) and h_t = 1 - a_t^2, Tweedie's
formula is

    grad log p_t(x) = (a_t / h_t) f*(x, t) - x / h_t,    f*(x, t) = E[X_0 | X_t = x],

so a score network is taken as s_W = (a_t / h_t) Pi(f_W) - x / h_t with Pi the projection on the ball that holds the
data. The score loss with weight (h_t / a_t)^2 is then E |f_W - f*|^2 and, up to a constant, E |f_W(X_t, t) - X_0|^2: a
regression whose labels X_0 are noisy by construction. Gradient descent on a wide network follows kernel regression
with the network's tangent kernel, and both fit the noise in the end; so training has to stop early:

* at the least loss on data held out (the default: its minimiser is that of the error itself, in expectation);
* by the rule of the theory, from the kernel's eigenvalues, the noise and the norm of f*.

Readings taken, since the paper gives no code: inputs of the network are (x, t - T_0, 1), the outer weights are fixed
signs, and the function at the start is subtracted.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradmatch.analysis._kernel_path import Kernel, KernelPath, RuleStop, step_grid, stopping_time
from gradmatch.analysis._two_layer import EmpiricalKernel, ReLUKernel, TwoLayerReLU
from gradmatch.core import checks
from gradmatch.core.path import AffinePath, OrnsteinUhlenbeck, Prediction, Time
from gradmatch.core.sampler import Solver

__all__ = [
    "DenoisingRegression",
    "EmpiricalKernel",
    "ErrorSplit",
    "KernelPath",
    "ReLUKernel",
    "RuleStop",
    "ScoreFit",
    "TweedieScore",
    "TwoLayerReLU",
    "error_split",
    "stopping_time",
    "train_score",
]

Truth = Callable[[Tensor, Tensor], Tensor]
"""f*(x (n, d), t (n,)) -> (n, d)."""
KERNEL_ROWS = 2000
"""Inputs from which the largest eigenvalue of the tangent kernel is taken where there are more."""


class DenoisingRegression:
    """Denoising score matching as a regression: triples (X_t, t, label), drawn once.

    Times are uniform on [t_min, t_max]. Unpacks as ``inputs, labels, t``.

    Args:
        data: X_0 (points, d).
        path: a forward process with alpha^2 + sigma^2 = 1; default dX = -X/2 dt + dB.
        t_min, t_max: T_0 > 0 and T.
        n: triples, their X_0 drawn with replacement; default every point ``draws`` times.
        draws: (t, noise) for each point. Fresh ones cost nothing, and in a hold-out they still its noise.
        target: "x0" regresses X_0, the score loss with weight (h/a)^2; "score" the score itself, -noise / sqrt(h),
            unweighted (the usual form, for comparison).
        radius: D of the ball that holds the data; default the largest |X_0|.
        clip: project X_t on a ball of this radius ("localised" inputs of the analysis); ``clipped`` is the share.
        resample: :meth:`epoch` draws fresh times and noise, as in practice; that removes overfitting, and with it
            what the theory is about.
        seed: of all draws.

    Raises:
        InputError: t_min not above 0, where the weight (a/h)^2 of the score has no bound, times that are not finite,
            or data outside the radius.

    >>> inputs, labels, t = DenoisingRegression(torch.zeros(7, 2))
    >>> inputs.shape, labels.shape, t.shape
    (torch.Size([7, 2]), torch.Size([7, 2]), torch.Size([7]))
    """

    def __init__(
        self,
        data: Tensor,
        path: AffinePath | None = None,
        *,
        t_min: float = 0.05,
        t_max: float = 3.0,
        n: int | None = None,
        draws: int = 1,
        target: Literal["x0", "score"] = "x0",
        radius: float | None = None,
        clip: float | None = None,
        resample: bool = False,
        seed: int = 0,
    ) -> None:
        self.data = checks.finite("data", torch.as_tensor(data))
        checks.require(
            self.data.ndim == 2 and len(self.data) > 0 and self.data.is_floating_point(),
            f"data is {self.data.dtype} of shape {tuple(self.data.shape)}; it must be floats (points, d).",
        )
        checks.require(
            checks.number("t_min", t_min) > 0,
            f"t_min is {t_min}; it must be above 0, since the weight of the score has no bound at 0.",
        )
        checks.require(
            checks.number("t_max", t_max) > t_min, f"t_max is {t_max}; it must be above t_min = {t_min}."
        )
        self.path, self.t_min, self.t_max = path or OrnsteinUhlenbeck(), float(t_min), float(t_max)
        self.n, self.draws = n if n is None else checks.whole("n", n), checks.whole("draws", draws)
        self.target = checks.one_of("target", target, ("x0", "score"))
        self.clip = None if clip is None else checks.positive("clip", clip)
        self.resample, self.seed = bool(resample), checks.whole("seed", seed, least=0)
        largest = float(self.data.norm(dim=1).max())
        self.radius = largest if radius is None else checks.nonnegative("radius", radius)
        checks.require(
            largest <= self.radius * (1 + 1e-6),
            f"data reaches {largest:.4g} from 0, and radius is {radius}; it must hold all data.",
        )
        own = (
            2401_15604 + self.seed
        )  # so that data drawn by a generator of the same seed do not determine the times
        self._generator = torch.Generator().manual_seed(own)
        self.inputs, self.labels, self.t, self.noise = self._draw()

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.inputs, self.labels, self.t))

    def __len__(self) -> int:
        return len(self.t)

    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g, count = self._generator, len(self.data) * self.draws if self.n is None else self.n
        rows = torch.arange(len(self.data)).repeat_interleave(self.draws)
        if self.n is not None:
            rows = torch.randint(len(self.data), (count,), generator=g)
        x0 = self.data[rows.to(self.data.device)]
        t = self.t_min + (self.t_max - self.t_min) * torch.rand(count, generator=g, dtype=torch.float64)
        t = t.to(x0.device)
        noise = torch.randn(x0.shape, generator=g, dtype=torch.float64).to(x0)
        x = self.path.sample(x0, noise, t)
        labels = self.path.target("x0" if self.target == "x0" else "score", x0, noise, t)
        if self.clip is not None:
            self.clipped = float((x.norm(dim=1) > self.clip).double().mean())
            x = _projected(x, self.clip)
        return x, labels, t.to(x), noise

    def epoch(self) -> tuple[Tensor, Tensor, Tensor]:
        """(inputs, labels, t) for one step over all: the triples, or fresh ones with ``resample``."""
        if self.resample:
            self.inputs, self.labels, self.t, self.noise = self._draw()
        return self.inputs, self.labels, self.t

    def split(self, held: float = 0.1, draws: int = 10) -> tuple[DenoisingRegression, DenoisingRegression]:
        """The task without a share of the data points, and those with ``draws`` times and noises each.

        Whole points are held out: another noise of a training point is no new label.
        """
        checks.fraction("held", held, one=False)
        checks.require(len(self.data) > 1, "data has one point; holding some out needs at least two.")
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.seed))
        count = min(len(order) - 1, max(1, round(held * len(order))))
        options: dict[str, Any] = {
            k: getattr(self, k) for k in ("t_min", "t_max", "target", "radius", "clip")
        }
        own = {"n": self.n, "draws": self.draws, "resample": self.resample, "seed": self.seed}
        rest, out = (self.data[i.to(self.data.device)] for i in (order[count:], order[:count]))
        return (
            DenoisingRegression(rest, self.path, **options, **own),  # type: ignore[arg-type]
            DenoisingRegression(out, self.path, **options, draws=draws, seed=self.seed + 1),
        )


def _projected(x: Tensor, radius: float) -> Tensor:
    """Rows on the ball of that radius."""
    inside: Tensor = (radius / x.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
    return x * inside


class TweedieScore:
    """A network f(x, t) for E[X_0 | X_t] as a score; call it as any model of ``gradmatch.core.sampler``.

    Args:
        net: ``net(x (n, d), t (n,)) -> (n, d)``.
        path: the forward process.
        radius: of the ball on which outputs are projected; None leaves them. With data inside it the projection
            never adds error.

    >>> score = TweedieScore(lambda x, t: x, OrnsteinUhlenbeck())
    >>> score(torch.zeros(3, 2), torch.ones(3)).kind
    'x0'
    """

    def __init__(self, net: Callable[..., Tensor], path: AffinePath, radius: float | None = None) -> None:
        self.net, self.path = net, path
        self.radius = None if radius is None else checks.positive("radius", radius)

    def __call__(self, x: Tensor, t: Time, cond: Any = None) -> Prediction:
        at = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        found = self.net(x, at)
        return Prediction("x0", found if self.radius is None else _projected(found, self.radius))

    def score(self, x: Tensor, t: Time) -> Tensor:
        """(a/h) Pi(f(x, t)) - x / h."""
        return self.path.convert(self(x, t), "score", x, t).tensor

    def sample(
        self,
        n: int,
        dim: int,
        *,
        t_min: float = 0.05,
        t_max: float = 3.0,
        steps: int = 60,
        step: str = "ddim",
        denoise: bool = True,
        seed: int = 0,
    ) -> Tensor:
        """(n, dim) from N(0, I) at ``t_max`` to ``t_min`` by ``steps`` times, evenly spaced in their logarithms.

        What is left of the noise at ``t_min`` is then taken off by one more prediction, unless ``denoise`` is False.
        ``step`` is one of the solver's ("ddim", "euler", "heun", ...), or "sde" for Euler's steps of the reverse
        stochastic equation dX = (g/2 X + g s) dt + sqrt(g) dB, which needs an :class:`OrnsteinUhlenbeck`.
        """
        times = torch.logspace(math.log10(t_max), math.log10(t_min), checks.whole("steps", steps) + 1)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, dim, generator=generator)
        if step == "sde":
            x = self._reversed(x, times.double(), generator)
        else:
            x = Solver(times, step).run(self, self.path, x).x
        with torch.no_grad():
            return checks.finite("the sample", self(x, float(times[-1])).tensor if denoise else x)

    @torch.no_grad()
    def _reversed(self, x: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
        """Euler's steps of the reverse stochastic equation."""
        path = self.path
        if not isinstance(path, OrnsteinUhlenbeck):
            checks.refuse(f'step is "sde" on a {type(path).__name__}; it needs an OrnsteinUhlenbeck.')
        for now, later in itertools.pairwise(times):
            h, g = float(now - later), float(path.rate(now))
            x = x + h * g * (x / 2 + self.score(x, float(now)))
            x = x + math.sqrt(h * g) * torch.randn(x.shape, generator=generator)
        return x


# --- training ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreFit:
    """A trained network and how it came there.

    Attributes:
        net: at the stop.
        step: the stop; ``steps`` where there was none.
        eta, largest: step size, and the largest eigenvalue of the tangent kernel over N at the start.
        looks: steps at which losses were looked at.
        losses: mean squared distance to the labels there, summed over outputs.
        held: the same on held-out points, where these are.
        rule: what the theory's rule used, where it was asked for.
    """

    net: nn.Module
    step: int
    eta: float
    largest: float
    looks: tuple[int, ...]
    losses: tuple[float, ...]
    held: tuple[float, ...]
    rule: RuleStop | None = None


def train_score(
    net: nn.Module,
    task: DenoisingRegression,
    *,
    lr: float | Literal["1/lambda_max"] = "1/lambda_max",
    steps: int = 4000,
    stop: Literal["holdout", "rule"] | None = "holdout",
    held: float = 0.1,
    draws: int = 10,
    sigma: float | None = None,
    norm: float | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> ScoreFit:
    """Full-batch gradient descent on a copy of ``net``, stopped early.

    Args:
        net: ``net(x, t) -> (n, d)``, such as :class:`TwoLayerReLU`.
        task: the regression. It is split if a part is to be held out.
        lr: eta in W <- W - eta grad of 1/2 mean |f - label|^2, or 1 / the largest eigenvalue of the tangent kernel
            over N (for :class:`TwoLayerReLU` that of infinite width).
        steps: most steps.
        stop: "holdout" keeps the weights with the least loss on held-out points; "rule" stops where
            :func:`stopping_time` says; None goes on to the end.
        held, draws: share of the points held out, and times and noises for each of them.
        sigma, norm: for the rule; default estimated, see :meth:`KernelPath.rule`.
        progress: called with (step, of how many).

    Raises:
        InputError: lr above 2 / the largest eigenvalue, where gradient descent diverges; the rule together with
            resampling, for which there is no fixed kernel; a loss that is not finite.

    >>> task = DenoisingRegression(torch.randn(40, 2))
    >>> fit = train_score(TwoLayerReLU(2, 64), task, steps=50)
    >>> fit.held[0] > min(fit.held)
    True
    """
    checks.one_of("stop", stop, ("holdout", "rule", None))
    checks.require(
        not (stop == "rule" and task.resample),
        'stop is "rule" and the task resamples; its noise is never fitted.',
    )
    model = copy.deepcopy(net).to(task.inputs)
    train, out = (task, None) if stop is None else task.split(held, draws)
    kernel = _kernel_of(model)
    largest = _largest(kernel, train)
    eta = 1 / largest if lr == "1/lambda_max" else checks.positive("lr", lr)
    checks.require(
        eta <= 2 / largest,
        f"lr is {eta:.4g}; above 2 / {largest:.4g} = {2 / largest:.4g} gradient descent diverges.",
    )
    most, rule = checks.whole("steps", steps), None
    if stop == "rule" and out is not None:
        path = KernelPath(kernel, (train.inputs, train.t), train.labels, eta=eta)
        rule = path.rule(out.inputs, out.t, out.labels, sigma=sigma, norm=norm, most=most)
        most = most if rule.step is None else min(most, rule.step)
    looks = [0, *step_grid(most).tolist()] if most else [0]
    losses, held_out, best = [], [], (math.inf, most, model.state_dict())
    for step, loss in _descend(model, train, eta, looks):
        losses.append(loss)
        if out is not None:
            held_out.append(_loss(model, out))
            if stop == "holdout" and held_out[-1] < best[0]:
                best = held_out[-1], step, copy.deepcopy(model.state_dict())
        if progress is not None:
            progress(step, most)
    if stop == "holdout":
        model.load_state_dict(best[2])
    return ScoreFit(model, best[1], eta, largest, tuple(looks), tuple(losses), tuple(held_out), rule)


def _kernel_of(net: nn.Module) -> Kernel:
    return ReLUKernel(net.t_min) if isinstance(net, TwoLayerReLU) else EmpiricalKernel(net)


def _largest(kernel: Kernel, task: DenoisingRegression) -> float:
    """Largest eigenvalue of K / N, from so many inputs as fit."""
    rows = KERNEL_ROWS
    if isinstance(kernel, EmpiricalKernel):
        size = sum(p.numel() for p in kernel.params.values()) * task.inputs.shape[1]
        rows = max(2, min(rows, 2**27 // size))
    order = torch.randperm(len(task), generator=torch.Generator().manual_seed(task.seed))[:rows]
    x, t = (v[order.to(v.device)] for v in (task.inputs, task.t))
    x, t = (x, t) if isinstance(kernel, EmpiricalKernel) else (x.double(), t.double())
    found = float(torch.linalg.eigvalsh(kernel(x, t, x, t) / len(x))[-1])
    checks.require(found > 0, "the tangent kernel is zero; the network cannot learn from these inputs.")
    return found


def _loss(net: nn.Module, task: DenoisingRegression) -> float:
    with torch.no_grad():
        return float((net(task.inputs, task.t) - task.labels).square().sum(1).mean())


def _descend(
    net: nn.Module, task: DenoisingRegression, eta: float, looks: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """Gradient descent on half the mean squared distance; (step, the mean before its update) at each of ``looks``."""
    at, slopes = set(looks), _slopes(net, task)
    for step in range(looks[-1] + 1):
        loss, gradients = slopes()
        if step in at:
            value = float(loss.detach())
            checks.require(math.isfinite(value), f"the loss is {value} after {step} steps; lower lr.")
            yield step, value
        if step == looks[-1]:
            return
        with torch.no_grad():
            for p, g in gradients:
                p.sub_(g, alpha=eta / 2)


def _slopes(
    net: nn.Module, task: DenoisingRegression
) -> Callable[[], tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]]:
    """Mean squared distance to the labels, and its gradient by parameter."""
    if isinstance(net, TwoLayerReLU) and not task.resample:
        return net.slopes(task.inputs, task.t, task.labels)
    params = [p for p in net.parameters() if p.requires_grad]

    def slopes() -> tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]:
        x, y, t = task.epoch()
        loss = (net(x, t) - y).square().sum(1).mean()
        return loss, list(zip(params, torch.autograd.grad(loss, params), strict=True))

    return slopes


# --- where the error comes from ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ErrorSplit:
    """Mean squared distances between functions at probe points after each of ``steps``, summed over outputs.

    Attributes:
        coupling: network and kernel fit of the noisy labels.
        mismatch: kernel fits of the noisy labels and of the true ones, f*.
        approximation: kernel fit of the true labels and f*.
        network, kernel: network, and kernel fit of the noisy labels, and f*.
    """

    steps: tuple[int, ...]
    coupling: tuple[float, ...]
    mismatch: tuple[float, ...]
    approximation: tuple[float, ...]
    network: tuple[float, ...]
    kernel: tuple[float, ...]


def error_split(
    net: nn.Module,
    task: DenoisingRegression,
    truth: Truth,
    steps: Sequence[int],
    probe: tuple[Tensor, Tensor],
    *,
    eta: float | None = None,
) -> ErrorSplit:
    """The three errors of the paper's proof along one training of a copy of ``net``.

    Args:
        net, task: as in :func:`train_score`; the task must not resample, and regress X_0.
        truth: f*(x, t), known for mixtures of Gaussians.
        steps: where to look, rising.
        probe: x (n, d) and t (n,), fresh draws of the forward process.
        eta: step size; default 1 / the largest eigenvalue of K / N.

    Raises:
        InputError: a task that resamples or does not regress X_0, or steps that do not rise from 0 or above.
    """
    checks.require(
        not task.resample and task.target == "x0",
        "task must regress X_0 on fixed draws to have a kernel path.",
    )
    looks = [checks.whole("steps", k, least=0) for k in steps]
    checks.require(bool(looks) and looks == sorted(set(looks)), f"steps is {list(steps)}; it must rise.")
    noisy = KernelPath(_kernel_of(net), (task.inputs, task.t), task.labels, eta=eta)
    clean = noisy.with_labels(truth(task.inputs, task.t))
    fits = [path.predict(*probe, looks) for path in (noisy, clean)]
    true, model, own = truth(*probe), copy.deepcopy(net).to(task.inputs), []
    for _ in _descend(model, task, noisy.eta, looks):
        with torch.no_grad():
            own.append(model(*probe).double())

    def apart(a: Tensor, b: Tensor) -> tuple[float, ...]:
        return tuple((a - b).square().sum(-1).mean(-1).tolist())

    network = torch.stack(own)
    pairs = ((network, fits[0]), (fits[0], fits[1]), (fits[1], true), (network, true), (fits[0], true))
    return ErrorSplit(tuple(looks), *(apart(a, b) for a, b in pairs))
