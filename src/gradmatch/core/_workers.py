"""Members of an ensemble trained in worker processes of one thread each (joblib's loky)."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradmatch.core import cpu
from gradmatch.core._members import Recipe, Trained, accuracy_of, forward_flops, logits_of, train_member
from gradmatch.core.checks import InputError
from gradmatch.core.networks import Network

Arrays = tuple[np.ndarray, np.ndarray]

_START_SECONDS = 5.0  # importing torch in fresh workers; measured 3 to 5 s
_CORE_FLOPS = 4e10  # float32 operations a second of one core in convolutions, on the high side
_STEP_SECONDS = 5e-4  # python and dispatch of one training step of a small network, on the low side
_THREAD_GAIN = 0.5  # what each further thread adds to a loop's speed, on the high side for small networks


def at_most() -> int:
    """An upper bound of :func:`available` that needs no import."""
    return os.cpu_count() or 1


def available() -> int:
    """Cores this process may use, limits of its container included."""
    try:
        return int(importlib.import_module("joblib").cpu_count())
    except ImportError:
        return torch.get_num_threads()


def why_not(network: Network, x: Tensor, recipe: Recipe, n: int, workers: int) -> str | None:
    """Why worker processes cannot be used here; ``None`` if they can."""
    if x.device.type != "cpu":
        return f"the data are on {x.device.type}, which worker processes do not share"
    if n == 1 or workers == 1:
        return "there is one member" if n == 1 else "there is one core to work on"
    if multiprocessing.current_process().name != "MainProcess":
        return "this is a worker process itself"
    try:
        pickler = importlib.import_module("joblib.externals.loky.backend.reduction")
    except ImportError:
        return "joblib is not installed"
    try:
        pickler.dumps((network, recipe))
    except Exception as error:  # whatever a user's factory raises when pickled is the reason reported
        return f"the network factory, augment or update cannot be pickled ({error})"
    return None


def too_little(module: nn.Module, x: Tensor, recipe: Recipe, n: int, workers: int, tested: int) -> str | None:
    """Why starting workers would not pay: an estimate from operation counts, the same on every run."""
    passes = 3 * len(x) * recipe.epochs + tested  # a backward pass costs about two forward passes
    steps = recipe.epochs * -(-len(x) // recipe.batch_size)
    one_core = n * (forward_flops(module, x[:1]) * passes / _CORE_FLOPS + steps * _STEP_SECONDS)
    alone = one_core / (1 + _THREAD_GAIN * (torch.get_num_threads() - 1))
    together = one_core * -(-n // workers) / n + _START_SECONDS
    if together < alone:
        return None
    return f"about {alone:.1f} s of work would not repay starting worker processes"


def train(
    network: Network,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    n: int,
    workers: int | None,
    test: tuple[Tensor, Tensor] | None,
    batch: int,
    done: Callable[[int], object] | None,
) -> list[Trained]:
    """Train members 0..n-1, each as one task; results in their order."""
    joblib = importlib.import_module("joblib")
    data = (x.numpy(), y.numpy())
    held = None if test is None else (test[0].numpy(), test[1].numpy())
    tasks = (joblib.delayed(_task)(network, data, recipe, k, held, batch) for k in range(n))
    results: list[Trained] = []
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        pool = joblib.Parallel(n_jobs=min(n, workers or available()), return_as="generator")
        outcomes = pool(tasks)
        for outcome in outcomes:
            if isinstance(outcome, InputError):
                with (
                    warnings.catch_warnings()
                ):  # joblib warns that the other members are cancelled, as they should be
                    warnings.simplefilter("ignore", UserWarning)
                    outcomes.close()
                raise outcome
            params, buffers, losses, snapshots, accuracy = outcome
            results.append(
                Trained(_tensors(params), _tensors(buffers), _tensor(losses), _tensor(snapshots), accuracy)
            )
            if done is not None:
                done(recipe.epochs)
    return results


def _task(
    network: Network, data: Arrays, recipe: Recipe, member: int, test: Arrays | None, batch: int
) -> Any:
    """Runs in a worker; only arrays cross the process border. A refusal comes back as a value."""
    cpu.keep_freed_memory()
    x, y = (_tensor(part) for part in data)
    with cpu.threads(1):
        try:
            module, trained = train_member(network, x, y, recipe, member)
        except InputError as error:
            return error
        accuracy = None
        if test is not None:
            x_test, y_test = (_tensor(part) for part in test)
            accuracy = float(accuracy_of(logits_of(module, x_test, batch), y_test))
    params, buffers = ({k: t.numpy() for k, t in part.items()} for part in (trained.params, trained.buffers))
    return params, buffers, trained.losses.numpy(), trained.snapshots.numpy(), accuracy


def _tensor(array: np.ndarray) -> Tensor:
    with (
        warnings.catch_warnings()
    ):  # large arrays arrive as read-only maps of shared files; nothing writes to them
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {k: _tensor(a) for k, a in arrays.items()}
