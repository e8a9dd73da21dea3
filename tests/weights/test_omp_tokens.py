"""Every check, refusal and named fault of tokenizer transplants."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.core.state_dicts import open_state_dict
from gradmatch.weights import transplant, transplant_folder
from gradmatch.weights._rebuild import METHODS, Anchors, Task, choose_k
from gradmatch.weights._vocabulary import Vocabulary, key_of, shared, style, undertrained

BASE_TEXT = ["the cat sat on the mat", "a cat in the hat ran and ran", "that rat sat"] * 4
DONOR_TEXT = ["the cats were sitting on mats", "another hat is on that cat", "sitting rats, running rats"] * 4


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bpe(text: Sequence[str], size: int, way: str = "bytes", eos: str = "<eos>", pad: str = "<pad>") -> Any:
    """A trained tokenizer that writes word starts as "Ġ" (bytes) or "▁" (metaspace, with byte tokens)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [eos, pad]
    if way == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        made = Tokenizer(models.BPE(byte_fallback=True))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        special += [f"<0x{b:02X}>" for b in range(65, 70)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    made.train_from_iterator(text, trainer)
    plain = json.loads(made.to_str())  # byte tokens are ordinary ones in published vocabularies
    plain["added_tokens"] = [t for t in plain["added_tokens"] if not t["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(plain))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, bos_token=eos, pad_token=pad)


def gpt2(words: Any, width: int, tied: bool = True, rows: int | None = None, seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=rows or len(words), n_positions=32, n_embd=width, n_layer=1, n_head=2, tie_word_embeddings=tied,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def words() -> tuple[Any, Any]:
    return bpe(BASE_TEXT, 60), bpe(DONOR_TEXT, 80, eos="<end>")


@pytest.fixture(scope="module")
def models(words) -> tuple[Any, Any]:
    return gpt2(words[0], 16), gpt2(words[1], 24, seed=1)


@pytest.fixture(autouse=True)
def no_warnings_about_narrow_donors():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="k is")
        yield


def changed(words, models, **options) -> tuple[Any, Any, Any]:
    return transplant(models[0], words[0], models[1], words[1], **{"k": 4, **options})


# --- vocabularies ------------------------------------------------------------------------------------------


def test_word_starts_match_however_they_are_written() -> None:
    assert (
        key_of("Ġthe", "bytes") == key_of("▁the", "metaspace") == key_of("the", "wordpiece") == (True, b"the")
    )
    assert (
        key_of("ing", "bytes")
        == key_of("ing", "metaspace")
        == key_of("##ing", "wordpiece")
        == (False, b"ing")
    )
    assert key_of("Ã©", "bytes") == key_of("é", "metaspace") == (False, "é".encode())
    assert key_of("Ċ", "bytes") == key_of("\n", "metaspace") == (False, b"\n")
    assert key_of("<0x41>", "metaspace") == ("byte", 65)
    assert key_of("<0x41>", "bytes") == (False, b"<0x41>")


def test_the_style_is_read_off_the_tokenizer_not_its_class(words) -> None:
    """Upstream takes every class it does not know for "Ġ"."""
    meta = bpe(BASE_TEXT, 60, way="metaspace")
    assert type(meta) is type(words[0])
    assert (style(words[0]), style(meta)) == ("bytes", "metaspace")

    class Slow:
        def __init__(self, tokens: Sequence[str]) -> None:
            self.tokens = tokens

        def get_vocab(self) -> dict[str, int]:
            return {t: i for i, t in enumerate(self.tokens)}

    assert style(Slow(["▁a", "b"])) == "metaspace"
    assert style(Slow(["Ġa", "b"])) == "bytes"
    assert style(Slow(["##a", "b"])) == "wordpiece"
    assert style(Slow(["a", "b"])) == "plain"


def test_matching_across_styles_finds_what_raw_strings_miss(words) -> None:
    meta = bpe(BASE_TEXT, 60, way="metaspace")
    old, new = Vocabulary.of(words[0]), Vocabulary.of(meta)
    exact, _ = shared(old, new)
    raw = set(words[0].get_vocab()) & set(meta.get_vocab())
    assert len(exact) > len(raw) + 5
    by_text = {new.tokens[d]: old.tokens[b] for d, b in exact.items()}
    assert by_text["▁the"] == "Ġthe"
    assert by_text["<eos>"] == "<eos>"


def test_special_tokens_match_by_role(words) -> None:
    exact, _ = shared(Vocabulary.of(words[0]), Vocabulary.of(words[1]))
    assert exact[words[1].eos_token_id] == words[0].eos_token_id
    assert exact[words[1].pad_token_id] == words[0].pad_token_id


def test_byte_and_prefix_matches_are_off_until_asked_for(words) -> None:
    meta = bpe(BASE_TEXT, 60, way="metaspace")
    old, new = Vocabulary.of(words[0]), Vocabulary.of(meta)
    byte = meta.convert_tokens_to_ids("<0x41>")
    base = bpe([*BASE_TEXT, "A"], 60)
    assert byte not in {**shared(Vocabulary.of(base), new)[0], **shared(Vocabulary.of(base), new)[1]}
    found = shared(Vocabulary.of(base), new, byte_match=True)[1]
    assert base.convert_ids_to_tokens(found[byte]) == "A"
    back = shared(new, Vocabulary.of(bpe(["ABBA AB"], 20)), byte_match=True)[1]
    assert {new.tokens[b] for b in back.values()} == {"<0x41>", "<0x42>"}
    donor = Vocabulary.of(words[1])
    exact, loose = shared(old, donor, prefix_match=True)
    longer = words[1].convert_tokens_to_ids("Ġcats")
    if longer in donor.tokens and longer in loose:
        assert old.tokens[loose[longer]] == "Ġcat"
    assert loose
    assert not set(loose) & set(exact)
    for d, b in loose.items():
        assert donor.keys[d][1].startswith(old.keys[b][1])
        assert donor.keys[d][0] == old.keys[b][0]


def test_undertrained_tokens_are_found() -> None:
    embedding = randn(200, 8) + 1
    embedding[7] *= 1e-3
    vocabulary = Vocabulary({i: f"t{i}" for i in range(190)}, {}, {}, frozenset({3}))
    embedding[3] = embedding[190:].mean(0)
    bad = undertrained(vocabulary, embedding, None)
    assert bool(bad[7])
    assert bool(bad[3])
    assert bool(bad[190:].all())
    assert int(bad.sum()) < 20


# --- transplants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_copied_or_rebuilt_by_omp(words, tied) -> None:
    from sklearn.linear_model import orthogonal_mp_gram

    base, donor = gpt2(words[0], 16, tied), gpt2(words[1], 24, tied, seed=1)
    model, tokenizer, report = transplant(base, words[0], donor, words[1], k=4, normalize_atoms=True)
    assert tokenizer is words[1]
    ids = shared(Vocabulary.of(words[0]), Vocabulary.of(words[1]))[0]
    anchors = sorted(ids)
    pairs = [
        (m.get_input_embeddings().weight, m.get_output_embeddings().weight) for m in (model, base, donor)
    ]
    for new, old, theirs in zip(*pairs, strict=True):
        for d, b in ids.items():
            assert torch.equal(new[d], old[b])
        target = next(d for d in Vocabulary.of(words[1]).tokens if d not in ids)
        atoms = theirs[anchors].detach().double()
        unit = atoms / atoms.norm(dim=1, keepdim=True)
        x = theirs[target].detach().double()
        picked = orthogonal_mp_gram((unit @ unit.T).numpy(), (unit @ x).numpy(), n_nonzero_coefs=4)
        coefficients = torch.as_tensor(picked) / atoms.norm(dim=1)
        wanted = coefficients @ old[[ids[a] for a in anchors]].detach().double()
        torch.testing.assert_close(new[target].double(), wanted, rtol=1e-3, atol=1e-6)
    assert report.tied == tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert len(report.copied) == len(ids) == report.shared
    assert len(report.copied) + len(report.approximated) == len(words[1])
    assert report.zeroed == ()
    assert report.donor_error is not None
    assert 0 < report.donor_error < 1
    assert report.norm_ratio is not None
    assert report.norm_ratio > 0


def test_logits_are_finite_and_special_ids_are_the_donors(words, models) -> None:
    before = copy.deepcopy(models[0].state_dict())
    model, tokenizer, _ = changed(words, models)
    ids = tokenizer("the cats were sitting", return_tensors="pt")["input_ids"]
    assert bool(torch.isfinite(model(ids).logits).all())
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    for holder in (model.config, model.generation_config):
        assert holder.eos_token_id == words[1].eos_token_id
        assert holder.pad_token_id == words[1].pad_token_id
    assert all(torch.equal(v, before[k]) for k, v in models[0].state_dict().items())
    assert models[0].config.eos_token_id == words[0].eos_token_id


def test_the_same_tokenizer_on_both_sides_changes_nothing(words, models) -> None:
    model, _, report = transplant(models[0], words[0], models[1], copy.deepcopy(words[0]), k=4)
    assert all(torch.equal(v, models[0].state_dict()[k]) for k, v in model.state_dict().items())
    assert report.approximated == report.zeroed == ()
    assert report.donor_error is None


def test_the_head_is_built_from_heads(words) -> None:
    """Upstream's wiring mixes up options of the two matrices."""
    base, donor = gpt2(words[0], 16, False), gpt2(words[1], 24, False, seed=1)
    model = transplant(base, words[0], donor, words[1], k=4)[0]
    pair = (donor.get_input_embeddings().weight, donor.get_output_embeddings().weight)
    as_pair = transplant(base, words[0], pair, words[1], k=4)[0]
    one = transplant(base, words[0], pair[0], words[1], k=4)[0]
    assert torch.equal(model.lm_head.weight, as_pair.lm_head.weight)
    assert torch.equal(model.transformer.wte.weight, one.transformer.wte.weight)
    assert not torch.equal(model.lm_head.weight, one.lm_head.weight)


def test_padded_rows_are_zero_and_ids_beyond_the_matrix_are_dropped(words, models) -> None:
    """Gemma-like: more ids than rows crash the gather upstream; Qwen-like: more rows than ids."""
    padded = gpt2(words[1], 24, rows=len(words[1]) + 9, seed=1)
    model, _, report = transplant(models[0], words[0], padded, words[1], k=4)
    assert len(model.get_input_embeddings().weight) == len(words[1])
    short = padded.get_input_embeddings().weight[: len(words[1]) - 5]
    with pytest.warns(UserWarning, match="5 tokens beyond"):
        model, _, report = transplant(models[0], words[0], short, words[1], k=4)
    for token in report.zeroed:
        row = model.get_input_embeddings().weight[words[1].convert_tokens_to_ids(token)]
        assert float(row.detach().abs().max()) == 0
    assert report.zeroed
    gapped = copy.deepcopy(words[1])
    text = json.loads(gapped.backend_tokenizer.to_str())
    last = max(text["model"]["vocab"], key=text["model"]["vocab"].get)
    text["model"]["vocab"][last] += 3
    gapped.backend_tokenizer.from_str(json.dumps(text))
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    gapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)), eos_token="<end>")
    model = transplant(models[0], words[0], padded, gapped, k=4)[0]
    rows = model.get_input_embeddings().weight
    assert len(rows) == len(words[1]) + 3
    assert float(rows.detach()[len(words[1]) - 1 : len(words[1]) + 2].abs().max()) == 0


