"""Pairs of networks trained from different seeds on Fashion-MNIST, compared unit by unit, group by group, and mixed.

Each seed is a pair of MLPs (784-256-256-256-10, 15 epochs of plain SGD on the first 10,000 images, weight decay 3e-3
and 5e-4) and a pair of small ConvNets on images of 14 x 14. Activations are taken on 5,000 test images, even ones to
fit predictions and odd ones to test them. Beside every figure stand pairs that were not trained, whose first layers
see the same few strong directions of the data, and pairs trained on shuffled labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gradmatch.analysis import Activations, cocluster, collect, match_units, sparse_predict
from gradmatch.analysis.convergent_learning import layer_report
from gradmatch.core.examples import Examples
from gradmatch.core.networks import seeded
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import Result, Row, Settings, gain, halved, kept, parallel, verdict_of
from gradmatch.evidence.analysis._unit_picture import Runs, mean, picture, values

SLUG = "convergent-learning"
TITLE = "Convergent learning: do different networks learn the same representations?"
CLAIM = (
    "Networks trained from different seeds share features one to one, except for a tail that only one has; few units "
    "of one predict a unit of the other much better than its best match, more of them deeper down; subspaces are "
    "shared though bases are not, and codes lie between local and distributed."
)
RULE = (
    "Of pairs, each also untrained; a difference counts if it exceeds two standard errors over the pairs, and a "
    "condition must be met in every layer it speaks of. For the MLPs at both decays: (1) matched correlation one to "
    "one is above that of untrained pairs. (2) More than half of the units match above 0.5, and some below 0.3. (3) "
    "The lasso at lambda 0.1 predicts held-out activations better than the best single unit, from fewer than a tenth "
    "of the units. (4) The error left by all units (ridge) is below that of the best single unit, and that ratio is "
    "lower than in untrained pairs. (5) Mixing B's units with their covariance kept lowers matched correlation. (6) "
    "Best matches by mutual information are nearly those by correlation: their absolute correlation is at least 95 % "
    "of the best. For the ConvNets: (7) the first and the last convolution match better than the middle one. (8) The "
    "lasso needs more units at each deeper convolution. 'holds' if all eight are met, 'holds in part' if some are, "
    "'does not hold' if none is. Shuffled labels, plain rotations and co-clusters are shown and not judged."
)

TRAIN, TEST = 10_000, 5_000
WIDTH, EPOCHS, CONV_EPOCHS, BATCH = 256, 15, 8, 100
DECAYS = {"3e-3": 3e-3, "5e-4": 5e-4}
LAMBDAS = (0.3, 0.1, 0.03, 0.01)
KINDS = (
    "MLP, decay 3e-3",
    "MLP, decay 5e-4",
    "MLP, untrained",
    "MLP, shuffled labels",
    "ConvNet",
    "ConvNet, untrained",
)
SHOWN = 9
"""Matched and unmatched pairs of units in the picture."""


@lru_cache(maxsize=1)
def data() -> tuple[Examples, Examples]:
    """The first training and test images, raw in [0, 1]."""
    found = fashion_mnist()
    return found.train.take(torch.arange(TRAIN)), found.test.take(torch.arange(TEST))


def mlp(seed: int) -> nn.Sequential:
    """PyTorch's own initialisation."""
    with seeded(seed):
        layers: list[nn.Module] = [nn.Flatten()]
        for before in (784, WIDTH, WIDTH):
            layers += [nn.Linear(before, WIDTH), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def conv(seed: int) -> nn.Sequential:
    """Three convolutions for images of 14 x 14."""
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10),
        )  # fmt: skip


