"""Every check, refusal and named fault of guided residual super-resolution and its one-step student."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.checks import InputError
from gradmatch.core.guidance import GradientGuide
from gradmatch.core.path import Prediction
from gradmatch.generate._spectrum import amplitudes
from gradmatch.generate.difiisr import (
    ConsistencyLoss,
    PerceptualLoss,
    ProfileLoss,
    ResShift,
    SpectrumLoss,
    radial_profile,
    residual_roots,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Net(nn.Module):
    """A small convolution that sees the time."""

    def __init__(self, channels: int = 1, factor: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(factor * channels, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.body(x) * (1 + t.to(x).reshape(-1, 1, 1, 1) / 30)
        return out


def copies_y(x: Tensor, t: Tensor) -> Tensor:
    return x[:, x.shape[1] // 2 :]


LR, HR = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(1)), randn(3, 1, 16, 20)


# --- schedule and path --------------------------------------------------------------------------------------------


def test_schedule_is_the_published_one() -> None:
    roots = residual_roots()
    assert len(roots) == 15
    assert float(roots[0]) == pytest.approx(0.02)  # 0.04 / kappa
    assert float(roots[-1]) == pytest.approx(0.99)
    assert bool((roots.diff() > 0).all())
    assert float(roots[7]) == pytest.approx(0.02 * (0.99 / 0.02) ** (0.5**0.3))
    assert float(residual_roots(kappa=1.0)[0]) == pytest.approx(math.sqrt(0.001))
    assert float(residual_roots(kappa=0.5)[0]) == pytest.approx(math.sqrt(0.001))
    assert float(residual_roots(kappa=4.0)[0]) == pytest.approx(0.01)


def test_deterministic_steps_stay_on_the_path_and_are_undone() -> None:
    model = ResShift(copies_y)
    x0, y, e = (randn(4, 1, 8, 8, seed=s, dtype=torch.float64) for s in range(3))
    path, roots = model.path.towards(y), residual_roots()
    for t in range(1, 15):
        eta, before = float(roots[t]) ** 2, float(roots[t - 1]) ** 2
        m = math.sqrt(before / eta)
        j = before - math.sqrt(before * eta)
        k = 1 - before + math.sqrt(before * eta) - m
        assert k + m * (1 - eta) == pytest.approx(1 - before)
        assert j + m * eta == pytest.approx(before)
        here = (1 - eta) * x0 + eta * y + 2 * math.sqrt(eta) * e
        there = (1 - before) * x0 + before * y + 2 * math.sqrt(before) * e
        said = Prediction("x0", x0)
        assert torch.allclose(path.sample(x0, e, t), here, atol=1e-12)
        assert torch.allclose(path.step(here, said, t, t - 1), there, atol=1e-10)
        assert torch.allclose(path.step(here, said, t, t - 1), k * x0 + m * here + j * y, atol=1e-10)
        assert torch.allclose(path.inverse_step(there, said, t, t - 1), here, atol=1e-6)
        noise = path.convert(said, "noise", here, t).tensor
        assert torch.allclose(noise, e, atol=1e-9)
    assert torch.equal(path.step(x0 * 0 + 3, Prediction("x0", x0), 0, -1), x0)


def test_sampling_starts_at_y_and_not_at_pure_noise_and_the_end_is_the_last_x0() -> None:
    seen: list[tuple[float, Tensor]] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append((float(t[0]), x))
        return torch.full_like(x[:, :1], 0.3)

    model, noise = ResShift(net), randn(3, 1, 16, 20)
    found = model.sample(LR, noise=noise)
    assert [t for t, _ in seen] == list(range(14, -1, -1))
    assert torch.allclose(found.images, torch.full_like(found.images, 0.3))
    assert found.nfe.tolist() == [15] * 3
    y = F.interpolate(LR, scale_factor=4, mode="bicubic", align_corners=False)
    start = (y + 2 * 0.99 * noise) / (3 * 2 * 0.99 + 1)  # the input is scaled in pixels
    assert torch.allclose(seen[0][1][:, :1], start, atol=1e-6)
    assert torch.allclose(seen[0][1][:, 1:], y)


def test_other_numbers_of_steps_and_one() -> None:
    seen: list[float] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return x[:, 1:]

    for steps, times in ((1, [14]), (3, [14, 9, 4]), (15, list(range(14, -1, -1)))):
        seen.clear()
        assert ResShift(net).sample(LR, steps).nfe.tolist() == [steps] * 3
        assert seen == times


def test_ancestral_steps_have_the_moments_of_the_product_of_gaussians() -> None:
    """One step from fixed x_t with a known x_0, against q(x_{t-1} | x_0) q(x_t | x_{t-1}) multiplied out."""
    roots = residual_roots(2)
    eta, before = float(roots[1]) ** 2, float(roots[0]) ** 2
    n, x0, lr = 4000, 0.7, torch.full((4000, 1, 2, 2), 0.2)
    states: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        states.append(x[:, :1])
        return torch.full_like(x[:, :1], x0)

    model = ResShift(net, T=2, scale=1)
    noise = torch.full((n, 1, 2, 2), 0.5)
    found = model.sample(lr, "ancestral", noise=noise, seed=3)
    assert found.nfe.tolist() == [2] * n
    assert torch.allclose(found.images, torch.full_like(noise, x0))  # no noise at t = 0
    at = float(0.2 + 2 * roots[1] * 0.5)
    after = states[1] * (3 * 2 * float(roots[0]) + 1)
    # prior of x_{t-1}: N(x0 + eta' (y - x0), k^2 eta'); x_t given it: N(x_{t-1} + alpha (y - x0), k^2 alpha)
    alpha, r = eta - before, 0.2 - x0
    variance = 1 / (1 / (4 * before) + 1 / (4 * alpha))
    mean = variance * ((x0 + before * r) / (4 * before) + (at - alpha * r) / (4 * alpha))
    assert mean == pytest.approx(before / eta * at + alpha / eta * x0)
    assert float(after.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / (4 * n)))
    assert float(after.var()) == pytest.approx(variance, rel=0.05)
    assert not torch.equal(found.images * 0 + states[1], model.sample(lr, "ancestral", noise=noise, seed=4).images * 0
                           + states[3])  # fmt: skip


def test_marginals_of_ancestral_sampling_are_those_of_the_path() -> None:
    """With the exact x_0 predicted, x_t of a whole run has the path's mean and deviation."""
    states: dict[float, Tensor] = {}
    roots = residual_roots()

    def net(x: Tensor, t: Tensor) -> Tensor:
        states[float(t[0])] = x[:, :1]
        return torch.full_like(x[:, :1], 0.7)

    ResShift(net, scale=1).sample(torch.full((2000, 1, 3, 3), 0.2), "ancestral")
    for t in (11, 6, 2):
        eta, size = float(roots[t]) ** 2, 3 * 2 * float(roots[t]) + 1
        x = states[float(t)] * size
        # the start takes x_0 to be y, 0.02 of the way off; it is forgotten on the way
        assert float(x.mean()) == pytest.approx((1 - eta) * 0.7 + eta * 0.2, abs=0.04)
        assert float(x.std()) == pytest.approx(2 * math.sqrt(eta), rel=0.04)


