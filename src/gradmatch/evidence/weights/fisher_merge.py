"""Fisher-weighted against plain averaging: exactness, ensembles of skewed copies, robust fine-tuning, another
task's help.

A. Two linear-Gaussian regressions on disjoint data, where the merge should be the pooled solution.
B. A small CNN is trained for two epochs on 6,000 images of Fashion-MNIST and fine-tuned four times for two
   epochs on 2,500 others whose classes are drawn from Dirichlet(alpha); the four are merged with equal
   weights.
C. The base and its first copy of alpha = 0.3 are merged along the lambda grid: accuracy on the copy's own
   class mix against that on all classes. For each way lambda is chosen by the mean of both on held-out
   images.
D. 10 images of each digit (scikit-learn) as the target task; donor: 900 other digits, rotated by up to 25
   degrees. Both start from an MLP trained on Fashion-MNIST at 8 x 8; bodies are merged, heads are not, lambda
   by 200 held-out digits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmatch.core.examples import Examples
from gradmatch.core.networks import build
from gradmatch.core.picture import png, subplots
from gradmatch.datasets import digits, fashion_mnist
from gradmatch.evidence._common import (
    Gain,
    Result,
    Row,
    Settings,
    accuracy,
    gain,
    kept,
    parallel,
    verdict_of,
)
from gradmatch.weights import fisher_diagonal, merge, search

SLUG = "fisher-merge"
TITLE = "Fisher merge: models averaged by their Fisher information"
CLAIM = (
    "Averaging fine-tuned copies by their Fisher information is better than plain averaging and near their "
    "output ensemble; along the line to the base it trades accuracy at least as well; and a donor's task "
    "helps a target's without training."
)
RULE = (
    "A difference counts if it exceeds two standard errors, paired by seed; Fisher means the published "
    "default (normalised, floor 1e-6). (1) Two linear-Gaussian models merge to the pooled solution within "
    "1e-8, and the plain average is off by more than 1e-3. Fisher is above the plain average of four copies "
    "with label skew (2) alpha 0.3, (3) alpha 1, (4) alpha 100. (5) Averaged over the three skews it is not "
    "below the output ensemble. (6) Fine-tuning towards one class mix, with lambda by held-out images, Fisher "
    "is not below plain interpolation in the mean of accuracy on that mix and on all classes. With a donor of "
    "another task it is (7) above the target's own model, (8) above the plain average. 'holds' if all eight "
    "are met, 'holds in part' if some are, 'does not hold' if none is."
)

ALPHAS = (0.3, 1.0, 100.0)
COPIES, BASE, SHARD, HELD, TEST = 4, 6000, 2500, 1000, 3000
GRID = 21
METHODS = (
    "base",
    "mean single",
    "best single",
    "plain average",
    "Fisher",
    "Fisher, not normalised",
    "output ensemble",
)
ROBUST = ("base", "fine-tuned", "plain interpolation", "Fisher", "Fisher, not normalised")
TRANSFER = (
    "target alone",
    "plain average",
    "Fisher",
    "Fisher, not normalised",
    "trained on the donor's task first",
)
MERGES: dict[str, dict[str, Any] | None] = {
    "plain average": None,
    "Fisher": {"normalize": True},
    "Fisher, not normalised": {"normalize": False},
}


def cnn() -> nn.Sequential:
    """Two convolutions of stride 2 and one hidden layer, without normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def mlp() -> nn.Sequential:
    """64-96-64-10."""
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))


def fit(
    network: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, seed: int, batch: int = 64
) -> nn.Module:
    """A copy of the network trained by Adam; batches go through the data in a new order each epoch."""
    network = copy.deepcopy(network).train()
    optimizer, generator = torch.optim.Adam(network.parameters(), lr), torch.Generator().manual_seed(seed)
    order: Tensor = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < min(batch, len(y)):
            order = torch.randperm(len(y), generator=generator)
        index, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(network(x[index]), y[index]))
        optimizer.step()
    return network.eval()


