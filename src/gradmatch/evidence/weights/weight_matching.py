"""Networks trained from different seeds on Fashion-MNIST: barriers before and after their units are matched, and why.

Each seed trains three MLPs (784-256-256-256-10, 20 epochs of SGD with a cosine on the first 10,000 images) with weight
decay 5e-4, two with none and two with 3e-3, two without any of that (Adam, He's initialisation: the negative
control), and two small ConvNets with batch-norm. B is matched to A by weights, by activations, and by gradients of
the loss in the middle; random permutations stand beside them. Barriers are of the training loss, of which an
overfitted pair has one even where its test loss shows none. Nothing is tuned: no method here has a rate but the
straight-through one, whose settings are the published form's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.assign import Permutation, PermutationSpec, singular
from gradmatch.core.examples import Examples
from gradmatch.core.networks import seeded
from gradmatch.core.picture import blank, png
from gradmatch.core.problem import Problem
from gradmatch.core.segment import Segment, segment
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import Gain, Result, Row, Settings, gain, halved, kept, parallel, verdict_of
from gradmatch.weights import activation_match, analyze_merge, barrier, energy_share, ste_match, weight_match
from gradmatch.weights._merge_analysis import taylor_barrier
from gradmatch.zoo import convnet

SLUG = "weight-matching"
TITLE = "Weight matching: why permuted networks average well"
CLAIM = (
    "Permuting one network's units by weight matching removes the barrier on the line to another while the distance "
    "falls only modestly: the permutation aligns singular vectors of large singular values. A second-order expansion "
    "does not predict the barrier, and straight-through estimation, which does not align them, leaves larger "
    "barriers among three networks."
)
RULE = (
    "Of the training loss, by pairs of seeds; a difference counts if it exceeds two standard errors. (1) With weight "
    "decay 5e-4 and with 3e-3, weight matching leaves less than a tenth of the naive barrier of the MLPs. (2) The "
    "distance falls by less than half in both. (3) Second-order estimates miss the true gap in the middle by more "
    "than half of it, before and after matching, at 5e-4. (4) R(0.3) rises, and after matching is above R(0), at both "
    "decays. (5) R(0.3) to an end is higher for the matched average than for the naive one. (6) R(0.3) of weight and "
    "of activation matching are both above that of straight-through estimation. (7) Between two networks both matched "
    "to a third, the barrier is larger for straight-through estimation than for weight matching. (8) More decay, more "
    "alignment: R(0.3) after weight matching rises from no decay to 5e-4 to 3e-3. (9) Weight matching with "
    "re-estimated statistics leaves less than half of the ConvNets' naive barrier. 'holds' if all nine are met, 'holds "
    "in part' if some are, 'does not hold' if none is. The negative control is shown and not judged."
)

TRAIN, TEST = 10_000, 5_000
WIDTH, EPOCHS, BATCH, RATE = 256, 20, 128, 0.1
DECAYS = {"none": 0.0, "5e-4": 5e-4, "3e-3": 3e-3}
GAMMA = 0.3
POINTS, FEW = 25, 13
CONV_EPOCHS, CONV_WIDTH = 10, 48
SHOWN = 24
"""Singular directions of the picture's overlaps."""


@lru_cache(maxsize=1)
def data() -> tuple[Examples, Examples]:
    """The first training and test images, raw in [0, 1]."""
    found = fashion_mnist()
    return found.train.take(torch.arange(TRAIN)), found.test.take(torch.arange(TEST))


def mlp(seed: int, variance: float = 1.0) -> nn.Sequential:
    """784-256-256-256-10 with weights of variance ``variance`` / fan-in and no biases at the start."""
    with seeded(seed):
        layers: list[nn.Module] = [nn.Flatten()]
        for before in (784, WIDTH, WIDTH):
            layers += [nn.Linear(before, WIDTH), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
        for part in net:
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=math.sqrt(variance / part.in_features))
                nn.init.zeros_(part.bias)
    return net


def conv(seed: int) -> nn.Module:
    """Two blocks of 3 x 3 convolutions with batch-norm, for images of 14 x 14."""
    with seeded(seed):
        return convnet(size=14, width=CONV_WIDTH, depth=2, norm="batch")


