"""Small supernets on digits: split by gradients, by chance, into all operations of one edge, or not at all.

The space is ``CellSpace``: 4 edges, 4 operations, 219 connected architectures. The truth of each is its accuracy on
397 held-out digits after training alone (1,000 digits, 4 epochs, SGD 0.1 with momentum, batches of 64, three starts).
Supernets are trained by sampled paths, 48 epochs in all for every method, and judged on 400 other digits: one net for
48; 8, then two for 4, then four from fresh weights for 8; or 8, then four for 10. Splits by gradients take 20 draws,
which cost about as much as the training, so one-shot also stands there with twice the epochs. Nothing is tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.networks import build
from gradmatch.core.picture import blank, png
from gradmatch.datasets import digits
from gradmatch.evidence._common import Gain, Result, Row, Settings, gain, kept, parallel, verdict_of
from gradmatch.weights._supernet_training import Recipe
from gradmatch.weights.gm_nas import CellSpace, FewShotNAS, GMSplitter, SearchResult, best_partition

SLUG = "gm-nas"
TITLE = "GM-NAS: supernets split where gradients disagree"
CLAIM = (
    "Sub-supernets split between operations whose gradients on the shared weights disagree rank architectures"
    " better than one supernet, than as many split at random, and than one for each operation of an edge."
)
RULE = (
    "Paired over 40 seeds; a difference counts if it exceeds two standard errors. Kendall's tau between "
    "accuracy in the supernet and alone, over all architectures: gradient matching is above (1) one-shot, (2)"
    " a random split, (3) one net for each operation of a random edge, (4) one-shot with twice the epochs. "
    "Over the best quarter: above (5) one-shot, (6) a random split. The accuracy lost by the architecture "
    "chosen: below (7) one-shot, (8) a random split. (9) Two copies of one operation end in one group on "
    "every edge, for every seed. 'holds' if all nine are met, 'holds in part' if some are, 'does not hold' if"
    " none is."
)

METHODS: dict[str, dict[str, Any]] = {
    "one-shot": {"splits": [], "final_epochs": 48},
    "one-shot, twice the epochs": {"splits": [], "final_epochs": 96},
    "random split": {"splits": [(8, 2), (12, 2)], "final_epochs": 8, "criterion": "random"},
    "all operations of a random edge": {"splits": [(8, 4)], "final_epochs": 10, "criterion": "exhaustive"},
    "gradient matching": {"splits": [(8, 2), (12, 2)], "final_epochs": 8, "criterion": "gm"},
}
GM = "gradient matching"
TRAIN, JUDGED = 1000, 400
REPEAT, BATCH = 20, 64
ALONE_EPOCHS, STARTS, PIECES = 4, 3, 8


@lru_cache(maxsize=1)
def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Digits to train on, to judge supernets on, and for the truth."""
    found = digits(test=0.01)
    x, y = torch.cat([found.train.x, found.test.x]), torch.cat([found.train.y, found.test.y])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    parts = order[:TRAIN], order[TRAIN : TRAIN + JUDGED], order[TRAIN + JUDGED :]
    a, b, c = ((x[i].flatten(1), y[i]) for i in parts)
    return a, b, c


@lru_cache(maxsize=1)
def architectures() -> list[tuple[int, ...]]:
    """All connected ones."""
    space = CellSpace()
    every = torch.cartesian_prod(*[torch.arange(4)] * 4).tolist()
    return [tuple(g) for g in every if space.connected(g)]


def _alone(settings: Settings, piece: int, epochs: int) -> list[float]:
    """Accuracies of a share of the architectures, each trained alone."""

    def make() -> list[float]:
        (x, y), _, (tx, ty) = data()
        found = []
        for genotype in architectures()[piece::PIECES]:
            scores = []
            for start in range(STARTS):
                net = build(lambda genotype=genotype: CellSpace().child(genotype), start)  # type: ignore[misc]
                optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
                g = torch.Generator().manual_seed(start)
                for _ in range(epochs):
                    for index in torch.split(torch.randperm(len(y), generator=g), BATCH):
                        optimizer.zero_grad()
                        torch.autograd.backward(F.cross_entropy(net(x[index]), y[index]))
                        optimizer.step()
                with torch.no_grad():
                    scores.append(float((net(tx).argmax(1) == ty).double().mean()))
            found.append(sum(scores) / STARTS)
        return found

    return list(kept(settings, SLUG, f"alone-{piece}", {"epochs": epochs, "version": 1}, make))


