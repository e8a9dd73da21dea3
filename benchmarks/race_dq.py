"""DQ's bins against the public implementation and submodlib: 5,000 x 256 unit vectors, ten bins.

The public code is not installable. Point DATASET_QUANTIZATION at a clone of magic-research/Dataset_Quantization; only
its ``dq/methods/methods_utils`` (greedy and graph cut, numpy) is loaded, nothing of it is kept here. Both peers are
driven as the public script does: one greedy graph cut on what remains, ten times.

Both compute in float32, whose rounding overtakes the gaps between the best gains of such data after a few hundred
picks; from there greedy selection takes another course. So "the same" is checked in three parts: ours is the greedy
selection in float64, the peer's first 100 picks are ours, and the graph-cut values of the first bins agree.
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
Pick = Callable[[np.ndarray, int], np.ndarray]
"""(remaining items, budget) -> places of the picks within the remaining."""
PUBLIC = "DATASET_QUANTIZATION"


def rows() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(N, M, generator=g), dim=1)


def ours(x: torch.Tensor) -> Selection:
    return DQ(n_bins=BINS, features=x, balance=False).select((x, torch.zeros(N, dtype=torch.long)))


def recursive(pick: Pick) -> list[np.ndarray]:
    """Bins by picking from what remains; the last is what is left."""
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


def public_pick(code: ModuleType, x: np.ndarray, left: np.ndarray, budget: int) -> np.ndarray:
    mine = x[left]
    function = code.submodular_function.GraphCut(
        index=np.arange(len(left)), similarity_kernel=lambda a, b: code.cossim_np(mine[a], mine[b])
    )
    greedy = code.submodular_optimizer.NaiveGreedy(None, np.arange(len(left)), budget)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        return greedy.select(gain_function=function.calc_gain, update_state=function.update_state)


def submodlib_pick(x: np.ndarray, left: np.ndarray, budget: int) -> np.ndarray:
    from submodlib import GraphCutFunction

    mine = x[left].astype(np.float64)
    function = GraphCutFunction(n=len(left), mode="dense", lambdaVal=1.0, ggsijs=0.5 + 0.5 * mine @ mine.T)
    found = function.maximize(
        budget=budget,
        optimizer="NaiveGreedy",
        stopIfZeroGain=False,
        stopIfNegativeGain=False,
        verbose=False,
        show_progress=False,
    )
    return np.array([i for i, _ in found])


def same(x: torch.Tensor, pick: Pick) -> Callable[[Selection, list[np.ndarray]], None]:
    s = 0.5 + 0.5 * x.double() @ x.double().T

    def value(items: torch.Tensor) -> float:
        return float(s[:, items].sum() - s[items][:, items].sum())

    def check(mine: Selection, theirs: list[np.ndarray]) -> None:
        shared = [len(np.intersect1d(a, b)) / len(b) for a, b in zip(mine.bins, theirs, strict=True)]
        print(f"  same items: first bin {shared[0]:.1%}, all bins {np.mean(shared):.1%}")
        gains = s.sum(0)
        for k, item in enumerate(mine.bins[0].tolist()):
            assert item == int(gains.argmax()), f"pick {k} of ours is not the greedy one"
            gains -= 2 * s[item]
            gains[item] = -torch.inf
        first = pick(np.arange(N), 100)
        assert set(first.tolist()) == set(mine.bins[0][:100].tolist()), "the first 100 picks differ"
        ratio = value(torch.from_numpy(theirs[0])) / value(mine.bins[0])
        assert abs(ratio - 1) < 1e-6, f"the first bins' values have the ratio {ratio}"

    return check


def run() -> None:
    x = rows()
    array = x.numpy()
    peers: list[tuple[str, Pick]] = []
    code = load_public()
    if code is None:
        missing("Dataset_Quantization NaiveGreedy + GraphCut", f"{PUBLIC} names no clone of it")
    else:
        peers.append(("public code", lambda left, budget: public_pick(code, array, left, budget)))
    try:
        import submodlib  # noqa: F401
    except ImportError as error:
        missing("submodlib-py GraphCut", str(error))
    else:
        peers.append(("submodlib-py", lambda left, budget: submodlib_pick(array, left, budget)))
    for peer, pick in peers:
        race(
            f"{BINS} bins of {N} x {M}",
            lambda: ours(x),
            lambda pick=pick: recursive(pick),
            peer=peer,
            rounds=3,
            warmup=0,
            check=same(x, pick),
            target=2.0,
            unit="s",
        )


if __name__ == "__main__":
    main(run)
