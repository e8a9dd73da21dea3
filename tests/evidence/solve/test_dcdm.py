"""The experiment on tiny boxes, its systems, and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.solve import dcdm as experiment
from gradmatch.evidence.solve._poisson import disc, poisson, right_hand_sides


def test_systems_are_what_they_say() -> None:
    A = poisson(16)
    assert np.allclose(np.linalg.eigvalsh(A.toarray())[0], 8 * np.sin(np.pi / 34) ** 2)
    inside = disc(16).ravel()
    for kind in experiment.OBSTACLES:
        B = poisson(16, kind)
        assert (abs(B - B.T)).max() == 0
        assert B[inside].nnz == 0
        sums = np.asarray(B.sum(1)).ravel().reshape(16, 16)
        near = np.zeros((16, 16), dtype=bool)
        near[1:-1, 1:-1] = ~disc(16)[1:-1, 1:-1]
        assert (np.allclose(sums[near], 0)) == (kind == "solid disc")
    blocks = right_hand_sides("blocks", 16, 2, np.random.default_rng(0)).reshape(16, 16, 2)
    assert np.array_equal(blocks[::2, ::2], blocks[1::2, 1::2])
    assert disc(100).mean() == pytest.approx(np.pi * 0.15**2, rel=0.02)


def test_a_tiny_run_gives_every_row_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(experiment, "TRAINED", 8)
    monkeypatch.setattr(experiment, "MAX_ITER", 5)
    tiny = {
        "samples": 32,
        "ritz": 20,
        "theta": 2,
        "steps": 4,
        "batch_size": 8,
        "held_out": 2,
        "check_every": 4,
    }
    monkeypatch.setattr(experiment, "TRAINING", tiny)
    cases = [(kind, 16) for kind in experiment.LABELS]
    monkeypatch.setattr(experiment, "CASES", cases)
    monkeypatch.setattr(experiment, "SIZES", (16,))
    monkeypatch.setattr(experiment, "SHOWN", 16)
    seen: list[Row] = []
    monkeypatch.setattr(experiment, "judged", lambda rows, png: seen.extend(rows) or png)
    settings = Settings(seeds=1, out=tmp_path, runs=tmp_path / "runs", workers=1, quiet=True)
    png = experiment.run(settings)
    assert png.startswith(b"\x89PNG")
    names = {r.method: r for r in seen}
    for method in ("CG", "Jacobi-PCG", "IC(0)-PCG", "deflated PCG, 16", "DCDM, 2 kept", "DCDM, 6 kept"):
        assert names[f"seconds, white noise, 16 x 16, {method}"].mean > 0
        assert names[f"iterations, solid disc, 16 x 16, {method}"].mean > 0
    assert (
        names["iterations, patches, 16 x 16, IC(0)-PCG"].mean < names["iterations, patches, 16 x 16, CG"].mean
    )
    assert (tmp_path / "runs" / "dcdm" / "net-0" / "net.safetensors").is_file()
    again: list[Row] = []
    monkeypatch.setattr(experiment, "judged", lambda rows, png: again.extend(rows))
    experiment.run(settings)  # read, not made anew
    assert again == seen


def rows(**changed: float) -> list[Row]:
    """Every condition met, but for what is changed."""
    found = []
    for kind, n in experiment.CASES:
        for method in ("CG", "DCDM, 2 kept"):
            for what in ("iterations", "seconds"):
                value = 100.0 if method == "CG" else 10.0
                if method != "CG":
                    value = changed.get(f"{kind} {n} {what}".replace(" ", "_"), value)
                found.append(Row(f"{what}, {experiment.LABELS[kind]}, {n} x {n}, {method}", (value,) * 3))
    return found


@pytest.mark.parametrize(
    "changed",
    [
        {"blocks_32_iterations": 26.0},
        {"blocks_64_iterations": 26.0},
        {"blocks_128_iterations": 17.0},
        {"held_disc_32_iterations": 51.0},
        {"solid_disc_128_iterations": 51.0},
        {"random_256_iterations": 21.0},
        {"random_128_seconds": 101.0},
        {"random_256_seconds": 101.0},
    ],
)
def test_the_rule_reads_every_condition(changed: dict[str, float]) -> None:
    assert experiment.judged(rows()).verdict == "holds"
    result = experiment.judged(rows(**changed))
    assert result.verdict == "holds in part"
    assert "4 of 5" in result.reason
