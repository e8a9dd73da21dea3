"""Bellman's cost matrix and path search against the public code, on a stored 101 x 100 x 3,072 trajectory.

The public code is not installable. Point BOSS_CODE at a clone of nguyenngocbaocmt02/BOSS; its
``ImageGeneration/sampling.py`` alone is loaded, with empty stand-ins for what it imports and does not use here
(TensorFlow data, jax, wandb, lpips), and nothing of it is kept. Its ``get_bellman_disc`` is driven with a stand-in
process that hands out the stored trajectory. A second peer is the double loop written out here.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from _timer import main, missing, race
from gradmatch.core.schedule import jump_cost, shortest_path

STEPS, SAMPLES, SHAPE, CALLS = 100, 100, (3, 32, 32), 10
PUBLIC = "BOSS_CODE"
STANDINS = ("evaluation", "sde_lib", "datasets", "models", "models.utils", "wandb", "lpips", "jax", "torchvision",
            "torchvision.utils")  # fmt: skip


def trajectory() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Euler steps of a bent field: states (101, 100, 3, 32, 32), slopes (100, ...), times (101,)."""
    times = torch.linspace(0, 1, STEPS + 1)
    x = torch.randn(SAMPLES, *SHAPE, generator=torch.Generator().manual_seed(0))
    states, slopes = [x], []
    for i in range(STEPS):
        slopes.append(torch.cos(6 * times[i]) * torch.sin(2 * x) - x)
        x = x + (times[i + 1] - times[i]) * slopes[-1]
        states.append(x)
    return torch.stack(states), torch.stack(slopes), times


def load_public() -> ModuleType | None:
    folder = os.environ.get(PUBLIC)
    if folder is None or not (Path(folder) / "ImageGeneration/sampling.py").is_file():
        return None
    before = {name: sys.modules.get(name) for name in STANDINS}
    for name in STANDINS:
        stand_in: Any = ModuleType(name)
        stand_in.make_grid = stand_in.save_image = None
        sys.modules[name] = stand_in
    sys.modules["models"].utils = sys.modules["models.utils"]  # type: ignore[attr-defined]
    try:
        spec = importlib.util.spec_from_file_location(
            "boss_sampling", Path(folder) / "ImageGeneration/sampling.py"
        )
        assert spec is not None
        code = importlib.util.module_from_spec(spec)
        assert spec.loader is not None
        spec.loader.exec_module(code)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    code.tqdm = lambda items: items  # type: ignore[attr-defined]
    code.print = lambda *_: None  # type: ignore[attr-defined]
    return code


def public_cost(
    code: ModuleType, states: torch.Tensor, slopes: torch.Tensor, times: torch.Tensor
) -> np.ndarray:
    """Its cost matrix, read from the file that it writes."""
    config = SimpleNamespace(K_max=STEPS, num_samples=SAMPLES, batch_size=SAMPLES, stack_batch=50, cost_matrix_path="",
                             from_image=False, loss="l2_pixel")  # fmt: skip
    process = SimpleNamespace(bellman_config=config, num_steps=1, discretizing_method="bellman_uniform", T_start=0.0,
                              T_end=1.0, get_z0=lambda z, train: z,
                              euler_solver=lambda *_, **__: (None, list(states), list(slopes), STEPS))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        code.get_bellman_disc(process, None, states.shape[1:], save_folder=folder, device="cpu")
        return np.load(Path(folder) / f"cost_matrix_bellman_uniform_{STEPS}_{SAMPLES}.npy")


def double_loop(states: torch.Tensor, slopes: torch.Tensor, times: torch.Tensor) -> np.ndarray:
    """Every pair by itself."""
    cost = np.zeros((STEPS + 1, STEPS + 1))
    for i in range(STEPS):
        for j in range(i + 1, STEPS + 1):
            gap = states[i] + (times[j] - times[i]) * slopes[i] - states[j]
            cost[i, j] = float(gap.square().sum()) / SAMPLES
    return cost


def same(ours: torch.Tensor, theirs: np.ndarray) -> None:
    upper = np.triu_indices(STEPS + 1, 2)
    a, b = ours.numpy()[upper], theirs[upper]
    assert np.abs(a - b).max() < 1e-4 * b.max(), "the cost matrices differ"
    for calls in (2, 4, CALLS):
        padded = np.where(np.tril(np.ones_like(theirs)) > 0, np.inf, theirs)
        assert shortest_path(ours, calls)[0] == shortest_path(torch.from_numpy(padded), calls)[0], (
            "the paths differ"
        )


def run() -> None:
    logging.disable(logging.INFO)
    states, slopes, times = trajectory()
    size = f"{STEPS + 1} x {SAMPLES} x {np.prod(SHAPE)}"

    def ours() -> torch.Tensor:
        return jump_cost(states, slopes, times, exact=True)

    code = load_public()
    if code is None:
        missing("BOSS get_bellman_disc and find_minimum_cost_path", f"{PUBLIC} names no clone of it")
    else:
        race(f"cost matrix {size}", ours, lambda: public_cost(code, states, slopes, times), peer="public code",
             rounds=3, check=same, target=20.0)  # fmt: skip
    race(f"cost matrix {size}", ours, lambda: double_loop(states, slopes, times), peer="double loop", rounds=3,
         check=same, target=20.0)  # fmt: skip
    if code is not None:
        cost = double_loop(states, slopes, times)
        table = ours()
        race(f"path of {CALLS} jumps through {STEPS + 1} nodes", lambda: shortest_path(table, CALLS)[0],
             lambda: code.find_minimum_cost_path(cost, CALLS + 1, "dp")[0], peer="public code", rounds=5,
             check=lambda a, b: _equal(a, b), target=5.0)  # fmt: skip


def _equal(a: list[int], b: list[int]) -> None:
    assert a == b, f"{a} against {b}"


if __name__ == "__main__":
    main(run)