def test_half_precision_is_computed_in_single_and_cast_back(words, models) -> None:
    half = copy.deepcopy(models[0]).bfloat16()
    model = transplant(half, words[0], models[1], words[1], k=4)[0]
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    single = copy.deepcopy(half).float()
    wanted = (
        transplant(single, words[0], models[1], words[1], k=4)[0].get_input_embeddings().weight.bfloat16()
    )
    assert torch.equal(model.get_input_embeddings().weight, wanted)


def test_every_way_gives_rows_and_subword_pieces_are_those_of_the_base(words, models) -> None:
    base = models[0].get_input_embeddings().weight.detach()
    made = {}
    for method in METHODS:
        model, _, report = changed(words, models, method=method, seed=3)
        made[method] = model.get_input_embeddings().weight.detach()
        assert bool(torch.isfinite(made[method]).all()), method
        assert report.method == method
    ids = shared(Vocabulary.of(words[0]), Vocabulary.of(words[1]))[0]
    rest = [d for d in Vocabulary.of(words[1]).tokens if d not in ids]
    assert float(made["zero"][rest].abs().max()) == 0
    torch.testing.assert_close(made["mean"][rest], base.mean(0).expand(len(rest), -1))
    assert float(made["normal"][rest].std()) == pytest.approx(1, abs=0.1)
    assert float(made["hewitt"][rest].std()) == pytest.approx(float(base.std()), rel=0.2)
    token = next(
        d for d in rest if len(words[0](words[1].decode([d]), add_special_tokens=False)["input_ids"]) > 2
    )
    pieces = base[words[0](words[1].decode([token]), add_special_tokens=False)["input_ids"]]
    torch.testing.assert_close(made["subword"][token], pieces.mean(0))
    torch.testing.assert_close(made["subword-sum"][token], pieces.sum(0))
    torch.testing.assert_close(made["subword-end"][token], pieces[-1])
    ramp = torch.arange(1.0, len(pieces) + 1)
    torch.testing.assert_close(
        made["subword-weighted"][token], (ramp / ramp.sum()) @ pieces
    )  # upstream: reversed
    assert torch.equal(
        changed(words, models, method="normal", seed=3)[0].get_input_embeddings().weight, made["normal"]
    )
    untied = [gpt2(words[0], 16, False), gpt2(words[1], 24, False, seed=1)]
    head = transplant(untied[0], words[0], untied[1], words[1], k=4, method="subword-weighted")[
        0
    ].lm_head.weight
    pieces = untied[0].lm_head.weight[
        words[0](words[1].decode([token]), add_special_tokens=False)["input_ids"]
    ]
    torch.testing.assert_close(head[token], (ramp.flip(0) / ramp.sum()) @ pieces)


