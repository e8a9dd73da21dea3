"""The experiment on a handful of paragraphs and steps, and the arithmetic of its rule."""

from __future__ import annotations

import math

import pytest
import torch

from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.weights import omp_tokens as evidence

TOO_GOOD = {"ridge map": 2.15, "landmark Procrustes": 2.15, "base with its own tokens": 2.0}


def rows(**changed: float) -> list[Row]:
    """Bits that meet every condition: OMP 2.1, everything else above it."""
    level = {"OMP, k chosen": 2.1, "OMP, k = 64": 2.2, **TOO_GOOD, **changed}
    names = ["base with its own tokens", *evidence.WAYS]
    return [
        Row(f"{w}, base of {s:,}", tuple(level.get(w, 2.3) + d for d in (0.0, 0.01, -0.01)))
        for s in evidence.SIZES
        for w in names
    ]


def near(omp: float = 0.9) -> list[dict[str, float]]:
    return [
        {f"OMP, noise {z}": omp + d, f"neighbours, noise {z}": 0.8, f"mean, noise {z}": 0.1, **other}
        for d in (0.0, 0.01, -0.01)
        for z, other in (
            (0.1, {"OMP, noise 0.5": omp, "neighbours, noise 0.5": 0.8, "mean, noise 0.5": 0.1}),
        )
    ]


def shown(neighbours: float = 0.3, mean: float = 0.1) -> list[dict[str, dict[str, float]]]:
    one = {"omp": 0.5, "mean": mean, "knn-cosine": neighbours, **{f"omp-{k}": 0.5 for k in evidence.SWEEP}}
    return [{str(s): {k: v + d for k, v in one.items()} for s in evidence.SIZES} for d in (0.0, 0.01, -0.01)]


def digits(otherwise: float = 0.1, alike: float = 0.9) -> list[dict[str, float]]:
    values = {
        f"{m}, {s}": v for m in evidence.DIGIT_WAYS for s, v in (("otherwise", otherwise), ("alike", alike))
    }
    return [{"base": 0.95, **values}] * 3


def judged(r=None, n=None, s=None, d=None):
    return evidence.judged(r or rows(), n or near(), s or shown(), d or digits(), "0" * 64)


def test_the_rule_reads_every_condition(monkeypatch) -> None:
    monkeypatch.setattr(evidence, "picture", lambda *_: b"")
    assert judged().verdict == "holds"
    for broken, name in (
        ({"n": near(0.7)}, "made-up mixtures no"),
        ({"s": shown(mean=0.6)}, "hidden tokens: mean no"),
        ({"s": shown(neighbours=0.6)}, "hidden tokens: neighbours no"),
        ({"r": rows(**{"mean row": 2.1})}, "mean and random no"),
        ({"r": rows(**{"normal rows": 2.1})}, "mean and random no"),
        ({"r": rows(**{"subword weighted": 2.1})}, "subword no"),
        ({"r": rows(**{"neighbours, least squares, k chosen": 2.1})}, "neighbours no"),
        ({"r": rows(**{"ridge map": 2.05})}, "ridge map no"),
        ({"r": rows(**{"landmark Procrustes": 2.1})}, "Procrustes no"),
        ({"r": rows(**{"OMP, k = 64": 2.4})}, "k = 64 below zero no"),
        ({"d": digits(otherwise=0.6)}, "digits no"),
        ({"d": digits(alike=0.8)}, "digits no"),
    ):
        result = judged(**broken)
        assert result.verdict == "holds in part"
        assert result.reason.startswith("10 of 11")
        assert name in result.reason, result.reason
    one_size = [
        Row(r.method, (2.0, 2.01, 1.99)) if r.method == "subword end, base of 1,000" else r for r in rows()
    ]
    assert judged(one_size).reason.startswith("10 of 11")
    zero = judged(rows(**{"zero rows": 2.1}))
    assert zero.reason.startswith("9 of 11")


def test_omp_is_nearer_than_neighbours_on_mixtures() -> None:
    found = evidence.mixtures(0)
    for noise in (0.1, 0.5):
        assert (
            found[f"OMP, noise {noise}"] > found[f"neighbours, noise {noise}"] > found[f"mean, noise {noise}"]
        )


def test_bits_are_those_of_the_model_window_by_window() -> None:
    words = evidence.bpe(["a cat sat on a mat"] * 3, 270)
    ids = evidence.tokens(words, "a cat sat on a mat. " * 60)
    model = evidence.trained(words, ids, 16, 1, 0)
    found = evidence.bits(model, ids)
    width = evidence.CONTEXT - 1
    assert len(found) == len(ids) // width * width
    with torch.no_grad():
        window = torch.cat([torch.zeros(1, dtype=torch.long), ids[width : 2 * width]])
        logp = torch.log_softmax(model(window[None]).logits[0], 1)
    at = [-float(logp[i, window[i + 1]]) / math.log(2) for i in range(width)]
    assert found[width : 2 * width].tolist() == pytest.approx(at, abs=1e-4)


def test_sums_have_two_digit_numbers_that_one_tokenizer_keeps_whole() -> None:
    asked = evidence.sums()
    assert ("12+7=", "19") in asked
    assert len(asked) == 100
    text = ["".join(s) for s in asked] * 3
    whole, split = evidence.bpe(text, 330, digits=False), evidence.bpe(text, 330, digits=True)
    assert len(whole("12", add_special_tokens=False)["input_ids"]) == 1
    assert len(split("12", add_special_tokens=False)["input_ids"]) == 2


def test_the_whole_runs_on_a_tiny_budget(tmp_path, monkeypatch) -> None:
    some = [
        f"paragraph {i} of the text says that {i * i} is the square of it, as all know" for i in range(150)
    ]
    monkeypatch.setattr(evidence, "_text", lambda seed: (some, "\n\n".join(some[:90]), "0" * 64))
    monkeypatch.setattr(evidence, "WIDTHS", (32, 68))
    monkeypatch.setattr(evidence, "DIGIT_WIDTHS", (32, 68))
    monkeypatch.setattr(evidence, "sums", lambda: [("12+7=", "19"), ("10+3=", "13")])
    settings = Settings(seeds=1, out=tmp_path, runs=tmp_path / "runs", workers=1, quiet=True)
    few = ("OMP, k chosen", "OMP, k = 64", "zero rows", "mean row")
    result = evidence.run(settings, fast=True)
    assert result.pictures[0][1].startswith(b"\x89PNG")
    assert {r.method for r in result.rows} >= {f"{w}, base of {s:,}" for w in few for s in evidence.SIZES}
    assert sum(r.method.startswith("wrong sums") for r in result.rows) == 1 + 2 * len(evidence.DIGIT_WAYS)
    assert all(math.isfinite(v) for r in result.rows for v in r.values)
