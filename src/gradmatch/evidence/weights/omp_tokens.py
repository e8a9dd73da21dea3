"""Tokenizer transplants: bits per byte after OMP and after every way it is compared with, hidden tokens, and digits.

Text: help topics and docstrings of Python's standard library, a twentieth held out. Byte-level BPE tokenizers learned
on its two halves, of 2,000 and 1,000 tokens for bases and 3,000 for the donor; GPT-2 of two layers, width 128 and 160,
untied, trained alike. Each base is given the donor's tokenizer in every way and reads the held-out text: bits per
byte, since tokens differ. k is chosen on hidden shared tokens, which no evaluation sees, for OMP and for neighbours
alike, and is also taken as published (64).

Digits: the same with lines "7+8=15" mixed in. The base splits numbers into digits; one donor has a token for each
number, the other splits as the base does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmatch.core.networks import seeded
from gradmatch.core.picture import png, subplots
from gradmatch.datasets import pydoc_text
from gradmatch.evidence._common import Gain, Result, Row, Settings, gain, kept, parallel, verdict_of
from gradmatch.weights import transplant
from gradmatch.weights._rebuild import METHODS, Anchors, Task
from gradmatch.weights._vocabulary import Vocabulary, shared

SLUG = "omp-tokens"
TITLE = "OMP tokens: tokenizer transplants without training"
CLAIM = (
    "A language model given another tokenizer keeps its skill when unseen tokens become sparse mixes of "
    "shared ones found by orthogonal matching pursuit, better than by other ways without training; where "
    "digits are split otherwise, arithmetic is lost."
)
RULE = (
    "A difference counts if it exceeds two standard errors, paired by seed. (1) On made-up mixtures OMP with "
    "k = 16 is nearer (cosine) to the true rows than 64 neighbours and the mean, at both noises. Hidden "
    "shared tokens, input rows, k chosen on others: OMP is nearer than (2) the mean, (3) neighbours by "
    "cosine. Bits per byte of held-out text, with both base vocabularies: OMP with k by hidden tokens is "
    "below (4) zero rows, (5) the mean row and random rows, (6) every subword way, (7) neighbours in all four "
    "forms, k chosen alike, (8) the ridge map, (9) landmark Procrustes; (10) OMP with the published k = 64 is "
    "below zero rows. (11) Sums answered by the base are lost by more than half with OMP when digits are "
    "split otherwise, and by less than a tenth when they are split alike. 'holds' if all eleven are met, "
    "'holds in part' if some are, 'does not hold' if none is."
)

SIZES = (2000, 1000)
DONOR = 3000
CONTEXT, BATCH = 64, 16
WIDTHS, DIGIT_WIDTHS = (128, 160), (96, 112)
"""Of base and donor."""
SWEEP = (1, 4, 8, 16, 64)
WAYS: dict[str, dict[str, Any]] = {
    "zero rows": {"method": "zero"},
    "mean row": {"method": "mean"},
    "normal rows": {"method": "normal"},
    "rows like the base's (Hewitt)": {"method": "hewitt"},
    "subword mean": {"method": "subword"},
    "subword sum": {"method": "subword-sum"},
    "subword weighted": {"method": "subword-weighted"},
    "subword end": {"method": "subword-end"},
    "neighbours, k chosen": {"method": "knn", "k": "auto"},
    "neighbours by cosine, k chosen": {"method": "knn-cosine", "k": "auto"},
    "neighbours, k = 64": {"method": "knn", "k": 64},
    "neighbours by cosine, k = 64": {"method": "knn-cosine", "k": 64},
    "neighbours, barycentric, k chosen": {"method": "knn-barycentric", "k": "auto"},
    "neighbours, least squares, k chosen": {"method": "knn-lstsq", "k": "auto"},
    "ridge map": {"method": "linear"},
    "landmark Procrustes": {"method": "procrustes"},
    **{f"OMP, k = {k}": {"method": "omp", "k": k} for k in SWEEP},
    "OMP by angle, k = 16": {"method": "omp", "k": 16, "normalize_atoms": True},
    "OMP, k chosen": {"method": "omp", "k": "auto"},
}
HIDDEN = ("mean", "knn", "knn-cosine", "linear", "procrustes", "omp")
DIGIT_WAYS = ("zero", "mean", "subword", "knn-cosine", "linear", "procrustes", "omp")
CONDITIONS = (
    "made-up mixtures", "hidden tokens: mean", "hidden tokens: neighbours", "zero", "mean and random", "subword",
    "neighbours", "ridge map", "Procrustes", "k = 64 below zero", "digits",
)  # fmt: skip


# --- text, tokenizers, models ------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _text(seed: int) -> tuple[list[str], str, str]:
    """Training paragraphs, the held-out text, and the digest of all."""
    found = pydoc_text(seed=seed)
    return list(found.train), "\n\n".join(found.held), found.digest


def bpe(lines: Sequence[str], size: int, digits: bool | None = None) -> Any:
    """Byte-level BPE; ``digits`` splits numbers into digits (True) or keeps them whole (False)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = [] if digits is None else [pre_tokenizers.Digits(individual_digits=digits)]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([*split, level]), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>"], show_progress=False, initial_alphabet=level.alphabet()
    )
    made.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, eos_token="<eos>", bos_token="<eos>"
    )