def test_undertrained_tokens_are_no_anchors_and_zero_if_both_have_them_so(words) -> None:
    base, donor = (
        gpt2(words[0], 16, rows=len(words[0]) + 4),
        gpt2(words[1], 24, rows=len(words[1]) + 4, seed=1),
    )
    d = words[1].convert_tokens_to_ids("Ġon")
    b = words[0].convert_tokens_to_ids("Ġon")
    with torch.no_grad():
        base.transformer.wte.weight[b] *= 1e-4
        donor.transformer.wte.weight[d] *= 1e-4
    model, _, report = transplant(base, words[0], donor, words[1], k=4, drop_undertrained=True)
    assert "Ġon" in report.zeroed
    assert float(model.transformer.wte.weight[d].detach().abs().max()) == 0
    assert report.shared < len(shared(Vocabulary.of(words[0]), Vocabulary.of(words[1]))[0])


def test_a_heads_bias_is_copied_with_its_token(words, tmp_path) -> None:
    from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    nets = [BertForMaskedLM(BertConfig(vocab_size=len(w), **sizes)).eval() for w in words]
    with torch.no_grad():
        nets[0].cls.predictions.bias.copy_(torch.arange(float(len(words[0]))))
    model = transplant(nets[0], words[0], nets[1], words[1], k=4)[0]
    ids = shared(Vocabulary.of(words[0]), Vocabulary.of(words[1]))[0]
    bias = model.get_output_embeddings().bias
    assert [float(bias[d]) for d in ids] == [float(b) for b in ids.values()]
    rest = next(d for d in range(len(words[1])) if d not in ids)
    assert float(bias[rest]) == pytest.approx((len(words[0]) - 1) / 2)
    for net, own, name in zip(nets, words, ("base", "donor"), strict=True):
        net.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
    transplant_folder(tmp_path / "base", tmp_path / "donor", tmp_path / "out", k=4)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    text = words[1]("the cats", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(text).logits, model(text).logits)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"k": 24 + 1}, "the donor's width is 24"),
        ({"k": 0}, "k is 0"),
        ({"k": 1000}, "share"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"ridge": -1.0}, "ridge is -1.0"),
    ],
)
def test_options_out_of_range_are_refused(words, models, options, word) -> None:
    with pytest.raises(InputError, match=word):
        changed(words, models, **options)


