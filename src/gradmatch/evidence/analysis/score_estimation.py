"""When to stop estimating a score: the network against its kernel, the theory's rule, the hold-out, and samples.

Mixture: four Gaussians at (+-1, +-1) of deviation 0.05, dX = -X/2 dt + dB, t in [0.2, 2], 200 or 800 labels, each with
one time and one noise; 40 further points with ten each are the hold-out. The network has two layers and 512 units; eta
is 1 / the largest eigenvalue of K / N for everything. Errors are E |f - f*|^2 on 2,000 fresh points, f* being known.
The same network is also trained to predict the score itself, without weights.

Digits: 8 principal components, scaled to a leading deviation of 1; 100 training digits with 15 draws each, t in
[0.05, 3]; 200 others with 5 draws are the hold-out. Kernel path; 400 samples by 60 DDIM steps at each of three stops,
compared with 497 test digits by MMD, and with the training digits by distance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gradmatch.analysis import (
    DenoisingRegression,
    KernelPath,
    ReLUKernel,
    TweedieScore,
    TwoLayerReLU,
    error_split,
    stopping_time,
    train_score,
)
from gradmatch.analysis._kernel_path import step_grid
from gradmatch.core.path import OrnsteinUhlenbeck
from gradmatch.datasets import digits
from gradmatch.evidence._common import Result, Row, Settings, gain, kept, parallel, verdict_of
from gradmatch.evidence.analysis._score_picture import picture
from gradmatch.zoo.oracles import MixtureOracle

SLUG = "score-estimation"
TITLE = "Score estimation: regression with noisy labels, and when to stop it"
CLAIM = (
    "A wide network trained by gradient descent on denoising score matching follows a kernel regression; trained long "
    "it fits the noise in its labels, and a rule from the kernel's eigenvalues stops it in time."
)
RULE = (
    "Differences are paired by seed and count above two standard errors. Mixture, 200 labels: (1) at the rule's step "
    "the network's mean squared distance to the kernel fit falls from 128 to 512 and (2) from 512 to 2,048 units; (3) "
    "the kernel's error after 4,000 steps is above its least along the path, and (4) so is the network's; where the "
    "rule stops, with noise and norm estimated, (5) the kernel's error is below that after 4,000 steps, (6) the "
    "network's is below its own after 4,000 steps, and (7) the kernel's is on average at most 1.75 times the least; "
    "(8) the same as (7) with the norm 1 of the theory. 800 labels: (9) the kernel's error after 4,000 steps is above "
    "its least, (10) the rule's below it, and (11) at most 1.75 times the least. (12) The hold-out's stop has on "
    "average at most 1.05 times the least error, at 200 labels. Each trained to its own hold-out stop, Tweedie's form "
    "has a lower error of the score than the network that predicts the score itself, (13) weighted by (h/a)^2 and (14) "
    "unweighted. Digits: (15) the hold-out loss after 100,000 steps is above its least; (16) samples from the "
    "hold-out's stop have no higher MMD to test digits than samples from 100,000 steps. 'holds' if all are met, 'holds "
    "in part' if some are, 'does not hold' if none is. Distances to training digits are shown and not judged."
)

PATH = OrnsteinUhlenbeck()
T_MIN, T_MAX, STD = 0.2, 2.0, 0.05
LONG, LONGER, MOST = 4000, 12_000, 100_000
WIDTHS = (128, 512, 2048)
HELD, PROBES, SAMPLES = 40, 2000, 400
TRAINED, DRAWN, OTHERS, COMPONENTS = 100, 15, 200, 8
NEAR, FAR = 1.05, 1.75
Figures = dict[str, Any]


@lru_cache(maxsize=1)
def _oracle() -> MixtureOracle:
    means = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)])
    return MixtureOracle(means, STD, path=PATH, kind="x0")


def truth(x: Tensor, t: Tensor) -> Tensor:
    """E[X_0 | X_t = x]."""
    return _oracle()(x, t).tensor


def _task(count: int, seed: int, **options: Any) -> DenoisingRegression:
    data = _oracle().sample(count, torch.Generator().manual_seed(seed))
    return DenoisingRegression(data, PATH, t_min=T_MIN, t_max=T_MAX, seed=seed, **options)


def _tasks(count: int, seed: int, **options: Any) -> tuple[DenoisingRegression, ...]:
    """Training triples, the hold-out, and fresh points."""
    return (
        _task(count, seed, **options),
        _task(HELD, 1000 + seed, draws=10, **options),
        _task(PROBES, 2000 + seed),
    )


def kernel_run(seed: int, count: int) -> Figures:
    """Errors of the kernel fit along its path and at each stop."""
    train, held, probe = _tasks(count, seed)
    path = KernelPath(ReLUKernel(T_MIN), (train.inputs, train.t), train.labels)
    true, grid = truth(probe.inputs, probe.t), step_grid(LONGER)
    errors = path.loss(probe.inputs, probe.t, true, grid)
    rule = path.rule(held.inputs, held.t, held.labels, most=LONGER)
    one = stopping_time(path.eigenvalues, path.eta, rule.sigma, 1.0, n=count)
    best = int(errors.argmin())
    steps = {
        "least": int(grid[best]),
        "hold-out": rule.pilot,
        "rule": rule.step or 0,
        "rule with norm 1": one or 0,
        "4,000 steps": LONG,
        "12,000 steps": LONGER,
    }
    found = path.loss(probe.inputs, probe.t, true, list(steps.values()))
    return {
        "errors": dict(zip(steps, found.tolist(), strict=True)),
        "steps": steps,
        "zero": float(true.square().sum(1).mean()),
        "sigma": rule.sigma,
        "norm": rule.norm,
        "grid": grid.tolist(),
        "curve": errors.tolist(),
    }


def network_run(seed: int, count: int) -> Figures:
    """The network's error along its training, and its distance to the kernel fit by width."""
    train, held, probe = _tasks(count, seed)
    path = KernelPath(ReLUKernel(T_MIN), (train.inputs, train.t), train.labels)
    rule = path.rule(held.inputs, held.t, held.labels, most=LONGER).step or 1
    at, coupling = (probe.inputs, probe.t), {}
    for width in WIDTHS:
        net = TwoLayerReLU(2, width, t_min=T_MIN, seed=seed)
        looks = sorted({rule, *step_grid(LONG).tolist()}) if width == 512 else [rule]
        split = error_split(net, train, truth, looks, at)
        coupling[str(width)] = split.coupling[split.steps.index(rule)]
        if width == 512:
            curve = split
    least = min(range(len(looks := list(curve.steps))), key=lambda i: curve.network[i])
    return {
        "coupling": coupling,
        "grid": looks,
        "curve": list(curve.network),
        "parts": [list(p) for p in (curve.coupling, curve.mismatch, curve.approximation)],
        "least": curve.network[least],
        "rule": curve.network[looks.index(rule)],
        "long": curve.network[-1],
    }


