"""The experiment end to end on a few images, and the arithmetic of its rule."""

from __future__ import annotations

import copy

import pytest
import torch

from gradmatch.evidence._common import Settings
from gradmatch.evidence.embed import _stationary_arms as arms
from gradmatch.evidence.embed import stationary as evidence

OWN = dict(zip(evidence.ARMS, (0.5, 0.52, 0.6, 0.7), strict=True))
CHOSEN = dict.fromkeys(evidence.ARMS, (1e-3, 1.0))


def matrix(own: float, back: float) -> list[list[float]]:
    return [[own], [back, own], [back, back, own], [back, back, back, own]]


def runs() -> evidence.Runs:
    """Two seeds in which every condition is met."""
    found: evidence.Runs = {}
    for setting in evidence.CONDITIONS:
        for arm in evidence.ARMS:
            gained = {"no replacement": 0.0, "replacement": 0.05 if arm == evidence.BEST else -0.05}.get(
                setting, 0.0
            )
            own = OWN[arm] + gained
            back = own + 0.1 if arm == evidence.BEST else own - 0.1
            found[arm, setting] = [
                {
                    "matrix": matrix(own + k, back + k),
                    "providers": matrix(0.4 + k, 0.3),
                    "untrained": [[0.4 + k]],
                }
                for k in (0.0, 0.004)
            ]
    return found


@pytest.mark.parametrize(
    ("arm", "setting", "own", "back", "missed"),
    [
        ("rehearsal", "large step", 0.9, 0.8, ("AA above rehearsal", "AA of the simplex above rehearsal")),
        ("feature distillation", "unseen clothes", 0.9, 0.8, ("AA above feature distillation",)),
        ("simplex", "no replacement", 0.9, 0.8, ("AA above simplex",)),
        ("rehearsal", "replacement", 0.51, 0.41, ("replacement helps",)),
        ("simplex", "large step", 0.5, 0.6, ("AC above the others",)),
        (evidence.BEST, "unseen clothes", 0.8, 0.7, ("AC above the others", "AC of one half")),
    ],
)
def test_the_rule_reads_every_condition(
    arm: str, setting: str, own: float, back: float, missed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "picture", lambda *_: b"")
    assert evidence._judged(runs(), CHOSEN).verdict == "holds"
    changed = copy.deepcopy(runs())
    for k, run in enumerate(changed[arm, setting]):
        run["matrix"] = matrix(own + 0.004 * k, back + 0.004 * k)
    result = evidence._judged(changed, CHOSEN)
    assert result.verdict == "holds in part"
    assert result.reason.endswith(f"not met: {', '.join(missed)}.")


def test_the_whole_experiment_on_a_few_images(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 10
    few = torch.rand(80, 1, 14, 14, generator=g), y
    monkeypatch.setattr(
        arms, "images", lambda: dict.fromkeys(("clients", "held", "providers", "digits", "clothes"), few)
    )
    for name in ("EPOCHS", "PROVIDER_EPOCHS"):
        monkeypatch.setattr(arms, name, 1)
    monkeypatch.setattr(evidence, "RATES", (1e-3,))
    arms.provided.cache_clear()
    result = evidence.run(Settings(seeds=1, workers=1, quiet=True, out=tmp_path, runs=tmp_path))
    arms.provided.cache_clear()
    assert result.verdict in ("does not hold", "holds in part")  # one seed proves nothing
    assert len(result.rows) == 4 * (4 + 4 + 1) + 3 * 2
    assert result.pictures[0][1].startswith(b"\x89PNG")


def test_provided_images_are_turned_and_inverted_classes_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.rand(40, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 10
    monkeypatch.setattr(arms, "images", lambda: {"providers": (x, y)})
    found, labels = arms.provider_images(24, 0)
    assert set(labels.tolist()) <= set(range(18))
    assert {int(v) // 6 for v in labels} == {0, 1, 2}
    originals = {c: x[y == c] for c in range(6)}
    for image, label in zip(found, labels.tolist(), strict=True):
        kind, c = divmod(label, 6)
        plain = image if kind == 0 else 1 - image
        plain = plain.rot90(-1, (1, 2)) if kind != 1 else plain
        assert bool((originals[c] - plain).abs().flatten(1).amax(1).min() < 1e-6)
