"""``gradmatch generate``: train, sample and compare on tiny images; refusals; killed and resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gradmatch.core.store import load_tensors

pytest.importorskip("diffusers")

TINY = ("--steps", "6", "--autoencoder-steps", "4", "--width", "8", "--batch", "8", "--sheet-every", "3")


def data(here, size=16, channels=None, n=24):
    draw = np.random.default_rng(0)
    shape = (n, size, size) if channels is None else (n, channels, size, size)
    x = draw.random(shape).astype(np.float32)
    np.savez(
        here / "data.npz",
        x_train=x,
        y_train=np.arange(n) % 2,
        x_test=draw.random((40, *shape[1:])),
        y_test=np.arange(40) % 2,
    )
    return "data.npz"


@pytest.fixture
def trained(run, here):
    """A model trained for a few steps."""
    result = run("generate", "train", "--method", "lfm", "--data", data(here), "--out", "flow", *TINY)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return "flow"


def test_training_leaves_weights_and_sheets(trained):
    files = {f.name for f in Path(trained).iterdir()}
    assert {
        "run.json",
        "flow.safetensors",
        "autoencoder.safetensors",
        "sheet-000003.png",
        "sheet-000006.png",
    } <= files
    assert "state.safetensors" not in files
    tensors, _ = load_tensors("flow/flow.safetensors")
    assert float(tensors["codec.scale"]) > 0


@pytest.mark.parametrize("schedule", ["uniform", "bellman"])
def test_samples_in_so_many_calls(run, trained, schedule):
    words = ("generate", "sample", trained, "--steps", 3, "--schedule", schedule, "--n", 5)
    result = run(*words, "--out", "a")
    assert result.exit_code == 0, result.stderr
    assert "5 images, 3 network calls each" in result.stdout
    tensors, facts = load_tensors("a/samples.safetensors")
    assert tensors["images"].shape == (5, 1, 16, 16)
    assert 0 <= float(tensors["images"].min()) <= float(tensors["images"].max()) <= 1
    assert (facts["times"][0], facts["times"][-1], len(facts["times"])) == (1.0, 0.0, 4)
    assert Path("a/samples.png").stat().st_size > 0
    run(*words, "--out", "b")
    assert torch.equal(load_tensors("b/samples.safetensors")[0]["images"], tensors["images"])
    run(*words, "--out", "c", "--seed", 1)
    assert not torch.equal(load_tensors("c/samples.safetensors")[0]["images"], tensors["images"])


def test_costs_of_jumps_are_measured_once(run, trained):
    assert not Path("flow/bellman.safetensors").exists()
    for steps in (2, 4):
        run("generate", "sample", trained, "--steps", steps, "--schedule", "bellman", "--n", 2, "--out", "a")
        if steps == 2:
            before = Path("flow/bellman.safetensors").stat().st_mtime_ns
    assert Path("flow/bellman.safetensors").stat().st_mtime_ns == before


def test_labels_and_guidance(run, refused, trained):
    words = ("generate", "sample", trained, "--steps", 2, "--n", 3, "--out", "a")
    for guidance, calls in ((1.0, 2), (1.5, 4), (0.0, 2)):
        result = run(*words, "--label", 1, "--guidance", guidance)
        assert result.exit_code == 0, result.stderr
        assert f"{calls} network calls each" in result.stdout
    assert "--label is 2" in refused(*words, "--label", 2)


def test_compare_prints_a_table_at_equal_calls_and_a_picture(run, trained):
    result = run(
        "generate", "compare", trained, "--schedules", "uniform,bellman", "--steps", "2,4", "--n", 40
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert result.stdout.count("bellman") == 2
    assert "32 principal components" in result.stdout
    found = json.loads(Path("flow/compare.json").read_text())
    assert [(r["schedule"], r["calls"]) for r in found["rows"]] == [
        ("uniform", 2), ("bellman", 2), ("uniform", 4), ("bellman", 4),
    ]  # fmt: skip
    assert found["rows"][0]["times"] == [1.0, 0.5, 0.0]
    assert Path("flow/compare.png").stat().st_size > 0


@pytest.mark.parametrize("options", [("--backbone", "dit"), ("--autoencoder-steps", "0"), ("--no-labels",)])
def test_other_builds_train_and_sample(run, here, options):
    words = [
        "generate",
        "train",
        "--data",
        data(here, channels=3),
        "--out",
        "flow",
        *TINY,
        "--steps",
        "2",
        *options,
    ]
    result = run(*words)
    assert result.exit_code == 0, (result.stderr, result.exception)
    result = run("generate", "sample", "flow", "--steps", 1, "--n", 2, "--out", "a")
    assert result.exit_code == 0, result.stderr
    assert load_tensors("a/samples.safetensors")[0]["images"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steps", "0"), "--steps is 0"),
        (("--batch", "0"), "--batch is 0"),
        (("--lr", "0"), "--lr is 0"),
        (("--width", "12"), "width is 12"),
        (("--method", "gan"), "--method is 'gan'"),
        (("--backbone", "vit"), "--backbone is 'vit'"),
        (("--sheet-every", "0"), "--sheet-every is 0"),
        (("--save-every", "-1"), "--save-every is -1"),
        (("--device", "abacus"), "--device is 'abacus'"),
        (("--data", "wide.npz"), "they must be square"),
        (("--data", "odd.npz"), "halve evenly"),
        (("--data", "flat.npz"), "generation needs images"),
        (("--data", "nan.npz"), "NaN"),
        (("--out", "data.npz"), "it must be a folder"),
    ],
)
def test_bad_training_is_one_sentence(refused, here, words, says):
    y = np.arange(12) % 2
    np.savez("wide.npz", x=np.ones((12, 16, 8), np.float32), y=y)
    np.savez("odd.npz", x=np.ones((12, 17, 17), np.float32), y=y)
    np.savez("flat.npz", x=np.ones((12, 5), np.float32), y=y)
    np.savez("nan.npz", x=np.full((12, 16, 16), np.nan, np.float32), y=y)
    assert says in refused("generate", "train", "--data", data(here), "--out", "flow", *TINY, *words)


def test_bad_sampling_is_one_sentence(refused, run, trained, here):
    assert "--schedule is 'random'" in refused(
        "generate", "sample", trained, "--schedule", "random", "--out", "a"
    )
    assert "--steps is 0" in refused("generate", "sample", trained, "--steps", 0, "--out", "a")
    assert "--steps is 101" in refused(
        "generate", "sample", trained, "--steps", 101, "--schedule", "bellman", "--out", "a"
    )
    assert "--n is 0" in refused("generate", "sample", trained, "--n", 0, "--out", "a")
    assert "holds no model" in refused("generate", "sample", "nowhere", "--out", "a")
    assert "--schedules is 'x'" in refused("generate", "compare", trained, "--schedules", "uniform,x")
    assert "--steps is 'y'" in refused("generate", "compare", trained, "--steps", "2,y")
    assert "--n is 8" in refused("generate", "compare", trained, "--n", 8)
    Path("flow/flow.safetensors").unlink()
    assert "not over; go on with its command and --resume" in refused(
        "generate", "sample", trained, "--out", "a"
    )
    assert "already holds a run" in refused("generate", "train", "--data", "data.npz", "--out", "flow", *TINY)


def test_a_finished_training_is_not_done_again(run, trained):
    before = Path("flow/flow.safetensors").read_bytes()
    result = run("generate", "train", "--data", "data.npz", "--out", "flow", *TINY, "--resume")
    assert result.exit_code == 0, result.stderr
    assert Path("flow/flow.safetensors").read_bytes() == before
    other = run("generate", "train", "--data", "data.npz", "--out", "flow", *TINY, "--resume", "--seed", 1)
    assert other.exit_code == 2
    assert "resume needs equal settings" in other.stderr


def test_nan_in_the_loss_stops_with_the_step_named(run, here):
    words = (
        "generate",
        "train",
        "--data",
        data(here),
        "--out",
        "flow",
        *TINY,
        "--lr",
        "1e30",
        "--steps",
        "40",
    )
    result = run(*words)
    assert result.exit_code == 2
    assert "gradmatch: the loss of step 2 is nan; training stops there." in result.stderr
    assert not Path("flow/flow.safetensors").exists()


def test_killed_and_resumed_gives_the_same_weights(run, here):
    """SIGKILL at a moment that the clock decides, in either stage, then --resume: the unbroken run's bytes."""
    words = ["generate", "train", "--data", data(here), *TINY, "--steps", "30", "--save-every", "0"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "gradmatch.cli", *words, "--out", "killed"], stderr=subprocess.DEVNULL
    )
    end, state = time.monotonic() + 60, Path("killed/state.safetensors")
    while not state.exists() and killed.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(time.time() % 0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert state.exists(), "the run was over before it was killed"
    assert not Path("killed/flow.safetensors").exists()
    assert 0 < load_tensors(state)[1]["step"] < 30
    resumed = run(*words, "--out", "killed", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert run(*words, "--out", "whole").exit_code == 0
    for name in ("flow.safetensors", "autoencoder.safetensors"):
        assert Path("whole", name).read_bytes() == Path("killed", name).read_bytes()
