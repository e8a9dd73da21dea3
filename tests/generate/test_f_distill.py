"""f-distill: the gradient formula, the student's step, who is trained when, the ratio, real networks, refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.checks import InputError
from gradmatch.core.divergence import DIVERGENCES, divergence
from gradmatch.core.path import EDM, LinearPath, Prediction, VariancePreserving
from gradmatch.core.store import RunFolder
from gradmatch.generate import FDistill
from gradmatch.zoo import mlp_velocity
from gradmatch.zoo.oracles import MixtureOracle

MIXTURE = MixtureOracle(
    torch.tensor([[-2.0], [2.0]], dtype=torch.float64),
    0.6,
    torch.tensor([0.35, 0.65]),
    path=EDM(),
    kind="score",
)
LEVEL = 0.3


def normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def exact(name: str, theta: Tensor) -> tuple[Tensor, Tensor]:
    """D_f(p_t || q_t) by quadrature and the formula's gradient, for a student mu + exp(s) z at noise LEVEL."""
    mu, s = theta
    x = torch.linspace(-14, 14, 40001, dtype=torch.float64)
    dx = float(x[1] - x[0])
    std = (s.exp().square() + LEVEL**2).sqrt()
    log_q, log_p = normal(x, mu, std), MIXTURE.log_density(x.unsqueeze(1), LEVEL)
    r = (log_p - log_q).clamp(-600, 600).exp()
    value = (log_q.exp() * divergence(name).f(r)).sum() * dx
    # the same integral over (z, noise) is over x_t and E[dG | x_t]: for a Gaussian, z given x_t is linear in it
    score_p = MIXTURE(x.unsqueeze(1), torch.full_like(x, LEVEL)).tensor.squeeze(1)
    score_q = -(x - mu) / std.square()
    z = s.exp() * (x - mu) / std.square()
    pull = -log_q.exp() * divergence(name).weight(r) * (score_p - score_q) * dx
    return value, torch.stack([pull.sum(), (pull * s.exp() * z).sum()]).detach()


@pytest.mark.parametrize(
    ("name", "theta"),
    [(n, (0.7, 0.5)) for n in DIVERGENCES if n != "neyman"]
    + [(n, (1.5, -0.4)) for n in ("rkl", "sf", "js", "sh", "neyman")],
)
def test_the_gradient_formula_is_the_derivative_of_the_divergence(
    name: str, theta: tuple[float, float]
) -> None:
    at = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    value, formula = exact(name, at)
    (numeric,) = torch.autograd.grad(value, at)
    assert torch.allclose(formula, numeric, atol=1e-4)


