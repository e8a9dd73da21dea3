"""``gradmatch gradients`` and ``merge-gradients``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradmatch.core.gradients import per_example_gradients
from gradmatch.core.problem import Problem
from gradmatch.core.store import GradientStore, save_tensors
from gradmatch.datasets import load


def content(folder: str) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}


@pytest.fixture
def language_model(here):
    """A tiny GPT-2 in a folder, without a tokenizer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=256, n_positions=32, n_embd=8, n_layer=1, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained("gpt2")
    Path("words.txt").write_text("\n".join(f"line {k} of some words" for k in range(20)))
    return model


def test_a_network_of_the_users_own_with_its_weights(run, npz, resnet):
    import importlib
    import sys

    sys.path.insert(0, str(Path.cwd()))
    try:
        model = importlib.import_module(resnet).ResNet(1, 2).eval()
    finally:
        sys.path.pop(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    save_tensors("net.safetensors", model.state_dict())
    words = ("--weights", "net.safetensors", "--project", 0, "--params", r"head|stem", "--batch", 5)
    result = run("gradients", f"{resnet}:ResNet", "data.npz", "--out", "grads", *words, "--workers", 1)
    assert result.exit_code == 0, result.stderr
    assert "24 x 50 gradients of 50 parameters in grads" in result.stdout
    data = load("data.npz").train
    problem = Problem(model, "cross_entropy", (data.x, data.y), select="head|stem")
    store = GradientStore("grads", problem)
    torch.testing.assert_close(store[:], per_example_gradients(problem), rtol=1e-4, atol=1e-6)


def test_shards_are_merged_into_the_whole_and_a_run_goes_on(run, npz):
    words = ("mlp", "data.npz", "--project", 16, "--batch", 2, "--seed", 3, "--split", "test", "--limit", 9)
    assert run("gradients", *words, "--out", "whole").exit_code == 0
    for k in (1, 2):
        result = run("gradients", *words, "--out", f"half{k}", "--shard", f"{k}/2")
        assert result.exit_code == 0, result.stderr
    merged = run("merge-gradients", "half1", "half2", "--out", "both")
    assert merged.exit_code == 0, merged.stderr
    assert content("both") == content("whole")
    assert run("gradients", *words, "--out", "whole").exit_code == 0
    assert content("both") == content("whole")
    other = run("gradients", *words[:-1], 8, "--out", "whole")
    assert other.exit_code == 2
    assert "holds gradients with examples 9, and this one has 8" in other.stderr


@pytest.mark.parametrize("of", ["gpt2", "convnet"])
def test_a_stopped_run_and_shards_give_the_bytes_of_one_run(run, npz, language_model, monkeypatch, of):
    words: tuple[object, ...] = ("convnet", "data.npz", "--project", 32, "--batch", 4)
    if of == "gpt2":
        words = ("gpt2", "words.txt", "--tokenizer", "bytes", "--length", 12, "--project", 32, "--batch", 4)
    build = GradientStore.build.__func__

    def in_small_parts(cls, problem, out, *, progress, **options):
        def stop(done, total):
            progress(done, total)
            if str(out) == "stopped" and not again:
                raise KeyboardInterrupt

        return build(cls, problem, out, progress=stop, **(options | {"part_rows": 8}))

    monkeypatch.setattr(GradientStore, "build", classmethod(in_small_parts))
    again: list[bool] = []
    assert run("gradients", *words, "--out", "whole").exit_code == 0
    stopped = run("gradients", *words, "--out", "stopped", "--workers", 1)
    assert stopped.exit_code == 130
    assert "goes on from here" in stopped.stderr
    assert 0 < len(content("stopped")) < len(content("whole"))
    again.append(True)
    for k in (1, 2):
        assert run("gradients", *words, "--out", f"half{k}", "--shard", f"{k}/2").exit_code == 0
    assert run("merge-gradients", "half1", "half2", "--out", "both").exit_code == 0
    assert run("gradients", *words, "--out", "stopped").exit_code == 0
    assert content("stopped") == content("both") == content("whole")


def test_a_language_model_on_text_and_on_saved_rows(run, here, language_model):
    text = ("gradients", "gpt2", "words.txt", "--tokenizer", "bytes", "--length", 12, "--project", 64)
    result = run(*text, "--out", "grads", "--params", "mlp")
    assert result.exit_code == 0, result.stderr
    ids = torch.tensor(list(Path("words.txt").read_bytes()))
    ids = ids[: len(ids) // 12 * 12].view(-1, 12)
    problem = Problem(language_model, "next_token", {"input_ids": ids}, select="mlp")
    store = GradientStore("grads", problem)
    expected = store.projection()(per_example_gradients(problem))
    torch.testing.assert_close(store[:], expected, rtol=1e-4, atol=1e-6)

    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [[5, 6, 7], [9, 8], [1, 2, 3, 4] * 9]
    datasets.Dataset.from_dict({"input_ids": rows, "extra": [0, 0, 0]}).save_to_disk("rows")
    assert run("gradients", "gpt2", "rows", "--out", "more", "--project", 0).exit_code == 0
    lone = Problem(language_model, "next_token", [{"input_ids": torch.tensor([r[:32]])} for r in rows])
    torch.testing.assert_close(GradientStore("more")[:], per_example_gradients(lone), rtol=1e-4, atol=1e-6)
    datasets.Dataset.from_dict({"text": ["some words", "more"]}).save_to_disk("texts")
    assert run("gradients", "gpt2", "texts", "--tokenizer", "bytes", "--out", "third").exit_code == 0
    assert GradientStore("third").shape == (2, 2048)


def test_bad_language_data_are_refused(run, here, language_model):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"input_ids": [[5, 300]]}).save_to_disk("strange")
    datasets.Dataset.from_dict({"input_ids": [[5, 6], [7]]}).save_to_disk("short")
    datasets.Dataset.from_dict({"other": [1]}).save_to_disk("columns")
    for source, more, says in (
        ("strange", (), "token 300; MODEL knows 0..255"),
        ("short", (), "fewer than 2 tokens: 1"),
        ("columns", ("--tokenizer", "bytes"), "it needs input_ids or text"),
        ("words.txt", (), "no readable tokenizer"),
        ("words.txt", ("--tokenizer", "bytes", "--length", 33), "at most 32"),
        ("none.txt", ("--tokenizer", "bytes"), "does not exist"),
        ("words.txt", ("--tokenizer", "bytes", "--weights", "w.safetensors"), "with its own"),
    ):
        result = run("gradients", "gpt2", source, "--out", "o", *more)
        assert result.exit_code == 2, (source, result.stderr)
        assert says in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mlp", "data.npz"], "Missing option '--out'"),
        (["mlp", "data.npz", "--out", "o", "--shard", "3/2"], "--shard is '3/2'"),
        (["mlp", "data.npz", "--out", "o", "--project", "-4"], "--project is -4"),
        (["mlp", "data.npz", "--out", "o", "--split", "all"], "--split is 'all'"),
        (["mlp", "data.npz", "--out", "o", "--limit", "0"], "--limit is 0"),
        (["mlp", "data.npz", "--out", "o", "--device", "moon"], "--device is 'moon'"),
        (["mlp", "data.npz", "--out", "o", "--length", "5"], "--length and --tokenizer"),
        (["mlp", "absent.npz", "--out", "o"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(refused, npz, words, says):
    assert says in refused("gradients", *words)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--project", 30), "multiple of 4"),
        (("--params", "nothing"), "matches none of"),
        (("--params", "("), "no regular expression"),
        (("--dtype", "int8"), "dtype is 'int8'"),
        (("--weights", "none.safetensors"), "does not exist"),
        (("--weights", "wrong.safetensors"), "lacks"),
    ],
)
def test_refusals_after_the_data_are_known(run, npz, more, says):
    save_tensors("wrong.safetensors", {"x": torch.zeros(2)})
    result = run("gradients", "mlp", "data.npz", "--out", "o", *more)
    assert result.exit_code == 2
    assert says in result.stderr.splitlines()[-1]


def test_shards_of_different_stores_are_refused(run, npz):
    for seed in (0, 1):
        run("gradients", "mlp", "data.npz", "--out", f"s{seed}", "--seed", seed, "--project", 16)
    result = run("merge-gradients", "s0", "s1", "--out", "o")
    assert result.exit_code == 2
    assert "they must agree" in result.stderr
