"""``gradmatch compress`` on a tiny language model and a network of one's own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from gradmatch.weights import CompressedModel

TEXT = ["the cat sat on the mat and the rat ran\n", "a hat on a cat is a fat hat\n"] * 6


@pytest.fixture
def causal(here):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=40, special_tokens=["<eos>"], show_progress=False)
    )
    words = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(here / "gpt")
    words.save_pretrained(here / "gpt")
    (here / "text.txt").write_text("".join(TEXT))
    return model.eval()


def test_a_language_model_reloads_and_its_dense_copy_loads_with_transformers(causal, here, run) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    words = (
        "compress",
        "gpt",
        "--bits",
        "4",
        "--data",
        "text.txt",
        "--groups",
        "2",
        "--steps",
        "5",
        "--length",
        "8",
    )
    result = run(*words, "--out", "small", "--dense")
    assert result.exit_code == 0, (result.stderr, result.exception)
    size, report = (
        (here / "small/compressed.safetensors").stat().st_size,
        json.loads((here / "small/report.json").read_text()),
    )
    assert f"{size:,} bytes on disk (predicted {report['bytes']:,})" in result.stdout
    assert size == report["bytes"]
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(here / "small")).eval()
    again = CompressedModel.load(here / "small/compressed.safetensors", fresh)
    dense = AutoModelForCausalLM.from_pretrained(here / "small/dense").eval()
    ids = torch.arange(8)[None]
    assert torch.allclose(again(ids).logits, dense(ids).logits, atol=1e-5)
    assert (again(ids).logits - causal(ids).logits).abs().max() < 0.5 * causal(ids).logits.abs().max()


def test_a_network_of_ones_own(photos, here, run) -> None:
    (here / "mynet.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    body = nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()\n"
        "    return nn.Sequential(nn.Flatten(), *body, nn.Linear(16, 2))\n"
    )
    import importlib.util

    spec = importlib.util.spec_from_file_location("mynet", here / "mynet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.make()
    save_file(net.state_dict(), here / "net.safetensors")
    words = (
        "compress",
        "mynet:make",
        "--weights",
        "net.safetensors",
        "--data",
        "photos",
        "--bits",
        "2",
        "--steps",
        "3",
    )
    result = run(*words, "--groups", "2", "--out", "small", "--all-layers", "--dense")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "the order of outputs is fixed" in result.stderr
    small = CompressedModel.load(here / "small/compressed.safetensors", module.make())
    assert set(small.coded) == {"1", "3", "5"}
    assert sorted(f.name for f in (here / "small").iterdir()) == [
        "compressed.safetensors",
        "dense.safetensors",
        "report.json",
    ]


def test_refuses(photos, here, refused) -> None:
    words = ("compress", "mynet:make", "--data", "photos", "--out", "small")
    assert "--bits is 9" in refused(*words, "--bits", "9")
    assert "has no weights" in refused(*words)
    (here / "small").mkdir()
    (here / "small/file").write_text("")
    assert "is there already" in refused(*words)
