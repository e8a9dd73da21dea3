"""Gumbel-Softmax flow: distributions of a toy and of text, and straight-through guidance.

A. Four independent positions over K tokens, probabilities drawn from Dirichlet(0.5) (peaked), with a trained denoiser
   and with the exact posterior; and the paper's own toy, softmax(rand), beside a generator that ignores the data.
B. Windows of 16 of Python's documentation in 27 symbols: n-grams against held-out text.
C. Guidance of B towards vowels, by a network trained on clean windows; what counts is the true number of vowels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmatch.evidence._common import Result, Row, Settings, gain, parallel, verdict_of
from gradmatch.evidence.generate import _gumbel_parts as parts
from gradmatch.generate import GumbelSimplexFlow

SLUG = "gumbel-flow"
TITLE = "Gumbel-Softmax flow matching with straight-through guidance"
CLAIM = (
    "A temperature-annealed flow on the simplex matches sequences' distributions about as well for large alphabets as "
    "for small ones, better than linear flows, and classifiers of clean sequences steer it."
)
RULE = (
    "Each by two standard errors over seeds. Peaked toy, trained denoiser, for every K: published, decoded from the "
    "posterior, under a third of the uniform generator (1 condition), under both argmax decoders (1), under the linear "
    "flow (1), and its KL at ten steps not above that at the full number by more than a tenth (1). The paper's toy: "
    "under half of the uniform generator (1 for every K). Text: 2-gram KL under that of independent letters (1) and "
    "under the linear flow (1). Guidance: the mean of true vowels rises at each of the first three scales (1), reaches "
    "one standard deviation of unguided windows more (1), and at the scale that does is above a random direction of "
    "equal norm (1). 'holds' if all are met, 'holds in part' if some are. The consistent path, an addition of ours, is "
    "in the rows and in no condition."
)
LINKS = {
    "paper": "https://arxiv.org/abs/2503.17361",
    "weights": "https://huggingface.co/ChatterjeeLab/GumbelFlow",
}
METRIC = "KL divergence a position or of n-grams (nats); vowels a window (guidance)"

PATHS = ("published", "consistent", "linear")
DECODERS = ("posterior", "argmax_x", "argmax_p")
SCALES = (0.0, 1.0, 3.0, 10.0)
LENGTH, TEXT = 4, 16


class Budget(NamedTuple):
    """Sizes of the experiment."""

    seeds: int
    ks: tuple[int, ...]
    sequences: int
    steps: int
    batch: int
    width: int
    samples: int
    times: int
    text_steps: int
    text_width: int
    text_samples: int


SMALL = Budget(3, (4, 20, 64), 50_000, 700, 256, 128, 10_000, 50, 700, 48, 3000)
FULL = Budget(5, (4, 20, 64, 160), 100_000, 3000, 512, 256, 51_200, 100, 5000, 128, 20_000)


def toy_run(peaked: bool, k: int, path: str, seed: int, budget: Budget) -> dict[str, float]:
    """KLs of one trained flow by decoder and number of steps."""
    p, tokens = parts.toy(k, LENGTH, peaked, budget.sequences, seed)
    flow = parts.make(path, parts.new_net("mlp", k, LENGTH, budget.width, seed), k)
    parts.trained(flow, tokens, budget.steps, budget.batch, seed)
    found = {"uniform": parts.uniform_kl(p), "floor": (k - 1) / (2 * budget.samples)}

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    if isinstance(flow, parts.LinearFlow):
        found["posterior"] = parts.position_kl(
            p, flow.draw(budget.samples, LENGTH, budget.times, generator())
        )
        return found
    for decode in DECODERS if peaked else ("posterior",):
        drawn = flow.sample(budget.samples, LENGTH, steps=budget.times, decode=decode, generator=generator())
        found[decode] = parts.position_kl(p, drawn.tokens)
    ten = flow.sample(budget.samples, LENGTH, steps=10, generator=generator())
    found["ten steps"] = parts.position_kl(p, ten.tokens)
    return found


def exact_run(k: int, path: str, seed: int, budget: Budget) -> float:
    """The KL with the exact posterior in place of a denoiser: what the path itself costs."""
    p, _ = parts.toy(k, LENGTH, True, 1, seed)
    flow = parts.make(path, lambda x, t: x, k)
    flow.denoiser = lambda x, t: flow.path.posterior(x, t, p.to(x)).clamp_min(1e-30).log()
    g = torch.Generator().manual_seed(seed)
    return parts.position_kl(p, flow.sample(budget.samples, LENGTH, steps=budget.times, generator=g).tokens)


def text_run(path: str, seed: int, budget: Budget) -> dict[str, Any]:
    """n-gram KLs of one flow on text; for the published path also its guidance."""
    train, held = parts.windows(TEXT, 40_000)
    flow = parts.make(
        path, parts.new_net("conv", len(parts.LETTERS), TEXT, budget.text_width, seed), len(parts.LETTERS)
    )
    parts.trained(flow, train, budget.text_steps, 128, seed)
    g = torch.Generator().manual_seed(seed)
    n = budget.text_samples
    if isinstance(flow, parts.LinearFlow):
        tokens = flow.draw(n, TEXT, budget.times, g)
    else:
        tokens = flow.sample(n, TEXT, steps=budget.times, generator=g).tokens
    found: dict[str, Any] = {f"{i}-gram": parts.gram_kl(held, tokens, i) for i in (1, 2, 3)}
    found["lines"] = ["".join(parts.LETTERS[c] for c in row) for row in tokens[:8].tolist()]
    letters = torch.bincount(train.flatten(), minlength=len(parts.LETTERS)).float()
    alone = torch.multinomial(letters, n * TEXT, replacement=True, generator=g).reshape(n, TEXT)
    found |= {f"letters {i}-gram": parts.gram_kl(held, alone, i) for i in (1, 2, 3)}
    if path == "published":
        found |= guided(flow, train, held, seed, budget)
    return found


def guided(flow: GumbelSimplexFlow, train: Tensor, held: Tensor, seed: int, budget: Budget) -> dict[str, Any]:
    """True vowels and 2-gram KL under guidance of several scales, and under what it is compared with."""
    judge, n = parts.vowel_judge(train, seed), max(60, budget.text_samples // 5)

    def draw(guide: Any = None, scale: float = 0.0, count: int = n) -> Tensor:
        g = torch.Generator().manual_seed(seed + 1)
        return flow.sample(
            count, TEXT, steps=budget.times, guide=guide, guide_scale=scale, generator=g
        ).tokens

    def measured(tokens: Tensor) -> tuple[float, float]:
        return float(parts.vowels(tokens).mean()), parts.gram_kl(held, tokens, 2)

    found: dict[str, Any] = {}
    for scale in SCALES:
        tokens = draw(judge, scale)
        found[f"scale {scale:g}"] = measured(tokens)
        if scale == 0:
            found["spread"] = float(parts.vowels(tokens).std())
    turn = torch.Generator().manual_seed(seed + 2)

    def random_direction(s: Tensor) -> Tensor:
        with torch.enable_grad():
            at = s.detach().requires_grad_()
            (a,) = torch.autograd.grad(judge(at).sum(), at)
        other = torch.randn(a.shape, generator=turn)
        other = other * (a.flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1))[:, None, None]
        value: Tensor = (s * other).sum((1, 2))
        return value

    found["random"] = measured(draw(random_direction, SCALES[-1]))
    many = draw(count=4 * n)
    score = judge(F.one_hot(many, len(parts.LETTERS)).float()).reshape(4, n)
    best = many.reshape(4, n, TEXT)[score.argmax(0), torch.arange(n)]
    found["best of 4"] = measured(best)
    return found


def run(settings: Settings) -> Result:
    """Run everything; the verdict follows from the rows by ``RULE``."""
    return experiment(settings, FULL if settings.full else SMALL)


def experiment(settings: Settings, budget: Budget) -> Result:
    """The same at any budget."""
    from gradmatch.evidence.generate._gumbel_picture import picture

    seeds = settings.seed_list(budget.seeds)
    cells = [(True, k, path) for k in budget.ks for path in PATHS]
    cells += [(False, k, "published") for k in budget.ks[1:]]
    found = parallel(
        toy_run, [(*c, s, budget) for c in cells for s in seeds], settings, label="gumbel-flow: toy"
    )
    toys = {c: found[i * len(seeds) : (i + 1) * len(seeds)] for i, c in enumerate(cells)}
    pairs = [(k, path) for k in budget.ks for path in PATHS[:2]]
    bare = parallel(
        exact_run, [(*c, s, budget) for c in pairs for s in seeds], settings, label="gumbel-flow: exact"
    )
    texts_ = parallel(
        text_run, [(p, s, budget) for p in PATHS for s in seeds], settings, label="gumbel-flow: text"
    )
    texts = {p: texts_[i * len(seeds) : (i + 1) * len(seeds)] for i, p in enumerate(PATHS)}
    rows = toy_rows(toys, budget)
    for i, (k, path) in enumerate(pairs):
        rows.append(
            Row(
                f"K {k}, exact posterior: {path}",
                tuple(bare[i * len(seeds) : (i + 1) * len(seeds)]),
                "no training",
            )
        )
    rows += text_rows(texts)
    verdict, reason = judge(rows, budget)
    return Result(
        SLUG, TITLE, CLAIM, RULE, verdict, reason, METRIC, tuple(rows), higher_is_better=False, links=LINKS,
        pictures=((f"{SLUG}.png", picture(rows, texts, budget)),),
    )  # fmt: skip


def toy_rows(toys: dict[tuple[bool, int, str], list[dict[str, float]]], budget: Budget) -> list[Row]:
    """Rows of both toys."""
    rows = []
    for (peaked, k, path), runs in toys.items():
        where = f"K {k}" if peaked else f"near-uniform K {k}"
        cost = f"{budget.steps} updates, {budget.times} calls"
        for what in runs[0]:
            if what in ("uniform", "floor"):
                if path == "published":
                    rows.append(Row(f"{where}: {what}", tuple(r[what] for r in runs), "no training"))
                continue
            rows.append(Row(f"{where}: {path}, {what}", tuple(r[what] for r in runs), cost))
    return rows


def text_rows(texts: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Rows of text and guidance."""
    rows = []
    for i in (1, 2, 3):
        rows += [Row(f"text {i}-gram: {p}", tuple(r[f"{i}-gram"] for r in runs)) for p, runs in texts.items()]
        alone = tuple(r[f"letters {i}-gram"] for r in texts["published"])
        rows.append(Row(f"text {i}-gram: independent letters", alone, "no training"))
    names = [f"scale {s:g}" for s in SCALES] + ["random", "best of 4"]
    for name in names:
        runs = [r[name] for r in texts["published"]]
        rows.append(Row(f"guidance, vowels: {name}", tuple(v for v, _ in runs)))
        rows.append(Row(f"guidance, 2-gram KL: {name}", tuple(kl for _, kl in runs)))
    rows.append(Row("guidance, vowels: deviation unguided", tuple(r["spread"] for r in texts["published"])))
    return rows


