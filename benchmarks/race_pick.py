"""Facility location and graph cut against apricot-select and submodlib: 6,000 x 512 features, 600 picks, same picks.

Two pieces of work: from the similarity matrix in float64, which the peers take as it is, and from float32 features
(the peers get a matrix made by one product, ours makes what it needs). Then 60,000 x 512 features, which is a matrix
of 14 GB in float32 that the peers cannot hold; ours is timed alone, with the memory it took (RACE_BIG=0 leaves it out).
"""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import numpy as np
import torch

from _timer import figure, main, missing, peak_mib, race
from gradmatch.core.pick import Picks, facility_location, graph_cut

N, M, BUDGET = 6000, 512, 600
BIG = 60_000


def features(n: int) -> torch.Tensor:
    """Unit rows around 200 centres of unequal weight: neither all alike nor all apart."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(200, M, generator=g)
    of = (200 * torch.rand(n, generator=g) ** 2).long()
    return torch.nn.functional.normalize(centres[of] + torch.randn(n, M, generator=g), dim=1)


def similarity(x: torch.Tensor) -> np.ndarray:
    x = x.double()
    return (0.5 + 0.5 * x @ x.T).numpy()


def covered(s: np.ndarray, picks: list[int]) -> float:
    return float(s[:, picks].max(1).sum())


def cut_value(s: np.ndarray, picks: list[int]) -> float:
    return float(s[:, picks].sum() - s[np.ix_(picks, picks)].sum())


def same_picks(s: np.ndarray, value: Any) -> Any:
    """Equal picks in equal order; where two gains tie to rounding the order may differ, the value may not."""

    def check(ours: Picks, theirs: list[int]) -> None:
        a, b = ours.indices.tolist(), [int(i) for i in theirs]
        shared = len(set(a) & set(b)) / len(a)
        first = next((k for k, (i, j) in enumerate(zip(a, b, strict=True)) if i != j), None)
        print(
            f"  same picks: {shared:.1%}" + ("" if first is None else f", first difference at pick {first}")
        )
        assert value(s, a) >= value(s, b) * (1 - 1e-12), f"value {value(s, a)} under the peer's {value(s, b)}"
        assert shared > 0.99, f"only {shared:.1%} of the picks are shared"

    return check


def apricot(s: np.ndarray) -> list[int]:
    from apricot import FacilityLocationSelection

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FacilityLocationSelection(BUDGET, metric="precomputed", optimizer="lazy")
        return list(model.fit(s).ranking)


def submodlib_facility(s: np.ndarray) -> list[int]:
    from submodlib import FacilityLocationFunction

    function = FacilityLocationFunction(n=len(s), mode="dense", sijs=s, separate_rep=False)
    return _maximised(function, "LazyGreedy")


def submodlib_cut(s: np.ndarray) -> list[int]:
    from submodlib import GraphCutFunction

    return _maximised(GraphCutFunction(n=len(s), mode="dense", lambdaVal=1.0, ggsijs=s), "NaiveGreedy")


def _maximised(function: Any, optimizer: str) -> list[int]:
    found = function.maximize(
        budget=BUDGET,
        optimizer=optimizer,
        stopIfZeroGain=False,
        stopIfNegativeGain=False,
        verbose=False,
        show_progress=False,
    )
    return [i for i, _ in found]


def big() -> None:
    """The case without a matrix, once each; memory above what the features take."""
    x = features(BIG)
    for name, work in (
        ("facility location", lambda: facility_location(x, BUDGET, kind="features")),
        ("graph cut", lambda: graph_cut(x, BUDGET, kind="features")),
    ):
        began = time.perf_counter()
        peak = peak_mib(work)
        seconds = time.perf_counter() - began
        figure(
            f"{name}, {BIG} x {M} features, {BUDGET} picks, ours alone",
            seconds=seconds,
            peak_mib=float("nan") if peak is None else peak,
            matrix_mib=BIG**2 * 4 / 2**20,
        )


def run() -> None:
    x = features(N)
    s = similarity(x)
    tensor = torch.from_numpy(s)
    peers: list[tuple[str, str, Any, Any, Any]] = [
        ("apricot", "apricot-select", apricot, facility_location, covered),
        ("submodlib", "submodlib-py", submodlib_facility, facility_location, covered),
        ("submodlib", "submodlib-py (graph cut)", submodlib_cut, graph_cut, cut_value),
    ]
    for module, peer, theirs, ours, value in peers:
        try:
            __import__(module)
        except ImportError as error:
            missing(peer, str(error))
            continue
        name = ours.__name__.replace("_", " ")
        race(
            f"{name}, matrix {N} x {N}, {BUDGET} picks",
            lambda ours=ours: ours(tensor, BUDGET),
            lambda theirs=theirs: theirs(s),
            peer=peer,
            rounds=3,
            check=same_picks(s, value),
            target=5.0,
            unit="s",
        )
        race(
            f"{name}, features {N} x {M}, {BUDGET} picks",
            lambda ours=ours: ours(x, BUDGET, kind="features"),
            lambda theirs=theirs: theirs(similarity(x)),
            peer=peer,
            rounds=3,
            check=same_picks(s, value),
            target=5.0,
            unit="s",
        )
    if os.environ.get("RACE_BIG", "1") != "0":
        big()


if __name__ == "__main__":
    main(run)