def tokens(tokenizer: Any, text: str) -> Tensor:
    """Ids of a long text."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def trained(tokenizer: Any, ids: Tensor, width: int, steps: int, seed: int) -> nn.Module:
    """A small GPT-2 with a head of its own; AdamW at 3e-3 in one cycle."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=width, n_layer=2, n_head=4, tie_word_embeddings=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with seeded(seed):
        model: nn.Module = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - CONTEXT, (BATCH,), generator=generator)
        batch = ids[starts[:, None] + torch.arange(CONTEXT)]
        logits = model(batch).logits[:, :-1]
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.train(False)
    return model


@torch.no_grad()
def bits(model: nn.Module, ids: Tensor) -> Tensor:
    """Bits of every token, read in windows that each begin with the end-of-text token."""
    whole = len(ids) // (CONTEXT - 1) * (CONTEXT - 1)
    windows = F.pad(ids[:whole].reshape(-1, CONTEXT - 1), (1, 0))
    found = []
    for part in torch.split(windows, 64):
        logits = model(part).logits[:, :-1]
        found.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return torch.cat(found).double() / math.log(2)


# --- what is measured --------------------------------------------------------------------------------------


def mixtures(seed: int) -> dict[str, float]:
    """Cosine to the true base rows where both spaces are linear images of latent clusters, with noise."""
    found = {}
    for noise in (0.1, 0.5):
        g = torch.Generator().manual_seed(seed)

        def randn(*shape: int, g: torch.Generator = g) -> Tensor:
            return torch.randn(*shape, generator=g)

        centres = 2 * randn(40, 32)
        latent = centres[torch.randint(0, 40, (1700,), generator=g)] + randn(1700, 32)
        donor, base = (latent @ randn(32, d) / 32**0.5 + noise * randn(1700, d) for d in (160, 128))
        anchors = Anchors(donor[:1500], base[:1500])
        for name, method, k in (("OMP", "omp", 16), ("OMP, k = 64", "omp", 64), ("neighbours", "knn", 64),
                                ("mean", "mean", 1), ("ridge map", "linear", 1)):  # fmt: skip
            found[f"{name}, noise {noise}"] = _nearness(method, anchors, donor[1500:], base[1500:], k)
    return found


def _nearness(method: str, anchors: Anchors, donor: Tensor, base: Tensor, k: int) -> float:
    task = Task(anchors, donor, anchors.base, (), False, k, False, 0.0, torch.Generator())
    return float(torch.cosine_similarity(METHODS[method](task), base).mean())


def hidden(anchors: Anchors, seed: int) -> dict[str, float]:
    """Mean cosine of hidden shared tokens to their true rows: a fifth hidden, k chosen on another fifth."""
    order = torch.randperm(len(anchors.donor), generator=torch.Generator().manual_seed(seed))
    fifth = len(order) // 5
    held, rest = order[:fifth], order[fifth:]
    tune, known = rest[:fifth], rest[fifth:]

    def of(method: str, seen: Tensor, asked: Tensor, k: int) -> float:
        own = Anchors(anchors.donor[seen], anchors.base[seen])
        return _nearness(method, own, anchors.donor[asked], anchors.base[asked], k)

    found = {}
    for method in HIDDEN:
        ks = [k for k in SWEEP if k <= len(known)] if method in ("knn", "knn-cosine", "omp") else [1]
        best = max(ks, key=lambda k: of(method, known, tune, k))
        found[method] = of(method, rest, held, best)
        if method == "omp":
            found |= {f"omp-{k}": of("omp", rest, held, k) for k in ks}
    return found