def test_what_cannot_be_transplanted_is_refused(words, models) -> None:
    with pytest.raises(InputError, match="donor_tokenizer is base_tokenizer"):
        transplant(models[0], words[0], models[1], words[0])
    alien = bpe(["ξψωφχψ"] * 3, 30, eos="<fin>", pad="<void>")
    alien.bos_token = alien.eos_token = alien.pad_token = None  # else they match by role
    with pytest.raises(InputError, match="share no token"):
        transplant(models[0], words[0], randn(len(alien), 8), alien, k=2)
    donor = models[1].get_input_embeddings().weight.detach().clone()
    donor[3, 1] = float("nan")
    with pytest.raises(InputError, match="donor embedding has 1 NaN"):
        transplant(models[0], words[0], donor, words[1], k=4)
    with pytest.raises(InputError, match="not quantised"):
        transplant(models[0], words[0], torch.ones(len(words[1]), 8, dtype=torch.int8), words[1], k=4)
    with pytest.raises(InputError, match="must be a transformers model"):
        transplant(torch.nn.Linear(2, 2), words[0], models[1], words[1])
    with pytest.raises(InputError, match="must be a model, an embedding"):
        transplant(models[0], words[0], "donor", words[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="a quarter of the donor's width"):
            changed(words, models, k=8)


# --- the ways of rebuilding --------------------------------------------------------------------------------


def task(anchors: Anchors, targets: Tensor, k: int = 4, **options) -> Task:
    given = {"pieces": (), "head": False, "normalize": False, "ridge": 0.0, "generator": torch.Generator()}
    return Task(anchors, targets, anchors.base, k=k, **{**given, **options})


def test_a_linear_relation_of_the_spaces_carries_over() -> None:
    donor, map_, x = (
        randn(60, 12, dtype=torch.double),
        randn(12, 9, seed=1, dtype=torch.double),
        randn(7, 12, seed=2, dtype=torch.double),
    )
    anchors = Anchors(donor, donor @ map_)
    same = Anchors(donor, donor)
    for k in (1, 3, 8):
        in_donor = METHODS["omp"](task(same, x, k))
        torch.testing.assert_close(METHODS["omp"](task(anchors, x, k)), in_donor @ map_, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(METHODS["omp"](task(anchors, x, 12)), x @ map_, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(METHODS["knn-lstsq"](task(anchors, x, 14)), x @ map_, rtol=1e-6, atol=1e-8)


def test_an_affine_map_and_a_turned_space_are_recovered_by_the_baselines() -> None:
    donor, x = randn(400, 6, dtype=torch.double), randn(7, 6, seed=2, dtype=torch.double)
    turn, shift = (
        torch.linalg.qr(randn(6, 6, seed=3, dtype=torch.double))[0],
        randn(6, seed=4, dtype=torch.double),
    )
    anchors = Anchors(donor, 2 * donor @ turn + shift)
    torch.testing.assert_close(METHODS["procrustes"](task(anchors, x)), 2 * x @ turn + shift)
    torch.testing.assert_close(METHODS["linear"](task(anchors, x)), 2 * x @ turn + shift, rtol=0.05, atol=0.1)


def test_neighbours_are_weighted_as_they_say() -> None:
    donor = torch.tensor([[0.0, 0], [1, 0], [0, 1], [9, 9]])
    anchors = Anchors(donor, torch.eye(4))
    x = torch.tensor([[0.25, 0.25]])
    near = METHODS["knn"](task(anchors, x, 3))
    apart = (x - donor[:3]).norm(dim=1)
    torch.testing.assert_close(near[0, :3], (1 / apart) / (1 / apart).sum())
    torch.testing.assert_close(
        METHODS["knn-barycentric"](task(anchors, x, 3))[0, :3],
        torch.tensor([0.5, 0.25, 0.25]),
        rtol=0,
        atol=2e-3,
    )
    cosine = METHODS["knn-cosine"](task(Anchors(donor[1:], torch.eye(3)), torch.tensor([[3.0, 0.0]]), 2))
    assert int(cosine.argmax()) == 0


def test_a_ridge_shrinks_and_the_right_k_is_found() -> None:
    donor = randn(300, 20)
    anchors = Anchors(donor, donor @ randn(20, 10, seed=1) + 0.5 * randn(300, 10, seed=5))
    targets = randn(9, 20, seed=2)
    plain, shrunk = (METHODS["omp"](task(anchors, targets, 15, ridge=r)).norm() for r in (0.0, 0.5))
    assert float(shrunk) < 0.9 * float(plain)
    best, scores = choose_k(anchors, seed=1)
    assert best == max(scores, key=scores.get)
    assert set(scores) == {1, 2, 4, 8, 16}
    assert all(math.isfinite(v) for v in scores.values())


def test_auto_reports_what_it_tried(words, models) -> None:
    report = changed(words, models, k="auto")[2]
    assert report.k in report.tried
    assert report.tried[report.k] == max(report.tried.values())


# --- folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_folders_give_what_memory_gives_and_load_unchanged(words, tied, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    nets = gpt2(words[0], 16, tied), gpt2(words[1], 24, tied, seed=1)
    folders = []
    for name, net, own in zip(("base", "donor"), nets, words, strict=True):
        folders.append(tmp_path / name)
        net.save_pretrained(folders[-1], max_shard_size="4KB")
        own.save_pretrained(folders[-1])
    if tied:  # older files hold the head as well
        whole = open_state_dict(folders[0]).tensors()
        for file in folders[0].glob("*.safetensors*"):
            file.unlink()
        save_file(
            whole | {"lm_head.weight": whole["transformer.wte.weight"].clone()},
            folders[0] / "model.safetensors",
        )
    report = transplant_folder(*folders, tmp_path / "out", k=4)
    wanted, _, in_memory = transplant(nets[0], words[0], nets[1], words[1], k=4)
    assert report == in_memory
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == words[1].get_vocab()
    ids = tokenizer("the cats were sitting", return_tensors="pt")["input_ids"]
    assert torch.equal(loaded(ids).logits, wanted(ids).logits)
    assert loaded.config.eos_token_id == words[1].eos_token_id == loaded.generation_config.eos_token_id
    assert loaded.config.vocab_size == len(words[1])
    kept = json.loads((Path(tmp_path) / "out/transplant.json").read_text())
    assert kept["copied"] == list(report.copied)
    assert ("lm_head.weight" in open_state_dict(tmp_path / "out")) == (not tied)
    with pytest.raises(InputError, match="not an empty folder"):
        transplant_folder(*folders, tmp_path / "out", k=4)