# --- training -----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_squared_error_of_x0() -> None:
    model, generator = ResShift(Net()), torch.Generator().manual_seed(5)
    got = model.loss(HR, LR, generator)
    g = torch.Generator().manual_seed(5)
    t = torch.randint(15, (3,), generator=g)
    noise = torch.randn(HR.shape, generator=g)
    y = F.interpolate(LR, scale_factor=4, mode="bicubic", align_corners=False)
    root = residual_roots()[t].float().reshape(-1, 1, 1, 1)
    x = HR + root**2 * (y - HR) + 2 * root * noise
    said = model.network(torch.cat([x / (6 * root + 1), y], 1), t)
    assert torch.allclose(got, (said - HR).square().mean(), rtol=1e-5)


def test_a_small_network_learns_and_the_global_generator_is_left() -> None:
    hr = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    state = torch.get_rng_state()
    model = ResShift(Net(), scale=2)
    found = model.fit(hr, lambda x, g: F.avg_pool2d(x, 2), 60, batch=16, rate=2e-2, ema=None)
    assert float(found.losses[-10:].mean()) < 0.5 * float(found.losses[:5].mean())
    assert torch.equal(torch.get_rng_state(), state)
    other = ResShift(Net(), scale=2)
    other.fit(hr, F.avg_pool2d(hr, 2), 60, batch=16, rate=2e-2, ema=None)
    assert torch.equal(other.network.body.weight, model.network.body.weight)