@torch.no_grad()
def right(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of right answers."""
    return accuracy(network(data[0]), data[1])


# --- A -----------------------------------------------------------------------------------------------------


def gaussian_errors() -> dict[str, float]:
    """Largest error against the pooled solution: Fisher merge with lambda_i = N_i / N, and the plain average."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    cover = torch.tensor([[3.0, 1, 2, 1, 0, 0, 1], [1, 0, 2, 4, 1, 3, 0]]).double()
    truth, sizes = randn(7), [9, 21]
    designs = [torch.linalg.qr(randn(n, 7))[0] * c for n, c in zip(sizes, cover, strict=True)]
    answers = [x @ truth + 0.3 * randn(len(x)) for x in designs]
    models = [{"w": torch.linalg.pinv(x) @ y} for x, y in zip(designs, answers, strict=True)]
    fishers = [{"w": x.square().mean(0)} for x in designs]
    pooled = torch.linalg.pinv(torch.cat(designs)) @ torch.cat(answers)
    merged = merge(models, fishers, sizes, normalize=False, floor=0.0)["w"]
    plain = merge(models, weights=sizes)["w"]
    return {"Fisher": float((merged - pooled).abs().max()), "plain": float((plain - pooled).abs().max())}


# --- B and C -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _fashion() -> tuple[Examples, Examples]:
    found = fashion_mnist()
    return found.train, found.test


def skewed(
    examples: Examples, pool: Tensor, alpha: float, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Places of ``count`` examples of a class mix drawn from Dirichlet(alpha), and the mix."""
    gamma = torch._standard_gamma(torch.full((examples.classes,), alpha, dtype=torch.double), generator)
    mix = (gamma + 1e-12) / (gamma + 1e-12).sum()
    wanted = torch.bincount(
        torch.multinomial(mix, count, replacement=True, generator=generator), minlength=examples.classes
    )
    of = examples.y[pool]
    return torch.cat([pool[of == c][: int(k)] for c, k in enumerate(wanted)]), mix


def weighted(network: nn.Module, data: Examples, mix: Tensor) -> tuple[float, float]:
    """Accuracy on the class mix and on all classes alike."""
    with torch.no_grad():
        hit = (network(data.x).argmax(1) == data.y).double()
    each = torch.stack([hit[data.y == c].mean() for c in range(data.classes)])
    return float((each * mix).sum()), float(each.mean())


def _ensembles(settings: Settings, seed: int, fast: bool) -> dict[str, Any]:
    """Accuracies of one seed: by alpha and method, and the curves of robust fine-tuning."""

    def make() -> dict[str, Any]:
        train, test = _fashion()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(train), generator=generator)
        base_at, held_at, pool = order[:BASE], order[BASE : BASE + HELD], order[BASE + HELD :]
        x, y = train.x, train.y
        test_at = torch.randperm(len(test), generator=generator)[:TEST]
        tested, held = test.take(test_at), train.take(held_at)
        steps = (2, 2) if fast else (2 * BASE // 64, 2 * SHARD // 64)
        base = fit(build(cnn, seed), x[base_at], y[base_at], steps[0], 1e-3, seed)
        found: dict[str, Any] = {"alphas": {}}
        for alpha in ALPHAS:
            shards = [
                skewed(train, pool[torch.randperm(len(pool), generator=generator)], alpha, SHARD, generator)
                for _ in range(COPIES)
            ]
            nets = [fit(base, x[i], y[i], steps[1], 1e-3, seed * 10 + k) for k, (i, _) in enumerate(shards)]
            few = 64 if fast else 4096
            fishers = [
                fisher_diagonal(n, (x[i], y[i]), n_examples=few, batch_size=128)
                for n, (i, _) in zip(nets, shards, strict=True)
            ]
            found["alphas"][str(alpha)] = _merged_scores(base, nets, fishers, (tested.x, tested.y))
            if alpha == ALPHAS[0]:
                fisher = fisher_diagonal(base, (x[base_at], y[base_at]), n_examples=few, batch_size=128)
                found["robust"] = _robust([base, nets[0]], [fisher, fishers[0]], held, tested, shards[0][1])
        return found

    return dict(kept(settings, SLUG, f"ensembles-{seed}", {"fast": fast, "version": 1}, make))


def _merged_scores(
    base: nn.Module,
    nets: Sequence[nn.Module],
    fishers: Sequence[dict[str, Tensor]],
    tested: tuple[Tensor, Tensor],
) -> dict[str, float]:
    singles = [right(n, tested) for n in nets]
    with torch.no_grad():
        together = torch.stack([torch.softmax(n(tested[0]), 1) for n in nets]).mean(0)
    found = {
        "base": right(base, tested),
        "mean single": sum(singles) / len(singles),
        "best single": max(singles),
        "output ensemble": accuracy(together, tested[1]),
    }
    for method, options in MERGES.items():
        found[method] = right(merge(nets, None if options is None else fishers, **(options or {})), tested)
    return found


def _robust(
    nets: Sequence[nn.Module],
    fishers: Sequence[dict[str, Tensor]],
    held: Examples,
    tested: Examples,
    mix: Tensor,
) -> dict[str, Any]:
    """Curves of (mix, all) accuracies on the test images, and where held-out images would stop."""
    found: dict[str, Any] = {
        "base": weighted(nets[0], tested, mix),
        "fine-tuned": weighted(nets[1], tested, mix),
    }
    for method, options in MERGES.items():
        name = "plain interpolation" if options is None else method
        curve, on_held = [], []
        for k in range(GRID):
            share = k / (GRID - 1)
            net = merge(nets, None if options is None else fishers, [1 - share, share], **(options or {}))
            curve.append(weighted(net, tested, mix))
            on_held.append(sum(weighted(net, held, mix)))
        found[name] = {"curve": curve, "chosen": max(range(GRID), key=lambda k: on_held[k])}
    return found


# --- D -----------------------------------------------------------------------------------------------------


def rotated(x: Tensor, generator: torch.Generator, degrees: float = 25.0) -> Tensor:
    """Images (n, 1, 8, 8) each turned by up to ``degrees``."""
    angle = (2 * torch.rand(len(x), generator=generator) - 1) * math.radians(degrees)
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([torch.stack([cos, -sin, none], 1), torch.stack([sin, cos, none], 1)], 1)
    return F.grid_sample(x, F.affine_grid(matrix, list(x.shape), align_corners=False), align_corners=False)


def _transfer(settings: Settings, seed: int, fast: bool) -> dict[str, float]:
    def make() -> dict[str, float]:
        every, generator = digits(test=0.01), torch.Generator().manual_seed(seed)
        x = torch.cat([every.train.x, every.test.x])
        y = torch.cat([every.train.y, every.test.y])
        order = torch.randperm(len(y), generator=generator)
        few = torch.cat([order[y[order] == c][:10] for c in range(10)])
        rest = order[~torch.isin(order, few)]
        held, test, donor = rest[:200], rest[200:800], rest[800:1700]
        turned, flat = rotated(x[donor], generator).flatten(1), x.flatten(1)
        steps = 5 if fast else 400
        source = _fashion()[0].take(torch.randperm(60_000, generator=generator)[:6000])
        small = F.avg_pool2d(F.pad(source.x, (2, 2, 2, 2)), 4).flatten(1)
        base = fit(build(mlp, seed), small, source.y, steps, 1e-3, seed)
        nets = [
            fit(base, flat[few], y[few], steps, 1e-3, seed),
            fit(base, turned, y[donor], steps, 1e-3, seed),
        ]
        fishers = [
            fisher_diagonal(nets[0], (flat[few], y[few])),
            fisher_diagonal(nets[1], (turned, y[donor])),
        ]
        body: dict[str, Any] = {"mergeable": "^[02]\\."}
        found = {"target alone": right(nets[0], (flat[test], y[test]))}
        for method, options in MERGES.items():
            given, options = (None, {}) if options is None else (fishers, options)
            best = search(nets, given, lambda n: right(n, (flat[held], y[held])), n=GRID, **options, **body)[
                1
            ]
            found[method] = right(merge(nets, given, best[0], **options, **body), (flat[test], y[test]))
        start = copy.deepcopy(nets[1])
        start[4] = copy.deepcopy(base[4])  # type: ignore[operator, index]
        tuned = fit(start, flat[few], y[few], steps, 1e-3, seed)
        return found | {TRANSFER[-1]: right(tuned, (flat[test], y[test]))}

    return dict(kept(settings, SLUG, f"transfer-{seed}", {"fast": fast, "version": 1}, make))


# --- the whole ---------------------------------------------------------------------------------------------


def run(settings: Settings, fast: bool = False) -> Result:
    """Train, merge, judge by ``RULE``."""
    seeds = settings.seed_list(20 if settings.full else 10)
    tasks = [(settings, s, fast) for s in seeds]
    ensembles = parallel(_ensembles, tasks, settings, label="copies of skewed classes")
    transfers = parallel(_transfer, tasks, settings, label="another task")
    rows = [
        Row(
            f"{method}, alpha {alpha:g}",
            tuple(e["alphas"][str(alpha)][method] for e in ensembles),
            _cost(method),
        )
        for alpha in ALPHAS
        for method in METHODS
    ]
    rows += [
        Row(f"{m}, robust fine-tuning", tuple(_both(e["robust"][m]) for e in ensembles), _robust_cost(m))
        for m in ROBUST
    ]
    rows += [
        Row(
            f"{m}, another task",
            tuple(t[m] for t in transfers),
            f"lambda of {GRID} by 200 held-out digits" if m in MERGES else "no lambda",
        )
        for m in TRANSFER
    ]
    return judged(rows, gaussian_errors(), ensembles[0]["robust"])


def _both(found: Any) -> float:
    """Mean of accuracy on the mix and on all classes, at the lambda that held-out images chose."""
    pair = found["curve"][found["chosen"]] if isinstance(found, dict) else found
    return float(sum(pair)) / 2


def _cost(method: str) -> str:
    return f"{COPIES} networks when used" if method == "output ensemble" else "1 network when used"


def _robust_cost(method: str) -> str:
    return "no lambda" if method in ("base", "fine-tuned") else f"lambda of {GRID} by {HELD} held-out images"


def judged(rows: Sequence[Row], errors: dict[str, float], curves: dict[str, Any]) -> Result:
    """The verdict by ``RULE``."""
    found = {r.method: r for r in rows}

    def against(a: str, b: str, where: str) -> Gain:
        return gain(found[f"{a}, {where}"], found[f"{b}, {where}"])

    def mean(method: str) -> list[float]:
        values = [found[f"{method}, alpha {a:g}"].values for a in ALPHAS]
        return [sum(v) / len(v) for v in zip(*values, strict=True)]

    skews = {a: against("Fisher", "plain average", f"alpha {a:g}") for a in ALPHAS}
    ensemble = gain(mean("Fisher"), mean("output ensemble"))
    robust = against("Fisher", "plain interpolation", "robust fine-tuning")
    alone = against("Fisher", "target alone", "another task")
    plain = against("Fisher", "plain average", "another task")
    met = [
        errors["Fisher"] < 1e-8 and errors["plain"] > 1e-3,
        *(g.above() for g in skews.values()),
        not ensemble.below(),
        not robust.below(),
        alone.above(),
        plain.above(),
    ]
    raw = gain(mean("Fisher, not normalised"), mean("Fisher"))
    words = f"Gaussian models merge to {errors['Fisher']:.1e} of the pooled solution"
    words += f" (plain average {errors['plain']:.2g} off); "
    words += "Fisher - plain average: " + ", ".join(f"alpha {a:g} {g}" for a, g in skews.items())
    words += f"; Fisher - output ensemble {ensemble}; robust fine-tuning, Fisher - plain {robust}"
    words += "; another task, Fisher - "
    words += f"target alone {alone}, - plain {plain}; without normalising {raw} over the three skews"
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        f"{sum(met)} of {len(met)} conditions met. {words}.",
        "test accuracy",
        tuple(rows),
        pictures=((f"{SLUG}.png", picture(found, curves)),),
        links={
            "paper": "https://arxiv.org/abs/2111.09832",
            "code": "https://github.com/mmatena/model_merging",
        },
    )


COLORS = {
    "base": "#9aa5ad", "mean single": "#c9b18f", "best single": "#b08d57", "plain average": "#5b8db8",
    "plain interpolation": "#5b8db8", "Fisher": "#c8442e", "Fisher, not normalised": "#e39a6f",
    "output ensemble": "#4f7f5b",
}  # fmt: skip


def picture(found: dict[str, Row], curves: dict[str, Any]) -> bytes:
    """Left: all seeds at each skew. Right: the trade along lambda of the first seed."""
    figure, (left, right_) = subplots(1, 2, figsize=(12, 5), width_ratios=(1.5, 1))
    for a, alpha in enumerate(ALPHAS):
        for k, method in enumerate(METHODS):
            row, at = found[f"{method}, alpha {alpha:g}"], a + 0.11 * (k - 3)
            left.bar(at, row.mean, 0.1, color=COLORS[method], alpha=0.85, label=method if a == 0 else None)
            left.plot([at] * len(row.values), row.values, ".", color="#1d2b36", markersize=3)
    low = min(min(r.values) for m, r in found.items() if "alpha" in m)
    left.set_ylim(max(0, low - 0.05), None)
    left.set_xticks(range(len(ALPHAS)), [f"class skew alpha {a:g}" for a in ALPHAS])
    left.set_ylabel("test accuracy")
    left.set_title("Four copies fine-tuned on skewed classes, merged", loc="left", fontsize=11)
    left.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, -0.22), frameon=False)
    for method in ROBUST[2:]:
        curve = torch.tensor(curves[method]["curve"])
        right_.plot(curve[:, 1], curve[:, 0], ".-", color=COLORS[method], label=method, alpha=0.9)
        chosen = curve[curves[method]["chosen"]]
        right_.plot(chosen[1], chosen[0], "o", color=COLORS[method], markersize=10, markeredgecolor="black")
    for name in ROBUST[:2]:
        right_.annotate(name, curves[name][::-1], textcoords="offset points", xytext=(6, -10), fontsize=9)
    right_.set_xlabel("accuracy on all classes")
    right_.set_ylabel("accuracy on the class mix of the fine-tuning")
    right_.set_title("From the base to one copy, as lambda grows (seed 0)", loc="left", fontsize=11)
    right_.legend(fontsize=8, title="circle: lambda by held-out images", title_fontsize=8)
    for axis in (left, right_):
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure)
