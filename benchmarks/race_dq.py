"""DQ's bins against the public implementation and submodlib: 5,000 x 256 unit vectors, ten bins.

The public code is not installable. Point DATASET_QUANTIZATION at a clone of magic-research/Dataset_Quantization; only
its ``dq/methods/methods_utils`` (greedy and graph cut, numpy) is loaded, nothing of it is kept here. Both peers are
driven as the public script does: one greedy graph cut on what remains, ten times.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from _timer import main, missing, race
from gradmatch.data import DQ, Selection

N, M, BINS = 5000, 256, 10
PUBLIC = "DATASET_QUANTIZATION"


def rows() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(N, M, generator=g), dim=1)


def ours(x: torch.Tensor) -> Selection:
    return DQ(n_bins=BINS, features=x, balance=False).select((x, torch.zeros(N, dtype=torch.long)))


def recursive(pick: Callable[[np.ndarray, int], np.ndarray]) -> list[np.ndarray]:
    """Bins by ``pick(remaining, budget)``, which returns places within ``remaining``; the last is what is left."""
    left, bins = np.arange(N), []
    for _ in range(BINS - 1):
        places = pick(left, N // BINS)
        bins.append(left[places])
        left = np.delete(left, places)
    return [*bins, left]


def load_public() -> ModuleType | None:
    folder = os.environ.get(PUBLIC)
    if folder is None or not (Path(folder) / "dq/methods/methods_utils/submodular_optimizer.py").is_file():
        return None
    sys.path.insert(0, str(Path(folder) / "dq/methods"))
    return importlib.import_module("methods_utils")


def public_bins(code: ModuleType, x: np.ndarray) -> list[np.ndarray]:
    def pick(left: np.ndarray, budget: int) -> np.ndarray:
        mine = x[left]
        function = code.submodular_function.GraphCut(
            index=np.arange(len(left)), similarity_kernel=lambda a, b: code.cossim_np(mine[a], mine[b])
        )
        greedy = code.submodular_optimizer.NaiveGreedy(None, np.arange(len(left)), budget)
        with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
            return greedy.select(gain_function=function.calc_gain, update_state=function.update_state)

    return recursive(pick)


def submodlib_bins(x: np.ndarray) -> list[np.ndarray]:
    from submodlib import GraphCutFunction

    def pick(left: np.ndarray, budget: int) -> np.ndarray:
        mine = x[left].astype(np.float64)
        function = GraphCutFunction(
            n=len(left), mode="dense", lambdaVal=1.0, ggsijs=0.5 + 0.5 * mine @ mine.T
        )
        found = function.maximize(
            budget=budget,
            optimizer="NaiveGreedy",
            stopIfZeroGain=False,
            stopIfNegativeGain=False,
            verbose=False,
            show_progress=False,
        )
        return np.array([i for i, _ in found])

    return recursive(pick)


def check(mine: Selection, theirs: list[np.ndarray]) -> None:
    """The same bins, as sets (the public code forgets the order); single precision may swap items between them."""
    shared = [len(np.intersect1d(a.numpy(), b)) / len(b) for a, b in zip(mine.bins, theirs, strict=True)]
    print(f"  same bins: first {shared[0]:.1%}, all {np.mean(shared):.1%}")
    assert shared[0] > 0.99, f"first bin shares {shared[0]:.1%}"
    assert np.mean(shared) > 0.95, f"bins share {np.mean(shared):.1%}"


def run() -> None:
    x = rows()
    name, array = f"{BINS} bins of {N} x {M}", x.numpy()
    code = load_public()
    if code is None:
        missing("Dataset_Quantization NaiveGreedy + GraphCut", f"{PUBLIC} names no clone of it")
    else:
        race(name, lambda: ours(x), lambda: public_bins(code, array), peer="public code", rounds=3,
             warmup=0, check=check, target=2.0, unit="s")  # fmt: skip
    try:
        import submodlib  # noqa: F401
    except ImportError as error:
        missing("submodlib-py GraphCut", str(error))
    else:
        race(name, lambda: ours(x), lambda: submodlib_bins(array), peer="submodlib-py", rounds=3,
             check=check, target=2.0, unit="s")  # fmt: skip


if __name__ == "__main__":
    main(run)
