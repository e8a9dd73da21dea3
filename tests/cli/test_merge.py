"""``gradmatch merge`` and ``gradmatch fisher`` on tiny models, text and images."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradmatch.core.state_dicts import open_state_dict
from gradmatch.weights import fisher_diagonal, merge


def tokenizer(vocab: int = 40):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<mask>"]
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", mask_token="<mask>"
    )


TEXT = ["the cat sat on the mat and the rat ran\n", "a hat on a cat is a fat hat\n"] * 6


def nudged(model, seed: int):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def save(model, words, folder):
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def causal(here):
    """Two tiny GPT-2 with one tokenizer, and text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    words = tokenizer()
    sizes = {"vocab_size": len(words), "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    for k, name in enumerate("ab"):
        torch.manual_seed(0)
        save(
            nudged(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)), k),
            words,
            here / name,
        )
    (here / "text.txt").write_text("".join(TEXT))
    return here


def test_two_folders_average_into_one_that_transformers_loads(causal, run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run("merge", "a", "b", "--weights", "1,3", "--out", "merged")
    assert result.exit_code == 0, result.stderr
    assert "merged 2 models" in result.stdout
    a, b, m = (open_state_dict(causal / n) for n in ("a", "b", "merged"))
    torch.testing.assert_close(
        m.read("transformer.wte.weight"),
        torch.lerp(a.read("transformer.wte.weight"), b.read("transformer.wte.weight"), 0.75),
    )
    loaded = AutoModelForCausalLM.from_pretrained(causal / "merged")
    ids = AutoTokenizer.from_pretrained(causal / "merged")("the cat", return_tensors="pt")["input_ids"]
    assert bool(torch.isfinite(loaded(ids).logits).all())


def test_fisher_of_language_models_then_their_merge(causal, run) -> None:
    for name in "ab":
        result = run(
            "fisher",
            name,
            "--data",
            "text.txt",
            "--length",
            "8",
            "--examples",
            "12",
            "--out",
            f"{name}-fisher",
        )
        assert result.exit_code == 0, result.stderr
        assert "sample labels" in result.stdout
        assert sorted(f.name for f in (causal / f"{name}-fisher").iterdir()) == [
            "fisher.safetensors",
            "run.json",
        ]
    result = run(
        "merge", "a", "b", "--method", "fisher", "--fisher", "a-fisher,b-fisher", "--out", "m.safetensors"
    )
    assert result.exit_code == 0, result.stderr
    fishers = [load_file(causal / f"{n}-fisher/fisher.safetensors") for n in "ab"]
    wanted = merge([causal / "a", causal / "b"], fishers)
    found = load_file(causal / "m.safetensors")
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    raw = run(
        "merge",
        "a",
        "b",
        "--method",
        "fisher",
        "--fisher",
        "a-fisher,b-fisher",
        "--raw",
        "--out",
        "raw.safetensors",
    )
    assert raw.exit_code == 0
    assert not torch.equal(
        load_file(causal / "raw.safetensors")["transformer.wte.weight"], found["transformer.wte.weight"]
    )


def test_fisher_of_classifiers_of_text_and_masked_models(here, run) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    words = tokenizer()
    sizes = {"vocab_size": len(words), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 8, "max_position_embeddings": 16}  # fmt: skip
    torch.manual_seed(0)
    classifier = save(
        nudged(BertForSequenceClassification(BertConfig(**sizes, num_labels=3)), 0), words, here / "cls"
    )
    save(nudged(BertForMaskedLM(BertConfig(**sizes)), 0), words, here / "mlm")
    (here / "some.jsonl").write_text("".join(json.dumps({"text": t, "label": 0}) + "\n" for t in TEXT[:5]))
    result = run("fisher", "cls", "--data", "some.jsonl", "--out", "cls-fisher", "--params", "encoder")
    assert result.exit_code == 0, result.stderr
    assert "exact labels" in result.stdout
    found = load_file(here / "cls-fisher/fisher.safetensors")
    assert all("encoder" in k for k in found)
    model = BertForSequenceClassification.from_pretrained(classifier).eval()
    one = words(TEXT[:5], padding=True, truncation=True, max_length=16, return_tensors="pt")
    wanted = fisher_diagonal(model, {k: one[k] for k in ("input_ids", "attention_mask")}, params="encoder")
    for k, value in wanted.items():
        torch.testing.assert_close(found[k], value)
    assert run("fisher", "mlm", "--data", "some.jsonl", "--length", "8", "--out", "mlm-fisher").exit_code == 0
    merged = run("merge", "cls", "mlm", "--keep", "^(classifier|bert.pooler|cls)", "--out", "both")
    assert merged.exit_code == 0, merged.stderr
    kept = open_state_dict(here / "both").read("classifier.weight")
    assert torch.equal(kept, open_state_dict(here / "cls").read("classifier.weight"))


def test_fisher_of_ones_own_network(here, run, npz, resnet) -> None:
    import importlib

    assert run("fisher", f"{resnet}:ResNet", "--data", "data.npz", "--out", "none").exit_code == 2
    import sys

    sys.path.insert(0, str(here))
    try:
        net = importlib.import_module(resnet).ResNet(1, 2)
    finally:
        sys.path.remove(str(here))
    save_file(net.state_dict(), here / "net.safetensors")
    words = ("fisher", f"{resnet}:ResNet", "--weights", "net.safetensors", "--data", "data.npz")
    result = run(*words, "--out", "own")
    assert result.exit_code == 0, result.stderr
    assert set(load_file(here / "own/fisher.safetensors")) == {k for k, _ in net.named_parameters()}
    merged = run(
        "merge",
        "net.safetensors",
        "net.safetensors",
        "--method",
        "fisher",
        "--fisher",
        "own,own",
        "--out",
        "m.safetensors",
    )
    assert merged.exit_code == 0, merged.stderr
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in load_file(here / "m.safetensors").items())