def form_run(seed: int, target: str, count: int) -> Figures:
    """Errors of the score at the hold-out's stop, with Tweedie's form or with the score predicted itself."""
    data = torch.cat([_task(count, seed).data, _task(HELD, 1000 + seed).data])
    task = DenoisingRegression(data, PATH, t_min=T_MIN, t_max=T_MAX, target=target, seed=seed)  # type: ignore[arg-type]
    fit = train_score(TwoLayerReLU(2, 512, t_min=T_MIN, seed=seed), task, steps=LONG, held=HELD / len(data))
    probe = _task(PROBES, 2000 + seed)
    x, t = probe.inputs, probe.t
    with torch.no_grad():
        score = TweedieScore(fit.net, PATH).score(x, t) if target == "x0" else fit.net(x, t)
    apart = (score - TweedieScore(truth, PATH).score(x, t)).square().sum(1)
    levels = PATH.levels(t.double())
    weight = (levels.sigma.square() / levels.alpha).square()
    return {"weighted": float((weight * apart).mean()), "plain": float(apart.mean()), "step": fit.step}


def _fitted(path: KernelPath, k: int, radius: float) -> TweedieScore:
    """The kernel fit after k steps as a score."""
    return TweedieScore(lambda x, t: path.predict(x, t, k).to(x), PATH, radius)


@lru_cache(maxsize=1)
def _pictures() -> Tensor:
    found = digits()
    return torch.cat([found.train.x, found.test.x]).flatten(1).double()


