"""``gradmatch search-optimizer``: what it prints and writes, what it refuses, and that a kill costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from gradmatch.optim import Program, SearchResult, programs

QUICK = ("--steps", "5", "--population", "8", "--tournament", "3", "--hidden", "4")


def test_a_search_prints_and_keeps_the_program_it_found(run, here) -> None:
    result = run("search-optimizer", "--budget", 30, "--out", "found", *QUICK)
    assert result.exit_code == 0, result.output
    assert "peak rate" in result.stderr
    source = result.stdout[result.stdout.index("def train(") : result.stdout.index("written:")].strip()
    short = Program.parse((here / "found" / "simplified.py").read_text())
    assert Program.parse(source) == short
    found = SearchResult.load(here / "found" / "result.json")
    assert len(found.history) == 30
    assert Program.parse((here / "found" / "best.py").read_text()) == found.best
    assert len(short) <= len(found.best)
    assert "30 programs" in result.stdout
    settings = json.loads((here / "found" / "run.json").read_text())
    assert settings["init"] == programs.adamw().to_source()
    more = ("--start", "found/best.py", "--lr", 0.01, "--strategy", "chains", "--budget", 3, "--out", "more")
    result = run("search-optimizer", *more, *QUICK)
    assert result.exit_code == 0, result.output
    assert "peak rate" not in result.stderr
    assert SearchResult.load(here / "more" / "result.json").top


def test_any_labelled_data_will_do(run, npz) -> None:
    result = run("search-optimizer", "--data", npz, "--start", "sgd", "--budget", 5, "--out", "found", *QUICK)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--budget", "0"), "--budget is 0; it must be at least 1"),
        (("--start", "adam"), "--start is 'adam'; it must be one of adamw, lion, momentum, sgd, or a file"),
        (("--start", "bad.py"), "reads 'q', which is not assigned yet"),
        (("--data", "missing.npz"), "missing.npz"),
        (("--strategy", "annealing"), "--strategy is 'annealing'; it must be one of"),
        (("--population", "0"), "--population is 0; it must be at least 1"),
        (("--steps", "0"), "steps is 0; it must be at least 1"),
        (("--lr", "-1"), "lr is -1.0; it must be above 0"),
    ],
)
def test_what_it_refuses(refused, here, words, sentence) -> None:
    (here / "bad.py").write_text("def train(w, g, lr):\n    update = mul(g, q)\n    return update\n")
    assert sentence in refused("search-optimizer", "--out", "found", *words)
    assert not (here / "found").exists()


def test_a_folder_in_use_is_refused(run, refused, here) -> None:
    run("search-optimizer", "--budget", 2, "--lr", 0.01, "--out", "found", *QUICK)
    assert "already holds a run" in refused("search-optimizer", "--budget", 2, "--out", "found", *QUICK)
    again = run("search-optimizer", "--budget", 2, "--lr", 0.01, "--out", "found", "--resume", *QUICK)
    assert again.exit_code == 0, again.output
    other = refused("search-optimizer", "--budget", 3, "--lr", 0.01, "--out", "found", "--resume", *QUICK)
    assert "resume needs equal settings" in other


def test_killed_and_resumed_it_ends_the_same(here) -> None:
    """SIGKILL once a state is on disk, then --resume: byte for byte the unbroken result."""
    options = ("--budget", "200", "--lr", "0.01", *QUICK[2:], "--steps", "20", "--save-every", "0")
    command = [sys.executable, "-m", "gradmatch.cli", "search-optimizer", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([*command, "--out", "killed"], stderr=subprocess.DEVNULL, env=environment)
    state = here / "killed" / "state.safetensors"
    until = time.monotonic() + 60
    while not state.exists() and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert state.exists(), "it ended before it could be killed"
    from typer.testing import CliRunner

    from gradmatch.cli import app

    for out, resume in (("killed", ["--resume"]), ("whole", [])):
        words = ["search-optimizer", *options, "--out", out, *resume]
        result = CliRunner().invoke(app, words, prog_name="gradmatch")
        assert result.exit_code == 0, result.output
    for name in ("result.json", "best.py", "simplified.py"):
        assert (here / "killed" / name).read_bytes() == (here / "whole" / name).read_bytes()