@pytest.mark.parametrize("name", ["rkl", "kl"])
def test_between_two_unit_normals_both_directions_of_kl_pull_by_the_distance(name: str) -> None:
    theta, x = 0.8, torch.linspace(-12, 12, 20001, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    log_p, log_q = normal(x, 0 * one, one), normal(x, theta * one, one)
    h = divergence(name).weight((log_p - log_q).exp())
    found = -(log_q.exp() * h * (-x + (x - theta))).sum() * float(x[1] - x[0])
    assert float(found) == pytest.approx(theta, abs=1e-6)


class Shift(nn.Module):
    """x0 = mu + exp(s) z at EDM's last time, whatever it is."""

    def __init__(self, mu: float, sigma: float) -> None:
        super().__init__()
        self.mu, self.s, self.sigma = nn.Parameter(torch.tensor(mu)), nn.Parameter(torch.zeros(())), sigma

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
        return Prediction("x0", self.mu + self.s.exp() * x / self.sigma)


class Record(nn.Module):
    """A network whose calls are kept."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = mlp_velocity(2, (16, 16))

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return self.net(x, t)


def built(**options: Any) -> FDistill:
    defaults: dict[str, Any] = {
        "student": Record(1), "fake": Record(2), "discriminator": "features", "schedule": LinearPath(),
        "kind": "velocity", "lr": 1e-3,
    }  # fmt: skip
    return FDistill(Record(0), **(defaults | options))


REAL = torch.randn(32, 2, generator=torch.Generator().manual_seed(3))


def test_the_students_loss_has_the_chosen_gradient_and_reaches_nobody_else() -> None:
    distill = built(gan_weight=0.0, student_every=2)
    distill.step(REAL)
    others = [*distill.teacher.parameters(), *distill.fake.parameters()]
    others += list(distill.states["discriminator"].module.parameters())
    before = [p.detach().clone() for p in others]
    seen: dict[str, Tensor] = {}

    def watch(z: Tensor, cond: Any = None) -> Tensor:
        x0 = FDistill.generate(distill, z, cond)
        x0.register_hook(lambda g: seen.update(g=g))
        seen["x0"] = x0
        return x0

    distill.generate = watch  # type: ignore[method-assign]
    asked: list[tuple[Tensor, Tensor]] = []
    weigh = distill.weigh.forward

    def weighing(ratio: Tensor, t: Tensor) -> Tensor:
        asked.append((weigh(ratio, t), t))
        return asked[-1][0]

    distill.weigh.forward = weighing  # type: ignore[method-assign]
    noise: list[Tensor] = []
    path_sample = distill.path.sample
    distill.path.sample = lambda x0, e, t: noise.append(e) or path_sample(x0, e, t)  # type: ignore
    distill.step(REAL)
    (h, t), x0 = asked[0], seen["x0"].detach()
    x_t = path_sample(x0, noise[0], t)
    with torch.no_grad():
        x_p, x_q = (x_t - t[:, None] * m(x_t, t) for m in (distill.teacher, distill.fake))
    w = h / ((x0 - x_p).abs().mean(1) + 1e-6)
    assert torch.allclose(seen["g"], w[:, None] * (x_q - x_p) / x0.numel(), rtol=1e-4, atol=1e-8)
    assert float(h.mean()) == pytest.approx(1, abs=1e-4)
    assert not h.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, others, strict=True))
    assert all(p.grad is None for p in others)


def test_a_student_that_is_the_teachers_equal_is_moved_by_the_game_alone() -> None:
    same = Record(0)
    still = FDistill(Record(0), Record(1), lambda x, t: same(x, t), schedule=LinearPath(), kind="velocity",
                     divergence="rkl", student_every=1, weight_decay=0.0)  # fmt: skip
    before = [p.detach().clone() for p in still.student.parameters()]
    figures = still.step(shape=(16, 2))
    assert figures["matching"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, still.student.parameters(), strict=True))
    moved = FDistill(Record(0), Record(1), lambda x, t: same(x, t), "features", schedule=LinearPath(),
                     kind="velocity", student_every=2, weight_decay=0.0)  # fmt: skip
    moved.step(REAL)
    assert moved.step(REAL)["matching"] == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, moved.student.parameters(), strict=True))


def test_who_is_trained_when() -> None:
    distill = built(student_every=5)
    distill.step(REAL)
    nets = {k: state.module for k, state in distill.states.items()} | {"teacher": distill.teacher}
    changes = dict.fromkeys(nets, 0)
    for _ in range(20):
        before = {k: copy.deepcopy(m.state_dict()) for k, m in nets.items()}
        distill.step(REAL)
        for k, m in nets.items():
            now = m.state_dict()
            changes[k] += any(not torch.equal(v, now[n]) for n, v in before[k].items())
    assert changes == {"student": 4, "fake": 16, "discriminator": 16, "teacher": 0}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t[:, None]], 1))


def test_reverse_kl_is_a_plain_loop_of_distribution_matching_and_a_game() -> None:
    """DMD2 written out, from the same draws."""
    lam, lr = 0.5, 1e-3
    judge = Plain()
    distill = built(
        divergence="rkl", discriminator=copy.deepcopy(judge), gan_weight=lam, student_every=2, lr=lr
    )
    teacher, student, fake = Record(0), Record(1), Record(2)
    optimizers = {
        k: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=1e-2)
        for k, m in (("student", student), ("fake", fake), ("judge", judge))
    }
    draws: list[Tensor] = []

    def keep(name: str, original: Any) -> Any:
        return lambda *a, **k: draws.append(original(*a, **k)) or draws[-1]

    patched = pytest.MonkeyPatch()
    patched.setattr(torch, "randn", keep("randn", torch.randn))
    patched.setattr(torch, "rand", keep("rand", torch.rand))
    try:
        for _ in range(6):
            distill.step(REAL)
    finally:
        patched.undo()

    def x0_of(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        return x - t[:, None] * net(x, t)

    for k in range(6):
        z, noise, u = draws[:3]
        del draws[:3]
        t = 0.001 + 0.998 * u
        one = torch.ones(32)
        if k % 2:
            x0 = x0_of(student, z, one)
            x = (1 - t[:, None]) * x0 + t[:, None] * noise
            with torch.no_grad():
                x_p, x_q = x0_of(teacher, x, t), x0_of(fake, x, t)
                g = (x_q - x_p) / ((x0 - x_p).abs().mean(1, keepdim=True) + 1e-6)
                target = x0 - g
            loss = 0.5 * F.mse_loss(x0, target) + lam * F.softplus(-judge(x, t)).mean()
            optimizers["student"].zero_grad()
            loss.backward()
            optimizers["student"].step()
            continue
        u_real, own = draws[:2]
        del draws[:2]
        t_real = 0.001 + 0.998 * u_real
        with torch.no_grad():
            x0 = x0_of(student, z, one)
            x = (1 - t[:, None]) * x0 + t[:, None] * noise
        real = (1 - t_real[:, None]) * REAL + t_real[:, None] * own
        optimizers["fake"].zero_grad()
        optimizers["judge"].zero_grad()
        F.mse_loss(fake(x, t), noise - x0).backward()
        (F.softplus(judge(x, t)).mean() + F.softplus(-judge(real, t_real)).mean()).backward()
        optimizers["fake"].step()
        optimizers["judge"].step()
    assert not draws
    for a, b in zip(student.parameters(), distill.student.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(judge.parameters(), distill.states["discriminator"].module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_ratio_is_the_discriminators_before_it_is_weighed() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor(math.log(2.0)))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.bias.expand(len(x), 4, 4)

    distill = built(discriminator=Fixed(), student_every=2, discriminator_lr=1e-9, weight_decay=0.0)
    distill.step(REAL)
    assert distill.step(REAL)["ratio"] == pytest.approx(2, rel=1e-3)


def test_an_exact_ratio_and_an_exact_fake_need_no_data() -> None:
    student = Shift(1.0, 80.0)

    def fake(x: Tensor, t: Tensor) -> Prediction:
        q = MixtureOracle(
            student.mu.detach().reshape(1, 1), float(student.s.detach().exp()), path=EDM(), kind="x0"
        )
        return q(x, t)

    teacher = MixtureOracle(torch.tensor([[3.0]]), 1.0, path=EDM(), kind="x0")

    def ratio(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        q = MixtureOracle(student.mu.detach().reshape(1, 1), float(student.s.detach().exp()), path=EDM())
        return (teacher.log_density(x, t) - q.log_density(x, t)).exp()

    distill = FDistill(teacher, student, fake, ratio_fn=ratio, divergence="js", student_every=1, lr=0.05,
                       weight_decay=0.0, times=lambda n, g: torch.full((n,), 0.3), ends=(0.1, 80.0))  # fmt: skip
    for _ in range(150):
        distill.step(shape=(256, 1))
    assert float(student.mu) == pytest.approx(3, abs=0.2)
    assert float(student.s) == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("form", ["difference", "gradient"])
def test_the_gradient_penalty(form: str) -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0, 0.0]))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return (x @ self.w)[:, None]

    plain, held = (built(discriminator=Line(), r1=r1, r1_form=form, seed=1) for r1 in (0.0, 10.0))
    extra = held.step(REAL)["discriminator"] - plain.step(REAL)["discriminator"]
    if form == "gradient":
        assert extra == pytest.approx(10 * 9, rel=1e-4)
    else:  # 10 E[(3 * 0.1 alpha e)^2] with alpha = 1 - t uniform
        assert extra == pytest.approx(10 * 9 * 0.01 / 3, rel=0.6)


def test_guidance_and_conditions_reach_the_networks() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = mlp_velocity(2, (16, 16), classes=3)

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            return self.net(x, t, cond)

    distill = FDistill(Labelled(), discriminator="features", schedule=LinearPath(), kind="velocity",
                       guidance=1.75, null=torch.tensor(3), student_every=2)  # fmt: skip
    y = torch.arange(32) % 3
    distill.step(REAL, y)
    assert math.isfinite(distill.step(REAL, y)["matching"])
    z = torch.randn(4, 2)
    assert not torch.equal(
        distill.sample(z, torch.zeros(4, dtype=torch.long)),
        distill.sample(z, torch.ones(4, dtype=torch.long)),
    )


def test_a_killed_run_goes_on_to_the_same_student(tmp_path: Path) -> None:
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    whole = built(ema=0.9, student_every=2)
    figures = whole.fit(data, 12, batch=16)
    assert len(figures) == 6
    folder = RunFolder(tmp_path / "run", {})
    first = built(ema=0.9, student_every=2)
    first.fit(data, 7, batch=16, run=folder, save_every=7)
    second = built(ema=0.9, student_every=2)
    second.fit(data, 12, batch=16, run=folder)
    z = torch.randn(5, 2)
    assert torch.equal(second.sample(z), whole.sample(z))
    assert torch.equal(second.weigh.means, whole.weigh.means)
    raw = whole.generate(z).detach()
    assert not torch.equal(whole.sample(z), raw)  # the average is another network
    assert torch.equal(whole.generate(z).detach(), raw)  # and leaves the student as it was


def test_a_loader_gives_batches(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(20, 2)), batch_size=10)
    assert len(built(student_every=2).fit(loader, 6)) == 3
    assert len(built(student_every=2).fit([REAL, REAL], 6)) == 3
    with pytest.raises(InputError, match="loader"):
        built().fit(loader, 4, run=RunFolder(tmp_path / "r", {}))
    with pytest.raises(InputError, match="empty"):
        built().fit([], 4)


def test_a_diffusers_network_is_teacher_student_and_fake() -> None:
    diffusers = pytest.importorskip("diffusers")
    from gradmatch.core.bridge import from_diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        8, 1, 1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    distill = FDistill(from_diffusers(unet, scheduler), discriminator="features", student_every=2)
    assert distill.discriminator is not None
    assert distill.discriminator.names == ("mid_block",)
    frozen = copy.deepcopy(unet.state_dict())
    real = torch.randn(4, 1, 8, 8)
    distill.step(real)
    assert math.isfinite(distill.step(real)["matching"])
    assert distill.sample(3, shape=(1, 8, 8)).shape == (3, 1, 8, 8)
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in frozen.items())


def test_times() -> None:
    from gradmatch.generate._noise_times import NoiseTimes

    g = torch.Generator().manual_seed(0)
    t = NoiseTimes(EDM(), "polynomial", None).draw(4000, g)
    assert 0.002 <= float(t.min()) < float(t.max()) <= 80
    middle = (0.5 * 80 ** (1 / 7) + 0.5 * 0.002 ** (1 / 7)) ** 7
    assert float(t.median()) == pytest.approx(middle, rel=0.2)
    path = VariancePreserving.from_betas(1e-4, 0.02)
    times = NoiseTimes(path, "uniform", None)
    assert times.last == 999
    assert times.ends == pytest.approx((0.999, 998.001))


TEACHER: dict[str, Any] = {"schedule": LinearPath(), "kind": "velocity"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"divergence": "tv"}, "'rkl', 'sf', 'js', 'sh', 'kl', 'jf', 'neyman'"),
        ({"divergence": "js"}, "needs density ratios"),
        ({"divergence": "rkl", "kind": None}, "say what the teacher predicts"),
        ({"divergence": "rkl", "schedule": None}, "needs the path"),
        ({"divergence": "rkl", "gan_weight": -1e-3}, "gan_weight"),
        ({"discriminator": "logits"}, "must be None, 'features' or a module"),
        ({"divergence": "rkl", "student_every": 1}, "student_every"),
        ({"divergence": "rkl", "lr": 0.0}, "lr is"),
        ({"divergence": "rkl", "ends": (0.5, 0.5)}, "must rise"),
        ({"divergence": "rkl", "times": "cosine"}, "times"),
        ({"divergence": "rkl", "guidance": 2.0}, "null"),
        ({"discriminator": "features", "ema": 1.0}, "ema"),
    ],
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        FDistill(Record(0), **(TEACHER | options))


def test_refusals_of_steps() -> None:
    with pytest.raises(InputError, match="needs data"):
        built().step(shape=(4, 2))
    with pytest.raises(InputError, match="real"):
        built().step(torch.full((4, 2), math.nan))
    wide = built(discriminator=None, ratio_fn=lambda x, t, c: x, student_every=2)
    wide.step(REAL)
    with pytest.raises(InputError, match="ratio_fn gave"):
        wide.step(REAL)
    with pytest.raises(InputError, match="only a module has features"):
        FDistill(lambda x, t: x, Record(0), Record(1), "features", **TEACHER)
    with pytest.raises(InputError, match="cannot be copied"):
        FDistill(lambda x, t: x, divergence="rkl", **TEACHER)
    broken = built(discriminator=None, divergence="rkl", lr=1e-3)
    with torch.no_grad():
        next(broken.fake.parameters()).fill_(math.nan)
    with pytest.raises(InputError, match="loss of fake in iteration 1"):
        broken.step(REAL)


def test_warnings() -> None:
    with pytest.warns(UserWarning, match="alpha / sigma"):
        FDistill(Record(0), divergence="rkl", schedule=EDM(), kind="x0", ends=(0.1, 2.0))
    with pytest.warns(UserWarning, match="lags behind"):
        built(lr=1e-3, fake_lr=1e-4)


def test_double_precision_all_through() -> None:
    torch.manual_seed(0)
    distill = FDistill(
        mlp_velocity(2, (8,)).double(), discriminator="features", student_every=2, r1=1.0, **TEACHER
    )
    for _ in range(2):
        distill.step(torch.randn(8, 2))
    assert distill.sample(3, shape=(2,)).dtype == torch.float64


def test_networks_that_are_one_and_the_same_are_refused() -> None:
    net = mlp_velocity(2, (8,))
    for options in ({"student": net}, {"fake": net}):
        with pytest.raises(InputError, match="share a network"):
            FDistill(net, divergence="rkl", **TEACHER, **options)
    other = mlp_velocity(2, (8,))
    with pytest.raises(InputError, match="share a network"):
        FDistill(net, other, other, divergence="rkl", **TEACHER)


def test_an_empty_batch_is_refused() -> None:
    distill = FDistill(mlp_velocity(2, (8,)), discriminator="features", **TEACHER)
    with pytest.raises(InputError, match="one example is needed"):
        distill.step(torch.randn(0, 2))
