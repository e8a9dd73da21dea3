"""Guidance hooks against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gradmatch.core.checks import InputError
from gradmatch.core.guidance import (
    ClassifierFreeGuidance,
    GradientGuide,
    StraightThroughGuide,
    straight_through_gradient,
)
from gradmatch.core.path import LinearPath, Path, Prediction, ResidualPath, VariancePreserving
from gradmatch.core.sampler import Hook, Network, Solver


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TABLE = randn(4, 3, seed=7)
NULL = 3


def labelled(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return torch.sin(x + TABLE[label]) + t[:, None]


class Counted:
    def __init__(self, forward: Any, kind: str = "velocity") -> None:
        self.forward, self.kind, self.rows = forward, kind, []

    def __call__(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        self.rows.append(len(x))
        return Prediction(self.kind, self.forward(x, t, cond))


# --- classifier-free -------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 2, 0, 1])
SOLVER = Solver([1.0, 0.6, 0.3, 0.0])


def guided(
    scale: float, cond: Any = LABELS, null: Any = NULL, **options: Any
) -> tuple[Tensor, Tensor, list[int]]:
    model = Counted(labelled)
    null = torch.tensor(null) if isinstance(null, int) else null
    hook = ClassifierFreeGuidance(scale, null, **options)
    found = SOLVER.run(model, LinearPath(), randn(5, 3), cond=cond, hooks=[hook])
    return found.x, found.calls, model.rows


def test_guidance_one_is_the_conditional_model_bit_for_bit_in_one_call() -> None:
    x, calls, rows = guided(1.0)
    plain = SOLVER.run(Counted(labelled), LinearPath(), randn(5, 3), cond=LABELS)
    assert torch.equal(x, plain.x)
    assert calls.tolist() == [3] * 5
    assert rows == [5] * 3


def test_guidance_zero_is_the_null_field_in_one_call() -> None:
    x, calls, rows = guided(0.0)
    plain = SOLVER.run(Counted(labelled), LinearPath(), randn(5, 3), cond=torch.full((5,), NULL))
    assert torch.equal(x, plain.x)
    assert (calls.tolist(), rows) == ([3] * 5, [5] * 3)


def test_guidance_mixes_both_fields_in_one_call_of_twice_the_batch() -> None:
    x, calls, rows = guided(1.5)

    def mixed(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        with_label, without = labelled(x, t, label), labelled(x, t, torch.full_like(label, NULL))
        return without + 1.5 * (with_label - without)

    plain = SOLVER.run(Counted(mixed), LinearPath(), randn(5, 3), cond=LABELS)
    assert torch.allclose(x, plain.x, atol=1e-14)
    assert (calls.tolist(), rows) == ([6] * 5, [10] * 3)


def test_guidance_within_an_interval_only() -> None:
    x, calls, rows = guided(1.5, interval=(0.0, 0.6))
    assert (calls.tolist(), rows) == ([5] * 5, [5, 10, 10])
    assert not torch.equal(x, guided(1.5)[0])
    assert torch.equal(guided(1.5, interval=(0.0, 1.0))[0], guided(1.5)[0])
    # dopri5 gives every example its own time
    hook = ClassifierFreeGuidance(1.5, torch.tensor(NULL), interval=(0.2, 0.6))
    solver = Solver([1.0, 0.6, 0.2, 0.0], "dopri5", rtol=1e-9, atol=1e-9)
    found = solver.run(Counted(labelled), LinearPath(), randn(5, 3), cond=LABELS, hooks=[hook])
    fine = Solver(torch.linspace(1, 0, 1001, dtype=torch.float64), "heun")
    assert torch.allclose(
        found.x,
        fine.run(Counted(labelled), LinearPath(), randn(5, 3), cond=LABELS, hooks=[hook]).x,
        atol=2e-3,
    )


def test_conditions_may_be_mappings() -> None:
    def model(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return labelled(x, t, cond["label"]) * cond["scale"]

    def run(scale: float) -> Tensor:
        hook = ClassifierFreeGuidance(scale, {"label": torch.tensor([NULL]), "scale": 2.0})
        cond = {"label": LABELS, "scale": 2.0}
        return SOLVER.run(Counted(model), LinearPath(), randn(5, 3), cond=cond, hooks=[hook]).x

    assert torch.isfinite(run(1.5)).all()
    assert not torch.equal(run(1.5), run(0.0))


# --- gradients -------------------------------------------------------------------------------------------------

PATH = VariancePreserving.from_betas(1e-4, 0.02)
WAY = randn(5, 3, seed=5)


def along(x0: Tensor, reference: Any) -> Tensor:
    return (x0 * WAY).sum()


def apart(x0: Tensor, reference: Tensor) -> Tensor:
    return (x0 - reference).square().sum()


def noise_model(x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
    return torch.tanh(x) + t[:, None] / 1000


def said(guide: GradientGuide, t: float = 400.0, path: Path = PATH) -> Prediction:
    return guide.wrap(Network(noise_model_at(t), "noise"), path)(randn(5, 3), t)


def noise_model_at(t: float) -> Any:
    return lambda x, _: torch.tanh(x) + t / 1000


def rms(g: Tensor) -> Tensor:
    return g.square().mean(1, keepdim=True).sqrt()


def test_a_linear_loss_shifts_x0_by_the_closed_form() -> None:
    plain = PATH.convert(
        Prediction("noise", noise_model_at(400)(randn(5, 3), 0)), "x0", randn(5, 3), 400
    ).tensor
    got = said(GradientGuide([along], scale=0.05))
    assert got.kind == "x0"
    assert torch.allclose(got.tensor, plain - 0.05 * WAY / (rms(WAY) + 1e-8), atol=1e-12)
    twice = said(GradientGuide([along, along], weights=[1.0, 2.0], scale=0.05))
    assert torch.allclose(twice.tensor, got.tensor, atol=1e-8)


def test_through_the_network_the_gradient_is_taken_at_x() -> None:
    alpha, sigma = (float(v) for v in PATH.levels(torch.tensor(400.0).double())[:2])
    slope = (1 - sigma * (1 - torch.tanh(randn(5, 3)).square())) / alpha * WAY
    plain = PATH.convert(
        Prediction("noise", noise_model_at(400)(randn(5, 3), 0)), "x0", randn(5, 3), 400
    ).tensor
    got = said(GradientGuide([along], scale=0.05, through="network"))
    assert torch.allclose(got.tensor, plain - 0.05 * slope / (rms(slope) + 1e-8), atol=1e-12)


def test_scale_zero_and_outside_the_interval_leave_every_bit_and_compute_no_gradient() -> None:
    asked = []

    def watched(x0: Tensor, reference: Any) -> Tensor:
        asked.append(1)
        return along(x0, reference)

    x = randn(5, 3)
    solver = Solver([900, 500, 100, -1], "ddim")
    plain = solver.run(Counted(noise_model, "noise"), PATH, x).x
    zero = GradientGuide([watched], scale=0.0)
    outside = GradientGuide([watched], scale=1.0, interval=(901, 1000), through="network")
    for guide in (zero, outside):
        assert torch.equal(solver.run(Counted(noise_model, "noise"), PATH, x, hooks=[guide]).x, plain)
    assert not asked
    inside = GradientGuide([watched], scale=1.0, interval=(400, 600))
    assert not torch.equal(solver.run(Counted(noise_model, "noise"), PATH, x, hooks=[inside]).x, plain)
    assert len(asked) == 1


def test_guidance_lowers_its_loss_and_costs_no_network_call() -> None:
    goal, x = randn(5, 3, seed=8), randn(5, 3)
    solver = Solver([900, 700, 500, 300, 100, -1], "ddim")

    def distance(x0: Tensor, reference: Tensor) -> Tensor:
        return (x0 - reference).square().mean()

    def run(**options: Any) -> Any:
        hooks = [GradientGuide([distance], scale=0.3, **options)] if options else []
        return solver.run(Network(lambda x, t: 0.5 * torch.tanh(x), "x0"), PATH, x, hooks=hooks)

    plain = run()
    for options in ({}, {"through": "network"}, {"decode": lambda z: z * 1.0}):
        found = run(reference=goal, **options)
        assert distance(found.x, goal) < 0.9 * distance(plain.x, goal)
        assert torch.equal(found.calls, plain.calls)
    assert torch.equal(run(reference=lambda x0: goal).x, run(reference=goal).x)


def test_the_form_in_the_noise_grows_without_bound_and_is_held() -> None:
    roots = torch.tensor([0.02 * (0.99 / 0.02) ** ((t / 14) ** 0.3) for t in range(15)], dtype=torch.float64)
    path, s = ResidualPath(roots, 2.0, randn(5, 3, seed=2)), 0.01
    for t, factor in ((14, 197.0), (13, 19.0), (7, 1.2), (0, 0.0016)):
        eta = float(roots[t]) ** 2
        literal = 4 * eta / (1 - eta)
        assert literal == pytest.approx(factor, rel=0.05)
        model = Network(lambda x, _: x * 0.5, "x0")
        got = GradientGuide([along], scale=s, form="noise").wrap(model, path)(randn(5, 3), float(t)).tensor
        shift = rms(got - 0.5 * randn(5, 3))
        assert torch.allclose(shift, torch.full_like(shift, min(0.1, s * literal)), rtol=1e-6)


def test_the_low_resolution_end_point_as_reference() -> None:
    y = randn(5, 3, seed=2)
    path = ResidualPath(torch.tensor([0.1, 0.5, 0.9]), 2.0, y)
    guide = GradientGuide([lambda x0, ref: (x0 - ref).square().sum()], scale=0.1, reference="lr")
    got = guide.wrap(Network(lambda x, t: x, "x0"), path)(randn(5, 3), 1.0).tensor
    gap = randn(5, 3) - y
    assert torch.allclose(got, randn(5, 3) - 0.1 * gap / (rms(gap) + 1e-8), atol=1e-8)
    with pytest.raises(InputError, match="only a residual path"):
        guide.wrap(Network(lambda x, t: x, "x0"), LinearPath())(randn(5, 3), 0.5)


def test_the_networks_parameters_get_no_gradient() -> None:
    layer = torch.nn.Linear(3, 3).double()
    guide = GradientGuide([along], through="network")
    Solver([900, 100], "ddim").run(Network(lambda x, t: layer(x), "noise"), PATH, randn(5, 3), hooks=[guide])
    assert all(p.grad is None for p in layer.parameters())


def test_a_reference_for_each_example_goes_after_classifier_free_guidance() -> None:
    free = ClassifierFreeGuidance(2.0, torch.tensor(NULL))
    guide = GradientGuide([apart], reference=randn(5, 3))

    def run(*hooks: Any) -> Tensor:
        return SOLVER.run(Counted(labelled), LinearPath(), randn(5, 3), cond=LABELS, hooks=hooks).x

    assert not torch.equal(run(free, guide), run(free))
    with pytest.raises(InputError, match=r"has 5 entries for 10 examples; .*put it first"):
        run(guide, free)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ClassifierFreeGuidance(1.5, None), "guidance other than 1 needs one"),
        (lambda: guided(1.5, cond={"label": LABELS}, null={"other": LABELS}), "they must agree"),
        (lambda: guided(1.5, cond=None), "they must be of one kind"),
        (lambda: GradientGuide([]), "losses is empty"),
        (lambda: GradientGuide([along], [1.0, 2.0]), "weights has 2"),
        (lambda: GradientGuide([along], scale=-1), "scale is -1"),
        (lambda: GradientGuide([along], through="decoder"), "through is 'decoder'"),
        (lambda: GradientGuide([along], form="latent"), "form is 'latent'"),
        (lambda: GradientGuide([along], reference="hr"), "reference is 'hr'"),
        (lambda: said(GradientGuide([lambda x0, ref: x0.sum(1)])), "it must give a scalar"),
        (lambda: said(GradientGuide([lambda x0, ref: (x0 * math.nan).sum()])), "gradient has 15 NaN"),
        (lambda: said(GradientGuide([lambda x0, ref: torch.tensor(1.0)])), "have no gradient in x0"),
        (lambda: said(GradientGuide([apart], reference=randn(4, 3))), "has 4 entries for 5 examples"),
        (
            lambda: straight_through_gradient(Q, lambda s: s.sum((1, 2)) * math.nan, 2, seeded()),
            "the guide's gradient has",
        ),
        (
            lambda: straight_through_gradient(Q, lambda s: s.sum(), 2, seeded()),
            "one number for each sequence",
        ),
        (
            lambda: straight_through_gradient(Q, lambda s: s.sum((1, 2)).detach(), 2, seeded()),
            "has no gradient",
        ),
        (lambda: StraightThroughGuide(weighted, -1.0, generator=seeded()), "scale is -1.0"),
        (lambda: StraightThroughGuide(weighted, 1.0, at="logits", generator=seeded()), "at is 'logits'"),
    ],
)
def test_refusals(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_a_simplex_path_has_no_x0_to_shift() -> None:
    with pytest.raises(InputError, match="converts to x0"):
        GradientGuide([along]).wrap(Network(lambda x, t: x, "posterior"), Tempered())


# --- straight-through -------------------------------------------------------------------------------------------

Q = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
WEIGHT = randn(4, 5, seed=3)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def weighted(s: Tensor) -> Tensor:
    return (s * WEIGHT).sum((1, 2))


class Tempered(Path):
    """The shape of a simplex path: what a solver needs, and no ``convert``."""

    def sample(self, x0: Tensor, noise: Tensor, t: Any) -> Tensor:
        return x0

    def velocity(self, x: Tensor, prediction: Prediction, t: Any) -> Tensor:
        p = prediction.tensor
        return -x * (p - (x * p).sum(-1, keepdim=True))

    def step(self, x: Tensor, prediction: Prediction, t: Any, t_next: Any) -> Tensor:
        return (x.log() + (t - t_next) * prediction.tensor).softmax(-1)

    def inverse_step(self, x_next: Tensor, prediction: Prediction, t: Any, t_next: Any) -> Tensor:
        return self.step(x_next, prediction, t_next, t)


def test_the_score_sees_one_hot_sequences_and_its_gradient_goes_through_the_softmax() -> None:
    seen = []

    def score(s: Tensor) -> Tensor:
        seen.append(s.detach().clone())
        return weighted(s)

    got = straight_through_gradient(Q, score, 7, seeded())
    assert seen[0].shape == (21, 4, 5)
    assert bool(((seen[0] == 0) | (seen[0] == 1)).all())
    assert bool((seen[0].sum(-1) == 1).all())
    wanted = Q * (WEIGHT - (Q * WEIGHT).sum(-1, keepdim=True))
    assert torch.allclose(got, wanted, atol=1e-12)
    assert float(got.sum(-1).abs().max()) < 1e-14
    logits = Q.log().requires_grad_()
    (again,) = torch.autograd.grad(weighted(logits.softmax(-1)).sum(), logits)
    assert torch.allclose(got, again, atol=1e-12)


def test_draws_follow_q_and_average_a_curved_score() -> None:
    def curved(s: Tensor) -> Tensor:
        return (s * WEIGHT).sum((1, 2)).square()

    got = straight_through_gradient(Q[:1], curved, 40_000, seeded())
    mean = (Q[:1] * WEIGHT).sum()
    wanted = Q[:1] * (WEIGHT - (Q[:1] * WEIGHT).sum(-1, keepdim=True)) * 2 * mean
    assert torch.allclose(got, wanted, atol=0.02)


def test_steering_raises_the_score_and_stays_on_the_simplex() -> None:
    model, solver = Network(lambda x, t: x, "posterior"), Solver(torch.linspace(1, 0, 11), "exponential")
    plain = solver.run(model, Tempered(), Q)
    scores = []
    for scale in (0.0, 0.3, 3.0):
        for at in ("x", "prediction"):
            guide = StraightThroughGuide(weighted, scale, at=at, generator=seeded())
            found = solver.run(model, Tempered(), Q, hooks=[guide])
            assert torch.allclose(found.x.sum(-1), torch.ones(3, 4, dtype=torch.float64))
            assert torch.equal(found.calls, plain.calls)
            scores.append(float(weighted(found.x).mean()))
        if scale == 0:
            assert torch.equal(found.x, plain.x)
    assert scores[0] < scores[2] < scores[4]
    assert scores[1::2] == pytest.approx(scores[::2])  # here the posterior is the point itself


def test_what_is_held_for_each_example_follows_those_that_dopri5_still_calls() -> None:
    rates, none = torch.tensor([0.1, 30.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])
    net = Network(lambda x, t, c: -x * (1 + c[:, None] * torch.sin(9 * t)[:, None]), "velocity")
    x, goal = torch.randn(3, 2, generator=seeded()), torch.randn(3, 2, generator=seeded())

    def hooks(k: slice) -> list[Hook]:
        pull = GradientGuide([lambda x0, ref: (x0 - ref).square().sum()], scale=1e-3, reference=goal[k])
        return [ClassifierFreeGuidance(1.5, none[k]), pull]

    def run(k: slice) -> Tensor:
        solver = Solver([1.0, 0.2], "dopri5", rtol=1e-3, atol=1e-3)
        found = solver.run(net, LinearPath(), x[k], cond=rates[k], hooks=hooks(k))
        calls.append(found.calls)
        return found.x

    calls: list[Tensor] = []
    whole = run(slice(None))
    assert len(set(calls[0].tolist())) > 1
    for k in range(3):
        assert torch.allclose(run(slice(k, k + 1)), whole[k : k + 1], atol=1e-6)
