"""The experiment's parts on made-up data, and the arithmetic of its rule."""

from __future__ import annotations

import pytest
import torch

from gradmatch.core.examples import Examples
from gradmatch.evidence._common import Row, Settings
from gradmatch.evidence.weights import fisher_merge as evidence

GOOD = {
    "plain average": 0.7,
    "Fisher": 0.8,
    "output ensemble": 0.8,
    "plain interpolation": 0.8,
    "target alone": 0.7,
}
EXACT = {"Fisher": 1e-12, "plain": 0.4}
CURVE = {"curve": [(0.5, 0.6), (0.7, 0.5)], "chosen": 1}
CURVES = {"base": (0.5, 0.6), "fine-tuned": (0.7, 0.5), **dict.fromkeys(evidence.ROBUST[2:], CURVE)}


def rows(where: str = "", **changed: float) -> list[Row]:
    """Rows that meet every condition, changed in the conditions that end in ``where``."""

    def row(method: str, place: str) -> Row:
        level = GOOD.get(method, 0.75)
        if place.endswith(where):
            level = changed.get(method.replace(" ", "_"), level)
        return Row(f"{method}, {place}", (level, level + 0.01, level - 0.01))

    found = [row(m, f"alpha {a:g}") for a in evidence.ALPHAS for m in evidence.METHODS]
    found += [row(m, "robust fine-tuning") for m in evidence.ROBUST]
    return found + [row(m, "another task") for m in evidence.TRANSFER]


def test_the_rule_reads_every_condition(monkeypatch) -> None:
    monkeypatch.setattr(evidence, "picture", lambda *_: b"")
    assert evidence.judged(rows(), EXACT, CURVES).verdict == "holds"
    for broken in (
        rows("alpha 0.3", plain_average=0.8),
        rows("alpha 1", plain_average=0.8),
        rows("alpha 100", plain_average=0.8),
        rows("alpha 100", output_ensemble=0.9),
        rows("fine-tuning", plain_interpolation=0.9),
        rows("task", target_alone=0.8),
        rows("task", plain_average=0.8),
    ):
        result = evidence.judged(broken, EXACT, CURVES)
        assert result.verdict == "holds in part"
        assert result.reason.startswith("7 of 8 conditions met")
    for errors in ({"Fisher": 1e-6, "plain": 0.4}, {"Fisher": 0.0, "plain": 1e-5}):
        assert evidence.judged(rows(), errors, CURVES).reason.startswith("7 of 8")
    assert evidence.judged(rows(Fisher=0.1), {"Fisher": 1.0, "plain": 1.0}, CURVES).verdict == "does not hold"


def test_the_gaussian_merge_is_exact() -> None:
    errors = evidence.gaussian_errors()
    assert errors["Fisher"] < 1e-12
    assert errors["plain"] > 1e-2


def test_a_skewed_draw_has_its_mix_and_turns_keep_pixels_in_range() -> None:
    y = torch.arange(2000) % 10
    data = Examples(torch.zeros(2000, 1), y, 10)
    index, mix = evidence.skewed(data, torch.arange(2000), 0.3, 150, torch.Generator().manual_seed(0))
    assert len(index) == len(set(index.tolist())) == 150
    assert float((torch.bincount(y[index], minlength=10) / 150 - mix).abs().max()) < 0.15
    assert float(mix.max()) > 0.25
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    turned = evidence.rotated(images, torch.Generator().manual_seed(0))
    assert 0 <= float(turned.min()) <= float(turned.max()) <= 1
    still = evidence.rotated(images, torch.Generator().manual_seed(0), 0.0)
    torch.testing.assert_close(still, images, rtol=0, atol=1e-5)


def test_accuracies_on_a_mix_are_weighted_by_class() -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1.0, 0.0]).expand(len(x), 2)

    data = Examples(torch.zeros(10, 1), torch.tensor([0] * 8 + [1] * 2), 2)
    assert evidence.weighted(Constant(), data, torch.tensor([0.9, 0.1])) == pytest.approx((0.9, 0.5))


def test_the_whole_runs_on_a_tiny_budget(tmp_path, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 10
    x = torch.rand(600, 1, 28, 28, generator=generator) + y[:, None, None, None] / 10
    train = Examples(x, y, 10)
    monkeypatch.setattr(evidence, "_fashion", lambda: (train, train))
    for name, value in {"BASE": 200, "SHARD": 40, "HELD": 100, "TEST": 100, "GRID": 3}.items():
        monkeypatch.setattr(evidence, name, value)
    settings = Settings(seeds=2, out=tmp_path, runs=tmp_path / "runs", workers=1, quiet=True)
    monkeypatch.setattr(evidence.torch, "randperm", short(torch.randperm))
    result = evidence.run(settings, fast=True)
    assert len(result.rows) == 3 * len(evidence.METHODS) + len(evidence.ROBUST) + len(evidence.TRANSFER)
    assert result.pictures[0][1].startswith(b"\x89PNG")
    assert all(len(r.values) == 2 for r in result.rows)


def short(randperm):
    """Permutations of all of Fashion-MNIST become permutations of what there is here."""
    return lambda n, **options: randperm(min(n, 600) if n == 60_000 else n, **options)
