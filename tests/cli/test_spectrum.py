"""``gradmatch spectrum``."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gradmatch.analysis import Spectrum, spectrum
from gradmatch.core.store import save_tensors
from gradmatch.datasets import load

NET = """
from torch import nn


def make(channels, size, classes):
    return nn.Sequential(
        nn.Conv2d(channels, 2, 3, stride=2), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(18, classes),
    )
"""


@pytest.fixture
def mine(here, request):
    """A user's module with batch norm and dropout, and trained weights of it."""
    name = f"own_{abs(hash(request.node.name)) % 10**8}"
    Path(f"{name}.py").write_text(NET)
    sys.path.insert(0, str(here))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = importlib.import_module(name).make(1, 8, 2)
            for _ in range(5):
                model(torch.rand(16, 1, 8, 8))
    finally:
        sys.path.remove(str(here))
    save_tensors("net.safetensors", model.state_dict())
    return f"{name}:make", model.eval()


def test_train_mode_is_refused_with_the_sentence_and_eval_mode_works(run, refused, npz, mine):
    spec, model = mine
    words = (spec, "--weights", "net.safetensors", "--data", "data.npz", "--out", "found")
    result = run("spectrum", *words, "--mode", "train")
    assert result.exit_code == 2
    sentence = result.stderr.strip().splitlines()[-1]
    assert "active dropout in 3; call model.eval()" in sentence
    assert sentence.endswith("here that is --mode eval.")
    assert not Path("found").exists()
    result = run("spectrum", *words, "--top", 6, "--density", "--steps", 8, "--probes", 2)
    assert result.exit_code == 0, result.stderr
    assert "eval mode: dropout off and batch norm as it stands" in result.stderr
    train = load("data.npz").train
    expected = spectrum(model, (train.x, train.y), top=6)
    found = Spectrum.load("found")
    torch.testing.assert_close(found.top, expected.top, atol=1e-9, rtol=1e-6)
    assert (found.n, found.size) == (24, expected.size)
    facts = json.loads(Path("found/spectrum.json").read_text())
    assert facts["largest"] == pytest.approx(expected.top[0].item())
    assert facts["about"]["settings"]["steps"] == 8
    assert facts["about"]["mode"] == "eval"
    assert Path("found/spectrum.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(Path("found").glob("*.part.*"))
    assert "largest ratio of neighbours" in result.stdout


def test_kinds_layers_and_examples(run, npz):
    words = ("spectrum", "mlp", "--data", "data.npz", "--out", "found", "--top", 3, "--method", "lanczos")
    result = run(
        *words, "--kind", "ggn", "--params", r"\.bias$", "--examples", 9, "--split", "train", "--seed", 2
    )
    assert result.exit_code == 0, result.stderr
    assert "9 of 24 examples" in result.stderr
    found = Spectrum.load("found")
    assert (found.kind, found.n, found.method) == ("ggn", 9, "lanczos")
    assert len(found.bottom) == 0
    assert "none below zero" in result.stdout
    again = run(*words, "--kind", "ggn", "--params", r"\.bias$", "--examples", 9, "--seed", 2)
    assert again.exit_code == 0, again.stderr
    other = run(*words, "--kind", "hessian")
    assert other.exit_code == 2
    assert "holds a run with" in other.stderr


def test_a_stopped_run_goes_on(run, npz, monkeypatch):
    from gradmatch.analysis import hessian_spectrum

    words = ("spectrum", "mlp", "--data", "data.npz", "--out", "found", "--top", 3, "--method", "lanczos", "--density",
             "--steps", 4, "--probes", 2)  # fmt: skip

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(hessian_spectrum, "_density", stop)
        stopped = run(*words)
    assert stopped.exit_code == 130
    assert "goes on from its last finished part" in stopped.stderr
    assert Path("found/ends.part.safetensors").exists()
    with monkeypatch.context() as m:
        m.setattr(hessian_spectrum, "_ends", stop)  # not needed again
        assert run(*words).exit_code == 0
    assert run(*words[:4], "--out", "whole", *words[6:]).exit_code == 0
    assert torch.equal(Spectrum.load("found").top, Spectrum.load("whole").top)
    assert torch.equal(Spectrum.load("found").density.nodes, Spectrum.load("whole").density.nodes)


def test_a_stopped_run_of_other_statistics_is_not_taken_over(run, npz, mine, monkeypatch):
    from gradmatch.analysis import hessian_spectrum

    spec, model = mine
    words = ("spectrum", spec, "--weights", "net.safetensors", "--data", "data.npz", "--out", "found", "--density",
             "--steps", 4, "--probes", 1)  # fmt: skip

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(hessian_spectrum, "_density", stop)
        assert run(*words).exit_code == 130
    model[1].running_mean += 1  # a buffer, no parameter
    save_tensors("net.safetensors", model.state_dict())
    result = run(*words)
    assert result.exit_code == 2
    assert "holds a run with" in result.stderr


def test_a_language_model(run, here):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=256, n_positions=16, n_embd=4, n_layer=1, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained("gpt2")
    Path("words.txt").write_text("some words in a line\n" * 8)
    words = ("--tokenizer", "bytes", "--length", 8, "--params", "mlp", "--top", 2, "--examples", 6)
    result = run("spectrum", "gpt2", "--data", "words.txt", "--out", "found", *words)
    assert result.exit_code == 0, result.stderr
    assert "eval mode: dropout off" in result.stderr
    assert Spectrum.load("found").n == 6


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (("--mode", "test"), "--mode"),
        (("--split", "all"), "--split"),
        (("--top", 0), "--top"),
        (("--kind", "fish"), "kind"),
        (("--params", "("), "regular expression"),
        (("--params", "nothing"), "matches none"),
        (("--weights", "none.safetensors"), "does not exist"),
    ],
)
def test_refusals(run, npz, words, word):
    result = run("spectrum", "mlp", "--data", "data.npz", "--out", "found", *words)
    assert result.exit_code == 2
    assert word in result.stderr


def test_weights_of_another_network(run, npz):
    save_tensors("net.safetensors", nn.Linear(2, 2).state_dict())
    result = run("spectrum", "mlp", "--data", "data.npz", "--out", "found", "--weights", "net.safetensors")
    assert result.exit_code == 2
    assert "lacks" in result.stderr
