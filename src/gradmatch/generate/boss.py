"""BOSS: Bellman optimal step-size straightening (Nguyen, Nguyen, Nguyen; ICLR 2024, arXiv 2312.16414).

Given a trained flow and a budget of K network calls:

1. Steps. Along fine Euler trajectories (X_i, V_i) the cost of jumping straight from i to j > i is
   C[i, j] = mean over samples of |X_i + (t_j - t_i) V_i - X_j|^2, and the K times are the shortest path of exactly K
   edges, D_1(i) = C[i, last], D_k(i) = min_j C[i, j] + D_{k-1}(j). No further network call is needed.
2. Straightening. The network is fine-tuned, without data, to jump exactly to where the fine trajectory of the frozen
   one went, at these times only: E |v(X_k, t_k) - (X_{k+1} - X_k) / (t_{k+1} - t_k)|^2, k uniform.

A plain velocity ``v(x, t)`` runs from noise at 0 to data at 1, as in the paper, or the other way along a falling grid.
A model on an affine path (diffusers, say) is first put in the frame z = x / (alpha + sigma), w = sigma / (alpha +
sigma), in which the exact step of any such path is straight; errors are still measured in x.

Readings: the sum over pixels is reported (the paper's mean has the same path). A limit: the cost sums local errors on
the exact path and does not see how early errors grow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.bridge import Denoiser, to_scheduler
from gradmatch.core.networks import seeded
from gradmatch.core.path import AffinePath
from gradmatch.core.regress import PairStore, pseudo_target_loss
from gradmatch.core.sampler import Hook, Model, Solver, State, as_times, part
from gradmatch.core.schedule import Distance, jump_cost, shortest_path, straight_frame
from gradmatch.core.store import RunFolder
from gradmatch.core.training import Progress, seed_of, train
from gradmatch.generate._common import as_model, fine_grid, in_eval, spanning
from gradmatch.generate._straightened import Straightened

__all__ = ["Straightened", "bellman_steps", "sample", "straighten", "to_scheduler"]

NoiseSampler = Callable[[int, torch.Generator], Tensor]


@torch.no_grad()
def bellman_steps(
    velocity: Callable[..., Any],
    x0: Tensor,
    nfe: int,
    k_max: int = 100,
    grid: Sequence[float] | Tensor | None = None,
    *,
    path: AffinePath | None = None,
    cond: Any = None,
    cost: str | Distance = "l2",
    chunk: int | None = None,
    return_cost: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The ``nfe + 1`` times at which so many network calls follow the flow best.

    Args:
        velocity: ``(x, t) -> dx/dt``; a model that gives a ``Prediction`` (with ``path``); or a diffusers network from
            :func:`gradmatch.core.bridge.from_diffusers`.
        x0: noise (n, ...) to measure with; the paper takes n = 100. Data, with a grid that runs towards noise.
        nfe: network calls, 1..k_max.
        k_max: steps of the fine grid; each costs one call a sample, and nothing else does. 100 as published.
        grid: the fine times themselves (k_max + 1,), rising or falling from one end of the path to the other.
        path: what the predictions mean; default the straight path.
        cond: a condition for every call.
        cost: "l2" (float64 sums of squares), or a distance (jumped (m, ...), reached (m, ...)) -> (m,), for errors
            that count in decoded space.
        chunk: samples at once, which bounds memory (their whole fine trajectory is kept); default all.
        return_cost: also give C (k_max + 1, k_max + 1).

    Returns:
        times (nfe + 1,) float64, in the order of the grid.

    Raises:
        InputError: nfe out of range, a grid that is not monotone or does not span the path, a velocity of a wrong
            shape or with NaN.

    >>> bellman_steps(lambda x, t: torch.ones_like(x), torch.zeros(4, 2), 2, k_max=4).tolist()[::2]
    [0.0, 1.0]
    """
    model, path, given = as_model(velocity, path)
    times = fine_grid(velocity, path, given, checks.whole("k_max", k_max), grid)
    k_max = len(times) - 1
    checks.whole("nfe", nfe, 1, k_max)
    checks.require(
        callable(cost) or cost == "l2", f"cost is {cost!r}; it must be 'l2' or a distance of two batches."
    )
    checks.require(len(x0) > 0, "x0 is empty; at least one sample is needed.")
    chunk = len(x0) if chunk is None else checks.whole("chunk", chunk)
    own, distance = not callable(cost), cost if callable(cost) else None
    solver, table = Solver(times, "ddim"), torch.zeros(k_max + 1, k_max + 1, dtype=torch.float64)
    for index in torch.split(torch.arange(len(x0)), chunk):
        with in_eval(velocity):
            run = solver.run(model, path, x0[index], cond=part(cond, index, len(x0)), record=True)
        assert run.states is not None
        states, slopes, along, scale = straight_frame(path, times, run.states, run.predictions)
        table += (
            len(index) / len(x0) * jump_cost(states, slopes, along, scale=scale, distance=distance, exact=own)
        )
    found = times[shortest_path(table, nfe)[0]]
    return (found, table) if return_cost else found


