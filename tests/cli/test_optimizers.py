"""``gradmatch optimizers compare``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gradmatch.analysis import SolutionReport

QUICK = ("--seeds", 2, "--epochs", 4, "--batch", 8, "--width", 8, "--out", "found")


@pytest.fixture
def four(here):
    """48 + 24 images of four classes, well apart."""
    draw = np.random.default_rng(0)

    def images(n):
        y = np.arange(n) % 4
        x = draw.integers(0, 100, (n, 4, 4))
        x[np.arange(n), y] += 150
        return x.astype(np.uint8), y

    (x, y), (x_test, y_test) = images(80), images(24)
    np.savez("four.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)


def test_one_page_with_plots_and_a_table(run, four):
    grid = ("--rates", "sgd=0.03,0.1", "--rates", "adam=0.01,0.03")
    words = ("optimizers", "compare", "--data", "four.npz", "--optimizers", "sgd,adam", *grid, *QUICK)
    result = run(*words, "--match", "none", "--metrics", "fit,rank,flatness")
    assert result.exit_code == 0, result.stderr
    assert "hessian_max" in result.stdout
    assert "each at its best rate" in result.stdout
    page = Path("found/report.html").read_text()
    assert "data:image/png;base64" in page
    assert "sgd, adam: each at its best rate" in page
    assert Path("found/solutions.png").stat().st_size > 20_000
    report = SolutionReport.load("found")
    assert report.optimizers == ["sgd", "adam"]
    assert {c["rate"] for c in report.curve if c["optimizer"] == "sgd"} == {0.03, 0.1}
    assert "best/0" in next(iter(report.states))
    before = json.loads(Path("found/solutions.json").read_text())
    assert run(*words, "--match", "none", "--metrics", "fit,rank,flatness").exit_code == 0
    assert json.loads(Path("found/solutions.json").read_text()) == before


def test_a_stream_and_an_optimizer_of_ones_own(run, four, here):
    Path("mine.py").write_text("import torch\nclass Slow(torch.optim.SGD):\n    pass\n")
    words = (
        "--data",
        "four.npz",
        "--stream",
        2,
        "--optimizers",
        "mine:Slow,shampoo",
        "--rates",
        "mine:Slow=0.1",
    )
    result = run(
        "optimizers",
        "compare",
        *words,
        *QUICK,
        "--match",
        "none",
        "--metrics",
        "codes",
        "--rates",
        "shampoo=0.03",
    )
    assert result.exit_code == 0, result.stderr
    report = SolutionReport.load("found")
    assert report.optimizers == ["mine:Slow", "shampoo"]
    assert "forgetting" in report.metrics


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optimizers", "sgd,best"], "--optimizers has 'best'"),
        (["--optimizers", "sgd,sgd"], "names sgd twice"),
        (["--optimizers", "sgd,"], "names with commas between"),
        (["--optimizers", "absent:Class"], "there is no module 'absent'"),
        (["--optimizers", "sgd", "--rates", "adam=0.1"], "--rates has adam"),
        (["--optimizers", "sgd", "--rates", "sgd=fast"], "--rates is 'sgd=fast'"),
        (["--optimizers", "sgd", "--rates", "sgd=0"], "--rates is 'sgd=0'"),
        (["--optimizers", "sgd", "--match", "speed"], "--match is 'speed'"),
        (["--optimizers", "sgd", "--match", "new_task_acc"], "one task is matched by train_loss"),
        (["--optimizers", "sgd", "--stream", "2"], "--stream by new_task_acc"),
        (["--optimizers", "sgd", "--schedule", "linear"], "--schedule is 'linear'"),
        (["--optimizers", "sgd", "--seeds", "0"], "--seeds is 0"),
        (["--optimizers", "sgd", "--data", "none.npz"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(refused, four, words, says):
    assert says in refused("optimizers", "compare", "--data", "four.npz", "--out", "o", *words)


def test_a_match_out_of_reach_names_the_closest_gap(run, four):
    words = ("--optimizers", "sgd", "--rates", "sgd=0.0001", "--target", 0.01)
    result = run("optimizers", "compare", "--data", "four.npz", *words, *QUICK)
    assert result.exit_code == 2
    assert "comes no closer than" in result.stderr.splitlines()[-1]
