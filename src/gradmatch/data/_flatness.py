"""Diagnostics of trajectories: how errors of matching pile up, and how flat the experts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.examples import as_examples
from gradmatch.core.networks import Network, build
from gradmatch.data._common import SyntheticDataset, standardise
from gradmatch.data._inner import Inner, batch_order, caller, require_matchable, squared_gap
from gradmatch.data._trajectories import TrajectoryBuffer


@dataclass(frozen=True)
class AccumulatedError:
    """Errors of a student that is not put back on the expert between segments; means over experts.

    Attributes:
        accumulated: eps_k / |theta*_0 - theta*_{kM}|^2 for k = 1, 2, ...
        matching: delta_k / |theta*_{(k-1)M} - theta*_{kM}|^2, each segment started on the expert.
        ratio: eps_k / delta_k, both squared distances in parameters: how far errors have piled up.
        loss_gap: loss of the student minus loss of the expert after segment k, on the data given.
    """

    accumulated: tuple[float, ...]
    matching: tuple[float, ...]
    ratio: tuple[float, ...]
    loss_gap: tuple[float, ...]


class _Student:
    """Plain SGD on a synthetic set from given parameters."""

    def __init__(
        self, synthetic: SyntheticDataset, network: Network, buffer: TrajectoryBuffer, lr: float | None
    ):
        self.net = build(network, 0).train()
        require_matchable(self.net)
        self.space = buffer.require_network(self.net)
        self.images, self.labels = synthetic.standardised(), synthetic.labels
        rate = synthetic.lr if lr is None else lr
        checks.require(
            rate is not None, "lr is None and the synthetic set has learned none; give the student's rate."
        )
        self.lr = float(rate or 0.0)

    def segment(self, theta: Tensor, steps: int, batch_syn: int | None, generator: torch.Generator) -> Tensor:
        """Parameters (P,) after ``steps`` steps from ``theta``."""
        inner = Inner(
            caller(self.net),
            batch_order(len(self.images), batch_syn, steps, generator),
            [0] * steps,
            None,
            False,
        )
        for i in range(steps):
            params = {k: p.detach().requires_grad_() for k, p in self.space.unflatten(theta).items()}
            loss = inner.loss(params, i, {"images": self.images}, self.labels)
            grads = torch.autograd.grad(
                loss, list(params.values()), allow_unused=True, materialize_grads=True
            )
            theta = theta - self.lr * self.space.flatten(grads)
        return checks.finite("the student's parameters", theta)

    @torch.no_grad()
    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> float:
        return float(F.cross_entropy(caller(self.net)(self.space.unflatten(theta), x), y))


def accumulated_error(
    synthetic: SyntheticDataset,
    network: Network,
    buffer: TrajectoryBuffer,
    data: Any,
    *,
    segments: int = 5,
    syn_steps: int = 30,
    expert_epochs: int = 2,
    lr: float | None = None,
    batch_syn: int | None = None,
    experts: int | None = None,
    seed: int = 0,
) -> AccumulatedError:
    """Train students from the experts' first checkpoints through several segments and compare.

    Args:
        synthetic: the distilled set; its mean and std are applied to ``data`` too.
        network, buffer: the experts and their architecture.
        data: labelled data for the loss gap.
        segments: how many, each ``syn_steps`` inner steps against ``expert_epochs`` epochs.
        lr: the student's rate; default the learned one.
        experts: only the first so many.

    Raises:
        InputError: more segments than the buffer has epochs for, or a student that diverges.
    """
    checks.require(
        checks.whole("segments", segments) * expert_epochs <= buffer.epochs,
        f"segments is {segments}, each of {expert_epochs} epochs; the buffer has {buffer.epochs}.",
    )
    student, held = _Student(synthetic, network, buffer, lr), as_examples(data)
    x = standardise(held.x, synthetic.mean, synthetic.std)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for e in range(len(buffer) if experts is None else min(experts, len(buffer))):
        theta, first = buffer.at(e, 0).clone(), buffer.at(e, 0)
        for k in range(1, segments + 1):
            before, target = buffer.at(e, (k - 1) * expert_epochs), buffer.at(e, k * expert_epochs)
            single = student.segment(before, syn_steps, batch_syn, generator)
            theta = student.segment(theta, syn_steps, batch_syn, generator)
            eps, delta = (theta - target).square().sum(), (single - target).square().sum()
            gap = student.loss(theta, x, held.y) - student.loss(target, x, held.y)
            rows.append(
                [eps / squared_gap(first, target), delta / squared_gap(before, target), eps / delta, gap]
            )
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, segments, 4).mean(0)
    return AccumulatedError(*(tuple(column) for column in table.T.tolist()))


def matching_error(
    synthetic: SyntheticDataset,
    network: Network,
    buffer: TrajectoryBuffer,
    *,
    syn_steps: int = 30,
    expert_epochs: int = 2,
    max_start_epoch: int = 20,
    lr: float | None = None,
    batch_syn: int | None = None,
    seed: int = 0,
) -> float:
    """Mean normalised matching loss over all experts and start epochs."""
    buffer.require_segments(max_start_epoch, expert_epochs)
    student, generator = _Student(synthetic, network, buffer, lr), torch.Generator().manual_seed(seed)
    errors = []
    for e in range(len(buffer)):
        for t in range(max_start_epoch):
            start, target = buffer.at(e, t), buffer.at(e, t + expert_epochs)
            end = student.segment(start, syn_steps, batch_syn, generator)
            errors.append(float((end - target).square().sum() / squared_gap(start, target)))
    return sum(errors) / len(errors)


def loss_rise(
    network: Network,
    theta: Tensor,
    data: Any,
    *,
    radius: float = 0.05,
    kind: str = "random",
    draws: int = 10,
    seed: int = 0,
) -> float:
    """How much the mean loss on ``data`` rises at the distance ``radius * |theta|``.

    Args:
        theta: flat parameters (P,) of ``network``.
        kind: "random" (mean over ``draws`` directions) or "gradient" (along the loss gradient, one step).
    """
    checks.one_of("kind", kind, ("random", "gradient"))
    loss, gradient = _loss_functions(network, theta, data)
    length = checks.positive("radius", radius) * float(theta.norm())
    here = float(loss(theta).detach())
    if kind == "gradient":
        g = gradient(theta)
        return float(loss(theta + length * g / g.norm()).detach()) - here
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(checks.whole("draws", draws)):
        d = torch.randn(theta.shape, generator=generator).to(theta)
        total += float(loss(theta + length * d / d.norm()).detach())
    return total / draws - here


def top_eigenvalue(
    network: Network,
    theta: Tensor,
    data: Any,
    *,
    iterations: int = 50,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> float:
    """The eigenvalue of the loss Hessian that is largest in size, by power iteration.

    Stops once it changes by less than ``tolerance`` of itself.
    """
    _, gradient = _loss_functions(network, theta, data)
    v = torch.randn(theta.shape, generator=torch.Generator().manual_seed(seed)).to(theta)
    v, value = v / v.norm(), float("inf")
    for _ in range(checks.whole("iterations", iterations)):
        at = theta.detach().requires_grad_()
        (hv,) = torch.autograd.grad(gradient(at, graph=True) @ v, at)
        last, value = value, float(v @ hv)
        if abs(value - last) <= tolerance * abs(value) or not bool(hv.norm() > 0):
            break
        v = hv / hv.norm()
    return value


def _loss_functions(network: Network, theta: Tensor, data: Any) -> tuple[Any, Any]:
    """theta -> mean loss on the data, and theta -> its gradient."""
    net, held = build(network, 0).eval(), as_examples(data)
    sizes = [p.numel() for p in net.parameters()]
    shapes = {k: p.shape for k, p in net.named_parameters()}
    checks.require(
        theta.ndim == 1 and len(theta) == sum(sizes),
        f"theta has shape {tuple(theta.shape)}; the network has {sum(sizes)} parameters.",
    )
    x, call = held.x.to(theta), caller(net.to(theta))

    def loss(at: Tensor) -> Tensor:
        parts = zip(shapes.items(), torch.split(at, sizes), strict=True)
        return F.cross_entropy(call({k: p.view(s) for (k, s), p in parts}, x), held.y)

    def gradient(at: Tensor, graph: bool = False) -> Tensor:
        at = at if graph else at.detach().requires_grad_()
        return torch.autograd.grad(loss(at), at, create_graph=graph)[0]

    return loss, gradient
