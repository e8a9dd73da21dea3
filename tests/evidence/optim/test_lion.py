"""The experiment's rule, its tasks and a tiny run of each part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gradmatch.evidence._common import Settings
from gradmatch.evidence.optim import lion
from gradmatch.optim import programs

SEEDS = [0, 1, 2]


def trained(**gains: float) -> lion.Trained:
    """AdamW at 80, Lion above it by what is given for a cell, such as MLP_64=0.3; 0.2 elsewhere, 1 at MLP 2048."""
    found: lion.Trained = {}
    for network, batch, _ in lion.CELLS:
        usual = 1.0 if (network, batch) == ("MLP", 2048) else 0.2
        own = gains.get(f"{network}_{batch}", usual)
        for method, rates in lion.RATES.items():
            level = 80 + (own if method == lion.LION else 0.0)
            found[network, batch, method] = {r: [(level, level + 0.01 * s) for s in SEEDS] for r in rates}
    return found


def scores(evolution: list[float], single: float = 0.29, chains: float = 0.28) -> tuple[Any, Any]:
    known = {(name, s): [0.3, 0.3, 0.2, 0.01] for name in lion.KNOWN for s in SEEDS}
    level = {
        lion.EVOLUTION: evolution,
        lion.SINGLE: [single] * 3,
        lion.CHAINS: [chains] * 3,
        lion.CONSTANTS: [0.25] * 3,
    }
    source = programs.lion().to_source()
    searched = {
        (name, s): {"scores": own, "curve": [0.3] * 5, "hit_rate": 0.5, "found": source, "simplified": source}
        for name, own in level.items()
        for s in SEEDS
    }
    return known, searched


def judged(own: lion.Trained, found: tuple[Any, Any], state: float = 0.5, step: float = 1.5) -> Any:
    return lion._judged(own, *found, state, step, SEEDS)


def test_the_rule_reads_every_condition() -> None:
    good = scores([0.27, 0.28, 0.19])
    assert judged(trained(), good).verdict == "holds"
    for number, result in (
        (1, judged(trained(MLP_256=-0.71), good)),
        (2, judged(trained(ViT_512=-0.71), good)),
        (3, judged(trained(MLP_64=1.1), good)),
        (4, judged(trained(MLP_2048=0.0, MLP_64=-0.1), good)),
        (5, judged(trained(), good, state=0.6)),
        (6, judged(trained(), good, step=0.9)),
        (7, judged(trained(), scores([0.285, 0.28, 0.19]))),
        (8, judged(trained(), scores([0.27, 0.286, 0.19]))),
        (9, judged(trained(), scores([0.27, 0.28, 0.2]))),
    ):
        met = [str(i) for i in range(1, 10) if i != number]
        assert result.reason.startswith(f"8 of 9 conditions met ({', '.join(met)})."), number
        assert result.verdict == "holds in part"
    worst = trained(MLP_64=0.0, MLP_256=-1.0, MLP_2048=-1.0, ViT_64=-1.0)
    nothing = judged(worst, scores([0.4, 0.4, 0.4]), state=1.0, step=0.5)
    assert nothing.verdict == "does not hold"
    assert nothing.reason.startswith("0 of 9 conditions met (none).")


def test_rates_are_chosen_on_held_out_images() -> None:
    own = trained()
    own["MLP", 64, lion.LION][1e-3] = [(90.0, 70.0)] * 3
    row = judged(own, scores([0.27, 0.28, 0.19])).row("Lion, MLP, batch 64")
    assert (row.values, row.cost) == ((70.0,) * 3, "rate 0.001")


def test_decay_keeps_its_size_and_state_is_half() -> None:
    for method, rates in lion.RATES.items():
        for rate in rates:
            (group,) = lion.make(method, [torch.nn.Parameter(torch.ones(1))], rate).param_groups
            assert group["lr"] * group["weight_decay"] == pytest.approx(1e-4)
    assert lion._state_ratio() == 0.5
    assert lion._step_ratio(count=3, size=50, rounds=1) > 0


def test_rows_of_a_search_and_of_its_examination_are_apart() -> None:
    proxy, fresh = lion._tasks(0)
    sizes = [len(e.x) for task in (proxy, fresh) for e in (task.train, task.validation)]
    assert sizes == [600, 400, 500, 297]
    all_rows = torch.cat([e.x for task in (proxy, fresh) for e in (task.train, task.validation)])
    assert len(torch.unique(all_rows.flatten(1), dim=0)) == 1797
    assert not torch.equal(lion._tasks(1)[0].train.x, proxy.train.x)
    assert proxy.seed != fresh.seed
    assert [t.steps for t in lion._longer(proxy, 0.01)] == [600] * 3


def test_a_tiny_run_of_each_part(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(runs=tmp_path, quiet=True, workers=1)
    g = torch.Generator().manual_seed(0)
    tiny = lion.Examples(torch.rand(40, 1, 28, 28, generator=g), torch.arange(40) % 10, 10)
    monkeypatch.setattr(lion, "_images", lambda *_: (tiny, tiny, tiny))
    for network in lion.NETWORKS:
        held, test = lion._trained(settings, network, 20, 1, lion.LION, 1e-3, 0)
        assert 0 <= held == test <= 100
    monkeypatch.setattr(lion, "LONGER", 2)
    known = lion._known(settings, "AdamW", 0)
    assert len(known) == 4
    found = lion._searched(settings, lion.EVOLUTION, 0, known[3], 40)
    assert found["curve"][-1] == found["scores"][0] <= known[0]
    assert len(found["curve"]) == 40
    assert lion.Program.parse(found["simplified"]).trimmed()