def trained(
    net: nn.Module, images: Examples, seed: int, decay: float, epochs: int, adam: bool = False
) -> nn.Module:
    """SGD with momentum, one epoch of warm-up and a cosine; or Adam at 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(images) // BATCH)
    warm = steps // epochs
    optimizer: torch.optim.Optimizer
    if adam:
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    else:
        optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=decay)
    net.train()
    order = torch.empty(0)
    for step in range(steps):
        if step % warm == 0:
            order = torch.randperm(len(images), generator=generator)
        if not adam:
            factor = (
                (step + 1) / warm
                if step < warm
                else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
            )
            optimizer.param_groups[0]["lr"] = RATE * factor
        at = order[step % warm * BATCH :][:BATCH]
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images.x[at]), images.y[at])
        torch.autograd.backward(loss)
        optimizer.step()
    return net.eval()


def _problem(net: nn.Module, images: Examples) -> Problem:
    return Problem(net, "cross_entropy", (images.x, images.y), batch_size=2500)


def _path(found: Segment) -> dict[str, Any]:
    accuracies = [] if found.accuracies is None else found.accuracies.tolist()
    return {
        "barrier": found.barrier,
        "gap": found.midpoint_gap,
        "losses": found.losses.tolist(),
        "accuracies": accuracies,
    }


def _overlaps(a: Tensor, b: Tensor) -> list[list[float]]:
    """|u . u'| |v . v'| of the leading singular directions of two weights."""
    x, y = singular(a), singular(b)
    grid = (x.u.T @ y.u).abs() * (x.vh @ y.vh.T).abs()
    return [[round(v, 3) for v in row] for row in grid[:SHOWN, :SHOWN].tolist()]


def _alignment(a: nn.Module, b: nn.Module, found: Permutation) -> dict[str, Any]:
    """What one permutation of B does to distances and singular directions."""
    report, all_of = (analyze_merge(a, b, found, gamma) for gamma in (GAMMA, 0.0))
    return {
        "reduction": report.reduction, "R before": report.agreement, "R": report.agreement_matched,
        "R0": all_of.agreement_matched, "merged": list(report.merged),
    }  # fmt: skip


def _middle(a: nn.Module, b: Permutation | None, other: nn.Module) -> list[float]:
    """Test loss and accuracy half-way."""
    end = other if b is None else b.apply(other)
    held = barrier(_problem(a, data()[1]), a, end, points=3, split="test")
    assert held.accuracies is not None
    return [float(held.losses[1]), float(held.accuracies[1])]


def _triple(seed: int) -> dict[str, Any]:
    """Three MLPs at weight decay 5e-4: every method, and the pair that was matched to the third."""
    train, test = data()
    nets = [trained(mlp(3 * seed + k), train, 3 * seed + k, DECAYS["5e-4"], EPOCHS) for k in (1, 2, 3)]
    a, b, c = nets
    spec, problem = PermutationSpec.from_module(a, train.x[:2]), _problem(a, train)
    pairs = (train.x, train.y)
    methods: dict[str, Callable[[nn.Module], Permutation]] = {
        "naive": lambda _: Permutation.identity(spec),
        "random permutation": lambda _: Permutation.random(spec, seed),
        "weight matching": lambda other: weight_match(spec, a, other, seed=seed),
        "activation matching": lambda other: activation_match(spec, a, other, pairs),
        "straight-through": lambda other: ste_match(spec, a, other, pairs, seed=seed),
    }
    found: dict[str, Any] = {"ends": [_accuracy(n, test) for n in nets]}
    for name, match in methods.items():
        to_b, to_c = match(b), match(c)
        moved = to_b.apply(b)
        points = POINTS if name in ("naive", "weight matching") else FEW
        own = _alignment(a, b, to_b) | {"path": _path(barrier(problem, a, moved, points=points))}
        third = barrier(problem, moved, to_c.apply(c), points=FEW)
        own |= {"test": _middle(a, to_b, b), "third": third.barrier}
        if points == POINTS:
            own["taylor"] = taylor_barrier(problem, a, moved)
            own["overlaps"] = _overlaps(a.state_dict()["3.weight"], moved["3.weight"])
        found[name] = own
    return found


def _accuracy(net: nn.Module, images: Examples) -> float:
    with torch.no_grad():
        return float((net(images.x).argmax(1) == images.y).double().mean())


def _decay(seed: int, name: str) -> dict[str, Any]:
    """Two MLPs at another weight decay, or the negative control."""
    train, test = data()
    adam = name == "control"
    a, b = (
        trained(
            mlp(3 * seed + k, 2.0 if adam else 1.0), train, 3 * seed + k, DECAYS.get(name, 0.0), EPOCHS, adam
        )
        for k in (1, 2)
    )
    spec, problem = PermutationSpec.from_module(a, train.x[:2]), _problem(a, train)
    move = weight_match(spec, a, b, seed=seed)
    shares = energy_share(spec, a, a, (train.x[:2000], train.y[:2000]), GAMMA)
    return {
        "ends": [_accuracy(n, test) for n in (a, b)],
        "naive": {"path": _path(barrier(problem, a, b, points=FEW)), "test": _middle(a, None, b)},
        "weight matching": _alignment(a, b, move)
        | {"path": _path(barrier(problem, a, move.apply(b), points=FEW)), "test": _middle(a, move, b)},
        "energy": [list(pair) for pair in shares.values()],
    }


def _convs(seed: int) -> dict[str, Any]:
    """Two ConvNets with batch-norm, matched by weights and by activations, statistics averaged and re-estimated."""
    train, test = (halved(e) for e in data())
    nets = [trained(conv(3 * seed + k), train, 3 * seed + k, DECAYS["5e-4"], CONV_EPOCHS) for k in (1, 2)]
    a, b = nets
    spec = PermutationSpec.from_module(a, train.x[:2])
    few = train.take(torch.arange(0, len(train), 4))
    problem, inputs = _problem(a, few), (few.x, few.y)
    found: dict[str, Any] = {"ends": [_accuracy(n, test) for n in nets]}
    moves = {
        "naive": Permutation.identity(spec),
        "weight matching": weight_match(spec, a, b, seed=seed),
        "activation matching": activation_match(spec, a, b, inputs),
    }
    for name, move in moves.items():
        found[name] = _path(barrier(problem, a, move.apply(b), inputs, FEW))
    found["weight matching, averaged statistics"] = _path(
        segment(problem, a, moves["weight matching"].apply(b), FEW)
    )
    return found


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "triple": _triple,
    "none": lambda seed: _decay(seed, "none"),
    "3e-3": lambda seed: _decay(seed, "3e-3"),
    "control": lambda seed: _decay(seed, "control"),
    "convs": _convs,
}


def _part(settings: Settings, seed: int, name: str) -> dict[str, Any]:
    config = {
        "train": TRAIN,
        "epochs": EPOCHS,
        "points": [POINTS, FEW],
        "conv": [CONV_EPOCHS, CONV_WIDTH],
        "version": 1,
    }
    return dict(kept(settings, SLUG, f"{name}-{seed}", config, lambda: PARTS[name](seed)))


def run(settings: Settings) -> Result:
    """Train and match every seed's networks, judge by ``RULE``."""
    seeds = settings.seed_list(3)
    tasks = [(settings, s, name) for s in seeds for name in PARTS]
    done = parallel(_part, tasks, settings, label="networks")
    found = {(name, s): value for (_, s, name), value in zip(tasks, done, strict=True)}
    parts = {name: [found[name, s] for s in seeds] for name in PARTS}
    return _judged(_rows(parts), parts)


