"""Every check, refusal and named fault of latent flow matching."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core.checks import InputError
from gradmatch.core.path import LinearPath
from gradmatch.core.store import RunFolder
from gradmatch.generate.lfm import Inpainting, Labels, LatentFlow, Layout, Moments, w2_bound
from gradmatch.zoo import autoencoder, mlp_velocity, unet

MEAN, STD = 1.5, 0.4


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Halver(nn.Module):
    """A user's own autoencoder: batch-norm and dropout that would show if its mode changed, tensors in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(1, affine=False), nn.Dropout(0.5)

    def encode(self, x: Tensor) -> Tensor:
        z = nn.functional.pixel_unshuffle(self.drop(self.norm(x)), 2)
        return torch.cat([z, z * 0], 1) if z.shape[1] == 2 else z

    def decode(self, z: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(z, 2)


class Field(nn.Module):
    """A convolution that hears time and label."""

    def __init__(self, inputs: int, outputs: int, classes: int = 3) -> None:
        super().__init__()
        self.mix, self.label = nn.Conv2d(inputs, outputs, 1), nn.Embedding(classes + 1, outputs)

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        out = self.mix(z) * (1 + t[:, None, None, None])
        return out if label is None else out + self.label(label)[:, :, None, None]


def field(inputs: int = 4, outputs: int = 4) -> Field:
    torch.manual_seed(0)
    return Field(inputs, outputs)


def gaussian(z: Tensor, t: Tensor) -> Tensor:
    """The exact field of N(MEAN, STD^2) on the published path, eps = 1e-5."""
    t = t.reshape(-1, *[1] * (z.ndim - 1)).double()
    s = 1e-5 + (1 - 1e-5) * t
    variance = (1 - t) ** 2 * STD**2 + s**2
    return (-MEAN + ((1 - 1e-5) * s - (1 - t) * STD**2) / variance * (z.double() - (1 - t) * MEAN)).to(z)


# --- path, loss --------------------------------------------------------------------------------------------------


def test_the_loss_is_the_published_one() -> None:
    flow, x = LatentFlow(None, field(), scale=0.5), randn(6, 4, 5, 5)
    got = flow.loss(x, generator=seeded(3))
    g = seeded(3)
    z0, z1, t = 0.5 * x, torch.randn(x.shape, generator=g), torch.rand(6, generator=g)
    wide = t[:, None, None, None]
    z = (1 - wide) * z0 + (1e-5 + (1 - 1e-5) * wide) * z1
    wanted = (flow.velocity(z, t) - ((1 - 1e-5) * z1 - z0)).square().mean()
    assert torch.allclose(got, wanted, rtol=1e-6)


def test_the_target_is_the_slope_of_the_path() -> None:
    path, z0, z1 = LinearPath(1e-5), randn(4, 3).double(), randn(4, 3, seed=1).double()
    slope = (path.sample(z0, z1, 0.3 + 1e-6) - path.sample(z0, z1, 0.3 - 1e-6)) / 2e-6
    assert torch.allclose(path.target("velocity", z0, z1, 0.3), slope, atol=1e-8)


def test_times_and_couplings() -> None:
    flow = LatentFlow(None, lambda z, t: times.append(t) or z, scale=1.0, times="logit-normal")
    times: list[Tensor] = []
    for k in range(20):
        flow.loss(randn(500, 1, 1, 1), generator=seeded(k))
    logits = torch.cat(times).logit()
    assert float(logits.mean()) == pytest.approx(0, abs=0.05)
    assert float(logits.std()) == pytest.approx(1, abs=0.05)
    # matched noise is the same noise in the order that costs least, so paths are shorter
    from gradmatch.generate._batches import matched

    z0, z1 = randn(30, 2), randn(30, 2, seed=1)
    order = matched(z0, z1)
    assert sorted(order.tolist()) == list(range(30))
    cost = torch.cdist(z0, z1).square()
    assert float((z0 - z1[order]).square().sum()) < 0.5 * float(cost.diagonal().sum())
    generator = seeded(5)
    for _ in range(50):
        shuffled = torch.randperm(30, generator=generator)
        assert float((z0 - z1[order]).square().sum()) <= float((z0 - z1[shuffled]).square().sum())
    straight = LatentFlow(None, lambda z, t: 0 * z, scale=1.0, coupling="ot")
    plain = LatentFlow(None, lambda z, t: 0 * z, scale=1.0)
    x = randn(64, 2, 1, 1)
    assert float(straight.loss(x, generator=seeded(1))) < 0.8 * float(plain.loss(x, generator=seeded(1)))


def test_the_same_generator_gives_the_same_loss_and_the_global_one_is_left() -> None:
    flow, x = LatentFlow(None, field(), scale=1.0, seed=4), randn(6, 4, 5, 5)
    before = torch.random.get_rng_state()
    assert torch.equal(flow.loss(x, generator=seeded(1)), flow.loss(x, generator=seeded(1)))
    again = LatentFlow(None, field(), scale=1.0, seed=4)
    assert torch.equal(flow.loss(x), again.loss(x))
    assert not torch.equal(flow.loss(x), again.loss(x[:5]))
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(before)
    field()
    assert not flow.loss(x).isnan()
    torch.random.set_rng_state(after)


# --- autoencoder -------------------------------------------------------------------------------------------------


def test_scaling_is_undone_before_decoding() -> None:
    vae, x = Halver(), rand(8, 1, 6, 6)
    for scale in ("auto", 0.18215, 3.0):
        flow = LatentFlow(vae, field(), scale=scale, shift=0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            z = flow.codec.latents(x, seeded())
        assert torch.allclose(flow.codec.images(z), vae.eval().decode(vae.encode(x)), atol=1e-5)
        assert not torch.allclose(vae.decode(z), vae.decode(vae.encode(x)), atol=0.05)  # forgetting 1 / s
        vae.train()


def test_auto_scale_is_one_over_the_deviation_of_the_first_latents_and_goes_with_the_weights() -> None:
    vae = Halver().eval()
    vae.norm.running_var.fill_(9.0)
    flow, x = LatentFlow(vae, field()), randn(50, 1, 6, 6)
    with pytest.raises(InputError, match="no images were seen yet"):
        flow.sample(2, shape=(4, 3, 3), solver="euler", steps=1)
    flow.loss(x)
    assert float(flow.codec.scale) == pytest.approx(1 / float(vae.encode(x).std()), rel=1e-4)
    before = float(flow.codec.scale)
    flow.loss(5 * x)
    assert float(flow.codec.scale) == before
    other = LatentFlow(vae, field())
    other.load_state_dict(flow.state_dict())
    assert float(other.codec.scale) == before
    assert not [k for k in flow.state_dict() if "norm" in k]


def test_an_unbalanced_scale_is_pointed_out_once() -> None:
    flow, x = LatentFlow(None, field(), scale=0.18215 / 5), randn(8, 4, 5, 5)
    with pytest.warns(UserWarning, match=r"deviation of 0.037\d after scaling"):
        flow.loss(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.loss(x)
        LatentFlow(None, field(), scale=1.0).loss(x)


def test_the_autoencoder_is_frozen_and_left_in_its_mode() -> None:
    vae = Halver().train()
    vae.drop.eval()
    extra = nn.Parameter(torch.ones(()))
    vae.register_parameter("extra", extra)
    plain_encode = vae.encode
    vae.encode = lambda x: plain_encode(x) * extra  # type: ignore[method-assign]
    flow = LatentFlow(vae, field())
    before = vae.norm.running_mean.clone()
    flow.fit(rand(20, 1, 6, 6), 3, batch=4, cache=False)
    flow.sample(2, solver="euler", steps=2)
    flow.train().loss(rand(4, 1, 6, 6)).backward()
    assert (vae.training, vae.norm.training, vae.drop.training) == (True, True, False)
    assert torch.equal(vae.norm.running_mean, before)
    assert extra.grad is None
    assert not [n for n, _ in flow.named_parameters() if "extra" in n]
    assert len(list(flow.parameters())) == len(list(field().parameters()))


def test_posterior_samples_and_means() -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae, x = autoencoder(1, 2, (8, 8)), rand(6, 1, 8, 8)
    sampled, mean = (LatentFlow(vae, field(2, 2), scale=1.0, mean=m) for m in (False, True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (sampled.codec.latents(x, seeded(k)) for k in (0, 1))
        assert not torch.equal(a, b)
        assert torch.equal(mean.codec.latents(x, seeded(0)), mean.codec.latents(x, seeded(1)))
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=seeded(0))
        assert torch.allclose(a, posterior.mean + posterior.std * noise, atol=1e-6)


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 1e-5), (torch.float16, 3e-4)])
def test_cached_moments_give_the_same_loss(dtype: torch.dtype, slack: float) -> None:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae, x = autoencoder(1, 2, (8, 8)), rand(40, 1, 8, 8)
    flow = LatentFlow(vae, field(2, 2))
    cache = flow.moments(x, batch=7, dtype=dtype)
    assert isinstance(cache, Moments)
    assert cache.mean.dtype == dtype
    live = flow.loss(x, generator=seeded(2))
    assert flow.loss(cache, generator=seeded(2)).item() == pytest.approx(live.item(), abs=slack)
    assert len(cache[:3]) == 3


# --- sampling ----------------------------------------------------------------------------------------------------


def test_error_falls_with_the_order_and_calls_are_steps() -> None:
    z, flow = randn(2000, 1).double(), LatentFlow(None, gaussian, scale=1.0)
    wanted = MEAN + STD * z  # the affine flow of a Gaussian
    errors: dict[str, list[float]] = {}
    for solver, calls in (("euler", 1), ("heun", 2)):
        for steps in (20, 40, 80):
            images, nfe = flow.sample(z, solver=solver, steps=steps)
            assert nfe.tolist() == [steps * calls] * 2000  # the published sampler makes steps - 1
            errors.setdefault(solver, []).append(float((images - wanted).abs().mean()))
            assert float(images.mean()) == pytest.approx(MEAN + STD * float(z.mean()), abs=0.02)
            assert float(images.std()) == pytest.approx(STD * float(z.std()), abs=0.04)
    for solver, order in (("euler", 1), ("heun", 2)):
        first, second, third = errors[solver]
        assert math.log2(first / second) == pytest.approx(order, abs=0.2)
        assert math.log2(second / third) == pytest.approx(order, abs=0.2)
    assert errors["euler"] == pytest.approx([0.0252, 0.0129, 0.0065], rel=0.1)


def test_dopri5_is_the_default_counts_its_calls_and_agrees_with_a_thousand_euler_steps() -> None:
    rows: list[int] = []

    def counted(z: Tensor, t: Tensor) -> Tensor:
        rows.append(len(z))
        return gaussian(z, t)

    flow, z = LatentFlow(None, counted, scale=1.0), randn(20, 2)
    images, nfe = flow.sample(z)
    assert int(nfe.sum()) == sum(rows)
    thousand, _ = LatentFlow(None, gaussian, scale=1.0).sample(z, solver="euler", steps=1000)
    assert float((images - thousand).abs().max()) < 3e-3
    alone, calls = flow.sample(z[:3])  # every example has its own step size
    assert torch.allclose(alone, images[:3], atol=1e-5)
    assert torch.equal(calls, nfe[:3])


def test_a_times_array_is_a_schedule() -> None:
    flow, z = LatentFlow(None, field(), scale=1.0), randn(3, 4, 5, 5)
    uniform, _ = flow.sample(z, solver="euler", steps=4)
    assert torch.allclose(
        flow.sample(z, solver="euler", times=[1, 0.75, 0.5, 0.25, 0]).images, uniform, atol=1e-6
    )
    bent = flow.sample(z, solver="euler", times=[1, 0.9, 0.1, 0])
    assert bent.nfe.tolist() == [3] * 3
    assert not torch.equal(bent.images, uniform)


def test_sampling_is_seeded_and_needs_no_training_where_the_shape_is_given() -> None:
    flow = LatentFlow(None, field(), scale=1.0)
    a, b, c = (flow.sample(3, solver="euler", steps=2, shape=(4, 5, 5), seed=s).images for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not a.requires_grad


# --- conditions --------------------------------------------------------------------------------------------------


def test_guidance_one_is_the_conditional_field_and_zero_the_null_field() -> None:
    net, labels = field(), torch.tensor([0, 2, 1])
    flow, z = LatentFlow(None, net, scale=1.0, condition=Labels(3)), randn(3, 4, 5, 5)

    def by_hand(guidance: float) -> Tensor:
        x = z
        for t in (1.0, 0.5):
            at = torch.full((3,), t)
            v, null = net(x, at, labels), net(x, at, torch.full_like(labels, 3))
            x = x - 0.5 * (null + guidance * (v - null))
        return x

    one, calls = flow.sample(z, labels, 1.0, "euler", 2)
    with torch.no_grad():
        x = z
        for t in (1.0, 0.5):
            x = x + -0.5 * net(x, torch.full((3,), t), labels)
        assert torch.equal(one, x)
        assert calls.tolist() == [2] * 3
        zero, calls = flow.sample(z, labels, 0.0, "euler", 2)
        assert torch.allclose(zero, by_hand(0.0), atol=1e-5)
        assert calls.tolist() == [2] * 3
        more, calls = flow.sample(z, labels, 1.5, "euler", 2)
        assert torch.allclose(more, by_hand(1.5), atol=1e-5)  # on all channels, the fourth too
        assert calls.tolist() == [4] * 3


def test_labels_are_dropped_to_the_null_label_one_time_in_ten() -> None:
    condition = Labels(5)
    labels = torch.arange(5).repeat(2000)
    dropped = condition.dropped(condition.ready(labels, None, lambda x: x, (1, 1)), seeded())["label"]
    hidden = dropped != labels
    assert float(hidden.double().mean()) == pytest.approx(0.1, abs=0.01)
    assert dropped[hidden].unique().tolist() == [5]  # num_classes, not class 0
    assert Labels(5).dropout == 0.1


def test_inpainting_gives_two_c_plus_one_channels_that_do_not_see_under_the_mask() -> None:
    vae = Halver().eval()
    seen: list[Tensor] = []

    class Watch(Field):
        def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            seen.append(z)
            return super().forward(z, t)

    torch.manual_seed(0)
    flow = LatentFlow(vae, Watch(9, 4), scale=1.0, condition=Inpainting())
    x, mask = rand(3, 1, 6, 6), torch.zeros(3, 1, 6, 6)
    mask[:, :, 2:4, 2:4] = 1
    flow.loss(x, {"mask": mask}, seeded())
    assert seen[0].shape == (3, 9, 3, 3)
    other = torch.where(mask.bool(), 7.0, x)
    ready = [flow.prepared({"mask": mask, "image": i}, None, (3, 3))["concat"] for i in (x, other)]
    assert torch.equal(*ready)
    assert torch.equal(seen[0][:, 4:], ready[0])
    assert torch.equal(ready[0][:, 4], mask[:, 0, ::2, ::2])
    around = flow.prepared({"mask": mask, "image": x + 1}, None, (3, 3))["concat"]
    assert not torch.equal(around, ready[0])
    images, nfe = flow.sample(3, {"mask": mask, "image": x}, solver="euler", steps=2)
    assert images.shape == x.shape
    assert nfe.tolist() == [2] * 3


def test_a_layout_is_halved_and_mixed_and_trained_along() -> None:
    condition = Layout(3, channels=2, halvings=1)
    flow = LatentFlow(Halver().eval(), field(6), scale=1.0, condition=condition)
    x, kinds = rand(4, 1, 6, 6), torch.randint(3, (4, 6, 6), generator=seeded())
    hot = nn.functional.one_hot(kinds, 3).permute(0, 3, 1, 2)
    before = condition.mix.weight.detach().clone()
    flow.fit((x, torch.zeros(4)), 3, batch=4, cond=lambda images, labels, g: hot, lr=1e-2)
    assert not torch.equal(condition.mix.weight, before)
    small = nn.functional.avg_pool2d(hot.float(), 2)  # what bilinear by a half is
    assert torch.allclose(flow.prepared(hot, None, (3, 3))["concat"], condition.mix(small), atol=1e-6)
    assert flow.sample(4, hot, solver="euler", steps=2).images.shape == x.shape
    assert (Layout(3).mix.out_channels, Layout(3).halvings) == (4, 3)


# --- training ----------------------------------------------------------------------------------------------------


def test_a_small_flow_learns_two_points() -> None:
    torch.manual_seed(0)
    points = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    flow = LatentFlow(None, mlp_velocity(2, (64, 64)), scale=1.0)
    flow.fit(points[torch.arange(512) % 2], 500, batch=256, lr=1e-2, schedule="cosine", ema=0.9)
    images, _ = flow.sample(200, solver="euler", steps=20)
    gaps = torch.cdist(images, points)
    assert float(gaps.min(1).values.median()) < 0.4
    assert 0.3 < float((gaps.argmin(1) == 0).double().mean()) < 0.7


def test_stopped_and_resumed_ends_with_the_same_bits(tmp_path: Any) -> None:
    data = rand(30, 1, 6, 6), torch.arange(30) % 3

    def fit(flow: LatentFlow, **options: Any) -> LatentFlow:
        flow.fit(data, 8, batch=5, ema=0.9, **options)
        return flow

    def make() -> LatentFlow:
        return LatentFlow(Halver().eval(), field(), condition=Labels(3))

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 5:
            raise Stop

    whole = fit(make())
    run = RunFolder(tmp_path, {})
    with pytest.raises(Stop):
        fit(make(), run=run, after=stop, save_every=0.0)
    assert run.load()[0] == 5
    again = fit(make(), run=RunFolder(tmp_path, {}, resume=True))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_loaders_examples_and_diffusers_networks_are_taken() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    x, y = rand(12, 1, 8, 8), torch.arange(12) % 3
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 8), latent_channels=2, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    net = diffusers.UNet2DModel(
        4, 2, 2, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, num_class_embeds=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    flow = LatentFlow(vae, net, condition=Labels(3))
    found = flow.fit(DataLoader(TensorDataset(x, y), batch_size=5), 4)
    assert len(found.losses) == 4
    images, nfe = flow.sample(3, torch.tensor([0, 1, 2]), 1.5, "euler", 2)
    assert images.shape == (3, 1, 8, 8)
    assert nfe.tolist() == [4] * 3
    plain = LatentFlow(None, unet(1, 8, 8, levels=1), scale=1.0)
    plain.fit(DataLoader(TensorDataset(x, y), batch_size=5), 2)
    plain.fit(DataLoader(TensorDataset(x), batch_size=5), 2)  # batches of one tensor
    assert plain.sample(2, solver="heun", steps=1).images.shape == (2, 1, 8, 8)


def test_nan_stops_with_its_step_named() -> None:
    x = rand(20, 1, 6, 6)
    x[7, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="data has 1 NaN"):
        LatentFlow(None, field(1, 1), scale=1.0).fit(x, 5)
    loader = [rand(4, 1, 6, 6), rand(4, 1, 6, 6), x]
    with pytest.raises(InputError, match="Step 3 of training stops: images has 1 NaN"):
        LatentFlow(None, field(1, 1), scale=1.0).fit(loader, 5)
    calls = [0]

    class Breaks(Field):
        def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            calls[0] += 1
            return super().forward(z, t) * (torch.nan if calls[0] == 4 else 1)

    with pytest.raises(InputError, match="the loss of step 4 is nan"):
        LatentFlow(None, Breaks(1, 1), scale=1.0).fit(rand(20, 1, 6, 6), 9)


# --- the bound ----------------------------------------------------------------------------------------------------


def test_the_bound_holds_where_the_printed_one_does_not() -> None:
    """Data N(0, 1), a decoder that shifts by 1, a field off by a constant 0.1 and Lipschitz constant 1."""
    w2 = 1.0 + 0.1  # the mean moves by both; the deviation is right
    printed = 1.0**2 + math.exp(1 + 2) * 0.1**2
    assert w2**2 > printed
    assert printed == pytest.approx(1.2009, abs=1e-4)
    assert w2 <= w2_bound(1.0, 1.0, 1.0, 0.1**2)
    assert w2_bound(1.0, 1.0, 1.0, 0.1**2) ** 2 == pytest.approx(2.10, abs=0.01)


# --- refusals -----------------------------------------------------------------------------------------------------

X = rand(3, 1, 6, 6)
MASK = torch.ones(3, 1, 6, 6)


def flow_of(**options: Any) -> LatentFlow:
    return LatentFlow(None, field(1, 1), scale=1.0, **options)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LatentFlow(3, field()), "autoencoder is a int"),
        (lambda: LatentFlow(None, 3), "velocity is a int"),
        (lambda: LatentFlow(None, field(), scale=-1.0), "scale is -1.0"),
        (lambda: flow_of(times="cosine"), "times is 'cosine'"),
        (lambda: flow_of(coupling="best"), "coupling is 'best'"),
        (lambda: flow_of().loss((X * 255).byte()), "images is of torch.uint8"),
        (lambda: flow_of().loss(X / 0), "images has"),
        (lambda: flow_of().loss(X, torch.tensor([0, 1, 2])), "made without a condition"),
        (lambda: flow_of(condition=Labels(3)).loss(X), "needs a label"),
        (lambda: flow_of(condition=Labels(3)).loss(X, torch.tensor([0, 1, 4])), "labels must be 0..2"),
        (lambda: flow_of(condition=Labels(3)).loss(X, torch.rand(3)), "must be whole numbers"),
        (lambda: Labels(3, dropout=1.0), "dropout is 1.0"),
        (
            lambda: flow_of(condition=Labels(3, 0.0)).sample(3, torch.zeros(3).long(), 1.5, shape=(1, 6, 6)),
            "never dropped in training",
        ),
        (lambda: flow_of().sample(3, guidance=1.5, shape=(1, 6, 6)), "never dropped in training"),
        (lambda: flow_of(condition=Inpainting()).loss(X, {"mask": MASK * 0.5}), "other than 0 and 1"),
        (lambda: flow_of(condition=Inpainting()).loss(X, {"mask": MASK[:, :, :3]}), "mask is of shape"),
        (lambda: flow_of(condition=Inpainting()).sample(3, {"mask": MASK}, shape=(1, 6, 6)), "cond must be"),
        (lambda: flow_of(condition=Inpainting()).loss(X, {"mask": MASK}), "does not take 3 channels"),
        (lambda: flow_of(condition=Layout(2)).loss(X, MASK), "one-hot map"),
        (lambda: flow_of(condition=Layout(1)).loss(X, MASK * 0.5), "is not one-hot"),
        (
            lambda: flow_of(condition=Layout(1, halvings=1)).loss(X, MASK),
            r"becomes \(3, 3\) after 1 halvings",
        ),
        (lambda: LatentFlow(None, field(1, 2), scale=1.0).loss(X), "it must give"),
        (lambda: flow_of().sample(3, solver="euler", steps=0, shape=(1, 6, 6)), "steps is 0"),
        (lambda: flow_of().sample(3, solver="euler", shape=(1, 6, 6)), "steps is None"),
        (lambda: flow_of().sample(3, steps=5, shape=(1, 6, 6)), "dopri5 finds its own"),
        (lambda: flow_of().sample(3, steps=5, times=[1, 0], shape=(1, 6, 6)), "both given"),
        (lambda: flow_of().sample(3, solver="euler", steps=2), "shape is None"),
        (
            lambda: flow_of(condition=Labels(3)).sample(
                3, torch.zeros(2).long(), 1.0, "euler", 2, shape=(1, 6, 6)
            ),
            "cond is for",
        ),
        (lambda: flow_of().fit(3, 5), "data is a int"),
        (lambda: flow_of().fit([], 5), "data is empty"),
        (lambda: flow_of().fit((X, torch.zeros(2)), 5), "data labels has 2"),
        (lambda: w2_bound(1.0, -1.0, 1.0, 1.0), "decoder is -1.0"),
    ],
)
def test_refusals(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_a_loader_cannot_be_resumed(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="give arrays to resume"):
        flow_of().fit([X], 2, run=RunFolder(tmp_path, {}))


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_networks_of_another_precision_are_trained_and_sampled(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    flow = LatentFlow(None, mlp_velocity(16, (8,)).to(kind), "auto")
    flow.fit(rand(8, 1, 4, 4), 3, batch=4)
    images = flow.sample(2, solver="heun", steps=2).images
    assert images.dtype == (torch.float64 if kind == torch.float64 else torch.float32)
    single = LatentFlow(None, mlp_velocity(16, (8,)), 1.0)
    assert float(single.loss(rand(8, 1, 4, 4).double(), generator=seeded())) > 0


def test_double_precision_keeps_its_digits() -> None:
    net = mlp_velocity(16, (8,)).double()
    x = rand(4, 1, 4, 4).double()
    flow = LatentFlow(None, net, 1.0)
    z1 = torch.randn(x.shape, generator=seeded(), dtype=x.dtype)
    g = seeded()
    torch.randn(x.shape, generator=g, dtype=x.dtype)
    t = torch.rand(4, generator=g).double()
    wide = t.reshape(-1, 1, 1, 1)
    wanted = (net((1 - wide) * x + (1e-5 + (1 - 1e-5) * wide) * z1, t) - (1 - 1e-5) * z1 + x).square().mean()
    assert float(flow.loss(x, generator=seeded())) == pytest.approx(float(wanted), abs=1e-14)


def test_batches_of_a_hugging_face_loader() -> None:
    rows = [{"pixel_values": rand(3, 1, 4, 4), "labels": torch.tensor([0, 1, 2])}]
    flow = LatentFlow(None, mlp_velocity(16, (8,), classes=3), 1.0, condition=Labels(3))
    assert len(flow.fit(rows, 3).losses) == 3


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (torch.ones(4, 1, 4, 4).byte(), "data is torch.uint8"),
        (torch.ones(0, 1, 4, 4), "one image or more"),
        (iter([torch.ones(4, 1, 4, 4)]), "an iterator ends once"),
        ([torch.ones(0, 1, 4, 4)], "x is empty"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(data: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        LatentFlow(None, mlp_velocity(16, (8,)), 1.0).fit(data, 3, batch=2)


def test_guidance_with_the_default_solver_where_samples_arrive_at_different_times() -> None:
    def field(z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return -z * (1 + 10 * label.to(z) * torch.sin(9 * t))[:, None, None, None]

    flow = LatentFlow(None, field, 1.0, condition=Labels(4))
    labels = torch.tensor([0, 3, 1])
    images, nfe = flow.sample(randn(3, 1, 2, 2), labels, 1.5)
    assert len(set(nfe.tolist())) > 1
    for k in range(3):
        alone = flow.sample(randn(3, 1, 2, 2)[k : k + 1], labels[k : k + 1], 1.5)
        assert torch.allclose(alone.images[0], images[k], atol=1e-5)
        assert alone.nfe[0] == nfe[k]
