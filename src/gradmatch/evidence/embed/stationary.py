"""Sequences of four models whose features search each other's galleries, with and without replaced backbones.

A small CNN, trained by a provider on turned and inverted Fashion-MNIST in other slots, is fine-tuned on 4 + 2 + 2 + 2
classes, 300 images each; at the third task a wider and deeper one, from a provider with more data, may take its place.
Search is open-set: identities are scikit-learn's digits, or four classes of clothes that nothing was trained on. Four
ways to update have the same data, rehearsal, epochs and providers of their own kind; each one's rate (and the weight of
distillation) is chosen on held-out images of the training classes, at a seed of its own. Logits are ten times
the published ones in all, as short trainings need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradmatch.embed import average_accuracy, average_compatibility
from gradmatch.evidence._common import Result, Row, Settings, gain, kept, parallel, verdict_of
from gradmatch.evidence.embed import _stationary_arms as arms
from gradmatch.evidence.embed._stationary_arms import ARMS, CONDITIONS, network, searched, sequence
from gradmatch.evidence.embed._stationary_picture import picture

SLUG = "stationary"
TITLE = "Stationary representations: new models in old models' galleries"
CLAIM = (
    "With a fixed simplex classifier and the higher-order compatibility loss, features of an updated model search a "
    "gallery of any older one better than the older one did (AC) and well on average (AA), even when the network is "
    "replaced by a better one, which helps these models and no others."
)
RULE = (
    "Over seeds, paired; a difference counts if it exceeds two standard errors, and a condition must be met in every "
    "setting it speaks of. AA: simplex and HOC is above (1) rehearsal with a learned head, (2) feature distillation, "
    "(3) the simplex alone, in all four settings (no replacement, replacement, large step, unseen clothes). (4) The "
    "simplex alone is above rehearsal in all four. (5) Replacement raises the AA of simplex and HOC over no "
    "replacement, and lowers that of rehearsal. AC: simplex and HOC is (6) above rehearsal, distillation and the "
    "simplex alone in the three settings with replacement, and (7) at least 0.5 in each of the three. AA and AC are "
    "judged apart: 'holds' if all seven are met, 'holds in part' if some are, 'does not hold' if none is. Untrained "
    "networks and providers' models as they came are shown and not judged."
)
RATES, WEIGHTS = (5e-4, 2e-3), (1.0, 10.0)
TUNING_SEED = 1000
REPLACED = ("replacement", "large step", "unseen clothes")
BEST = "simplex and HOC"


def grid(arm: str) -> list[tuple[float, float]]:
    """Rates, and weights of distillation, among which an arm is tuned."""
    return [(r, w) for r in RATES for w in (WEIGHTS if arm == "feature distillation" else WEIGHTS[:1])]


def _tuned(stationary: bool) -> dict[str, list[list[float]]]:
    """For each arm and point of its grid, AA on held-out images of the training classes."""
    condition = CONDITIONS["replacement"]
    found: dict[str, list[list[float]]] = {}
    for arm in arms_of(stationary):
        for rate, weight in grid(arm):
            models, _ = sequence(arm, condition, TUNING_SEED, rate, weight)
            found.setdefault(arm, []).append([average_accuracy(searched(models, "held")), rate, weight])
    return found


def _run(stationary: bool, seed: int, chosen: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Every setting of the arms that share a kind of provider."""
    found: dict[str, Any] = {}
    for arm in arms_of(stationary):
        for setting, condition in CONDITIONS.items():
            models, bare = sequence(arm, condition, seed, *chosen[arm])
            untrained = [network(stationary, seed).eval()]
            found[f"{arm}, {setting}"] = {
                "matrix": _lower(searched(models, condition.unseen)),
                "providers": _lower(searched(bare, condition.unseen)),
                "untrained": _lower(searched(untrained, condition.unseen)),
            }
    return found


def arms_of(stationary: bool) -> list[str]:
    """The arms with a stationary head, or those with a learned one."""
    return [arm for arm in ARMS if ("simplex" in arm) == stationary]


def _lower(matrix: torch.Tensor) -> list[list[float]]:
    """Rows up to the diagonal, as JSON has no NaN."""
    return [[round(float(v), 5) for v in row[: i + 1]] for i, row in enumerate(matrix)]