def _read(settings: Settings, seed: int, fast: bool) -> dict[str, Any]:
    """Bits per byte of every way at both base sizes, bits of unshared tokens, and hidden tokens."""

    def make() -> dict[str, Any]:
        paragraphs, held, digest = _text(seed)
        paragraphs, held = (paragraphs[:200], held[:3000]) if fast else (paragraphs, held[:30_000])
        steps, sizes, donor_size = (2, (300, 280), 320) if fast else (500, SIZES, DONOR)
        joined, half = "\n\n".join(paragraphs), len(paragraphs) // 2
        new = bpe(paragraphs[half:], donor_size)
        donor = trained(new, tokens(new, joined), WIDTHS[1], steps, seed)
        of_held = tokens(new, held)
        found: dict[str, Any] = {
            "digest": digest,
            "bits": {},
            "unshared": {},
            "hidden": {},
            "k": {},
            "share": {},
        }
        for at, size in zip(SIZES, sizes, strict=True):
            old = bpe(paragraphs[:half], size)
            base = trained(old, tokens(old, joined), WIDTHS[0], steps, seed)
            ids = shared(Vocabulary.of(old), Vocabulary.of(new))[0]
            rows = (donor.get_input_embeddings().weight.detach(), base.get_input_embeddings().weight.detach())  # type: ignore[operator]
            anchors = Anchors(rows[0][sorted(ids)], rows[1][[ids[d] for d in sorted(ids)]])
            found["hidden"][str(at)] = hidden(anchors, seed)
            unshared = torch.ones(len(new), dtype=torch.bool)
            unshared[list(ids)] = False
            found["bits"][str(at)] = {"base with its own tokens": _per_byte(base, tokens(old, held), old)}
            for way, options in WAYS.items():
                per_byte, per_token, k = _after(base, old, donor, new, of_held, unshared, options, seed)
                found["bits"][str(at)][way] = per_byte
                found["unshared"].setdefault(str(at), {})[way] = per_token
                found["k"].setdefault(str(at), {})[way] = k
            found["share"][str(at)] = float(unshared[of_held].double().mean())
        return found

    return dict(kept(settings, SLUG, f"read-{seed}", {"fast": fast, "version": 1}, make))


def _per_byte(model: nn.Module, ids: Tensor, tokenizer: Any) -> float:
    each = bits(model, ids)
    return float(each.sum()) / len(tokenizer.decode(ids[: len(each)]).encode())