def digits_run(seed: int) -> Figures:
    """Hold-out loss along the path, and samples at three stops against test and training digits."""
    order = torch.randperm(len(_pictures()), generator=torch.Generator().manual_seed(seed))
    parts = torch.split(_pictures()[order], [TRAINED, OTHERS, len(order) - TRAINED - OTHERS])
    mean = parts[0].mean(0)
    _, _, axes = torch.linalg.svd(parts[0] - mean, full_matrices=False)
    axes = axes[:COMPONENTS]
    scale = ((parts[0] - mean) @ axes[0]).std()
    train, held, test = ((p - mean) @ axes.T / scale for p in parts)
    test = test[:497]
    options: Figures = {"t_min": 0.05, "t_max": 3.0}
    task = DenoisingRegression(train, PATH, draws=DRAWN, seed=seed, **options)
    out = DenoisingRegression(held, PATH, draws=5, seed=1000 + seed, **options)
    path = KernelPath(ReLUKernel(0.05), (task.inputs, task.t), task.labels)
    grid = step_grid(MOST)
    losses = path.loss(out.inputs, out.t, out.labels, grid)
    stop = int(grid[losses.argmin()])
    found: Figures = {"grid": grid.tolist(), "losses": losses.tolist(), "stop": stop, "at": {}}
    nearest = torch.cdist(test, train).min(1).values
    found["test distance"] = float(nearest.mean())
    for name, k in (("hold-out", stop), ("1,000 steps", 1000), ("100,000 steps", MOST)):
        fitted = _fitted(path, k, task.radius)
        drawn = fitted.sample(SAMPLES, COMPONENTS, steps=60, seed=seed).double()
        near = torch.cdist(drawn, train).topk(2, largest=False)
        found["at"][name] = {
            "mmd": mmd(drawn, test),
            "distance": float(near.values[:, 0].mean()),
            "copies": float((near.values[:, 0] < near.values[:, 1] / 3).double().mean()),
            "loss": float(path.loss(out.inputs, out.t, out.labels, k)),
            "images": (drawn[:10] * scale @ axes + mean).clamp(0, 1).tolist(),
            "nearest": parts[0][near.indices[:10, 0]].tolist(),
        }
    return found


def mmd(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased, with a Gaussian kernel as wide as the median distance in ``b``."""
    width = torch.pdist(b).median()
    inner = [torch.exp(-torch.cdist(x, y).square() / (2 * width**2)) for x, y in ((a, a), (b, b), (a, b))]
    own = [(k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in inner[:2]]
    return float(own[0] + own[1] - 2 * inner[2].mean())


def scatter_run(seed: int) -> Figures:
    """Samples of the kernel's score at three stops, for the picture."""
    train, held, _ = _tasks(200, seed)
    path = KernelPath(ReLUKernel(T_MIN), (train.inputs, train.t), train.labels)
    stop = path.rule(held.inputs, held.t, held.labels, most=LONGER)
    found: Figures = {"train": train.data.tolist(), "samples": {}}
    for name, k in (("rule", stop.step or 1), ("hold-out", stop.pilot), ("12,000 steps", LONGER)):
        fitted = _fitted(path, k, train.radius)
        found["samples"][f"{name} ({k})" if k != LONGER else name] = fitted.sample(
            600, 2, t_min=T_MIN, t_max=T_MAX, seed=seed
        ).tolist()
    return found


RUNS: dict[str, Callable[..., Figures]] = {
    "kernel": kernel_run,
    "network": network_run,
    "form": form_run,
    "digits": digits_run,
    "scatter": scatter_run,
}
CELLS: tuple[tuple[Any, ...], ...] = (
    ("digits",),
    ("network", 200),
    ("form", "x0", 200),
    ("form", "score", 200),
    ("kernel", 800),
    ("kernel", 200),
)


def _one(settings: Settings, seed: int, cell: tuple[Any, ...]) -> Figures:
    name = "-".join(map(str, (*cell, seed)))
    return dict(kept(settings, SLUG, name, {"version": 1}, lambda: RUNS[cell[0]](seed, *cell[1:])))


def run(settings: Settings) -> Result:
    """Everything for every seed, judged by ``RULE``."""
    seeds = settings.seed_list(5)
    tasks = [(settings, s, c) for c in CELLS for s in seeds] + [(settings, 0, ("scatter",))]
    found: dict[tuple[Any, ...], list[Figures]] = {}
    for (_, _, cell), value in zip(tasks, parallel(_one, tasks, settings, label="scores"), strict=True):
        found.setdefault(cell, []).append(value)
    return judged(found)


def judged(found: dict[tuple[Any, ...], list[Figures]]) -> Result:
    """Rows, conditions and verdict."""
    rows = [*_mixture_rows(found), *_form_rows(found), *_digit_rows(found["digits",])]
    met = _conditions({r.method: r for r in rows})
    failed = [name for name, ok in met.items() if not ok]
    reason = f"{len(met) - len(failed)} of {len(met)} conditions met"
    reason += f"; not met: {', '.join(failed)}." if failed else "."
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(list(met.values())),
        reason,
        "mean squared error, or as named in the row",
        tuple(rows),
        higher_is_better=False,
        pictures=((f"{SLUG}.png", picture(found)),),
        links={"paper": "https://arxiv.org/abs/2401.15604"},
    )


