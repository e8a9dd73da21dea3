"""The experiment on tiny matrices, its baselines, and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.solve import matrix_completion as experiment
from gradmatch.evidence.solve._completion_baselines import factor_descent, hide, low_rank, soft_impute


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "SWEEPS", 3)
    monkeypatch.setattr(experiment, "SIZE", 30)
    monkeypatch.setattr(experiment, "RANK", 2)
    monkeypatch.setattr(experiment, "TRIALS", 1)
    monkeypatch.setattr(experiment, "RATIOS", (2.0, 4.0))
    monkeypatch.setattr(experiment, "SIDE", 200)
    monkeypatch.setattr(experiment, "REAL_SWEEPS", 1)
    monkeypatch.setattr(experiment, "BASELINE_ITERATIONS", 1)
    monkeypatch.setattr(experiment, "_real", lambda data, method, seed: (0.1, "rank 5", 0.0))
    monkeypatch.setattr(experiment, "_race", lambda seed: {"exact": [(1.0, 0.1)], "default": [(0.5, 0.1)]})
    rng = np.random.default_rng(0)
    long = hide(low_rank(300, 20, 3, 1.0, rng), 0.7, rng)
    sketched = experiment._half_sweeps((long,), 3, ("exact", "sketch", "default"))
    monkeypatch.setattr(experiment, "_seconds_sketched", lambda seed: sketched)


def test_a_tiny_run_gives_every_row_and_a_picture(tiny: None, tmp_path: Path) -> None:
    result = experiment.run(Settings(seeds=1, out=tmp_path, runs=tmp_path / "runs", workers=1, quiet=True))
    names = [r.method for r in result.rows]
    for part in ("error after 3 sweeps, 10% kappa 5, 2 steps", "share recovered, default"):
        assert part in names
    assert "seconds of a half-sweep, rank 100, auto" in names
    assert "seconds of a half-sweep, half observed, sketch" in names
    assert "hidden RMSE, digits, soft-impute, tuned" in names
    assert "PSNR in dB, photograph, default at rank 20" in names
    assert "of 5 conditions met" in result.reason
    assert result.pictures[0][1].startswith(b"\x89PNG")


def test_real_rows_choose_on_a_part_of_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    M = low_rank(40, 30, 2, 1.0, np.random.default_rng(0))
    monkeypatch.setitem(experiment.REAL, "digits", (lambda: M, 0.6, (2,)))
    seen_nan = []

    def truth(seen: np.ndarray) -> np.ndarray:
        seen_nan.append(int(np.isnan(seen).sum()))
        return M

    monkeypatch.setattr(
        experiment, "_methods", lambda ranks: {"x": [("bad", lambda s: 0 * M), ("good", truth)]}
    )
    error, name, _ = experiment._real("digits", "x", 0)
    assert error == 0
    assert name == "good"
    assert seen_nan[0] > seen_nan[1]


def test_baselines_recover_an_easy_matrix() -> None:
    rng = np.random.default_rng(0)
    M = low_rank(60, 50, 2, 1.0, rng)
    seen = hide(M, 0.6, rng)
    assert np.linalg.norm(soft_impute(seen, 0.01, 300) - M) < 0.05 * np.linalg.norm(M)
    assert np.linalg.norm(factor_descent(seen, 2, 0.3, 300) - M) < 0.01 * np.linalg.norm(M)
    assert not factor_descent(seen, 2, 1e3, 50).any()  # what diverges is scored as nothing found


def rows(**changed: float) -> list[Row]:
    """A table in which every condition is met, but for what is changed."""
    value = {
        "error": 1e-8,
        "share": 0.5,
        "exact": 1.0,
        "auto": 0.9,
        "sketch": 0.9,
        "psnr": 20.0,
        "rmse": 0.2,
    } | changed
    found = [
        Row(
            f"error after 30 sweeps, {p:.0%} kappa {k:g}, {name}",
            (value["error"] if name == "2 steps" else 1e-8,) * 3,
        )
        for p, k in experiment.RATES
        for name in experiment.SOLVERS
    ]
    found += [
        Row("share recovered, exact", (0.5,) * 3),
        Row("share recovered, default", (value["share"],) * 3),
    ]
    for k in experiment.RANKS:
        for name, seconds in (
            ("exact", 1.0),
            ("auto", value["auto"]),
            ("default", value.get(f"default {k}", 10 / k)),
        ):
            found.append(Row(f"seconds of a half-sweep, rank {k}, {name}", (seconds,) * 3))
    for name in ("exact", "sketch"):
        found.append(Row(f"seconds of a half-sweep, half observed, {name}", (value[name],) * 3))
    for label in (" at rank 5", " at rank 10", " at rank 20", ", tuned"):
        for name in ("exact", "default"):
            found.append(
                Row(
                    f"PSNR in dB, photograph, {name}{label}",
                    (value["psnr"] if name == "default" else 20.0,) * 3,
                )
            )
            if label != " at rank 20":
                rmse = value["rmse"] if name == "default" else 0.2
                found.append(Row(f"hidden RMSE, digits, {name}{label}", (rmse,) * 3))
    return found  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"error": 2.1e-8},
        {"share": 0.44},
        {"auto": 1.1},
        {"default 100": 0.6},
        {"default 20": 0.1},
        {"sketch": 1.1},
        {"psnr": 19.7},
        {"rmse": 0.21},
    ],
)
def test_the_rule_reads_every_condition(changed: dict[str, float]) -> None:
    assert experiment.judged(rows()).verdict == "holds"
    result = experiment.judged(rows(**changed))
    assert result.verdict == "holds in part"
    assert "4 of 5" in result.reason
