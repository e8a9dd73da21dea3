"""Which program trains an ensemble, and how the members' results are put together."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor, nn

from gradmatch.core import _vmapped, _workers, checks
from gradmatch.core._members import (
    Recipe,
    Trained,
    accuracy_of,
    forward_flops,
    fresh_member,
    logits_of,
    train_member,
    train_module,
)
from gradmatch.core.cpu import side_by_side
from gradmatch.core.networks import Network, draws_random_numbers

PROGRAMS = ("auto", "loop", "vmap", "threads", "processes")
TEST_BATCH = 256
_THREAD_FLOPS = 1e7
"""Operations of a member's step below which threads wait for the interpreter more than they compute."""


def choose(
    program: str,
    template: nn.Module,
    network: Network,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    n: int,
    workers: int | None,
    test: tuple[Tensor, Tensor] | None,
) -> tuple[str, str]:
    """The program to run and the reason for it."""
    checks.one_of("program", program, PROGRAMS)
    if workers is not None:
        checks.whole("workers", workers)
    if program == "loop":
        return "loop", "asked for"
    if program == "vmap":
        obstacle = _vmapped.why_not(template, x, y)
        checks.require(obstacle is None, f"program is 'vmap', but {obstacle}.")
        return "vmap", "asked for"
    if program == "processes":
        obstacle = _workers.why_not(network, x, recipe, n, workers or _workers.available())
        return ("loop", obstacle) if obstacle else ("processes", "asked for")
    if program == "threads":
        obstacle = _apart(template, x, recipe, n)
        return ("loop", obstacle) if obstacle else ("threads", "asked for")
    if n == 1:
        return "loop", "there is one member"
    if x.device.type != "cpu" or _vmapped.pays_on_cpu(template, x, n, recipe.batch_size):
        obstacle = _vmapped.why_not(template, x, y)
        if obstacle is None:
            return "vmap", "one batched program is fastest here"
        if x.device.type != "cpu":
            return "loop", obstacle
    work = 3 * forward_flops(template, x[:1]) * min(len(x), recipe.batch_size)
    if work >= _THREAD_FLOPS and _apart(template, x, recipe, n) is None:
        return "threads", f"steps long enough for {min(n, torch.get_num_threads())} threads"
    tested = 0 if test is None else len(test[0])
    count = workers or _workers.at_most()
    obstacle = _workers.too_little(template, x, recipe, n, count, tested)
    if obstacle is None and workers is None:
        count = _workers.available()
        obstacle = _workers.too_little(template, x, recipe, n, count, tested)
    obstacle = obstacle or _workers.why_not(network, x, recipe, n, count)
    return ("loop", obstacle) if obstacle else ("processes", f"enough work for {count} worker processes")


def _apart(module: nn.Module, x: Tensor, recipe: Recipe, n: int) -> str | None:
    """Why members cannot be trained in threads of this process; ``None`` if they can."""
    if x.device.type != "cpu":
        return f"the data are on {x.device.type}, where one member uses all there is"
    if n == 1 or torch.get_num_threads() == 1:
        return "there is one member" if n == 1 else "PyTorch has one thread"
    if draws_random_numbers(module, x[: recipe.batch_size]):
        return "the network draws random numbers, and threads share the generator they come from"
    return None


def run_threads(
    network: Network,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    n: int,
    test: tuple[Tensor, Tensor] | None,
    done: Callable[[int], object] | None,
) -> list[Trained]:
    """Members side by side, each in one thread; they are built before, as that seeds the global generator."""
    lock = Lock()

    def count(more: int) -> None:
        if done is not None:
            with lock:
                done(more)

    def train(module: nn.Module, member: int) -> Trained:
        return _tested(*train_module(module, x, y, recipe, member, count), test)

    return side_by_side(train, [(fresh_member(network, x, recipe, k), k) for k in range(n)])


def run_loop(
    network: Network,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    n: int,
    test: tuple[Tensor, Tensor] | None,
    done: Callable[[int], object] | None,
) -> list[Trained]:
    return [_tested(*train_member(network, x, y, recipe, k, done), test) for k in range(n)]


def _tested(module: nn.Module, trained: Trained, test: tuple[Tensor, Tensor] | None) -> Trained:
    if test is not None:
        trained.accuracy = float(accuracy_of(logits_of(module, test[0], TEST_BATCH), test[1]))
    return trained


def stack(results: list[Trained], device: torch.device) -> Trained:
    """Members' results with a first axis of members, on the device."""
    accuracies = [r.accuracy for r in results if r.accuracy is not None]
    return Trained(
        {k: torch.stack([r.params[k] for r in results]).to(device) for k in results[0].params},
        {k: torch.stack([r.buffers[k] for r in results]).to(device) for k in results[0].buffers},
        torch.stack([r.losses for r in results]).to(device),
        torch.stack([r.snapshots for r in results]),
        torch.tensor(accuracies, dtype=torch.float64) if accuracies else None,
    )


def join(groups: list[Trained]) -> Trained:
    """Groups of stacked members one after another."""
    if len(groups) == 1:
        return groups[0]
    return Trained(
        {k: torch.cat([g.params[k] for g in groups]) for k in groups[0].params},
        {},
        torch.cat([g.losses for g in groups]),
        torch.cat([g.snapshots for g in groups]),
    )