def test_diffusers_networks_and_autoencoders() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=5, out_channels=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, in_channels=1, out_channels=1,
    )  # fmt: skip
    model = ResShift(unet, T=3, scale=2, autoencoder=vae, latent_scale="auto")
    lr = torch.rand(2, 1, 8, 8)
    model.loss(torch.rand(2, 1, 16, 16), lr).backward()
    assert all(p.grad is None for p in vae.parameters())
    assert all(p.grad is not None for p in unet.parameters())
    guide = GradientGuide([ConsistencyLoss(2)], scale=0.05, decode=model.decode,
                          reference=F.interpolate(lr, scale_factor=2.0))  # fmt: skip
    found = model.sample(lr, guide=guide)
    assert found.images.shape == (2, 1, 16, 16)
    assert not torch.equal(found.images, model.sample(lr).images)
    z = randn(2, 4, 8, 8).requires_grad_()
    vae.train()
    model.decode(z).sum().backward()
    assert z.grad is not None
    assert all(p.requires_grad and p.grad is None for p in vae.parameters())
    assert vae.training


def test_the_small_image_itself_is_given_where_latents_have_its_size() -> None:
    class Halves(nn.Module):
        def encode(self, x: Tensor) -> Any:  # as diffusers' VQModel
            return SimpleNamespace(latents=F.avg_pool2d(x, 2))

        def decode(self, z: Tensor) -> Tensor:
            return F.interpolate(z, scale_factor=2.0)

    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return x[:, 1:]

    lr, noise = torch.rand(2, 1, 6, 6), randn(2, 1, 6, 6)
    found = ResShift(net, T=2, scale=2, autoencoder=Halves()).sample(lr, noise=noise)
    assert found.images.shape == (2, 1, 12, 12)
    assert torch.equal(seen[0][:, 1:], lr)
    y = F.avg_pool2d(F.interpolate(lr, scale_factor=2, mode="bicubic", align_corners=False), 2)
    sigma = 2 * 0.99
    assert torch.allclose(seen[0][:, :1], (y + sigma * noise) / math.sqrt(sigma**2 + 1), atol=1e-6)


@pytest.mark.parametrize("sides", [(4, 4), (5, 7), (9, 6)])
def test_any_size_is_padded_and_cropped_to_exactly_scale_times_it(sides: tuple[int, int]) -> None:
    shapes: list[tuple[int, ...]] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        shapes.append(tuple(x.shape[2:]))
        return x[:, 1:]

    lr = torch.rand(2, 1, *sides)
    found = ResShift(net, T=2, scale=3, multiple=4).sample(lr)
    assert found.images.shape == (2, 1, 3 * sides[0], 3 * sides[1])
    assert all(s % 12 == 0 for shape in shapes for s in shape)
    inner = F.interpolate(lr, scale_factor=3, mode="bicubic", align_corners=False)
    assert torch.allclose(found.images[..., :6, :6], inner[..., :6, :6], atol=1e-5)


# --- one step -----------------------------------------------------------------------------------------------------