def trained(net: nn.Module, images: Examples, seed: int, decay: float, epochs: int) -> nn.Module:
    """Plain SGD at 0.1."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=decay)
    for _ in range(epochs):
        for at in torch.split(torch.randperm(len(images), generator=generator), BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images.x[at]), images.y[at])
            torch.autograd.backward(loss)
            optimizer.step()
    return net.eval()


def _pair(kind: str, seed: int) -> tuple[list[nn.Module], Examples]:
    """Two networks of a kind, and the images they are read on."""
    train, test = data()
    if kind.startswith("ConvNet"):
        train, test = halved(train), halved(test)
    if "shuffled" in kind:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        train = Examples(train.x, train.y[order], train.classes)
    seeds = (2 * seed + 1, 2 * seed + 2)
    nets = [conv(s) if kind.startswith("ConvNet") else mlp(s) for s in seeds]
    if "untrained" in kind:
        return [n.eval() for n in nets], test
    decay = DECAYS.get(kind.rpartition(" ")[2], 3e-3)
    epochs = CONV_EPOCHS if kind.startswith("ConvNet") else EPOCHS
    return [trained(n, train, s, decay, epochs) for n, s in zip(nets, seeds, strict=True)], test


def _measured(kind: str, seed: int) -> dict[str, Any]:
    """Every layer of one pair."""
    nets, test = _pair(kind, seed)
    is_mlp = kind.startswith("MLP")
    seen = collect(nets, (test.x, test.y), samples=5000 if is_mlp else 0, seed=seed)
    with torch.no_grad():
        right = [float((n(test.x).argmax(1) == test.y).double().mean()) for n in nets]
    layers = [_layer(seen, name, seed, is_mlp) for name in seen.layers]
    found: dict[str, Any] = {"accuracy": right, "layers": layers}
    if is_mlp:
        found |= {"curves": _curves(seen), "weights": _shown(nets, seen)}
    return found


def _layer(seen: Activations, name: str, seed: int, information: bool) -> dict[str, Any]:
    line = layer_report(seen, name, 0, 1, seed)
    path = sparse_predict(seen, name, 0, 1, LAMBDAS, seed=seed)
    groups = cocluster(seen, name)
    found: dict[str, Any] = {
        **{k: getattr(line, k) for k in ("one2one", "semi", "chance", "common", "unique", "ridge", "single", "cka")},
        "mixed": line.whitened, "turned": line.turned, "dead": sum(line.dead),
        "losses": path.losses.mean(1).tolist(), "nonzero": path.nonzero.double().mean(1).tolist(),
        "shuffled": path.shuffled.mean(1).tolist(), "units": sum(seen.units[name]) / 2,
        "clusters": len(groups.clusters), "shared": groups.shared(),
    }  # fmt: skip
    if information:
        table = seen.correlation(name, 0, 1).abs()
        by_mi = match_units(seen, name, how="semi", score="mi")
        by_corr = match_units(seen, name, how="semi", absolute=True)
        found["mi share"] = float(table[by_mi.a, by_mi.b].mean() / by_corr.scores.mean())
        found["mi same"] = float((by_mi.b == by_corr.b).double().mean())
    return found


def _curves(seen: Activations) -> dict[str, list[float]]:
    """Sorted correlations of the second layer, one to one and best for each."""
    name = seen.layers[1]
    return {
        how: [
            round(v, 4) for v in match_units(seen, name, how=how).scores.sort(descending=True).values.tolist()
        ]
        for how in ("one2one", "semi")
    }


def _shown(nets: Sequence[nn.Module], seen: Activations) -> dict[str, Any]:
    """Weights of the first layer's best and worst matched units."""
    found = match_units(seen, seen.layers[0])
    order = found.scores.argsort(descending=True)
    places = [order[k * (len(order) - 1) // (2 * SHOWN - 1)] for k in range(2 * SHOWN)]
    first, second = (n.state_dict()["1.weight"] for n in nets)
    return {
        "scores": [round(float(found.scores[p]), 3) for p in places],
        "a": [[round(v, 3) for v in first[found.a[p]].tolist()] for p in places],
        "b": [[round(v, 3) for v in second[found.b[p]].tolist()] for p in places],
    }


def _part(settings: Settings, kind: str, seed: int) -> dict[str, Any]:
    config = {
        "images": [TRAIN, TEST],
        "width": WIDTH,
        "epochs": [EPOCHS, CONV_EPOCHS],
        "lambdas": list(LAMBDAS),
        "version": 1,
    }
    name = f"{kind}-{seed}".replace(" ", "-").replace(",", "")
    return dict(kept(settings, SLUG, name, config, lambda: _measured(kind, seed)))


def run(settings: Settings) -> Result:
    """Train the pairs, compare them, judge by ``RULE``."""
    seeds = settings.seed_list(4)
    tasks = [(settings, kind, s) for s in seeds for kind in KINDS]
    done = parallel(_part, tasks, settings, label="pairs")
    found = {(kind, s): value for (_, kind, s), value in zip(tasks, done, strict=True)}
    return _judged({kind: [found[kind, s] for s in seeds] for kind in KINDS})


def _rows(runs: Runs) -> list[Row]:
    return [
        row
        for kind, own in runs.items()
        for k in range(len(own[0]["layers"]))
        for row in _layer_rows(own, k, f"{kind}, layer {k + 1}")
    ]


def _layer_rows(own: Sequence[dict[str, Any]], k: int, at: str) -> list[Row]:
    few = LAMBDAS.index(0.1)

    def average(key: str, place: int | None = None) -> float:
        return mean(values(own, k, key, place))

    matched = (
        f"semi {average('semi'):.3f}, random pairs {average('chance'):.3f}, above 0.5 {average('common'):.2f}, "
        f"below 0.3 {average('unique'):.2f}, dead {average('dead'):.1f}; CKA {average('cka'):.3f}; "
        f"accuracy {mean([v for r in own for v in r['accuracy']]):.3f}"
    )
    used = f"{average('nonzero', few):.1f} units; the same weights on shuffled units {average('shuffled', few):.2f}"
    lines: list[tuple[str, str, int | None, str]] = [
        ("correlation one to one", "one2one", None, matched),
        (
            "correlation, B mixed with its covariance kept",
            "mixed",
            None,
            f"plain rotation {average('turned'):.3f}",
        ),
        ("error from few units (lambda 0.1)", "losses", few, used),
        ("error from all units (ridge)", "ridge", None, ""),
        ("error from the best single unit", "single", None, ""),
        ("units in clusters of both", "shared", None, f"{average('clusters'):.1f} clusters"),
    ]
    if "mi share" in own[0]["layers"][k]:
        name = "correlation of matches by mutual information, share of the best"
        lines.append((name, "mi share", None, f"{average('mi same'):.2f} the same match"))
    return [Row(f"{name}, {at}", values(own, k, key, place), cost) for name, key, place, cost in lines]


def _conditions(runs: Runs) -> dict[str, bool]:
    """What ``RULE`` asks for, in its order."""
    mlps, untrained, convs = KINDS[:2], runs["MLP, untrained"], runs["ConvNet"]
    layers = range(len(untrained[0]["layers"]))
    few = LAMBDAS.index(0.1)
    cells = [(runs[kind], k) for kind in mlps for k in layers]

    def above(a: Sequence[float], b: Sequence[float] | float) -> bool:
        return gain(a, [b] * len(a) if isinstance(b, float) else b).above()

    def ratio(own: Sequence[dict[str, Any]], k: int) -> list[float]:
        return [x / y for x, y in zip(values(own, k, "ridge"), values(own, k, "single"), strict=True)]

    units = float(untrained[0]["layers"][0]["units"])
    first, middle, last = (values(convs, k, "one2one") for k in range(3))
    counts = [values(convs, k, "nonzero", few) for k in range(3)]
    return {
        "above untrained": all(
            above(values(o, k, "one2one"), values(untrained, k, "one2one")) for o, k in cells
        ),
        "most match, some do not": all(
            above(values(o, k, "common"), 0.5) and above(values(o, k, "unique"), 0.0) for o, k in cells
        ),
        "few units beat one": all(
            above(values(o, k, "single"), values(o, k, "losses", few))
            and above([units / 10] * len(o), values(o, k, "nonzero", few))
            for o, k in cells
        ),
        "subspaces are shared": all(
            above(values(o, k, "single"), values(o, k, "ridge")) and above(ratio(untrained, k), ratio(o, k))
            for o, k in cells
        ),
        "mixing breaks the match": all(
            above(values(o, k, "one2one"), values(o, k, "mixed")) for o, k in cells
        ),
        "information agrees": all(above(values(o, k, "mi share"), 0.95) for o, k in cells),
        "first and last convolution match best": above(first, middle) and above(last, middle),
        "deeper convolutions need more units": above(counts[1], counts[0]) and above(counts[2], counts[1]),
    }


def _judged(runs: Runs) -> Result:
    met = _conditions(runs)
    missed = [k for k, v in met.items() if not v]
    layers = range(len(runs[KINDS[0]][0]["layers"]))

    def matched(of: Sequence[dict[str, Any]]) -> str:
        return ", ".join(f"{mean(values(of, k, 'one2one')):.2f}" for k in layers)

    reason = (
        f"At decay 3e-3 matched correlation is {matched(runs[KINDS[0]])} in layers 1 to {len(layers)}, untrained "
        f"{matched(runs['MLP, untrained'])}. Conditions met: {sum(met.values())} of {len(met)}"
    )
    reason += f"; not met: {', '.join(missed)}." if missed else "."
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(list(met.values())),
        reason,
        "the quantity each row names (correlations: up to 1; errors: share of variance, lower is better)",
        tuple(_rows(runs)),
        pictures=((f"{SLUG}.png", picture(runs, LAMBDAS)),),
        links={
            "paper": "https://arxiv.org/abs/1511.07543",
            "code": "https://github.com/yixuanli/convergent_learning",
        },
    )
