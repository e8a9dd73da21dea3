"""``gradmatch match-weights`` on a user's network with batch-norm and on a language model in a folder."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradmatch.core.assign import Permutation, PermutationSpec

MATCH = ("match-weights", "a.safetensors")


@pytest.fixture
def nets(here, resnet, npz):
    """Weights of two of the user's networks, and of a third whose units are those of the first in another order."""
    sys.path.insert(0, str(here))
    try:
        make = importlib.import_module(resnet).ResNet
    finally:
        sys.path.remove(str(here))
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = make(1, 2, width=6).train()
        for _ in range(4):
            net(torch.rand(8, 1, 8, 8))  # running statistics of their own
        found.append(net.eval())
    spec = PermutationSpec.from_module(found[0], torch.rand(1, 1, 8, 8))
    hidden = Permutation.random(spec, 3)
    for name, state in (
        ("a", found[0].state_dict()), ("b", found[1].state_dict()), ("shuffled", hidden.apply(found[0]))
    ):  # fmt: skip
        save_file({k: t.contiguous() for k, t in state.items()}, here / f"{name}.safetensors")
    (here / "wide.py").write_text(f"from {resnet} import ResNet\nmake = lambda: ResNet(1, 2, width=6)\n")
    return "wide:make"


def test_a_users_resnet_with_data(here, run, nets) -> None:
    result = run(
        *MATCH, "shuffled.safetensors", "--network", nets, "--data", "data.npz", "--out", "o", "--points", "5"
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "matched 18 units in 3 groups" in result.stdout
    assert "note" not in result.stderr
    first, back, merged = (
        load_file(here / n) for n in ("a.safetensors", "o/matched.safetensors", "o/merged.safetensors")
    )
    assert all(torch.equal(t, back[k]) for k, t in first.items())
    assert not torch.equal(
        merged["blocks.0.body.1.running_mean"], first["blocks.0.body.1.running_mean"]
    )  # measured anew
    assert torch.equal(merged["stem.weight"], first["stem.weight"])
    summary = json.loads((here / "o/summary.json").read_text())
    assert set(summary["splits"]) == {"train", "test"}
    split = summary["splits"]["train"]
    assert split["matched"]["barrier"] <= split["naive"]["barrier"] + 1e-6
    assert len(split["matched"]["losses"]) == 5
    assert "midpoint_gap" in split["matched"]
    assert summary["distance_matched"] < 1e-6 < summary["distance"]
    assert (here / "o/path.png").read_bytes().startswith(b"\x89PNG")
    assert max(Permutation.load(here / "o/permutation.safetensors").moved().values()) > 0


def test_a_users_resnet_without_data_is_warned_of(here, run, nets) -> None:
    result = run(
        *MATCH, "b.safetensors", "--network", nets, "--input", "1,8,8", "--classes", "2", "--out", "o"
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "these networks have batch-norm, and without --data" in result.stderr
    assert not (here / "o/path.png").exists()
    assert "agreement of leading directions" in result.stdout
    assert json.loads((here / "o/summary.json").read_text())["splits"] == {}


@pytest.mark.parametrize("method", ["activations", "straight-through"])
def test_other_ways_of_matching(here, run, nets, method, monkeypatch) -> None:
    from gradmatch.weights import _ste

    monkeypatch.setitem(_ste.DEFAULTS, "sinkhorn", _ste._Defaults(0.1, 8, 2))
    result = run(
        *MATCH,
        "b.safetensors",
        "--network",
        nets,
        "--data",
        "data.npz",
        "--out",
        "o",
        "--points",
        "3",
        "--method",
        method,
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "gap in the middle" in result.stdout


def test_language_models_in_folders(here, run) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    text = "the cat sat on the mat and the rat ran\n" * 20
    made = Tokenizer(
        models.WordLevel({w: k for k, w in enumerate(["?", *sorted(set(text.split()))])}, unk_token="?")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", eos_token="?")
    sizes = {"vocab_size": len(words), "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    a = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()
    spec = PermutationSpec.from_module(a, {"input_ids": torch.arange(6)[None]})
    b = GPT2LMHeadModel(a.config)
    b.load_state_dict(Permutation.random(spec, 1).apply(a))
    for name, net in (("a", a), ("b", b)):
        net.save_pretrained(here / name)
        words.save_pretrained(here / name)
    (here / "text.txt").write_text(text)
    result = run(
        "match-weights", "a", "b", "--data", "text.txt", "--out", "o", "--points", "3", "--seed", "0"
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    summary = json.loads((here / "o/summary.json").read_text())
    path = summary["splits"]["text"]
    assert abs(path["matched"]["midpoint_gap"]) < 1e-6 < abs(path["naive"]["midpoint_gap"])
    bare = run("match-weights", "a", "b", "--out", "bare")
    assert bare.exit_code == 0, bare.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--method", "guess"), "--method is 'guess'"),
        (("--points", "4"), "--points is 4; it must be odd"),
        (("--method", "activations", "--network", "{net}"), "needs --data"),
        ((), "say which network they belong to"),
        (("--network", "{net}"), "or the shape of one --input"),
        (("--network", "{net}", "--data", "data.npz", "--input", "1,8,8"), "--input is given"),
        (("--network", "{net}", "--input", "1,x"), "--input is 'x'"),
        (("--network", "mlp", "--data", "data.npz"), "A 'a.safetensors' does not fit --network"),
        (("--network", "{net}", "--data", "none.npz"), "none.npz"),
    ],
)
def test_what_does_not_fit_is_refused(here, refused, nets, words, sentence) -> None:
    given = [w.format(net=nets) for w in words]
    assert sentence in refused("match-weights", "a.safetensors", "b.safetensors", "--out", "o", *given)
    assert not (here / "o").exists()
