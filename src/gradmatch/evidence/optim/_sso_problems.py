"""What target-based surrogates are measured on: an ill-conditioned logistic regression, digits, and imitation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.evidence.optim._training import seeded
from gradmatch.optim import TargetSurrogate
from gradmatch.optim.gns import minimize_gns

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs [b, C], targets) -> losses [b]."""


@dataclass
class Task:
    """A model, its data and a loss of the outputs; ``safe`` is 1/L of one example's loss."""

    model: nn.Module
    x: Tensor
    y: Tensor
    loss: Loss
    safe: float
    batch: int | None = None
    best: float = 0.0
    seed: int = 0
    order: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.order = torch.Generator().manual_seed(self.seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """All rows, or a batch of random ones."""
        if self.batch is None:
            return self.x, self.y
        rows = torch.randint(len(self.x), (self.batch,), generator=self.order)
        return self.x[rows], self.y[rows]

    def value(self) -> float:
        """The full loss less the least one known."""
        with torch.no_grad():
            return float(self.loss(self.model(self.x), self.y).double().mean()) - self.best


def bce(z: Tensor, y: Tensor) -> Tensor:
    """Logistic loss."""
    return F.binary_cross_entropy_with_logits(z[:, 0], y, reduction="none")


def softmax(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(z, y, reduction="none")


def squared(z: Tensor, y: Tensor) -> Tensor:
    """Half the squared distance to one-hot targets."""
    return 0.5 * (z - F.one_hot(y, z.shape[1]).to(z.dtype)).square().sum(1)


def logistic_task(seed: int, n: int = 500, d: int = 50) -> Task:
    """Columns of scales 1 to 0.01, rows of norm 1; labels from weights that undo the scales. In float64."""
    g = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=g, dtype=torch.float64)
    x = normal(n, d) * torch.logspace(0, -2, d, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True)
    score = x @ (normal(d) * torch.logspace(0, 2, d, dtype=torch.float64))
    y = (torch.rand(n, generator=g) < torch.sigmoid(3 * score / score.std())).double()
    model = nn.Linear(d, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    start = torch.zeros(d, dtype=torch.float64)
    found = minimize_gns(lambda w: bce((x @ w)[:, None], y).mean(), start, tol_grad=1e-9, max_iter=200)
    return Task(model, x, y, bce, 4.0, best=found.value)


def digits_task(kind: str, batch: int | None, seed: int, rows: int) -> Task:
    """An MLP 64-32-10 with tanh on digits / 16."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    own = torch.randperm(len(bunch.data), generator=torch.Generator().manual_seed(seed))[:rows]
    x = torch.tensor(bunch.data, dtype=torch.float32)[own] / 16
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), seed)
    loss, safe = {"softmax": (softmax, 2.0), "squared": (squared, 1.0)}[kind]
    return Task(model, x, torch.tensor(bunch.target)[own], loss, safe, batch, seed=seed)


def _with(loss: Loss, y: Tensor, z: Tensor) -> Tensor:
    return loss(z, y)


# --- methods: one expensive call a step ----------------------------------------------------------------------


class ArmijoDescent:
    """Gradient descent with a backtracked rate (c 0.1, halved; doubled after each step); only gradients are counted."""

    def __init__(self, params: Any, lr: float) -> None:
        self.params, self.lr = list(params), lr

    def step(self, loss: Callable[[], Tensor]) -> None:
        """One gradient, and losses until one is low enough."""
        here = loss()
        grads = torch.autograd.grad(here, self.params)
        slope = float(sum(g.square().sum() for g in grads))
        with torch.no_grad():
            torch._foreach_add_(self.params, grads, alpha=-self.lr)
            for _ in range(60):
                if float(loss()) <= float(here) - 0.1 * self.lr * slope:
                    break
                torch._foreach_add_(self.params, grads, alpha=self.lr / 2)
                self.lr /= 2
        self.lr *= 2


BASELINES: dict[str, Callable[[Any, float], Any]] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr),
    "Armijo": ArmijoDescent,
}


def losses_by_call(task: Task, method: str, rate: float, calls: int) -> tuple[list[float], float]:
    """Full loss before and after every call, and passes of the model a call (a backward counts two).

    ``method`` is a baseline or "SSO m N"; for the latter ``rate`` is eta in units of 1/L.
    """
    params = list(task.model.parameters())
    found = [task.value()]
    if method.startswith("SSO"):
        m = int(method.split()[-1])
        ours = TargetSurrogate(params, eta=rate * task.safe, inner_steps=m)
        backwards = 0
        for _ in range(calls):
            x, y = task.draw()
            try:
                ours.step(partial(task.model, x), partial(_with, task.loss, y))
            except InputError:  # eta beyond 1/L may diverge
                return _capped(found, calls), float("inf")
            assert ours.stats is not None
            backwards += ours.stats.inner_steps
            found.append(task.value())
        return _capped(found, calls), (ours.stats.forwards + 2 * backwards) / calls if ours.stats else 0.0
    optimizer = BASELINES[method](params, rate)
    for _ in range(calls):
        x, y = task.draw()

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return task.loss(task.model(x), y).mean()

        if method == "Armijo":
            optimizer.step(loss)
        else:
            optimizer.zero_grad()
            torch.autograd.backward(loss())
            optimizer.step()
        found.append(task.value())
    return _capped(found, calls), 3.0


def _capped(found: list[float], calls: int, most: float = 1e6) -> list[float]:
    """A value for every call: at most ``most``, also where it is not finite or the run had ended."""
    full = [*found, *[most] * (calls + 1 - len(found))]
    return [min(v, most) if v == v else most for v in full]


# --- imitation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    """A linearised cart-pole, x+ = A x + B u at 50 Hz, and its optimal linear controller u = -K x."""

    a: Tensor
    b: Tensor
    k: Tensor

    @classmethod
    def cart_pole(cls) -> Expert:
        """Cart 1 kg, pole 0.1 kg of half-length 0.5 m; cost |x|^2 + 0.1 u^2."""
        from scipy.linalg import solve_discrete_are

        m, cart, half, g, dt = 0.1, 1.0, 0.5, 9.8, 0.02
        total, swing = m + cart, half * (4 / 3 - m / (m + cart))
        a, b = np.eye(4), np.zeros((4, 1))
        a[0, 1] = a[2, 3] = dt
        a[3, 2], b[3, 0] = dt * g / swing, -dt / (total * swing)
        a[1, 2] = -dt * m * half * g / (total * swing)
        b[1, 0] = dt * (1 / total + m * half / (total**2 * swing))
        p = solve_discrete_are(a, b, np.eye(4), 0.1 * np.eye(1))
        k = np.linalg.solve(0.1 * np.eye(1) + b.T @ p @ b, b.T @ p @ a)
        return cls(*(torch.tensor(t, dtype=torch.float32) for t in (a, b, k)))

    def act(self, x: Tensor) -> Tensor:
        """The expert's action [n, 1] in states [n, 4]."""
        return -x @ self.k.T

    def roll(self, policy: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> tuple[Tensor, float]:
        """States visited [steps * n, 4] and the mean cost; states are held within 5."""
        seen, cost = [], 0.0
        with torch.no_grad():
            for _ in range(steps):
                u = policy(x)
                seen.append(x)
                cost += float((x.square().sum(1) + 0.1 * u.square()[:, 0]).mean())
                x = (x @ self.a.T + u @ self.b.T).clamp(-5, 5)
        return torch.cat(seen), cost


def rounds_to_expert(method: str, rate: float, seed: int, most: int) -> int:
    """Rounds of interaction until the policy's cost is within a 0.95th of the expert's.

    A round is 50 steps of the learner from four starts, all labelled by the expert; one gradient of the loss in the
    actions is asked for. The policy is an MLP 4-32-1.
    """
    expert, g = Expert.cart_pole(), torch.Generator().manual_seed(seed)
    policy = seeded(lambda: nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)), seed)
    trials = 0.3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    goal = expert.roll(expert.act, trials, 150)[1] / 0.95
    params = list(policy.parameters())
    if method.startswith("SSO"):
        ours = TargetSurrogate(params, eta=rate, inner_steps=int(method.split()[-1]))
    else:
        theirs = BASELINES[method](params, rate)
    for k in range(most):
        if expert.roll(policy, trials, 150)[1] <= goal:
            return k
        x, _ = expert.roll(policy, 0.3 * torch.randn(4, 4, generator=g), 50)
        target = expert.act(x)

        def losses(z: Tensor, target: Tensor = target) -> Tensor:
            return 0.5 * (z - target).square().sum(1)

        if method.startswith("SSO"):
            ours.step(partial(policy, x), losses)
        else:
            theirs.zero_grad()
            torch.autograd.backward(losses(policy(x)).mean())
            theirs.step()
    return most