def straighten(
    velocity: nn.Module | Denoiser,
    times: Sequence[float] | Tensor,
    noise_sampler: NoiseSampler,
    n_pairs: int = 5000,
    steps: int = 12_000,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    lora_rank: int | None = None,
    ema: float | None = 0.999,
    loss: str | Callable[[Tensor, Tensor], Tensor] = "l2",
    *,
    path: AffinePath | None = None,
    kind: str = "velocity",
    k_max: int = 100,
    batch: int = 128,
    lr: float = 2e-4,
    schedule: str = "constant",
    warmup: int | None = None,
    clip: float | None = 1.0,
    held_out: float = 0.1,
    chunk: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    run: RunFolder | None = None,
) -> Straightened:
    """A copy of ``velocity`` fine-tuned to be straight between ``times``; no data are needed.

    Args:
        velocity: an ``nn.Module`` called as (x, t) -> dx/dt (or what ``kind`` on ``path`` says), or a diffusers network
            from ``from_diffusers``.
        times: of :func:`bellman_steps`, (K + 1,) from noise to data.
        noise_sampler: (n, generator) -> starting points (n, ...).
        n_pairs: fine trajectories of the frozen network (5,000 as published; each gives K pairs).
        steps, batch, lr, clip: of fine-tuning; 12,000, 128, 2e-4, 1.0 as published.
        warmup: steps of rising rate; default 5/12 of ``steps`` (5,000 of 12,000 as published).
        optimizer: default Adam.
        lora_rank: train adapters of this rank on every linear layer and convolution instead, then merge them (peft).
        ema: decay of the averaged weights that are returned; the published 0.999999 hardly moves in 12,000 steps.
        loss: "l2", or a function of (prediction, target) -> scalar.
        k_max: fine steps from one end to the other.
        held_out: share of trajectories never trained on; their loss is reported.
        chunk: trajectories at once.
        seed: of noises, draws and adapters.
        run: a folder to go on from after a stop.

    Raises:
        InputError: times that do not span the path from noise to data, or options out of range.
    """
    path_given = path
    coarse = as_times(times)
    model, path, given = as_model(velocity, path, kind)
    spanning(path, given, coarse, "times", noise_first=True)
    checks.require(callable(loss) or loss == "l2", f"loss is {loss!r}; it must be 'l2' or a function.")
    with in_eval(velocity):
        store = _pairs(
            model, path, coarse, noise_sampler, checks.whole("n_pairs", n_pairs, 2), k_max, chunk, seed
        )
    kept, held = store.split(held_out, seed)
    student = Straightened(_copy_of(velocity), coarse, path_given, kind)
    if lora_rank is not None:
        student.network = _adapted(student.network, checks.whole("lora_rank", lora_rank), seed)

    def error(rows: Tensor, k: Tensor) -> Tensor:
        each = torch.arange(len(k), device=rows.device)
        x, y = rows[each, k], rows[each, k + 1]
        target = path.aim(student.kind, x, y, coarse.to(k.device)[k], coarse.to(k.device)[k + 1]).tensor
        said = student.predict(x, coarse.to(k.device)[k].to(x))
        return pseudo_target_loss(said, target) if not callable(loss) else loss(said, target.detach())

    def drawn(generator: torch.Generator) -> Tensor:
        rows = kept.batch(batch, generator)["states"]
        k = torch.randint(len(coarse) - 1, (batch,), generator=generator, device=generator.device)
        return error(rows, k.to(rows.device))

    rise = round(steps * 5 / 12) if warmup is None else warmup
    found = train(
        student.network, drawn, steps, optimizer=optimizer, lr=lr, schedule=schedule, warmup=rise, clip=clip,
        average=ema, seed=seed, progress=progress, run=run,
    )  # fmt: skip
    if found.averaged:
        student.network.load_state_dict(found.averaged)
    if lora_rank is not None:
        student.network = student.network.merge_and_unload()
    student.eval()
    rows = held.tensors["states"]
    with torch.no_grad():
        every = [error(rows, torch.full((len(rows),), k, device=rows.device)) for k in range(len(coarse) - 1)]
    student.held_out = float(torch.stack(every).mean())
    return student


