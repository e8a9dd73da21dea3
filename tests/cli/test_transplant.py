"""``gradmatch transplant`` on two tiny models with tokenizers of different kinds."""

from __future__ import annotations

import json

import pytest
import torch

TEXTS = (["the cat sat on the mat and ran"] * 4, ["the cats were sitting on another mat"] * 4)


def tokenizer(text, vocab: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<eos>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", bos_token="<eos>")


@pytest.fixture
def folders(here):
    from transformers import GPT2Config, GPT2LMHeadModel

    for name, text, vocab, width in zip(("base", "donor"), TEXTS, (30, 50), (8, 12), strict=True):
        words = tokenizer(text, vocab)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(words),
            n_positions=16,
            n_embd=width,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        GPT2LMHeadModel(config).save_pretrained(here / name)
        words.save_pretrained(here / name)
    return here


def test_the_result_loads_and_the_report_counts_every_token(folders, run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run("transplant", "base", "donor", "--k", "4", "--out", "new")
    assert result.exit_code == 0, result.stderr
    assert "a quarter of the donor's width" in result.stderr
    report = json.loads((folders / "new/transplant.json").read_text())
    words = AutoTokenizer.from_pretrained(folders / "new")
    assert len(report["copied"]) + len(report["approximated"]) + len(report["zeroed"]) == len(words)
    assert "copied" in result.stdout
    assert "rebuilt by omp" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(folders / "new")
    assert model.get_input_embeddings().weight.shape == (len(words), 8)
    assert bool(torch.isfinite(model(words("the cats", return_tensors="pt")["input_ids"]).logits).all())
    auto = run("transplant", "base", "donor", "--k", "auto", "--by-angle", "--out", "auto")
    assert auto.exit_code == 0, auto.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("base", "nowhere", "--out", "new"), "DONOR is 'nowhere'"),
        (("base", "donor", "--out", "base"), "is there already"),
        (("base", "donor", "--k", "13", "--out", "new"), "the donor's width is 12"),
        (("base", "donor", "--k", "some", "--out", "new"), "--k is 'some'"),
        (("base", "donor", "--method", "magic", "--out", "new"), "method is 'magic'"),
        (("bare", "donor", "--out", "new"), "no readable tokenizer"),
    ],
)
def test_what_cannot_be_transplanted_is_refused(folders, refused, words, sentence) -> None:
    (folders / "bare").mkdir()
    (folders / "bare/config.json").write_text("{}")
    assert sentence in refused("transplant", *words)
    assert not (folders / "new").exists()
