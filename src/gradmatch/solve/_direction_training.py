"""Training a network to propose directions, from the spectrum of one matrix and without any solution."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.krylov import LinearOperator, as_operator, lanczos
from gradmatch.core.store import RunFolder, generator_state, load_tensors, restored_generator, save_tensors
from gradmatch.solve._direction_net import DirectionNet
from gradmatch.solve.dcdm import DirectionSolver

VALUE_FLOOR = 1e-8
"""Ritz values below this share of the largest are dropped (published: below 1e-8, for values of about 1 to 12)."""


WARM_UP, CLIP = 100, 0.1
"""Steps over which the rate rises, and the largest norm of a gradient."""


class _Product(torch.autograd.Function):
    """A V for a symmetric A, whose derivative is A as well."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, operator: LinearOperator) -> Tensor:
        ctx.operator = operator
        return operator.matvec(vectors)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor, None]:
        return ctx.operator.matvec(slopes[0].contiguous()), None


def direction_loss(A: Any, r: Float[Tensor, "n b"], f: Float[Tensor, "n b"]) -> Tensor:
    """Mean over the columns of |r - alpha A f|^2 with alpha = (f.r) / (f.A f), for unit r.

    0 where f is parallel to A^-1 r, and the same for any multiple of f. It may exceed 1: alpha minimises the A-norm of
    the error and not the residual. The gradient goes through alpha.
    """
    image: Tensor = _Product.apply(f, as_operator(A))  # type: ignore[no-untyped-call]
    alpha = (f * r).sum(0) / (f * image).sum(0)
    loss = (r - alpha * image).square().sum(0).mean()
    return loss


