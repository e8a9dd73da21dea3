"""SSO: loss for each expensive gradient, against tuned optimizers, and what the inner steps cost in time.

1. Logistic regression (500 x 50, columns of scales 1 to 0.01), full batch: gap to the optimum after 10, 50, 200 calls.
2. An MLP on 1,000 digits with softmax and squared loss, full batch and batches of 64: loss after 20 and 100 calls, and
   in the time that tuned Adam takes for 20 calls, where a target gradient costs 0, 10 or 100 forward passes more.
3. Online imitation of a controller of a linearised cart-pole: rounds of interaction to 95 % of the expert.

Every rate, and eta of {1, 4, 10} / L where it is not fixed, is chosen on a draw of data and weights of its own, for
each number of calls anew.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from gradmatch.evidence._common import Result, Row, Settings, gain, parallel, verdict_of
from gradmatch.evidence.optim import _sso_problems as problems

SLUG = "sso"
TITLE = "SSO: target-based surrogates"
CLAIM = (
    "With ten or more inner steps on the surrogate, the loss for each call of an expensive gradient is lower than that "
    "of SGD with and without line search, Adam and Adagrad; full batches fall monotonically."
)
RULE = (
    "Lower means by two standard errors of the log ratio over seeds, every rate tuned on another draw. Logistic "
    "regression, eta 4: m 10 is below gradient descent at 10, 50 and 200 calls (3 conditions), m 100 below Adam (3), "
    "and the loss falls at every call for m 1, 10 and 100 in every seed (1). Digits, in each of softmax and squared "
    "loss x full batch and 64, m 20: below each of SGD, Armijo and Adagrad at 20 and at 100 calls (2), below Adam at "
    "20 calls (1), and below Adam in the time of its 20 calls where a target gradient costs 100 forward passes more "
    "(1). Imitation, m 20 at the safe eta: fewer rounds than each of SGD, Adam and Adagrad (1). 'holds' if all are "
    "met, 'holds in part' if some are."
)
LINKS = {
    "paper": "https://arxiv.org/abs/2302.02607",
    "code": "https://github.com/WilderLavington/Target-Based-Surrogates-For-Stochastic-Optimization",
}
METRIC = "training loss (gap to the optimum for logistic regression), or rounds of interaction"

OURS = "SSO m 20"
CELLS = tuple((kind, batch) for kind in ("softmax", "squared") for batch in (None, 64))
ETAS = (1.0, 4.0, 10.0)
RATES: dict[str, tuple[float, ...]] = {
    "SGD": (0.1, 0.3, 1.0, 3.0),
    "momentum": (0.03, 0.1, 0.3, 1.0),
    "Adam": (3e-3, 1e-2, 3e-2, 1e-1),
    "Adagrad": (0.03, 0.1, 0.3, 1.0),
    "Armijo": (1.0,),
    OURS: ETAS,
}
LOGISTIC: dict[str, tuple[float, ...]] = {
    "gradient descent": (4.0, 16.0, 64.0, 256.0),
    "Adam": (0.1, 0.3, 1.0, 3.0, 10.0),
    "SSO m 1": (1.0,),
    "SSO m 10": (1.0,),
    "SSO m 100": (1.0,),
}
IMITATION: dict[str, tuple[float, ...]] = {
    "SGD": (1e-3, 1e-2, 1e-1),
    "Adam": (1e-2, 3e-2, 1e-1, 3e-1),
    "Adagrad": (3e-2, 1e-1, 3e-1),
    OURS: (1.0,),
}
FACTORS = (0, 10, 100)
TUNING = 1000


class Budget(NamedTuple):
    """Sizes of the experiment."""

    seeds: int
    rows: int
    logistic_calls: tuple[int, ...]
    calls: tuple[int, int]
    rounds: int


SMALL = Budget(3, 1000, (10, 50, 200), (20, 100), 100)
FULL = Budget(10, 1797, (10, 50, 200), (20, 100), 400)


def cell_name(kind: str, batch: int | None) -> str:
    """In words."""
    return f"{kind}, {'full batch' if batch is None else f'batch {batch}'}"


def curve(
    where: str, kind: str, batch: int | None, method: str, rate: float, seed: int, budget: Budget
) -> tuple[list[float], float]:
    """Losses by call and passes a call of one training."""
    if where == "logistic":
        task = problems.logistic_task(seed)
        name = "SGD" if method == "gradient descent" else method
        return problems.losses_by_call(task, name, rate, budget.logistic_calls[-1])
    return problems.losses_by_call(
        problems.digits_task(kind, batch, seed, budget.rows), method, rate, budget.calls[-1]
    )


Arm = tuple[str, str, int | None, str]
"""(where, kind, batch, method)."""


def run(settings: Settings) -> Result:
    """Run everything; the verdict follows from the rows by ``RULE``."""
    return experiment(settings, FULL if settings.full else SMALL)


def experiment(settings: Settings, budget: Budget) -> Result:
    """The same at any budget."""
    from gradmatch.evidence.optim._sso_picture import picture

    seeds = settings.seed_list(budget.seeds)
    grids: dict[Arm, tuple[float, ...]] = {
        ("digits", kind, batch, m): rates for kind, batch in CELLS for m, rates in RATES.items()
    }
    grids |= {("logistic", "", None, m): rates for m, rates in LOGISTIC.items()}
    tuning = [
        (*arm, rate, TUNING, budget) for arm, rates in grids.items() for rate in rates if len(rates) > 1
    ]
    tuned = dict(
        zip([t[:5] for t in tuning], parallel(curve, tuning, settings, label="sso: rates"), strict=True)
    )

    def best(arm: Arm, at: int) -> float:
        rates = grids[arm]
        return rates[0] if len(rates) == 1 else min(rates, key=lambda r: tuned[(*arm, r)][0][at])

    marks = {arm: budget.logistic_calls if arm[0] == "logistic" else budget.calls for arm in grids}
    wanted = list(dict.fromkeys((*arm, best(arm, at)) for arm in grids for at in marks[arm]))
    tasks = [(*w, s, budget) for w in wanted for s in seeds]
    found = parallel(curve, tasks, settings, label="sso: runs")
    by = {w: found[k * len(seeds) : (k + 1) * len(seeds)] for k, w in enumerate(wanted)}
    chosen = {(arm, at): by[(*arm, best(arm, at))] for arm in grids for at in marks[arm]}
    rows = [loss_row(arm, at, runs, best(arm, at)) for (arm, at), runs in chosen.items()]
    rows += time_rows(chosen, budget)
    rows += imitation_rows(settings, seeds, budget)
    falls = [
        all(b <= a + 1e-12 for a, b in zip(r[0], r[0][1:], strict=False))
        for m in ("SSO m 1", "SSO m 10", "SSO m 100")
        for r in chosen[("logistic", "", None, m), budget.logistic_calls[-1]]
    ]
    rows.append(
        Row("logistic: share of runs that fall at every call", (sum(falls) / len(falls),) * len(seeds))
    )
    verdict, reason = judge(rows, budget)
    return Result(
        SLUG, TITLE, CLAIM, RULE, verdict, reason, METRIC, tuple(rows), higher_is_better=False, links=LINKS,
        pictures=((f"{SLUG}.png", picture(chosen, rows, budget)),),
    )  # fmt: skip


def loss_name(arm: Arm, at: int) -> str:
    """Name of the row."""
    where, kind, batch, method = arm
    return f"{'logistic' if where == 'logistic' else cell_name(kind, batch)}, {at} calls: {method}"


def loss_row(arm: Arm, at: int, runs: list[tuple[list[float], float]], rate: float) -> Row:
    """Loss after ``at`` calls at the rate tuned for it."""
    what = "eta L" if arm[3].startswith("SSO") else "rate"
    return Row(
        loss_name(arm, at), tuple(r[0][at] for r in runs), f"{what} {rate:g}, {runs[0][1]:.0f} passes a call"
    )


def time_rows(chosen: dict[Any, Any], budget: Budget) -> list[Row]:
    """Loss of SSO in the time that tuned Adam takes for its calls, for each cost of a target gradient."""
    calls, rows = budget.calls[0], []
    for kind, batch in CELLS:
        adam, ours = (chosen[("digits", kind, batch, m), calls] for m in ("Adam", OURS))
        for factor in FACTORS:
            values, counts = [], []
            for (_, theirs), (losses, passes) in zip(adam, ours, strict=True):
                count = int(calls * (theirs + factor) / (passes + factor)) if math.isfinite(passes) else 0
                counts.append(min(count, len(losses) - 1))
                values.append(losses[counts[-1]])
            name = f"{cell_name(kind, batch)}, time of {calls} Adam calls at {factor}: {OURS}"
            rows.append(Row(name, tuple(values), f"{counts[0]} calls"))
    return rows


def imitation_rows(settings: Settings, seeds: list[int], budget: Budget) -> list[Row]:
    """Rounds to 95 % of the expert, at the rate of the fewest on a draw of its own."""
    grid = [(m, r) for m, rates in IMITATION.items() for r in rates]
    tuning = parallel(
        problems.rounds_to_expert,
        [(m, r, TUNING, budget.rounds) for m, r in grid],
        settings,
        label="sso: imitation",
    )
    table = dict(zip(grid, tuning, strict=True))
    best = {m: min(rates, key=lambda r, m=m: table[m, r]) for m, rates in IMITATION.items()}  # type: ignore[misc]
    tasks = [(m, best[m], s, budget.rounds) for m in IMITATION for s in seeds]
    found = parallel(problems.rounds_to_expert, tasks, settings, label="sso: imitation")
    rows = []
    for k, m in enumerate(IMITATION):
        counts = found[k * len(seeds) : (k + 1) * len(seeds)]
        rows.append(Row(f"imitation: {m}", tuple(float(max(1, v)) for v in counts), f"rate {best[m]:g}"))
    return rows


def judge(rows: list[Row], budget: Budget) -> tuple[str, str]:
    """The verdict of ``RULE``, and what led to it."""
    by = {r.method: r for r in rows}

    def lower(ours: str, *others: str) -> bool:
        def logs(name: str) -> list[float]:
            return [math.log(max(v, 1e-12)) for v in by[name].values]

        return all(gain(logs(ours), logs(other)).below() for other in others)

    first, last = budget.calls
    cells = [cell_name(*c) for c in CELLS]
    groups = {
        "logistic, m 10 under gradient descent": [
            lower(f"logistic, {k} calls: SSO m 10", f"logistic, {k} calls: gradient descent")
            for k in budget.logistic_calls
        ],
        "logistic, m 100 under Adam": [
            lower(f"logistic, {k} calls: SSO m 100", f"logistic, {k} calls: Adam")
            for k in budget.logistic_calls
        ],
        "monotone": [by["logistic: share of runs that fall at every call"].mean == 1.0],
        "digits, under SGD, Armijo and Adagrad": [
            lower(f"{c}, {k} calls: {OURS}", *(f"{c}, {k} calls: {m}" for m in ("SGD", "Armijo", "Adagrad")))
            for c in cells
            for k in (first, last)
        ],
        f"digits, under Adam at {first} calls": [
            lower(f"{c}, {first} calls: {OURS}", f"{c}, {first} calls: Adam") for c in cells
        ],
        "digits, under Adam in time at 100": [
            lower(f"{c}, time of {first} Adam calls at 100: {OURS}", f"{c}, {first} calls: Adam")
            for c in cells
        ],
        "imitation": [lower(f"imitation: {OURS}", *(f"imitation: {m}" for m in ("SGD", "Adam", "Adagrad")))],
    }
    met = [c for group in groups.values() for c in group]
    free = [
        lower(f"{c}, time of {first} Adam calls at 0: {OURS}", f"{c}, {first} calls: Adam") for c in cells
    ]
    reason = f"{sum(met)} of {len(met)} conditions met: "
    reason += "; ".join(f"{name} {sum(group)} of {len(group)}" for name, group in groups.items())
    reason += f". Where a target gradient costs nothing more, SSO is under Adam in {sum(free)} of {len(free)} cells."
    late = [
        f"{c} {by[f'{c}, {last} calls: {OURS}'].mean:.3g} against {by[f'{c}, {last} calls: Adam'].mean:.3g}"
        for c in cells
    ]
    reason += f" At {last} calls, SSO against Adam: {', '.join(late)}."
    return verdict_of(met), reason