def _search(settings: Settings, seed: int, fast: bool) -> dict[str, list[float]]:
    """For every method the accuracy of all architectures in its supernets; for the picture, which net holds which."""

    def make() -> dict[str, Any]:
        train, judged, _ = data()
        found: dict[str, Any] = {}
        for method, options in METHODS.items():
            options = dict(options)
            if fast:
                options["splits"] = [(k + 1, g) for k, (_, g) in enumerate(options["splits"])]
                options["final_epochs"] = 1
            search = FewShotNAS(
                CellSpace(),
                recipe=Recipe(lr=0.1, lr_min=0.001, weight_decay=0.0),
                splitter={"repeat": 1 if fast else REPEAT},
                select_samples=1,
                batch_size=BATCH,
                seed=seed,
                **options,
            )
            result = search.fit(train, judged)
            found[method] = _accuracies(result, judged)
            if method == GM:
                leaves = result.tree.leaves()
                found["nets"] = [leaves.index(result.leaf_of(g)) for g in architectures()]
                split = result.tree.split
                assert split is not None
                found["root"] = {"d": split.distances.tolist(), "edge": split.edge, "groups": split.groups}
        return found

    return dict(kept(settings, SLUG, f"search-{seed}", {"fast": fast, "version": 1}, make))


@torch.no_grad()
def _accuracies(result: SearchResult, judged: tuple[Tensor, Tensor]) -> list[float]:
    return [result.leaf_of(g).trainee.accuracy(g, [judged]) for g in architectures()]


def twins(seed: int) -> list[list[list[int]]]:
    """Groups on each edge where the bottleneck is a copy of the linear layer; weights as trained for a moment."""

    class Twins(CellSpace):
        def supernet(self) -> nn.Module:
            net = super().supernet()
            for edge in net.cell.values():  # type: ignore[operator]
                edge.ops[3] = edge.ops[2]
            return net

    space, (train, _, _) = Twins(), data()
    net = build(space.supernet, seed)
    batches = [(train[0][i], train[1][i]) for i in torch.split(torch.arange(TRAIN), BATCH)]
    splitter = GMSplitter(space, repeat=REPEAT, vectorized=False, seed=seed)
    return [
        [list(g) for g in best_partition(splitter.distances(net, e, batches), 2)[0]]
        for e in range(len(space.edges))
    ]


def tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b."""
    from scipy.stats import kendalltau

    return float(kendalltau(a, b).statistic)


def run(settings: Settings, fast: bool = False) -> Result:
    """Train all architectures alone and all supernets, judge by ``RULE``."""
    pieces = parallel(
        _alone,
        [(settings, p, 1 if fast else ALONE_EPOCHS) for p in range(PIECES)],
        settings,
        label="architectures alone",
    )
    truth = [0.0] * len(architectures())
    for p, piece in enumerate(pieces):
        truth[p::PIECES] = piece
    seeds = settings.seed_list(100 if settings.full else 40)
    searches = parallel(_search, [(settings, s, fast) for s in seeds], settings, label="searches")
    together = all([2, 3] in groups for s in range(5) for groups in twins(s))
    return judged(truth, searches, together)


def judged(truth: Sequence[float], searches: Sequence[dict[str, Any]], together: bool) -> Result:
    """The verdict by ``RULE``, and the rows."""
    best = sorted(range(len(truth)), key=lambda k: -truth[k])[: len(truth) // 4]
    values: dict[str, dict[str, list[float]]] = {"all": {}, "best quarter": {}, "lost": {}}
    for method in METHODS:
        found = [s[method] for s in searches]
        values["all"][method] = [tau(f, truth) for f in found]
        values["best quarter"][method] = [tau([f[k] for k in best], [truth[k] for k in best]) for f in found]
        chosen = [max(range(len(truth)), key=lambda k: f[k]) for f in found]
        values["lost"][method] = [max(truth) - truth[k] for k in chosen]

    def gm(metric: str, other: str) -> Gain:
        return gain(values[metric][GM], values[metric][other])

    others = [m for m in METHODS if m != GM]
    gains = {metric: {m: gm(metric, m) for m in others} for metric in values}
    order = ("one-shot", "random split")
    met = [
        *(
            gains["all"][m].above()
            for m in (*order, "all operations of a random edge", "one-shot, twice the epochs")
        ),
        *(gains["best quarter"][m].above() for m in order),
        *(gains["lost"][m].below() for m in order),
        together,
    ]
    words = "; ".join(
        f"{label}: " + ", ".join(f"- {m} {g}" for m, g in gains[metric].items())
        for label, metric in (
            ("tau, gradient matching", "all"),
            ("best quarter", "best quarter"),
            ("accuracy lost", "lost"),
        )
    )
    rows = [Row(m, tuple(values["all"][m]), _cost(m, values)) for m in METHODS]
    rows += [Row(f"{m}, best quarter", tuple(values["best quarter"][m]), _cost(m, values)) for m in METHODS]
    unmet = ", ".join(str(k + 1) for k, m in enumerate(met) if not m) or "none"
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        f"{sum(met)} of {len(met)} conditions met (all but {unmet}). {words}; copies of one operation "
        f"{'always' if together else 'not always'} in one group.",
        "Kendall's tau with accuracy alone",
        tuple(rows),
        pictures=((f"{SLUG}.png", picture(truth, searches, values)),),
        links={"paper": "https://arxiv.org/abs/2203.15207", "code": "https://github.com/skhu101/GM-NAS"},
    )


def _cost(method: str, values: dict[str, dict[str, list[float]]]) -> str:
    lost = values["lost"][method]
    epochs = 96 if "twice" in method else 48
    extra = f" and 3 x {REPEAT} x 13 gradients" if method == GM else ""
    return f"{epochs} epochs{extra}; loses {sum(lost) / len(lost):.4f} of accuracy"


def picture(
    truth: Sequence[float], searches: Sequence[dict[str, Any]], values: dict[str, dict[str, list[float]]]
) -> bytes:
    """Supernet against truth for one seed, the distances behind its first split, and tau by method."""
    first, space = searches[0], CellSpace()
    figure = blank(figsize=(13, 7.6))
    top, bottom = cast(Any, figure).subfigures(2, 1, height_ratios=(1.5, 1))
    axes = top.subplots(1, 3, width_ratios=(1, 1, 1.15))
    for axis, method in zip(axes[:2], ("one-shot", GM), strict=True):
        nets = first["nets"] if method == GM else [1] * len(truth)
        axis.scatter(truth, first[method], c=nets, cmap="Set1", s=18, alpha=0.8, vmin=0, vmax=8)
        title = f"{method}: tau {values['all'][method][0]:.2f} (seed 0)"
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("accuracy of an architecture trained alone")
        axis.set_ylabel("accuracy in the supernet" if method != GM else "in its sub-supernet (colour)")
    for k, method in enumerate(METHODS):
        own = torch.tensor(values["all"][method])
        jitter = torch.rand(len(own), generator=torch.Generator().manual_seed(k)) * 0.3 - 0.15
        axes[2].plot(own, k + jitter, ".", color="#c8442e" if method == GM else "#5b8db8", alpha=0.6)
        axes[2].plot([own.mean()], [k], "|", color="black", markersize=22, markeredgewidth=2)
    axes[2].set_yticks(range(len(METHODS)), list(METHODS), fontsize=9)
    axes[2].invert_yaxis()
    axes[2].set_xlabel("Kendall's tau, all architectures (a dot a seed)")
    heats = bottom.subplots(1, len(space.edges))
    for e, axis in enumerate(heats):
        axis.imshow(first["root"]["d"][e], cmap="magma", vmin=0, vmax=1.2)
        chosen = first["root"]["edge"] == e
        groups = " | ".join(", ".join(space.OPS[o] for o in g) for g in first["root"]["groups"])
        axis.set_title(f"edge {space.edges[e]}" + (f": split into\n{groups}" if chosen else ""), fontsize=9)
        axis.set_xticks(range(4), space.OPS, fontsize=8, rotation=25)
        axis.set_yticks(range(4), space.OPS if e == 0 else [""] * 4, fontsize=8)
    bottom.suptitle("Distances of gradients behind the first split (seed 0)", fontsize=11, x=0.01, ha="left")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return png(figure, dpi=120)