Parts = dict[str, list[dict[str, Any]]]


def _values(runs: Sequence[dict[str, Any]], *keys: Any) -> tuple[float, ...]:
    out = []
    for run_ in runs:
        for key in keys:
            run_ = run_[key]
        out.append(float(run_))  # type: ignore[arg-type]
    return tuple(out)


def _rows(parts: Parts) -> list[Row]:
    """Barriers first, then what explains them."""
    triple, rows = parts["triple"], []
    for name in METHODS:
        loss, right = (_mean(_values(triple, name, "test", k)) for k in (0, 1))
        fall = _mean(_values(triple, name, "reduction"))
        cost = (
            f"signed gap in the middle {_mean(_values(triple, name, 'path', 'gap')):+.3f}; test loss there "
        )
        cost += f"{loss:.3f}, accuracy {right:.3f}; distance -{fall:.1f}%"
        rows.append(Row(f"barrier, MLP, decay 5e-4, {name}", _values(triple, name, "path", "barrier"), cost))
    for name in METHODS:
        rows.append(Row(f"barrier of two matched to a third, MLP, {name}", _values(triple, name, "third")))
    for decay in ("none", "3e-3", "control"):
        where = "Adam, no decay" if decay == "control" else f"decay {decay}"
        for name in ("naive", "weight matching"):
            own = [p[name] for p in parts[decay]]
            loss, right = (_mean(_values(own, "test", k)) for k in (0, 1))
            cost = f"test loss in the middle {loss:.3f}, accuracy {right:.3f}"
            rows.append(Row(f"barrier, MLP, {where}, {name}", _values(own, "path", "barrier"), cost))
    for name in CONVS:
        rows.append(
            Row(
                f"barrier, ConvNet, {name}", _values(parts["convs"], name, "barrier"), "2,500 training images"
            )
        )
    for name in METHODS:
        rows.append(Row(f"R(0.3), MLP, decay 5e-4, {name}", _values(triple, name, "R")))
    rows.append(Row("R(0), MLP, decay 5e-4, weight matching", _values(triple, "weight matching", "R0")))
    for decay in ("none", "3e-3", "control"):
        where = "Adam, no decay" if decay == "control" else f"decay {decay}"
        own = [p["weight matching"] for p in parts[decay]]
        rows.append(Row(f"R(0.3), MLP, {where}, naive", _values(own, "R before")))
        rows.append(Row(f"R(0.3), MLP, {where}, weight matching", _values(own, "R"),
                        f"distance -{_mean(_values(own, 'reduction')):.1f}%"))  # fmt: skip
        rows.append(Row(f"R(0), MLP, {where}, weight matching", _values(own, "R0")))
    for k, name in enumerate(("naive average", "matched average")):
        rows.append(
            Row(
                f"R(0.3) of an end and the {name}, decay 5e-4",
                _values(triple, "weight matching", "merged", k),
            )
        )
    for name in ("naive", "weight matching"):
        rows.append(Row(f"second-order estimate of the middle, {name}", _values(triple, name, "taylor")))
    for layer in range(4):
        of = _mean(_values(parts["3e-3"], "energy", layer, 1))
        rows.append(Row(f"input energy on leading directions, decay 3e-3, layer {layer + 1}",
                        _values(parts["3e-3"], "energy", layer, 0), f"{of:.1%} of the directions"))  # fmt: skip
    return rows