def test_a_stopped_fisher_goes_on(causal, run, refused, monkeypatch) -> None:
    words = ("fisher", "a", "--data", "text.txt", "--length", "8", "--batch", "2", "--out", "f")
    assert run(*words).exit_code == 0
    assert "pass resume" in refused(*words)
    assert "resume needs equal settings" in refused(*words, "--seed", "2", "--resume")
    whole = load_file(causal / "f/fisher.safetensors")
    from gradmatch.core.store import RunFolder

    saves = RunFolder.save

    def save_and_stop(self, step, tensors, info=None):
        saves(self, step, tensors, info)
        raise KeyboardInterrupt

    monkeypatch.setattr("time.monotonic", iter(range(0, 10**7, 60)).__next__)
    monkeypatch.setattr(RunFolder, "save", save_and_stop)
    stopped = run(*words[:-1], "g")
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    monkeypatch.setattr(RunFolder, "save", saves)
    assert run(*words[:-1], "g", "--resume").exit_code == 0
    again = load_file(causal / "g/fisher.safetensors")
    assert all(torch.equal(again[k], whole[k]) for k in whole)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("merge", "a", "--out", "m"), "needs at least two"),
        (("merge", "a", "b", "--method", "mean", "--out", "m"), "--method is 'mean'"),
        (("merge", "a", "b", "--method", "fisher", "--out", "m"), "they belong together"),
        (("merge", "a", "b", "--fisher", "x,y", "--out", "m"), "they belong together"),
        (("merge", "a", "b", "--weights", "1,x", "--out", "m"), "--weights is 'x'"),
        (("merge", "a", "b", "--weights", "1", "--out", "m"), "weights has 1 entries"),
        (("merge", "a", "nowhere", "--out", "m"), "does not exist"),
        (("merge", "a", "b", "--out", "a"), "is there already"),
        (("merge", "a", "b", "--keep", ".", "--out", "m"), "mergeable leaves no parameter"),
        (("fisher", "a", "--data", "none.txt", "--out", "m"), "does not exist"),
        (("fisher", "a", "--data", "a", "--out", "m"), "holds no .txt"),
        (("fisher", "a", "--data", "short.txt", "--out", "m"), "at least one window"),
        (("fisher", "a", "--data", "text.txt", "--labels", "true", "--out", "m"), "--labels is 'true'"),
        (("fisher", "nowhere", "--data", "text.txt", "--out", "m"), "Hugging Face folder or module:factory"),
        (("fisher", "odd", "--data", "text.txt", "--out", "m"), "names the architecture 'os'"),
        (("fisher", "a", "--data", "bad.jsonl", "--out", "m"), 'bad.jsonl, line 2, has no "text"'),
    ],
)
def test_what_cannot_be_done_is_refused(causal, refused, words, sentence) -> None:
    (causal / "short.txt").write_text("cat")
    (causal / "bad.jsonl").write_text('{"text": "a"}\n{"words": 3}\n')
    (causal / "odd").mkdir()
    (causal / "odd/config.json").write_text('{"architectures": ["os"]}')
    assert sentence in refused(*words)
    assert not (causal / "m").exists()


def test_permuted_copies_average_back_to_the_model(causal, run) -> None:
    from transformers import GPT2LMHeadModel

    from gradmatch.core.assign import Permutation, PermutationSpec

    model = GPT2LMHeadModel.from_pretrained(causal / "a").eval()
    ids = {"input_ids": torch.arange(6)[None]}
    spec = PermutationSpec.from_module(model, ids)
    shuffle = Permutation.random(spec, seed=1)
    other = GPT2LMHeadModel(model.config)
    other.load_state_dict(shuffle.apply(model.state_dict()))
    other.save_pretrained(causal / "shuffled")
    result = run("merge", "a", "shuffled", "--method", "permute", "--out", "merged")
    assert result.exit_code == 0, result.stderr
    merged, first = open_state_dict(causal / "merged"), open_state_dict(causal / "a")
    assert list(merged.specs) == list(first.specs)
    for name in first.specs:
        torch.testing.assert_close(merged.read(name), first.read(name), rtol=0, atol=1e-7)
    plain = run("merge", "a", "shuffled", "--out", "plain")
    assert plain.exit_code == 0
    name = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.allclose(open_state_dict(causal / "plain").read(name), first.read(name), atol=1e-2)


def test_what_cannot_be_permuted_is_refused(causal, refused) -> None:
    save_file({"w": torch.ones(2, 2)}, causal / "w.safetensors")
    words = ("merge", "w.safetensors", "w.safetensors", "--method", "permute", "--out", "m.safetensors")
    assert "runs the network to see its units" in refused(*words)
    config = json.loads((causal / "a/config.json").read_text())
    (causal / "a/config.json").write_text(json.dumps(config | {"architectures": ["os"]}))
    assert "which transformers does not have" in refused(
        "merge", "a", "b", "--method", "permute", "--out", "m"
    )
