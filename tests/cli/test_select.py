"""``gradmatch select`` and ``data``."""

import gzip
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gradmatch.core.store import load_tensors
from gradmatch.data import Selection
from gradmatch.datasets import _fetch, fashion_mnist, find_fashion_mnist, load
from gradmatch.datasets.fashion_mnist import FILES, read_idx


def test_selection_names_places_and_files(run, photos):
    result = run("select", "photos", "--ratio", 0.5, "--bins", 2, "--out", "kept")
    assert result.exit_code == 0, result.stderr
    found = json.loads(Path("kept/selection.json").read_text())
    chosen, split = Selection.load("kept"), load("photos")
    assert len(chosen) == len(found["indices"]) == len(found["files"]) == 8
    everything = sorted(str(f) for f in Path("photos").glob("*/*.png"))
    assert [everything[i] for i in found["indices"]] == found["files"]
    kept = load_tensors("kept/selected.safetensors")[0]
    assert torch.equal(kept["x"], split.train.x[chosen.indices])
    assert "test accuracy" not in result.stdout
    again = load("kept/selected.safetensors")  # what was selected is data again
    assert len(again.train) == 8
    assert torch.equal(again.test.y, split.test.y)


@pytest.mark.parametrize("method", ["dq", "random"])
def test_selection_is_compared_with_random_ones(run, npz, method):
    words = ("--ratio", 0.5, "--bins", 2, "--eval", "--epochs", 1, "--eval-networks", 2, "--width", 4)
    result = run("select", "data.npz", "--method", method, "--out", "kept", *words)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(Path("kept/summary.json").read_text())
    assert [r["images"] for r in summary["rows"]] == [12, 12, 24]
    assert [len(r["accuracies"]) for r in summary["rows"]] == [2, 2, 1]
    assert "selected images" in result.stdout
    assert "report.html" in result.stdout


def test_own_resnet_gives_the_features(run, photos, resnet):
    words = ("--ratio", 0.5, "--bins", 2, "--epochs", 1)
    result = run("select", "photos", "--network", f"{resnet}:ResNet", "--out", "kept", *words)
    assert result.exit_code == 0, result.stderr
    assert Selection.load("kept").meta["features"] == "gradient"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.npz"], "Missing option '--out'"),
        (["data.npz", "--out", "o", "--ratio", "0"], "--ratio is 0.0"),
        (["data.npz", "--out", "o", "--ratio", "1.5"], "--ratio is 1.5"),
        (["data.npz", "--out", "o", "--ratio", "nan"], "--ratio is nan"),
        (["data.npz", "--out", "o", "--bins", "0"], "--bins is 0"),
        (["data.npz", "--out", "o", "--method", "best"], "--method is 'best'"),
        (["data.npz", "--out", "o", "--method", "random", "--network", "mlp"], "--network is given"),
        (["data.npz", "--out", "data.npz"], "it must be a folder"),
        (["absent.npz", "--out", "o"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(refused, npz, words, says):
    assert says in refused("select", *words)


@pytest.mark.parametrize(
    ("more", "says"), [(("--bins", 13), "n_bins is 13"), (("--ratio", 0.01), "keep none")]
)
def test_refusals_of_the_method_itself(run, npz, more, says):
    result = run("select", "data.npz", "--out", "o", *more)
    assert result.exit_code == 2
    assert says in result.stderr.splitlines()[-1]


# ---------------------------------------------------------------------- data


def write_four_files(folder):
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for name in FILES:
        n = 20 if name.startswith("train") else 10
        array = draw.integers(0, 255, (n, 28, 28)) if "images" in name else np.arange(n) % 10
        header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / name).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    """A machine without Fashion-MNIST, the hub or Debian's programs; gives the folder of its programs."""
    from gradmatch.datasets import fashion_mnist as module

    monkeypatch.setenv("GRADMATCH_DATA", str(tmp_path / "home"))
    monkeypatch.setattr(sys.modules[module.__module__], "_DEBIAN", tmp_path / "absent")
    monkeypatch.setitem(sys.modules, "datasets", None)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


def program(folder, name, script):
    (folder / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    os.chmod(folder / name, 0o755)


def test_data_unpacks_the_package_without_root(run, nothing_here, tmp_path):
    write_four_files(tmp_path / "source")
    program(nothing_here, "apt-get", '[ "$1 $2" = "download dataset-fashion-mnist" ] && touch it_1_all.deb')
    unpack = f'[ "$1" = "-x" ] && mkdir -p "$3/usr/share/d" && cp {tmp_path}/source/* "$3/usr/share/d"'
    program(nothing_here, "dpkg", unpack)
    assert find_fashion_mnist() is None
    result = run("data", "fashion-mnist")
    assert result.exit_code == 0, result.stderr
    assert str(tmp_path / "home" / "fashion-mnist") in result.stdout
    assert len(fashion_mnist().train) == 20
    assert "in " in run("data", "fashion-mnist").stdout  # found now: nothing is fetched again


def test_data_says_what_to_do_where_nothing_works(run, nothing_here):
    program(nothing_here, "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    program(nothing_here, "dpkg", "exit 1")
    result = run("data", "fashion-mnist")
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert "Unable to locate package" in last
    assert "apt-get install dataset-fashion-mnist" in last
    assert FILES[0] in last


def test_hub_rows_become_the_four_files(tmp_path):
    parts = {
        part: {"image": [np.full((28, 28), k, dtype=np.uint8) for k in range(n)], "label": list(range(n))}
        for part, n in (("train", 4), ("test", 2))
    }
    _fetch.write_idx_files(parts, tmp_path)
    assert read_idx(tmp_path / FILES[0]).shape == (4, 28, 28)
    assert read_idx(tmp_path / FILES[1]).tolist() == [0, 1, 2, 3]
    assert read_idx(tmp_path / FILES[2])[1, 0, 0] == 1


def test_digits_need_nothing(run):
    assert "nothing to fetch" in run("data", "digits").stdout