def ritz_dataset(
    A: Any, m: int, n: int, theta: int, boost: float = 9.0, *, generator: torch.Generator | None = None
) -> Float[Tensor, "P n"]:
    """``n`` random unit vectors as columns, made of the Ritz vectors of A with the smooth half boosted.

    Lanczos from A x, x standard normal, gives up to m Ritz vectors q_j, values ascending. b = sum_j c_j q_j with
    c_j = boost N(0, 1) for j < m / 2 + theta and N(0, 1) for the rest, of length 1. (The published code boosts from
    0, the paper's text reads as if from theta; the code is followed.)

    Args:
        m: steps of Lanczos; 10,000 for 64^3 and 128^3 as published.
        theta: 500 as published, m / 20.
        generator: of x and c; default a new one with seed 0.
    """
    operator = as_operator(A)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    start = operator.matvec(torch.randn(operator.shape[1], generator=generator).to(_like(operator)))
    values, vectors, _ = lanczos(operator, start, checks.whole("m", m)).ritz()
    vectors = vectors[:, values > VALUE_FLOOR * values.max()].to(operator.dtype)
    coefficients = torch.randn(vectors.shape[1], checks.whole("n", n), generator=generator).to(vectors)
    coefficients[: len(values) // 2 + checks.whole("theta", theta, 0)] *= checks.positive("boost", boost)
    columns = vectors @ coefficients
    unit: Tensor = columns / columns.norm(dim=0)
    return unit


def _like(operator: LinearOperator) -> Tensor:
    return torch.empty(0, dtype=operator.dtype, device=operator.device)


@dataclass(frozen=True)
class DirectionTraining:
    """A trained network with its losses [steps], and the iterations its checkpoints needed, as (step, mean)."""

    net: nn.Module
    losses: Tensor
    checks: tuple[tuple[int, float], ...]

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, atomically."""
        net = self.net
        checks.require(
            isinstance(net, DirectionNet), "net is not a DirectionNet; save its state_dict yourself."
        )
        about = {
            "dims": net.dims,
            "layout": net.layout,
            "channels": net.channels,
            "checks": list(self.checks),
        }
        return save_tensors(
            path, {"losses": self.losses, **{f"net.{k}": v for k, v in net.state_dict().items()}}, about
        )

    @staticmethod
    def load(path: str | Path) -> DirectionTraining:
        """Read what :meth:`save` wrote."""
        tensors, about = load_tensors(path)
        checks.require("dims" in about, f"{path} does not hold a direction network.")
        net = DirectionNet(about["dims"], about["layout"], about["channels"])
        net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        return DirectionTraining(net.eval(), tensors["losses"], tuple((s, i) for s, i in about["checks"]))


def train_direction_net(
    A: Any,
    grid_shape: tuple[int, ...],
    *,
    net: nn.Module | None = None,
    samples: int = 2000,
    ritz: int = 400,
    theta: int = 20,
    boost: float = 9.0,
    steps: int = 1500,
    batch_size: int = 32,
    lr: float = 2e-3,
    check_every: int = 250,
    held_out: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int, float], object] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
) -> DirectionTraining:
    """Train a network to propose directions for matrices like A.

    Adam on :func:`direction_loss` over :func:`ritz_dataset`, with gradients clipped to norm 0.1 and a rate that rises
    to ``lr`` over 100 steps and falls to 0: that removes the spikes of a constant rate, and the networks generalise to
    larger grids better (own choice). Every ``check_every`` steps the network solves ``held_out`` random systems with
    A, and the one that needed the fewest iterations is returned: the loss alone misleads. The published training (in
    3-D) has 20,000 samples of 10,000 Ritz vectors, batches of 10, a rate of 1e-4 throughout, up to 1,000 passes.

    Args:
        A: the training matrix, such as the discrete Laplacian of an empty box; whatever ``DirectionSolver`` takes.
        grid_shape: of its unknowns.
        net: the network to train, in place; default a fresh :class:`DirectionNet`.
        samples, ritz, theta, boost: of the data, see :func:`ritz_dataset`.
        progress: called after every step with (step, loss).
        out: a folder in which the state is kept at every check, so that a killed training goes on with ``resume`` and
            ends with the same network.

    Raises:
        InputError: a grid that does not fit, or a loss that is not finite.
    """
    net = DirectionNet(len(grid_shape), seed=seed) if net is None else net
    exact = as_operator(A, dtype=torch.float64, device=device)
    work = _Training(
        exact, as_operator(A, dtype=torch.float32, device=device), net.to(exact.device), grid_shape
    )
    work.prepare(samples, ritz, theta, boost, batch_size, held_out, checks.whole("seed", seed, 0))
    work.steps, work.lr = checks.whole("steps", steps), checks.positive("lr", lr)
    sizes = {"unknowns": exact.shape[0], "samples": samples, "ritz": ritz, "theta": theta, "boost": boost}
    sizes |= {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    folder = None if out is None else RunFolder(out, sizes | {"check_every": check_every}, resume)
    found = None if folder is None else folder.load()
    if found is not None:
        work.restore(found[1], found[2])
    while len(work.losses) < work.steps:
        work.step()
        done = len(work.losses)
        if done % checks.whole("check_every", check_every) == 0 or done == work.steps:
            work.check()
            if folder is not None:
                folder.save(done, work.state(), {"marks": work.marks})
        if progress is not None:
            progress(done, work.losses[-1])
    result = work.result()
    if folder is not None and isinstance(net, DirectionNet):
        folder.finish(lambda path: result.save(path / "net.safetensors"))
    return result


class _Training:
    """Network, data, Adam and the best weights so far."""

    def __init__(
        self, exact: LinearOperator, rough: LinearOperator, net: nn.Module, shape: tuple[int, ...]
    ) -> None:
        self.rough, self.net, self.shape, self.exact = rough, net, shape, exact
        self.judge = DirectionSolver(exact, net, grid_shape=shape, fallback=None)
        self.optimizer = torch.optim.Adam(net.parameters())
        self.losses: list[float] = []
        self.marks: list[tuple[int, float]] = []
        self.best = copy.deepcopy(net.state_dict())
        self.steps, self.lr = 1, 1.0

    def prepare(
        self, samples: int, ritz: int, theta: int, boost: float, batch_size: int, held_out: int, seed: int
    ) -> None:
        """Draw training vectors, and systems to be solved at every check."""
        checks.whole("samples", samples, checks.whole("batch_size", batch_size))
        self.generator, self.batch_size = torch.Generator().manual_seed(seed), batch_size
        self.data = ritz_dataset(self.exact, ritz, samples, theta, boost, generator=self.generator).float()
        count = checks.whole("held_out", held_out)
        self.systems = torch.randn(self.exact.shape[0], count, generator=self.generator)
        self.order = torch.empty(0, dtype=torch.long)

    def step(self) -> None:
        """One batch."""
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(self.data.shape[1], generator=self.generator)
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        r = self.data[:, chosen.to(self.data.device)]
        f = self.net(r.T.reshape(-1, 1, *self.shape)).flatten(1).T
        loss = direction_loss(self.rough, r, f)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        at = len(self.losses)
        self.optimizer.param_groups[0]["lr"] = self.lr * min(1.0, (at + 1) / WARM_UP) * (1 - at / self.steps)
        self.optimizer.step()
        self.losses.append(float(checks.finite("the training loss", loss.detach())))

    def check(self) -> None:
        """Solve the held-out systems, and keep the weights if none were better."""
        spent = self.judge.solve(self.systems.to(self.exact.device))[1].iterations
        mean = float(spent.double().mean())
        if all(mean <= other for _, other in self.marks):
            self.best = copy.deepcopy(self.net.state_dict())
        self.marks.append((len(self.losses), mean))

    def state(self) -> dict[str, Tensor]:
        """Everything that the rest of the training depends on."""
        found = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        found |= {f"best.{k}": v for k, v in self.best.items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            found |= {f"adam.{i}.{k}": v for k, v in slots.items()}
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return found | {"order": self.order, "generator": generator_state(self.generator), "losses": losses}

    def restore(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""

        def part(name: str) -> dict[str, Tensor]:
            return {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(name + ".")}

        self.net.load_state_dict(part("net"))
        self.best = part("best")
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in part("adam").items():
            number, name = key.split(".")
            slots.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})
        self.order, self.losses = tensors["order"], tensors["losses"].tolist()
        self.generator = restored_generator(tensors["generator"])
        self.marks = [(step, mean) for step, mean in info["marks"]]

    def result(self) -> DirectionTraining:
        """The best network, in eval mode."""
        self.net.load_state_dict(self.best)
        return DirectionTraining(self.net.eval(), torch.tensor(self.losses), tuple(self.marks))