def full(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """The matrix of :func:`_lower`, NaN above its diagonal."""
    found = torch.full((len(rows), len(rows)), torch.nan, dtype=torch.float64)
    for i, row in enumerate(rows):
        found[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
    return found


def _config() -> dict[str, Any]:
    return {
        "images": [arms.PER_CLASS, arms.HELD],
        "epochs": [arms.EPOCHS, arms.PROVIDER_EPOCHS],
        "scale": arms.SCALE,
    }


def _tune(settings: Settings, stationary: bool) -> dict[str, Any]:
    return dict(kept(settings, SLUG, f"tune-{stationary}", _config(), lambda: _tuned(stationary)))


def _part(
    settings: Settings, stationary: bool, seed: int, chosen: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    config = _config() | {"chosen": {k: list(v) for k, v in chosen.items()}}
    return dict(kept(settings, SLUG, f"{stationary}-{seed}", config, lambda: _run(stationary, seed, chosen)))


Runs = dict[tuple[str, str], list[dict[str, Any]]]


def run(settings: Settings) -> Result:
    """Tune every arm, run every setting, judge by ``RULE``."""
    kinds = (False, True)
    scores = parallel(_tune, [(settings, kind) for kind in kinds], settings, label="rates")
    chosen = {
        arm: (best[1], best[2]) for own in scores for arm, points in own.items() for best in [max(points)]
    }
    seeds = settings.seed_list(3)
    done = parallel(
        _part, [(settings, kind, s, chosen) for s in seeds for kind in kinds], settings, label="sequences"
    )
    found: Runs = {(arm, setting): [] for setting in CONDITIONS for arm in ARMS}
    for part in done:
        for name, value in part.items():
            arm, setting = name.split(", ")
            found[arm, setting].append(value)
    return _judged(found, chosen)


def _values(runs: Sequence[dict[str, Any]], key: str, of: Any) -> tuple[float, ...]:
    return tuple(float(of(full(r[key]))) for r in runs)


def _rows(runs: Runs, chosen: dict[str, tuple[float, float]]) -> list[Row]:
    rows = []
    for setting, condition in CONDITIONS.items():
        for arm in ARMS:
            own = runs[arm, setting]
            final = _values(own, "matrix", lambda c: c[-1, -1])
            back = _values(own, "matrix", lambda c: c[-1, 0])
            rate, weight = chosen[arm]
            cost = f"last model in its own gallery {_mean(final):.3f}, in the first one's {_mean(back):.3f}"
            cost += f"; rate {rate:g}"
            cost += f", weight {weight:g}" if arm == "feature distillation" else ""
            rows.append(Row(f"AA, {setting}, {arm}", _values(own, "matrix", average_accuracy), cost))
        for arm in ARMS:
            rows.append(
                Row(f"AC, {setting}, {arm}", _values(runs[arm, setting], "matrix", average_compatibility))
            )
        own = runs[BEST, setting]
        if condition.strong:
            for arm in ("rehearsal", "simplex"):
                rows.append(Row(f"AA, {setting}, providers' models of {arm} as they came",
                                _values(runs[arm, setting], "providers", average_accuracy)))  # fmt: skip
        rows.append(
            Row(f"own gallery, {setting}, untrained network", _values(own, "untrained", average_accuracy))
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _judged(runs: Runs, chosen: dict[str, tuple[float, float]]) -> Result:
    rows = {r.method: r for r in _rows(runs, chosen)}

    def above(figure: str, a: str, b: str, settings: Sequence[str] = tuple(CONDITIONS)) -> bool:
        return all(gain(rows[f"{figure}, {s}, {a}"], rows[f"{figure}, {s}, {b}"]).above() for s in settings)

    def raised(arm: str) -> Any:
        return gain(rows[f"AA, replacement, {arm}"], rows[f"AA, no replacement, {arm}"])

    others = ARMS[:3]
    met = {f"AA above {other}": above("AA", BEST, other) for other in others} | {
        "AA of the simplex above rehearsal": above("AA", "simplex", "rehearsal"),
        "replacement helps": raised(BEST).above() and raised("rehearsal").below(),
        "AC above the others": all(above("AC", BEST, other, REPLACED) for other in others),
        "AC of one half": all(rows[f"AC, {s}, {BEST}"].mean >= 0.5 for s in REPLACED),
    }
    missed = [k for k, v in met.items() if not v]

    def figures(name: str, arm: str) -> str:
        return ", ".join(f"{rows[f'{name}, {s}, {arm}'].mean:.3g}" for s in CONDITIONS)

    reason = (
        f"AA of simplex and HOC {figures('AA', BEST)} ({', '.join(CONDITIONS)}), of rehearsal with a learned head "
        f"{figures('AA', 'rehearsal')}; AC of simplex and HOC {figures('AC', BEST)}. Conditions met: "
        f"{sum(met.values())} of {len(met)}"
    )
    reason += f"; not met: {', '.join(missed)}." if missed else "."
    means = {key: torch.stack([full(r["matrix"]) for r in own]).mean(0) for key, own in runs.items()}
    titles = {
        (a, s): f"AA {rows[f'AA, {s}, {a}'].mean:.1f}  AC {rows[f'AC, {s}, {a}'].mean:.2f}" for a, s in runs
    }
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(list(met.values())),
        reason,
        "AA: mean top-1 accuracy over query and gallery models, percent; AC: share of pairs that improve, 0 to 1",
        tuple(rows.values()),
        pictures=((f"{SLUG}.png", picture(means, titles)),),
        links={"paper": "https://arxiv.org/abs/2405.02581", "code": "https://github.com/miccunifi/iamcl2r"},
    )
