"""Lion against AdamW at three batch sizes, and the program search against random search and tuned optimizers.

1. Fashion-MNIST, 10,000 training images: an MLP 784-128-10 at batches of 64, 256 and 2048, and a vision transformer of
   two blocks on 4,000 images at 64 and 512. Four rates for each optimizer (Lion's lower by about three, its decay
   higher so that lr * weight_decay is 1e-4 for both), cosine schedule; rates are chosen on 2,000 other training images.
2. Search. The proxy is an MLP 64-16-10 on 600 digits, 60 steps, scored by its loss on 400 others, mean of two runs.
   From AdamW with its rate tuned on a fine grid, 3,000 mutations by evolution, by random search with one mutation and
   with chains of one to eight, and of constants alone. What each found is scored on rows and seeds that no search saw,
   and, chosen among its ten best by runs ten times longer, on those rows in such runs. Rows differ by seed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core.examples import Examples
from gradmatch.datasets import digits, fashion_mnist
from gradmatch.evidence._common import (
    Result,
    Row,
    Settings,
    gain,
    hold_out,
    kept,
    parallel,
    per_class,
    verdict_of,
)
from gradmatch.evidence.optim._training import best_by_hold_out, seeded, tested, train
from gradmatch.optim import Lion, Program, ProgramSearch, optimizer_state_bytes, programs
from gradmatch.optim.program_search import MLPTask, SearchResult, simplify, tuned

SLUG = "lion"
TITLE = "Lion, and the search over optimizer programs"
CLAIM = (
    "Sign momentum with half of AdamW's state trains as well or better, the more so at large batches; evolution over "
    "programs, from AdamW, finds optimizers that beat it on tasks larger than the one it was given."
)
RULE = (
    "Accuracies in points, each optimizer at the best of four rates by held-out training images; a difference "
    "counts if it exceeds two standard errors, paired by seed. (1) MLP: Lion within 0.7 of AdamW, or above, at "
    "batches 64, 256 and 2048. (2) Vision transformer: likewise at 64 and 512. (3) MLP: Lion minus AdamW is not "
    "lower at 2048 than at 64. (4) MLP: Lion is above AdamW at 2048, as published. (5) Lion's state is exactly "
    "half of AdamW's. (6) Its step takes less time than AdamW's tensor by tensor, on 100 tensors of 100,000. (7) "
    "In every search seed, evolution's best score on the proxy is at most that of both random searches. (8) On "
    "rows and seeds that no search saw, its best program is more than 5 % below tuned AdamW in every search seed."
    " (9) So is the best of its ten best after runs ten times longer, chosen by such runs, below AdamW. 'holds' "
    "if all are met, 'holds in part' if some are, 'does not hold' if none is."
)

ADAMW, LION = "AdamW", "Lion"
RATES = {ADAMW: (1e-3, 3e-3, 1e-2, 3e-2), LION: (3e-4, 1e-3, 3e-3, 1e-2)}
DECAY = 1e-4
CELLS: tuple[tuple[str, int, int], ...] = (
    ("MLP", 64, 5),
    ("MLP", 256, 5),
    ("MLP", 2048, 10),
    ("ViT", 64, 5),
    ("ViT", 512, 5),
)
"""Network, batch size, epochs."""
ROWS = {"MLP": 1000, "ViT": 400}
"""Training images of each class."""
MARGIN = 0.7

MUTATIONS = 3000
EVOLUTION, SINGLE, CHAINS, CONSTANTS = "evolution", "random single", "random chains", "constants only"
SEARCHES: dict[str, dict[str, Any]] = {
    EVOLUTION: {},
    SINGLE: {"strategy": "random"},
    CHAINS: {"strategy": "chains"},
    CONSTANTS: {"constants_only": True},
}
KNOWN: dict[str, Callable[[], Program]] = {
    "AdamW": programs.adamw,
    "momentum": programs.momentum,
    "Lion": programs.lion,
}
FINE = tuple(1e-3 * 1.4**k for k in range(22))
"""Ratio 1.4: a coarser grid would flatter the search."""
LONGER, FUNNEL = 10, 10


class ViT(nn.Module):
    """Patches of 7 x 7, two pre-norm blocks of width 64, mean over the patches."""

    def __init__(self, width: int = 64, blocks: int = 2, patch: int = 7) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
        block = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, blocks, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, 1, 28, 28) to logits (b, 10)."""
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.place
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MLP": _mlp, "ViT": ViT}