def sample(
    velocity: Callable[..., Any],
    x0: Tensor,
    times: Sequence[float] | Tensor,
    method: str = "euler",
    *,
    path: AffinePath | None = None,
    cond: Any = None,
) -> Tensor:
    """From ``x0`` along ``times`` by any step of :class:`gradmatch.core.sampler.Solver`."""
    if isinstance(velocity, Straightened):
        same = len(velocity.times) == len(times) and torch.allclose(as_times(times), velocity.times.cpu())
        checks.require(
            same, f"times is {list(times)}; the network was straightened at {velocity.times.tolist()}."
        )
        return velocity.sample(x0)
    model, path, _ = as_model(velocity, path)
    return Solver(times, method).run(model, path, x0, cond=cond).x


class _Keep(Hook):
    """Keeps the first state and those after some of the steps, where a whole trajectory would fill memory."""

    def __init__(self, index: set[int], first: Tensor) -> None:
        self.index, self.states = index, [first]

    def after_step(self, state: State) -> None:
        if state.index + 1 in self.index:
            self.states.append(state.x)


@torch.no_grad()
def _pairs(
    model: Model,
    path: AffinePath,
    coarse: Tensor,
    noise_sampler: NoiseSampler,
    n: int,
    k_max: int,
    chunk: int,
    seed: int,
) -> PairStore:
    """{"states": (n, K + 1, ...)}: where fine trajectories of the frozen network are at the coarse times."""
    fine = torch.linspace(
        float(coarse[0]), float(coarse[-1]), checks.whole("k_max", k_max) + 1, dtype=torch.float64
    )
    apart = (fine[:, None] - coarse).abs().amin(1) > 1e-9 * (coarse[-1] - coarse[0]).abs()
    whole = torch.cat([fine[apart], coarse]).sort(descending=bool(coarse[0] > coarse[-1])).values
    index = torch.cat([torch.nonzero(whole == t).flatten() for t in coarse])
    parts = []
    for start in range(0, n, chunk):
        noise = noise_sampler(min(chunk, n - start), torch.Generator().manual_seed(seed_of(seed, start)))
        keep = _Keep(set(index.tolist()), noise)
        Solver(whole, "ddim").run(model, path, noise, hooks=(keep,))
        parts.append({"states": torch.stack(keep.states, 1)})
    return PairStore.joined(parts)


def _copy_of(velocity: nn.Module | Denoiser) -> Any:
    if isinstance(velocity, Denoiser):
        module = copy.deepcopy(velocity.module).requires_grad_(True)
        return Denoiser(module, velocity.scheduler, velocity.timestep_scale)
    checks.require(
        isinstance(velocity, nn.Module),
        f"velocity is a {type(velocity).__name__}; straightening trains an nn.Module.",
    )
    return copy.deepcopy(velocity).requires_grad_(True)


def _adapted(module: nn.Module, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    with seeded(seed):
        return get_peft_model(module, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