def _after(
    base: nn.Module,
    old: Any,
    donor: nn.Module,
    new: Any,
    ids: Tensor,
    unshared: Tensor,
    options: dict[str, Any],
    seed: int,
) -> tuple[float, float, int]:
    """Bits per byte after one transplant, bits per unshared token, and the k used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, report = transplant(base, old, donor, new, seed=seed, **options)
    each = bits(model, ids)
    of = unshared[ids[: len(each)]]
    return float(each.sum()) / len(new.decode(ids[: len(each)]).encode()), float(each[of].mean()), report.k


# --- digits ------------------------------------------------------------------------------------------------


def sums() -> list[tuple[str, str]]:
    """Every "a+b=" of a two-digit and a one-digit number below 30, and its answer."""
    return [(f"{a}+{b}=", f"{a + b}") for a in range(10, 20) for b in range(10)]


@torch.no_grad()
def answered(model: nn.Module, tokenizer: Any) -> float:
    """Share of sums whose likeliest continuation is the answer and the end of the line."""
    good = 0
    for ask, answer in sums():
        start, wanted = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("\n" + ask, answer + "\n")
        )
        ids = torch.tensor([[*start, *wanted]])
        best = model(ids).logits[0].argmax(1)[len(start) - 1 : -1]
        good += bool((best == torch.tensor(wanted)).all())
    return good / len(sums())


def _digits(settings: Settings, seed: int, fast: bool) -> dict[str, float]:
    def make() -> dict[str, float]:
        paragraphs = [p[:200] for p in _text(seed)[0][: 100 if fast else 1000]]
        draws = torch.randint(
            0, len(sums()), (len(paragraphs), 30), generator=torch.Generator().manual_seed(seed)
        )
        chunks = ["\n" + "".join("".join(sums()[i]) + "\n" for i in row) for row in draws.tolist()]
        text, steps = (
            "\n".join(t for pair in zip(chunks, paragraphs, strict=True) for t in pair),
            2 if fast else 500,
        )
        old = bpe([*paragraphs, *chunks], 800, digits=True)
        base = trained(old, tokens(old, text), DIGIT_WIDTHS[0], steps, seed)
        found = {"base": answered(base, old)}
        for name, split in (("otherwise", False), ("alike", True)):
            new = bpe([*paragraphs[: len(paragraphs) // 2], *chunks], 1000, digits=split)
            donor = trained(new, tokens(new, text), DIGIT_WIDTHS[1], steps, seed)
            for method in DIGIT_WAYS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    k = "auto" if method in ("omp", "knn-cosine") else 64
                    model = transplant(base, old, donor, new, method=method, k=k, seed=seed)[0]
                found[f"{method}, {name}"] = answered(model, new)
        return found

    return dict(kept(settings, SLUG, f"digits-{seed}", {"fast": fast, "version": 1}, make))


# --- the whole ---------------------------------------------------------------------------------------------


def run(settings: Settings, fast: bool = False) -> Result:
    """Train, transplant, read, judge by ``RULE``."""
    seeds = settings.seed_list(10 if settings.full else 3)
    tasks = [(settings, s, fast) for s in seeds]
    read = parallel(_read, tasks, settings, label="transplants")
    digits = parallel(_digits, tasks, settings, label="digits")
    rows = []
    for size in SIZES:
        for way in read[0]["bits"][str(size)]:
            values = tuple(r["bits"][str(size)][way] for r in read)
            rows.append(Row(f"{way}, base of {size:,}", values, _cost(read, size, way)))
    for name in digits[0]:
        label = "base" if name == "base" else name.replace(", ", ", digits split ")
        rows.append(Row(f"wrong sums: {label}", tuple(1 - d[name] for d in digits), f"{len(sums())} sums"))
    near = [mixtures(s) for s in seeds]
    return judged(rows, near, [r["hidden"] for r in read], digits, read[0]["digest"])


def _cost(read: Sequence[dict[str, Any]], size: int, way: str) -> str:
    share = sum(r["share"][str(size)] for r in read) / len(read)
    if way not in WAYS:
        return "no transplant"
    unshared = sum(r["unshared"][str(size)][way] for r in read) / len(read)
    words = f"{unshared:.1f} bits per unshared token, {share:.1%} of the tokens"
    if WAYS[way].get("k") == "auto":
        words += f"; k {', '.join(str(r['k'][str(size)][way]) for r in read)}"
    return words


def judged(
    rows: Sequence[Row], near: Sequence[dict[str, float]], shown: Sequence[dict[str, dict[str, float]]],
    digits: Sequence[dict[str, float]], digest: str,
) -> Result:  # fmt: skip
    """The verdict by ``RULE``."""
    found = {r.method: r for r in rows}

    def below(other: str, way: str = "OMP, k chosen") -> bool:
        return all(
            gain(found[f"{way}, base of {s:,}"], found[f"{other}, base of {s:,}"]).below() for s in SIZES
        )

    def nearer(other: str) -> Gain:
        means = [[sum(h[str(s)][m] for s in SIZES) / len(SIZES) for h in shown] for m in ("omp", other)]
        return gain(*means)

    made_up = all(
        gain([n[f"OMP, noise {z}"] for n in near], [n[f"{o}, noise {z}"] for n in near]).above()
        for z in (0.1, 0.5)
        for o in ("neighbours", "mean")
    )
    lost = {s: sum(d["base"] - d[f"omp, {s}"] for d in digits) / len(digits) for s in ("otherwise", "alike")}
    base = sum(d["base"] for d in digits) / len(digits)
    met = [
        made_up,
        nearer("mean").above(),
        nearer("knn-cosine").above(),
        below("zero rows"),
        all(below(w) for w in ("mean row", "normal rows", "rows like the base's (Hewitt)")),
        all(below(f"subword {w}") for w in ("mean", "sum", "weighted", "end")),
        all(
            below(f"neighbours{w}, k chosen") for w in ("", " by cosine", ", barycentric", ", least squares")
        ),
        below("ridge map"),
        below("landmark Procrustes"),
        below("zero rows", "OMP, k = 64"),
        lost["otherwise"] > base / 2 and lost["alike"] < base / 10,
    ]
    words = "; ".join(f"{n} {'yes' if m else 'no'}" for n, m in zip(CONDITIONS, met, strict=True))
    of_size = [[found[f"{w}, base of {s:,}"] for w in WAYS] for s in SIZES]
    best = [min(own, key=lambda r: r.mean) for own in of_size]
    words += ". Best: " + ", ".join(f"{r.method} {r.mean:.3f}" for r in best)
    words += f". Hidden tokens, OMP - neighbours by cosine {nearer('knn-cosine')}, - mean {nearer('mean')}"
    words += (
        f". Sums: base {base:.2f} right, OMP {base - lost['otherwise']:.2f} with digits split otherwise, "
    )
    words += f"{base - lost['alike']:.2f} alike. Text of this Python: SHA-256 {digest[:16]}"
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        f"{sum(met)} of {len(met)} conditions met: {words}.",
        "bits per byte of held-out text (sums: share answered wrongly)",
        tuple(rows),
        higher_is_better=False,
        pictures=((f"{SLUG}.png", picture(found, shown, digits)),),
        links={"paper": "https://arxiv.org/abs/2506.06607", "code": "https://github.com/arcee-ai/mergekit"},
    )


def picture(
    found: dict[str, Row], shown: Sequence[dict[str, dict[str, float]]], digits: Sequence[dict[str, float]]
) -> bytes:
    """Left: bits per byte of every way. Middle: what k does. Right: sums."""
    figure, (left, middle, right) = subplots(1, 3, figsize=(15, 6), width_ratios=(1.5, 1, 1))
    colors = {SIZES[0]: "#5b8db8", SIZES[1]: "#c8442e"}
    order = sorted(WAYS, key=lambda w: -found[f"{w}, base of {SIZES[0]:,}"].mean)
    for size, color in colors.items():
        rows = [found[f"{w}, base of {size:,}"] for w in order]
        means = [r.mean for r in rows]
        own = found[f"base with its own tokens, base of {size:,}"].mean
        left.hlines(range(len(order)), own, means, color=color, alpha=0.35, lw=2)
        left.plot(means, range(len(order)), "o", color=color, label=f"base of {size:,} tokens")
        left.axvline(own, color=color, ls=":", lw=1)
        ks = [found[f"OMP, k = {k}, base of {size:,}"] for k in SWEEP]
        middle.errorbar(SWEEP, [r.mean for r in ks], [r.std for r in ks], fmt="o-", color=color, capsize=3)
        middle.axhline(found[f"zero rows, base of {size:,}"].mean, color=color, ls="--", lw=1)
        for k, row in zip(SWEEP, ks, strict=True):
            cosine = sum(h[str(size)].get(f"omp-{k}", math.nan) for h in shown) / len(shown)
            middle.annotate(
                f"cos {cosine:.2f}", (k, row.mean), textcoords="offset points", xytext=(4, 6), fontsize=7
            )
    left.set_yticks(range(len(order)), order, fontsize=8)
    limit = sorted(found[f"{w}, base of {SIZES[1]:,}"].mean for w in WAYS)[-4]
    left.set_xlim(min(r.mean for r in found.values() if "base of" in r.method) - 0.05, 1.02 * limit)
    left.set_xlabel("bits per byte of held-out text (dotted: base with its own tokens)")
    left.set_title("Every way to make the rows of unseen tokens", loc="left", fontsize=11)
    left.legend(fontsize=8, loc="upper right")
    middle.set_xscale("log", base=2)
    middle.set_xticks(SWEEP, [str(k) for k in SWEEP])
    middle.set_xlabel("atoms k (labels: cosine of hidden shared tokens)")
    middle.set_ylabel("bits per byte (dashed: zero rows)")
    middle.set_title("What the number of atoms does", loc="left", fontsize=11)
    places = range(len(DIGIT_WAYS))
    for shift, (split, color) in zip(
        (-0.2, 0.2), (("alike", "#4f7f5b"), ("otherwise", "#b08d57")), strict=True
    ):
        values = [[d[f"{m}, {split}"] for d in digits] for m in DIGIT_WAYS]
        means = [sum(v) / len(v) for v in values]
        right.bar([p + shift for p in places], means, 0.38, color=color, label=f"digits split {split}")
        for p, v in zip(places, values, strict=True):
            right.plot([p + shift] * len(v), v, ".", color="#1d2b36", markersize=4)
    right.axhline(sum(d["base"] for d in digits) / len(digits), color="#33485a", ls=":", lw=1)
    right.set_xticks(places, DIGIT_WAYS, rotation=40, ha="right", fontsize=8)
    right.set_ylabel("sums answered (dotted: the base)")
    right.set_title("The trap of digits", loc="left", fontsize=11)
    right.legend(fontsize=8)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure)