def make(method: str, params: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW or Lion with lr * weight_decay = 1e-4."""
    if method == LION:
        return Lion(params, lr, weight_decay=DECAY / lr)
    return torch.optim.AdamW(params, lr, weight_decay=DECAY / lr)


# --- 1. training ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _images(network: str, full: bool) -> tuple[Examples, Examples, Examples]:
    """Training, held-out and test images; the same for every seed."""
    found = fashion_mnist()
    rest, held = hold_out(found.train, 200, 0)
    return (rest if full else per_class(rest, ROWS[network], 0)), held, found.test


def _trained(
    settings: Settings, network: str, batch: int, epochs: int, method: str, rate: float, seed: int
) -> tuple[float, float]:
    """Accuracies in points on held-out and on test images."""

    def run() -> list[float]:
        own, held, test = _images(network, settings.full)
        model = seeded(NETWORKS[network], seed)
        train(model, make(method, model.parameters(), rate), own, epochs, batch, seed)
        return [100 * tested(model, held), 100 * tested(model, test)]

    name = f"{network}-{batch}-{method}-{rate:g}-{seed}"
    held, test = kept(settings, SLUG, name, {"version": 1, "budget": settings.budget, "epochs": epochs}, run)
    return held, test


def _step_ratio(count: int = 100, size: int = 100_000, rounds: int = 9) -> float:
    """Time of AdamW's step tensor by tensor over that of Lion's as it comes, alternating."""
    timed: dict[str, list[float]] = {ADAMW: [], LION: []}
    own = {}
    for method in timed:
        params = [nn.Parameter(torch.zeros(size)) for _ in range(count)]
        for p in params:
            p.grad = torch.ones(size)
        own[method] = Lion(params) if method == LION else torch.optim.AdamW(params, foreach=False)
        own[method].step()
    for _ in range(rounds):
        for method, optimizer in own.items():
            began = time.perf_counter()
            optimizer.step()
            timed[method].append(time.perf_counter() - began)
    return statistics.median(timed[ADAMW]) / statistics.median(timed[LION])


def _state_ratio() -> float:
    """Lion's bytes of state over AdamW's, step counters aside."""
    found = []
    for method in (LION, ADAMW):
        model = _mlp()
        optimizer = make(method, model.parameters(), 1e-3)
        model(torch.zeros(2, 1, 28, 28)).sum().backward()
        optimizer.step()
        counters = sum(
            t.nbytes
            for s in optimizer.state.values()
            for k, t in s.items()
            if k == "step" and isinstance(t, Tensor)
        )
        found.append(optimizer_state_bytes(optimizer) - counters)
    return found[0] / found[1]


# --- 2. search ------------------------------------------------------------------------------------------------


def _tasks(seed: int) -> tuple[MLPTask, MLPTask]:
    """The proxy, and the task of other rows and seeds."""
    found = digits()
    x, y = torch.cat([found.train.x, found.test.x]), torch.cat([found.train.y, found.test.y])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))

    def rows(start: int, stop: int) -> Examples:
        return Examples(x[order[start:stop]], y[order[start:stop]], 10)

    proxy = MLPTask(rows(0, 600), rows(600, 1000), runs=2, seed=seed)
    return proxy, MLPTask(rows(1000, 1500), rows(1500, 1797), runs=4, seed=1000 + seed)


def _longer(task: MLPTask, lr: float) -> list[MLPTask]:
    """Runs ten times longer at three rates around ``lr``."""
    return [replace(task, steps=LONGER * task.steps, lr=rate) for rate in (lr / 3, lr, 3 * lr)]


def _scores(seed: int, candidates: Sequence[Program], lr: float) -> list[float]:
    """Score on the proxy and on other rows of the first candidate, and of the best after longer runs on other rows."""
    proxy, fresh = (task.with_lr(lr) for task in _tasks(seed))
    scored = [
        (task(program), program, i) for program in candidates for i, task in enumerate(_longer(proxy, lr))
    ]
    _, best, rate = min(scored, key=lambda found: found[0])
    return [proxy(candidates[0]), fresh(candidates[0]), _longer(fresh, lr)[rate](best)]


def _known(settings: Settings, name: str, seed: int) -> list[float]:
    def run() -> list[float]:
        program = KNOWN[name]()
        return [*_scores(seed, [program], (task := tuned(_tasks(seed)[0], program, FINE)).lr), task.lr]

    return list(kept(settings, SLUG, f"known-{name}-{seed}", {"version": 1}, run))


def _searched(settings: Settings, name: str, seed: int, lr: float, mutations: int) -> dict[str, Any]:
    """What one search found: its scores, its curve, its best program before and after simplification."""

    def run() -> dict[str, Any]:
        task = _tasks(seed)[0].with_lr(lr)
        found: SearchResult = ProgramSearch(programs.adamw(), tasks=task, seed=seed, **SEARCHES[name]).run(
            mutations
        )
        short = simplify(found.best, replace(task, runs=4)) if name == EVOLUTION else found.best
        return {
            "scores": [_finite(x) for x in _scores(seed, [p for p, _ in found.top[:FUNNEL]], lr)],
            "curve": found.best_so_far(),
            "hit_rate": found.hit_rate,
            "found": found.best.to_source(),
            "simplified": short.to_source(),
        }

    config = {"version": 1, "mutations": mutations, "lr": lr}
    return dict(kept(settings, SLUG, f"search-{name}-{seed}".replace(" ", "-"), config, run))


def _finite(x: float) -> float:
    """A loss for the table: programs that fail count as ten."""
    return x if x < 10.0 else 10.0


# --- the experiment -------------------------------------------------------------------------------------------


def run(settings: Settings) -> Result:
    """Train every cell, search from every seed, judge by ``RULE``."""
    seeds = settings.seed_list(3)
    tasks = [
        (settings, *cell, method, rate, seed)
        for cell in CELLS
        for method in RATES
        for rate in RATES[method]
        for seed in seeds
    ]
    scores = dict(
        zip([t[1:] for t in tasks], parallel(_trained, tasks, settings, label="training"), strict=True)
    )
    trained = {
        (network, batch, method): {
            rate: [scores[network, batch, epochs, method, rate, s] for s in seeds] for rate in RATES[method]
        }
        for network, batch, epochs in CELLS
        for method in RATES
    }
    pairs = [(settings, name, seed) for name in KNOWN for seed in seeds]
    known = dict(zip([p[1:] for p in pairs], parallel(_known, pairs, settings, label="tuning"), strict=True))
    mutations = 10 * MUTATIONS if settings.full else MUTATIONS
    jobs = [(settings, name, s, known["AdamW", s][3], mutations) for s in seeds for name in SEARCHES]
    searched = dict(
        zip([j[1:3] for j in jobs], parallel(_searched, jobs, settings, label="searching"), strict=True)
    )
    from gradmatch.evidence.optim._lion_picture import picture

    result = _judged(trained, known, searched, _state_ratio(), _step_ratio(), seeds)
    return replace(result, pictures=((f"{SLUG}.png", picture(result, known, searched, seeds)),))


Trained = dict[tuple[str, int, str], dict[float, list[tuple[float, float]]]]
STAGES = ("proxy", "other rows", f"other rows, {LONGER} times longer")


def _judged(
    trained: Trained,
    known: dict[tuple[str, int], list[float]],
    searched: dict[tuple[str, int], dict[str, Any]],
    state: float,
    step: float,
    seeds: Sequence[int],
) -> Result:
    rows = []
    for (network, batch, method), by_rate in trained.items():
        chosen = best_by_hold_out(by_rate)
        edge = " (an end of the grid)" if chosen in (min(by_rate), max(by_rate)) else ""
        values = tuple(t for _, t in by_rate[chosen])
        rows.append(Row(f"{method}, {network}, batch {batch}", values, f"rate {chosen:g}{edge}"))
    accuracy = {r.method: r for r in rows}

    def over(network: str, batch: int) -> Any:
        name = f"{network}, batch {batch}"
        return gain(accuracy[f"{LION}, {name}"], accuracy[f"{ADAMW}, {name}"])

    losses: dict[tuple[str, str], tuple[float, ...]] = {}
    for i, stage in enumerate(STAGES):
        for name in KNOWN:
            losses[name, stage] = tuple(known[name, s][i] for s in seeds)
            rows.append(Row(f"{name} program, loss, {stage}", losses[name, stage], "rate tuned on 22"))
        for name in SEARCHES:
            losses[name, stage] = tuple(searched[name, s]["scores"][i] for s in seeds)
            hits = statistics.mean(searched[name, s]["hit_rate"] for s in seeds)
            cost = f"{len(searched[name, seeds[0]]['curve'])} mutations, {hits:.0%} from the cache"
            rows.append(Row(f"{name} search, loss, {stage}", losses[name, stage], cost))
    differences = {(network, batch): over(network, batch) for network, batch, _ in CELLS}
    ours = {stage: losses[EVOLUTION, stage] for stage in STAGES}
    plain = {stage: losses[ADAMW, stage] for stage in STAGES}
    not_lower = _gap(accuracy, 2048, 64)
    met = [
        all(g.mean >= -MARGIN for (network, _), g in differences.items() if network == "MLP"),
        all(g.mean >= -MARGIN for (network, _), g in differences.items() if network == "ViT"),
        not not_lower.below(),
        differences["MLP", 2048].above(),
        state == 0.5,
        step > 1,
        all(
            a <= b
            for other in (SINGLE, CHAINS)
            for a, b in zip(ours["proxy"], losses[other, "proxy"], strict=True)
        ),
        all(a < 0.95 * b for a, b in zip(ours[STAGES[1]], plain[STAGES[1]], strict=True)),
        all(a < b for a, b in zip(ours[STAGES[2]], plain[STAGES[2]], strict=True)),
    ]
    shares = {stage: [a / b - 1 for a, b in zip(ours[stage], plain[stage], strict=True)] for stage in STAGES}
    reason = (
        f"{sum(met)} of {len(met)} conditions met ({', '.join(str(i) for i, m in enumerate(met, 1) if m) or 'none'}). "
        "Lion - AdamW in points: "
        + ", ".join(f"{network} {batch} {g}" for (network, batch), g in differences.items())
        + f". State {state:g} of AdamW's, AdamW's step tensor by tensor {step:.2f} times Lion's. Evolution's best "
        "against tuned AdamW: "
        + "; ".join(f"{stage} " + ", ".join(f"{x:+.1%}" for x in shares[stage]) for stage in STAGES)
        + "."
    )
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        reason,
        "test accuracy (points); loss, lower is better, where a row says so",
        tuple(rows),
        links={"paper": "https://arxiv.org/abs/2302.06675", "code": "https://github.com/google/automl"},
    )


def _gap(accuracy: dict[str, Row], large: int, small: int) -> Any:
    """(Lion - AdamW at the large batch) - (the same at the small one), paired by seed."""

    def difference(batch: int) -> list[float]:
        pair = [accuracy[f"{method}, MLP, batch {batch}"].values for method in (LION, ADAMW)]
        return [a - b for a, b in zip(*pair, strict=True)]

    return gain(difference(large), difference(small))