METHODS = ("naive", "random permutation", "weight matching", "activation matching", "straight-through")
CONVS = ("naive", "weight matching", "activation matching", "weight matching, averaged statistics")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _judged(rows: list[Row], parts: Parts) -> Result:
    row = {r.method: r for r in rows}

    def scaled(name: str, factor: float) -> list[float]:
        return [factor * v for v in row[name].values]

    def barriers(decay: str) -> Gain:
        name = f"barrier, MLP, decay {decay}"
        return gain(scaled(f"{name}, naive", 0.1), row[f"{name}, weight matching"])

    def missed(name: str) -> bool:
        truth = _values(parts["triple"], name, "path", "gap")
        error = [abs(e - t) for e, t in zip(_values(parts["triple"], name, "taylor"), truth, strict=True)]
        return gain(error, [abs(t) / 2 for t in truth]).above()

    def r(decay: str, method: str, gamma: str = "0.3") -> Row:
        return row[f"R({gamma}), MLP, decay {decay}, {method}"]

    wm, ste = "weight matching", "straight-through"
    reductions = [
        [p[wm]["reduction"] for p in parts["triple"]],
        [p[wm]["reduction"] for p in parts["3e-3"]],
    ]
    met = {
        "barrier under a tenth": all(barriers(d).above() for d in ("5e-4", "3e-3")),
        "distance falls by less than half": all(gain([50.0] * len(v), v).above() for v in reductions),
        "second order misses": all(missed(name) for name in ("naive", wm)),
        "leading directions align": all(
            gain(r(d, wm), r(d, "naive")).above() and gain(r(d, wm), r(d, wm, "0")).above()
            for d in ("5e-4", "3e-3")
        ),
        "the matched average is nearer in direction": gain(
            row["R(0.3) of an end and the matched average, decay 5e-4"],
            row["R(0.3) of an end and the naive average, decay 5e-4"],
        ).above(),
        "straight-through aligns less": all(
            gain(r("5e-4", name), r("5e-4", ste)).above() for name in (wm, "activation matching")
        ),
        "straight-through fails for three": gain(
            row[f"barrier of two matched to a third, MLP, {ste}"],
            row[f"barrier of two matched to a third, MLP, {wm}"],
        ).above(),
        "decay aligns": gain(r("5e-4", wm), r("none", wm)).above()
        and gain(r("3e-3", wm), r("5e-4", wm)).above(),
        "ConvNets": gain(scaled("barrier, ConvNet, naive", 0.5), row[f"barrier, ConvNet, {wm}"]).above(),
    }
    not_met = [k for k, v in met.items() if not v]
    reason = (
        f"Training barrier of the MLPs {row['barrier, MLP, decay 5e-4, naive'].mean:.3f} naive, "
        f"{row[f'barrier, MLP, decay 5e-4, {wm}'].mean:.3f} after weight matching (decay 5e-4) while the distance "
        f"falls by {_mean(reductions[0]):.0f}%; R(0.3) {r('5e-4', 'naive').mean:.3f} to {r('5e-4', wm).mean:.3f}. "
        f"Conditions met: {sum(met.values())} of {len(met)}"
    )
    reason += f"; not met: {', '.join(not_met)}." if not_met else "."
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(list(met.values())),
        reason,
        "the quantity each row names (barriers: training loss, lower is better; R: up to 1)",
        tuple(rows),
        higher_is_better=False,
        pictures=((f"{SLUG}.png", _picture(parts)),),
        links={
            "paper": "https://arxiv.org/abs/2402.04051",
            "weight matching": "https://arxiv.org/abs/2209.04836",
        },
    )