def _mixture_rows(found: dict[tuple[Any, ...], list[Figures]]) -> list[Row]:
    rows = []
    for count in (200, 800):
        runs = found["kernel", count]
        for name in runs[0]["errors"]:
            steps = [r["steps"][name] for r in runs]
            cost = f"steps {min(steps)} to {max(steps)}"
            if name == "rule":
                cost += ", norm {:.2f} to {:.2f}".format(*(f(r["norm"] for r in runs) for f in (min, max)))
            rows.append(Row(f"kernel, {count} labels: {name}", tuple(r["errors"][name] for r in runs), cost))
        rows.append(Row(f"{count} labels: zero function", tuple(r["zero"] for r in runs)))
    runs = found["network", 200]
    for name, key in (("least", "least"), ("rule", "rule"), ("4,000 steps", "long")):
        rows.append(Row(f"network, 200 labels: {name}", tuple(r[key] for r in runs)))
    for width in WIDTHS:
        values = tuple(r["coupling"][str(width)] for r in runs)
        rows.append(Row(f"network to kernel at the rule's step, {width} units", values))
    return rows


def _form_rows(found: dict[tuple[Any, ...], list[Figures]]) -> list[Row]:
    rows = []
    for target, name in (("x0", "Tweedie's form"), ("score", "score predicted itself")):
        runs = found["form", target, 200]
        steps = [r["step"] for r in runs]
        for key in ("weighted", "plain"):
            values = tuple(r[key] for r in runs)
            rows.append(Row(f"{name}: {key} score error", values, f"steps {min(steps)} to {max(steps)}"))
    return rows


def _digit_rows(runs: list[Figures]) -> list[Row]:
    rows = []
    for name in runs[0]["at"]:
        steps = [r["stop"] for r in runs]
        cost = f"steps {min(steps)} to {max(steps)}" if name == "hold-out" else ""
        for key, text in (
            ("loss", "hold-out loss"),
            ("mmd", "MMD to test digits"),
            ("distance", "distance to the nearest training digit"),
            ("copies", "copies of training digits"),
        ):
            values = tuple(r["at"][name][key] for r in runs)
            rows.append(Row(f"digits, {name}: {text}", values, cost))
    rows.append(
        Row(
            "digits, test digits: distance to the nearest training digit",
            tuple(r["test distance"] for r in runs),
        )
    )
    return rows


def _conditions(rows: dict[str, Row]) -> dict[str, bool]:
    def above(a: str, b: str) -> bool:
        return gain(rows[a], rows[b]).above()

    def within(name: str, count: int, factor: float) -> bool:
        return (
            rows[f"kernel, {count} labels: {name}"].mean
            <= factor * rows[f"kernel, {count} labels: least"].mean
        )

    gaps = [f"network to kernel at the rule's step, {w} units" for w in WIDTHS]
    k2, k8, net = "kernel, 200 labels: ", "kernel, 800 labels: ", "network, 200 labels: "
    tweedie, itself = "Tweedie's form: ", "score predicted itself: "
    end, stop = "digits, 100,000 steps: ", "digits, hold-out: "
    more = gain(rows[stop + "MMD to test digits"], rows[end + "MMD to test digits"])
    return {
        "coupling tighter at 512 units": above(gaps[0], gaps[1]),
        "coupling tighter at 2,048 units": above(gaps[1], gaps[2]),
        "kernel overfits": above(k2 + "4,000 steps", k2 + "least"),
        "network overfits": above(net + "4,000 steps", net + "least"),
        "rule helps the kernel": above(k2 + "4,000 steps", k2 + "rule"),
        "rule helps the network": above(net + "4,000 steps", net + "rule"),
        "rule near the least": within("rule", 200, FAR),
        "rule with norm 1 near the least": within("rule with norm 1", 200, FAR),
        "kernel overfits 800 labels": above(k8 + "4,000 steps", k8 + "least"),
        "rule helps at 800 labels": above(k8 + "4,000 steps", k8 + "rule"),
        "rule near the least at 800 labels": within("rule", 800, FAR),
        "hold-out at the least": within("hold-out", 200, NEAR),
        "Tweedie's form better, weighted": above(
            itself + "weighted score error", tweedie + "weighted score error"
        ),
        "Tweedie's form better, unweighted": above(
            itself + "plain score error", tweedie + "plain score error"
        ),
        "digits overfit": above(end + "hold-out loss", stop + "hold-out loss"),
        "digits sampled as well at the stop": not more.above(),
    }