def test_a_student_reaches_in_one_step_what_its_teacher_reaches_in_all() -> None:
    teacher = ResShift(Net(), T=5, scale=2)
    student, lr = copy.deepcopy(teacher), torch.rand(64, 1, 6, 6)
    before = copy.deepcopy(teacher.state_dict())
    pairs = teacher.pairs(lr, seed=1)
    assert set(pairs.tensors) == {"lr", "start", "x0"}
    noise = (pairs.tensors["start"] - teacher.enlarged(lr)) / (2 * 0.99)
    assert torch.allclose(pairs.tensors["x0"], teacher.sample(lr, noise=noise).images, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def gap() -> float:
        y, each = student.enlarged(lr), torch.full((64,), 4.0)
        return float((student.x0(pairs.tensors["start"], each, y, lr) - pairs.tensors["x0"]).square().mean())

    first = gap()
    student.distill(teacher, lr, 150, pairs=pairs, rate=1e-2, batch=32, visual=0.0)
    assert gap() < 0.3 * first
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_every_term_of_distillation_counts_as_written() -> None:
    """One step of plain gradient descent has the gradient of the written-out sum."""
    teacher, lr, hr = ResShift(Net(), T=3, scale=2), torch.rand(4, 1, 4, 4), torch.rand(4, 1, 8, 8)
    extractor = nn.Conv2d(1, 3, 3).eval().requires_grad_(False)
    perceptual = PerceptualLoss([extractor])
    pairs = teacher.pairs(lr, hr)
    for options in (
        {"visual": 0.5}, {"perceptual": 0.7}, {"truth": 0.3}, {"inverse": 0.2},
        {"visual": 0.5, "perceptual": 0.7, "against": "truth"},
    ):  # fmt: skip
        weights: dict[str, Any] = {"visual": 0.0, "perceptual": 0.0, "truth": 0.0, "inverse": 0.0} | options
        student = copy.deepcopy(teacher)
        found = student.distill(
            teacher, lr, 1, pairs=pairs, extractors=perceptual, batch=4, rate=1e-9, **weights
        )
        rows = pairs.batch(4, _generator_of_step_0())
        y, each = teacher.enlarged(rows["lr"]), torch.ones(4)
        said, x0 = teacher.x0(rows["start"], 2 * each, y, rows["lr"]), rows["x0"]
        want = (said - x0).square().mean()
        goal = rows["hr"] if weights.get("against") == "truth" else x0
        want = want + weights["visual"] * SpectrumLoss()(said, goal)
        want = want + weights["perceptual"] * perceptual(said, goal)
        want = want + weights["truth"] * (said - rows["hr"]).square().mean()
        back = teacher.x0(x0, 0 * each, y, rows["lr"])
        want = want + weights["inverse"] * (back - rows["start"]).square().mean()
        assert float(found.losses[0]) == pytest.approx(want.item(), rel=1e-5), options
    assert extractor.weight.grad is None


def _generator_of_step_0() -> torch.Generator:
    from gradmatch.core.training import seed_of

    return torch.Generator().manual_seed(seed_of(0, 0))


# --- guidance -----------------------------------------------------------------------------------------------------


def test_guides_of_no_scale_change_nothing_and_outside_their_interval_compute_nothing() -> None:
    model, asked = ResShift(Net()), []

    def loss(x0: Tensor, y: Any) -> Tensor:
        asked.append(1)
        return x0.sum()

    plain = model.sample(LR).images
    assert torch.equal(model.sample(LR, guide=GradientGuide([loss], scale=0.0)).images, plain)
    assert torch.equal(
        model.sample(LR, guide=GradientGuide([loss], scale=0.1, interval=(20, 30))).images, plain
    )
    assert not asked
    found = model.sample(LR, guide=GradientGuide([loss], scale=0.1, interval=(3, 5)))
    assert len(asked) == 3
    assert found.nfe.tolist() == [15] * 3
    assert not torch.equal(found.images, plain)


@pytest.mark.parametrize("steps", ["ddim", "ancestral"])
def test_a_linear_loss_shifts_the_last_x0_by_its_length(steps: str) -> None:
    """The last step returns x_0 itself, so a guide there alone moves the image by scale * g / RMS(g)."""
    model, way = ResShift(Net()), randn(1, 1, 16, 20, seed=7)
    guide = GradientGuide([lambda x0, _: (x0 * way).sum()], scale=0.05, interval=(0, 0))
    moved = model.sample(LR, steps, guide).images - model.sample(LR, steps).images
    want = -0.05 * way / way.square().mean().sqrt()
    assert torch.allclose(moved, want.expand_as(moved), atol=1e-6)


def test_guidance_by_the_low_resolution_image_brings_samples_nearer_to_it() -> None:
    model, y = ResShift(Net()), F.interpolate(LR, scale_factor=4, mode="bicubic", align_corners=False)
    for loss in (ConsistencyLoss(4), SpectrumLoss(band=(0, 0.25))):
        guide = GradientGuide([loss], scale=0.02, reference="lr", interval=(0, 0))
        assert float(loss(model.sample(LR, guide=guide).images, y)) < float(loss(model.sample(LR).images, y))


# --- losses -------------------------------------------------------------------------------------------------------


def test_amplitudes_do_not_see_shifts_signs_or_reflection() -> None:
    a, loss = randn(2, 1, 8, 10, dtype=torch.float64), SpectrumLoss()
    for other in (a.roll((3, -2), (2, 3)), -a, a.flip(2, 3)):
        assert float(loss(a, other)) < 1e-9
        assert float(SpectrumLoss(phase=0.1)(a, other)) > 1e-3  # the phase does
    assert float(loss(a, 1.1 * a)) > 1e-3
    assert float(SpectrumLoss(phase=0.1)(a, a)) < 1e-9


def test_the_spectrum_loss_is_the_written_out_mean() -> None:
    a, b = randn(2, 3, 6, 8, dtype=torch.float64), randn(2, 3, 6, 8, seed=1, dtype=torch.float64)
    f, g = (torch.fft.fft2(x, norm="ortho").abs() for x in (a, b))
    assert float(SpectrumLoss()(a, b)) == pytest.approx(float((f - g).abs().mean()), rel=1e-6)
    logs = (f.log1p() - g.log1p()).abs()
    assert float(SpectrumLoss(log=True)(a, b)) == pytest.approx(float(logs.mean()), rel=1e-6)
    v, u = torch.meshgrid(torch.fft.fftfreq(6).abs() * 2, torch.fft.fftfreq(8).abs() * 2, indexing="ij")
    r = torch.hypot(v, u)
    assert float(SpectrumLoss(power=2.0)(a, b)) == pytest.approx(
        float((r**2 * (f - g).abs()).sum() / (6 * r**2).sum()), rel=1e-6
    )
    inside = (r >= 0.3) & (r <= 0.8)
    assert float(SpectrumLoss(band=(0.3, 0.8))(a, b)) == pytest.approx(
        float((f - g).abs()[..., inside].mean()), rel=1e-6
    )


def test_parseval_and_finite_gradients_where_the_amplitude_is_zero() -> None:
    a = randn(2, 1, 8, 8, dtype=torch.float64)
    assert float(amplitudes(a).square().sum()) == pytest.approx(float(a.square().sum()))
    zero = torch.zeros(1, 1, 8, 8, requires_grad=True)
    SpectrumLoss()(zero, torch.ones(1, 1, 8, 8)).backward()
    assert zero.grad is not None
    assert torch.equal(zero.grad, torch.zeros_like(zero))  # an image of zeros receives none
    flat = torch.full((1, 1, 8, 8), 0.5, requires_grad=True)
    SpectrumLoss()(flat, randn(1, 1, 8, 8)).backward()
    assert flat.grad is not None
    assert bool(flat.grad.isfinite().all())
    assert amplitudes(torch.ones(1, 1, 4, 4).half()).dtype == torch.float32


def test_features_of_the_identity_are_the_mean_absolute_difference() -> None:
    a, b = randn(2, 1, 5, 5), randn(2, 1, 5, 5, seed=1)
    assert torch.allclose(PerceptualLoss([nn.Identity().eval()])(a, b), (a - b).abs().mean())
    two = PerceptualLoss([lambda x: x, lambda x: x.square()])
    assert torch.allclose(two(a, b), (a - b).abs().mean() + (a.square() - b.square()).abs().mean())
    seen: list[Tensor] = []
    colour = PerceptualLoss([lambda x: (seen.append(x), x)[1]], channels=3, mean=(0.1, 0.2, 0.3), std=2.0)
    colour(a, b)
    assert torch.allclose(seen[1][:, 2], (a[:, 0] - 0.3) / 2)
    assert len(seen[0][0]) == 3


def test_profiles_are_means_over_rings() -> None:
    x = randn(3, 1, 16, 16)
    profile = radial_profile(x, 4)
    v, u = torch.meshgrid(torch.fft.fftfreq(16) * 2, torch.fft.fftfreq(16) * 2, indexing="ij")
    r, logs = torch.hypot(v, u), torch.fft.fft2(x, norm="ortho").abs().log()[:, 0]
    for k in range(4):
        ring = (r >= k / 4) & (r < (k + 1) / 4)
        assert torch.allclose(profile[:, k], logs[:, ring].mean(1), atol=1e-4)
    assert float(ProfileLoss(x[:1], low=0.25, bins=4)(x[:1])) < 1e-10
    blurred = F.avg_pool2d(x, 3, 1, 1)
    assert float(ProfileLoss(x, bins=4)(blurred)) > float(ProfileLoss(x, bins=4)(x))


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ResShift(None), "network is a NoneType"),
        (lambda: ResShift(copies_y, kappa=0.0), "kappa is 0.0"),
        (lambda: ResShift(copies_y, T=1), "T is 1"),
        (lambda: ResShift(copies_y, p=0.0), "p is 0.0"),
        (lambda: ResShift(copies_y, scale=0), "scale is 0"),
        (lambda: ResShift(copies_y, autoencoder=3), "autoencoder is a int"),
        (lambda: ResShift(Net()).loss(HR[..., :12], LR), "hr must be 4 times as large"),
        (lambda: ResShift(Net(), multiple=4).loss(HR, LR), "must be multiples of 4"),
        (lambda: ResShift(Net()).loss(HR * float("nan"), LR), "NaN"),
        (lambda: ResShift(Net()).fit(HR, LR[:2], 1), "hr has 3 entries"),
        (lambda: ResShift(Net()).fit((HR * 255).byte(), (LR * 255).byte(), 1), "hr is torch.uint8"),
        (lambda: ResShift(Net()).loss((HR * 255).byte(), (LR * 255).byte()), "images is torch.uint8"),
        (lambda: ResShift(copies_y).sample(LR[:0]), "not empty"),
        (lambda: ResShift(Net()).fit(HR, LR * float("inf"), 1), "lr has 60 NaN or infinite"),
        (lambda: ResShift(lambda x, t: x).sample(LR), "network gave"),
        (lambda: ResShift(copies_y).sample(LR, "euler"), "steps is 'euler'"),
        (lambda: ResShift(copies_y).sample(LR, 16), "steps is 16"),
        (lambda: ResShift(copies_y).sample(LR, 0), "steps is 0"),
        (lambda: ResShift(copies_y).sample(LR[0]), r"lr is torch.float32 of shape \(1, 4, 5\)"),
        (lambda: ResShift(copies_y).sample((LR * 255).byte()), "lr is torch.uint8"),
        (lambda: ResShift(copies_y).sample(LR * float("nan")), "NaN"),
        (lambda: ResShift(copies_y).sample(LR, guide=GradientGuide([lambda x, _: x])), "must give a scalar"),
        (lambda: PerceptualLoss([nn.Conv2d(1, 1, 1).eval()]), "extractor 0 is not frozen"),
        (lambda: PerceptualLoss([nn.Dropout()]), "extractor 0 is not frozen"),
        (lambda: PerceptualLoss([]), "extractors is empty"),
        (lambda: SpectrumLoss(band=(0.5, 0.2)), "band is"),
        (lambda: SpectrumLoss(band=(1.9, 2.0))(HR, HR), "holds no frequency"),
        (lambda: SpectrumLoss()(HR, LR), "they must be equal"),
        (lambda: ResShift(Net()).distill(ResShift(Net()), LR, 1, visual=-1.0), "visual is -1.0"),
        (lambda: ResShift(Net()).distill(ResShift(Net()), LR, 1, truth=1.0), "there is no hr"),
        (lambda: ResShift(Net()).distill(ResShift(Net()), LR, 1, against="truth"), "there is no hr"),
        (lambda: ResShift(Net()).distill(ResShift(Net()), LR, 1, against="noise"), "against is 'noise'"),
    ],
)  # fmt: skip
def test_refusals(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
