"""The experiment on tiny settings, and the arithmetic of its rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neural_network import MLPClassifier, MLPRegressor

from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.optim import gbnn as experiment


def test_every_method_has_twelve_settings_and_splits_are_apart() -> None:
    for name in ("iris", "diabetes"):
        grids = experiment.grids(name, 0)
        assert set(grids) == set(experiment.METHODS)
        assert {len(grid) for grid in grids.values()} == {12}
        assert all(len({setting for setting, _ in grid}) == 12 for grid in grids.values())
        X, y, Xt, yt = experiment.data(name, 0)
        assert (len(X), len(Xt)) == (len(y), len(yt))
        assert np.allclose(X.mean(0), 0, atol=1e-9)
        assert not np.allclose(Xt.mean(0), 0, atol=1e-9)  # scaled by the training rows
    assert len(experiment.data("digits", 0)[0]) == 0.7 * experiment.DIGITS_ROWS


@pytest.mark.parametrize("name", ["iris", "breast cancer", "diabetes"])
def test_a_network_without_its_units_is_its_rest(name: str) -> None:
    X, y, Xt, yt = experiment.data(name, 0)
    model = experiment._fitted(lambda: experiment._perceptron(name, 0, (6,), 0.1, "lbfgs"), X, y)
    net = model.regressor_ if name == "diabetes" else model
    assert isinstance(net, MLPRegressor if name == "diabetes" else MLPClassifier)
    hidden = 1 / (1 + np.exp(-(Xt @ net.coefs_[0] + net.intercepts_[0])))
    raw = hidden @ net.coefs_[1] + net.intercepts_[1]
    assert np.allclose(experiment._linked(name, model, raw), model.predict(Xt))
    removed = experiment._removed(name, model, Xt, yt, 0)
    assert set(removed) == {"0.25", "0.5", "0.75"}


def test_a_tiny_run_gives_every_row_and_a_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(experiment, "STEPS", 3)
    monkeypatch.setattr(experiment, "_deep", lambda seed: {"own head": 80.0, "boosted head": 81.0})
    monkeypatch.setattr(experiment, "_unstable", lambda seed: {"J 1": 3.0})
    times = {"GBNN of 100 units": 1.0, "GBNN of 200 units": 2.0, "MLP of 3 layers of 200": 3.0}
    monkeypatch.setattr(experiment, "_seconds", lambda seed: times)
    whole = experiment._compare
    made = whole("iris", 0)
    monkeypatch.setattr(experiment, "_compare", lambda name, seed: made)
    monkeypatch.setattr("gradmatch.evidence.optim._gbnn_picture._draw_decisions", lambda axes: None)
    result = experiment.run(Settings(seeds=2, out=tmp_path, runs=tmp_path / "runs", workers=1, quiet=True))
    assert result.pictures[0][1].startswith(b"\x89PNG")
    for method in ("RMSE, Friedman-1, GBNN, first 25% of the steps", "accuracy (%), iris, boosted trees"):
        assert result.row(method).values == result.row(method).values[:1] * 2
    assert "of 7 conditions met" in result.reason


def rows(**changed: float) -> list[Row]:
    """Every condition met, but for what is changed."""
    value = {"gbnn": 0.0, "trees": 0.5, "quarter": 0.0, "half": 0.0, "best": 0.0, "removed": 10.0,
             "two": 2.0, "deep": 3.0, "head": 0.0} | changed  # fmt: skip

    def worse(name: str, margins: float) -> float:
        return (2.0 if name in experiment.REGRESSION else 90.0) + margins * experiment.MARGINS[name] * (
            1 if name in experiment.REGRESSION else -1
        )

    found = []
    for name in experiment.MARGINS:
        own = value["gbnn"] if name == "iris" else 0.0
        cells = {
            "GBNN": own,
            **dict.fromkeys(experiment.PERCEPTRONS, 0.0),
            "boosted trees": value["trees"] / 0.15,
            "GBNN, first 25% of the steps": value["quarter"] if name == "wine" else own,
            "GBNN, first 50% of the steps": value["half"] if name == "diabetes" else own,
            "GBNN, best prefix": -value["best"] if name == "digits" else own,
            "MLP by L-BFGS, random half of the units": value["removed"],
        }
        found += [
            Row(f"{experiment.unit(name)}, {name}, {m}", (worse(name, v),) * 3) for m, v in cells.items()
        ]
    seconds = {
        "GBNN of 100 units": 1.0,
        "GBNN of 200 units": value["two"],
        "MLP of 3 layers of 200": value["deep"],
    }
    found += [Row(f"seconds, digits, {k}", (v,) * 3) for k, v in seconds.items()]
    for k, v in (("own head", 80.0), ("boosted head", 80.0 + value["head"])):
        found.append(Row(f"accuracy (%), Fashion-MNIST, {k}", (v,) * 3))
    return found


@pytest.mark.parametrize(
    "changed",
    [
        {"gbnn": 1.1},
        {"trees": -0.1},
        {"quarter": 1.1},
        {"half": 1.1},
        {"removed": 4.0},
        {"best": 0.6},
        {"two": 2.5},
        {"deep": 1.9},
        {"head": -0.6},
    ],
)
def test_the_rule_reads_every_condition(changed: dict[str, float]) -> None:
    assert experiment.judged(rows()).verdict == "holds"
    result = experiment.judged(rows(**changed))
    assert result.verdict == "holds in part"
    assert "6 of 7" in result.reason