def judge(rows: list[Row], budget: Budget) -> tuple[str, str]:
    """The verdict of ``RULE``, and what led to it."""
    by = {r.method: r for r in rows}

    def under(a: str, b: str, factor: float = 1.0) -> bool:
        return gain(by[a], [factor * v for v in by[b].values]).below()

    def ours(k: int, what: str = "posterior") -> str:
        return f"K {k}: published, {what}"

    raised = [
        gain(by[f"guidance, vowels: scale {b:g}"], by[f"guidance, vowels: scale {a:g}"]).above()
        for a, b in ((0, 1), (1, 3))
    ]
    top = f"guidance, vowels: scale {SCALES[-1]:g}"
    spread = by["guidance, vowels: deviation unguided"]
    lifted = [v - u for v, u in zip(by[top].values, by["guidance, vowels: scale 0"].values, strict=True)]
    groups = {
        "under a third of uniform": [under(ours(k), f"K {k}: uniform", 1 / 3) for k in budget.ks],
        "under both argmax decoders": [
            under(ours(k), ours(k, "argmax_x")) and under(ours(k), ours(k, "argmax_p")) for k in budget.ks
        ],
        "under the linear flow": [under(ours(k), f"K {k}: linear, posterior") for k in budget.ks],
        "ten steps as good": [
            not gain(by[ours(k, "ten steps")], [1.1 * v for v in by[ours(k)].values]).above()
            for k in budget.ks
        ],
        "the paper's toy under half of uniform": [
            under(f"near-uniform K {k}: published, posterior", f"near-uniform K {k}: uniform", 0.5)
            for k in budget.ks[1:]
        ],
        "text under independent letters": [
            under("text 2-gram: published", "text 2-gram: independent letters")
        ],
        "text under the linear flow": [under("text 2-gram: published", "text 2-gram: linear")],
        "guidance rises": [all(raised)],
        "guidance by a deviation": [gain(lifted, spread).above()],
        "guidance above a random direction": [gain(by[top], by["guidance, vowels: random"]).above()],
    }
    met = [c for group in groups.values() for c in group]
    reason = f"{sum(met)} of {len(met)} conditions met: "
    reason += ", ".join(f"{name} {sum(group)} of {len(group)}" for name, group in groups.items())
    each = [
        f"K {k} uniform {by[f'K {k}: uniform'].mean:.3g}, published {by[ours(k)].mean:.3g}, linear "
        f"{by[f'K {k}: linear, posterior'].mean:.3g}, consistent {by[f'K {k}: consistent, posterior'].mean:.3g}; with "
        f"the exact posterior published {by[f'K {k}, exact posterior: published'].mean:.3g}, consistent "
        f"{by[f'K {k}, exact posterior: consistent'].mean:.2g}"
        for k in budget.ks
    ]
    return verdict_of(met), f"{reason}. KL: {'; '.join(each)}."