def _picture(parts: Parts) -> bytes:
    """The loss along both kinds of paths, and the leading singular directions before and after matching."""
    figure = blank(figsize=(11, 8.2))
    top, bottom = cast(Any, figure).subfigures(2, 1, height_ratios=(1, 1.15))
    paths = {m: [p[m]["path"] for p in parts["triple"]] for m in METHODS}
    convs = {m: [p[m] for p in parts["convs"]] for m in CONVS}
    titles = ("MLPs: training loss between two networks", "ConvNets with batch-norm: the same")
    for axis, own, title in zip(top.subplots(1, 2), (paths, convs), titles, strict=True):
        for name, runs in own.items():
            losses = torch.tensor([r["losses"] for r in runs])
            t = torch.linspace(0, 1, losses.shape[1])
            color = COLORS[name]
            axis.plot(t, losses.mean(0), color=color, lw=2, label=name, ls=":" if "averaged" in name else "-")
            for each in losses:
                axis.plot(t, each, color=color, lw=0.6, alpha=0.4)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("from A (0) to B (1)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, loc="upper left" if own is paths else "upper right")
        axis.set_ylim(0, 1.25 * max(max(r["losses"]) for runs in own.values() for r in runs))
    first = parts["triple"][0]
    axes = bottom.subplots(1, 2)
    for axis, name in zip(axes, ("naive", "weight matching"), strict=True):
        shown = axis.imshow(first[name]["overlaps"], vmin=0, vmax=0.6, cmap="magma")
        axis.set_title(
            f"second layer, {name}: R(0.3) of the network {first[name]['R']:.2f}", loc="left", fontsize=11
        )
        axis.set_xlabel("singular directions of B, largest first")
        axis.set_ylabel("of A")
        axis.set_xticks([])
        axis.set_yticks([])
    bottom.colorbar(shown, ax=axes, shrink=0.8, label="|u . u'| |v . v'|")
    return png(figure)


COLORS = {
    "naive": "#b3423a",
    "random permutation": "#d9a441",
    "weight matching": "#2f6f9f",
    "weight matching, averaged statistics": "#2f6f9f",
    "activation matching": "#3c8d5a",
    "straight-through": "#7b5aa6",
}
