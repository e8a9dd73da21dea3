"""``gradmatch distill`` and ``demo`` on tiny real runs: files, tables, refusals, the user's own network, resuming."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from gradmatch.cli import _demo, _methods
from gradmatch.core.checks import InputError
from gradmatch.core.store import load_tensors, save_tensors
from gradmatch.data import Distiller, SyntheticDataset, train_experts

from .conftest import QUICK, images


def test_folder_of_images_leaves_all_files_and_a_table(run, photos):
    result = run("distill", "photos", "--per-class", 2, "--out", "out", *QUICK)
    assert result.exit_code == 0, result.stderr
    made = SyntheticDataset.load("out")
    assert made.images.shape == (4, 1, 8, 8)
    with Image.open("out/contact_sheet.png") as sheet:
        assert min(sheet.size) > 100
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["compression_ratio"] == 16 / 4
    assert [r["images"] for r in summary["rows"]] == [4, 4, 16]
    assert all(0 <= r["mean"] <= 1 for r in summary["rows"])
    for row in ("distilled images", "random real images", "all real images"):
        assert row in result.stdout
    page = Path("out/report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http://www.w3.org", "")  # self-contained: nothing is fetched


@pytest.mark.parametrize("method", ["dcc", "dc", "dsa", "dsac", "ftd", "tesla"])
def test_every_method_runs_on_arrays(run, npz, method):
    more = []
    if method in ("ftd", "tesla"):
        more = ["--set", "experts.n_experts=1", "--set", "experts.epochs=2", "--set", "max_start_epoch=1"]
        more += ["--set", "syn_steps=2"]
    else:
        more = ["--set", "net_epochs=1", "--set", "batch_real=8"]
    words = ("distill", "data.npz", "--method", method, "--per-class", 1, "--steps", 2, "--out", "out")
    result = run(*words, "--network", "mlp", "--width", 8, "--no-eval", *more)
    assert result.exit_code == 0, result.stderr
    made = SyntheticDataset.load("out")
    assert made.images.shape == (2, 1, 8, 8)
    assert made.meta["steps"] == 2
    assert "test accuracy" not in result.stdout
    assert json.loads(Path("out/summary.json").read_text())["rows"] == []


@pytest.mark.parametrize("method", ["auto", "dcc"])
def test_own_resnet_from_the_present_folder(run, photos, resnet, method):
    more = QUICK if method == "auto" else (*QUICK[:6], "--set", "net_epochs=1")
    network = f"{resnet}:ResNet"
    result = run(
        "distill", "photos", "--method", method, "--network", network, "--out", "out", "--per-class", 1, *more
    )
    assert result.exit_code == 0, result.stderr
    assert SyntheticDataset.load("out").images.shape == (2, 1, 8, 8)


def test_small_and_flat_inputs(run, here):
    x, y = images(12, size=4)
    np.savez("small.npz", x=x, y=y)
    assert run("distill", "small.npz", "--per-class", 1, "--out", "a", *QUICK).exit_code == 0
    save_tensors("flat.safetensors", {"x": torch.randn(20, 5), "y": torch.arange(20) % 2})
    words = ("--per-class", 1, "--network", "mlp", "--width", 4, *QUICK)
    result = run("distill", "flat.safetensors", "--out", "b", *words)
    assert result.exit_code == 0, result.stderr
    assert SyntheticDataset.load("b").images.shape == (2, 5)


def test_earlier_result_is_the_start_of_a_new_one(run, npz):
    words = ("distill", "data.npz", "--per-class", 1, "--no-eval", "--method", "dcc", "--network", "mlp")
    assert run(*words, "--steps", 1, "--set", "net_epochs=1", "--out", "first").exit_code == 0
    assert run(*words, "--steps", 0, "--init", "first", "--out", "second").exit_code == 0
    first, second = (SyntheticDataset.load(name).images for name in ("first", "second"))
    torch.testing.assert_close(first, second)


def test_no_word_counts_as_true_by_being_there():
    """As any text does for ``bool``, and did for a flag of the published program."""
    for word in ("False", "false"):
        maker = _methods.distiller("ftd", per_class=1, settings=[f"experts.adaptive={word}"])
        assert maker.experts["adaptive"] is False
    with pytest.raises(InputError, match="adaptive is 'no'"):
        train_experts((torch.zeros(4, 2), torch.arange(4) % 2), lambda: nn.Linear(2, 2), adaptive="no")


def test_steps_are_those_of_all_phases():
    for per_class in (1, 10):
        usual = _methods.distiller("auto", per_class=per_class, budget="full")
        short = _methods.distiller("auto", per_class=per_class, budget="full", steps=100)
        assert short.steps == short.ridge_steps + short.refine_steps == 100
        share = usual.refine_steps / usual.steps
        assert short.refine_steps == round(100 * share) > 0
    own = _methods.distiller("auto", per_class=1, steps=7, settings=["refine_steps=2"])
    assert (own.ridge_steps, own.refine_steps) == (7, 2)


@pytest.fixture
def strange(here):
    """A module with every kind of factory that cannot be used."""
    (here / "strange_nets.py").write_text(
        "from torch import nn\n"
        "number = 3\n"
        "def needs_more(depth): pass\n"
        "def breaks(): raise KeyError('secret')\n"
        "def gives_none(): return None\n"
        "def wrong_width(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
        "def wrong_input(): return nn.Sequential(nn.Flatten(), nn.Linear(65, 2))\n"
        "def fails_in_forward():\n"
        "    class Odd(nn.Module):\n"
        "        def forward(self, x): return x.absent\n"
        "    return Odd()\n"
    )
    (here / "broken_nets.py").write_text("import nothing_of_this_name\n")
    (here / "garbled_nets.py").write_text("def (:\n")


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ("resnet", "it must be convnet, mlp or module:factory"),
        ("absent_module:f", "there is no module 'absent_module'"),
        ("absent_file.py:f", "there is no file absent_file.py"),
        ("strange_nets:absent", "has no 'absent'"),
        ("strange_nets:number", "is a int"),
        ("strange_nets:needs_more", "needs depth"),
        ("strange_nets:breaks", "KeyError: 'secret'"),
        ("strange_nets:gives_none", "must make an nn.Module"),
        ("strange_nets:wrong_width", "has 7 outputs"),
        ("strange_nets:wrong_input", "does not take inputs of shape (1, 8, 8)"),
        ("strange_nets:fails_in_forward", "trying the network on one input failed"),
        ("broken_nets:f", "importing 'broken_nets' failed with ModuleNotFoundError"),
        ("garbled_nets:f", "importing 'garbled_nets' failed with SyntaxError"),
    ],
)
def test_unusable_networks_are_refused(refused, npz, strange, network, says):
    assert says in refused("distill", "data.npz", "--network", network, "--out", "out")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.npz"], "Missing option '--out'"),
        (["data.npz", "--out", "data.npz"], "a file; it must be a folder"),
        (["data.npz", "--out", "o", "--method", "magic"], "--method is 'magic'"),
        (["data.npz", "--out", "o", "--per-class", "0"], "per_class is 0"),
        (["data.npz", "--out", "o", "--per-class", "x"], "Invalid value for '--per-class'"),
        (["data.npz", "--out", "o", "--epochs", "0"], "--epochs is 0"),
        (["data.npz", "--out", "o", "--eval-networks", "0"], "--eval-networks is 0"),
        (["data.npz", "--out", "o", "--width", "0"], "--width is 0"),
        (["data.npz", "--out", "o", "--seed", "-1"], "seed is -1"),
        (["data.npz", "--out", "o", "--steps", "-1"], "steps is -1"),
        (["data.npz", "--out", "o", "--device", "abacus"], "--device is 'abacus'"),
        (["data.npz", "--out", "o", "--budget", "huge"], "--budget is 'huge'"),
        (["data.npz", "--out", "o", "--save-every", "-1"], "--save-every is -1"),
        (["data.npz", "--out", "o", "--set", "pool"], "it must be name=value"),
        (["data.npz", "--out", "o", "--set", "puddle=3"], "no option 'puddle'"),
        (["data.npz", "--out", "o", "--set", "pool=none"], "pool is 'none'"),
        (
            ["data.npz", "--out", "o", "--set", "standardise=maybe"],
            "standardise is 'maybe'; it must be one of",
        ),
        (["data.npz", "--out", "o", "--method", "ftd", "--set", "experts=3"], "set one by one"),
        (["data.npz", "--out", "o", "--method", "ftd", "--set", "experts.ro=3"], "experts has ro, no option"),
        (["data.npz", "--out", "o", "--size", "8"], "it is for folders of images"),
        (["data.npz", "--out", "o", "--init", "nowhere"], "does not exist"),
        (["absent.npz", "--out", "o"], "does not exist"),
        (["./absent", "--out", "o"], "DATA is './absent'"),
        (["wide.npz", "--out", "o"], "8 x 6 pixels"),
        (["nan.npz", "--out", "o"], "1 NaN or infinite"),
        (["flat.npz", "--out", "o"], "takes images"),
        (["mixed", "--out", "o"], "give --size"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(refused, npz, here, words, says):
    x, y = images(12)
    np.savez("wide.npz", x=x[:, :, :6], y=y)
    np.savez("flat.npz", x=np.ones((12, 5), dtype=np.float32), y=y)
    bad = x.astype(np.float32)
    bad[3, 2, 1] = np.nan
    np.savez("nan.npz", x=bad, y=y)
    for name, size in (("a", 4), ("b", 6)):
        (here / "mixed" / name).mkdir(parents=True)
        Image.new("L", (size, size)).save(here / "mixed" / name / "0.png")
    assert says in refused("distill", *words)


def test_a_finished_folder_is_not_overwritten_but_resumed(run, refused, npz):
    words = ("distill", "data.npz", "--per-class", 1, "--out", "out", *QUICK, "--no-eval")
    assert run(*words).exit_code == 0
    before = Path("out/synthetic.safetensors").read_bytes()
    assert "continue it with --resume" in refused(*words)
    assert run(*words, "--resume").exit_code == 0
    assert Path("out/synthetic.safetensors").read_bytes() == before
    other = run(*words, "--resume", "--seed", 1)
    assert other.exit_code == 2
    assert "resume needs equal settings" in other.stderr


def test_ctrl_c_says_how_to_go_on(run, npz, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Distiller, "distill", stop)
    result = run("distill", "data.npz", "--out", "out", *QUICK)
    assert result.exit_code == 130
    assert "--resume goes on from out" in result.stderr


def test_killed_and_resumed_gives_the_same_file(run, npz):
    """SIGKILL at a moment that the clock decides, then ``--resume``: byte for byte the unbroken result."""
    words = ["distill", "data.npz", "--per-class", "1", "--no-eval", "--save-every", "0", "--steps", "40"]
    words += ["--set", "pool=2"]
    killed = subprocess.Popen([sys.executable, "-m", "gradmatch.cli", *words, "--out", "killed"])
    end = time.monotonic() + 60
    state = Path("killed/state.safetensors")
    while not state.exists() and killed.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(time.time() % 0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert state.exists(), "the run was over before it was killed"
    assert not Path("killed/synthetic.safetensors").exists()
    reached = load_tensors(state)[1]["step"]
    assert 0 < reached < 40
    resumed = run(*words, "--out", "killed", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert run(*words, "--out", "whole").exit_code == 0
    whole, again = (Path(f, "synthetic.safetensors").read_bytes() for f in ("whole", "killed"))
    assert whole == again


def test_demo_replaces_an_earlier_demo_and_nothing_else(run, refused, here):
    words = ("demo", "--data", "digits", "--per-class", 1, "--steps", 2, "--epochs", 1)
    for folder, mark in (("demo", _demo.MARK), ("mine", "notes")):
        (here / folder).mkdir()
        for name in (mark, "run.json", "state.safetensors"):
            (here / folder / name).write_text("{}")
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    left = {f.name for f in (here / "demo").iterdir()}
    assert left == {*_demo.FILES, _demo.MARK} - {"state.safetensors"}
    assert "test accuracy" in result.stdout
    assert "no demo made" in refused(*words, "--out", "mine")
    assert (here / "mine" / "state.safetensors").exists()


def test_demo_takes_fashion_mnist_where_it_is_and_says_which(monkeypatch, capsys, tmp_path):
    from gradmatch import datasets

    monkeypatch.setattr(datasets, "find_fashion_mnist", lambda: tmp_path)
    assert _demo.choose("auto") == "fashion-mnist"
    monkeypatch.setattr(datasets, "find_fashion_mnist", lambda: None)
    assert _demo.choose("auto") == "digits"
    said = capsys.readouterr().err
    assert "demo on Fashion-MNIST" in said
    assert "demo on scikit-learn's digits" in said


def test_worker_processes_give_the_figures_of_one_process(photos, resnet, monkeypatch):
    """Also for a user's network, which the workers import from the present folder."""
    from joblib.externals.loky import get_reusable_executor

    from gradmatch.cli import _network, _score
    from gradmatch.datasets import load

    split = load("photos")
    network = _network.network_for(f"{resnet}:ResNet", split.train)
    groups = [
        _score.learned("a", _score.part_of(split.train, torch.arange(8)), 2, 3),
        _score.everything(split.train, 5),
    ]
    steps = []
    alone = _score.compare(groups, network, split.test, advance=lambda k, n: steps.append((k, n)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(_score, "POOL_SECONDS", 0.0)
    monkeypatch.setattr(_score, "_workers", lambda: 2)
    get_reusable_executor().shutdown()  # workers that another test left were started in another folder
    together = _score.compare(groups, network, split.test)
    assert [r.accuracies for r in together] == [r.accuracies for r in alone]
    assert [(r.name, len(r.accuracies), r.note) for r in alone] == [
        ("a", 2, "2 networks, 3 epochs"),
        ("all real images", 1, "1 network, 5 epochs"),
    ]
