"""U-REPA: the two terms, projection and upsampling, taps that change nothing, teachers that stay frozen, refusals."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.core.relational import relation_mismatch
from gradmatch.generate import FeatureAlignment, PatchTokens
from gradmatch.generate._token_grid import resized

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """A U-Net of three convolutions with its middle at half the size."""

    def __init__(self, tokens: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv2d(3, 6, 2, 2)
        self.mid_block = Middle(tokens)
        self.up = nn.ConvTranspose2d(6, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid_block(self.down(x))
        h = h if h.ndim == 4 else h.mT.reshape(len(h), 6, 4, 4)
        return self.up(h)


class Middle(nn.Module):
    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.conv, self.tokens = nn.Conv2d(6, 6, 1), tokens

    def forward(self, h: Tensor) -> Tensor:
        h = self.conv(h)
        return h.flatten(2).mT if self.tokens else h


def teacher(width: int = 5) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Dropout()).eval().requires_grad_(False)


def aligned(model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, FeatureAlignment]:
    model = model or Small()
    return model, FeatureAlignment(model, **({"teacher": teacher(), "dim_out": 5, "hidden": 16} | options))


def test_a_perfect_projection_scores_minus_one_and_zero() -> None:
    model, align = aligned(Small(), dim_out=6, upsample="teacher_down")
    align.project = nn.Sequential(nn.Linear(6, 6, bias=False))
    align.project[0].weight.data.copy_(torch.eye(6))
    h = model.mid_block(model.down(X))  # type: ignore[operator]
    model(X)
    found = align.loss(h.flatten(2).mT.detach())
    assert float(found["token"].detach()) == pytest.approx(-1, abs=1e-6)
    assert float(found["manifold"]) == pytest.approx(0, abs=1e-6)
    assert float(found["total"]) == pytest.approx(-0.5, abs=1e-6)


def test_the_terms_by_hand() -> None:
    model, align = aligned(weight=0.7, token_weight=0.3, manifold_weight=2.0)
    model(X)
    found = align.loss(X)
    h = model.mid_block(model.down(X))  # type: ignore[operator]
    phi = torch.nn.functional.interpolate(
        align.project(h.movedim(1, -1)).movedim(-1, 1), scale_factor=2, mode="bilinear", align_corners=False
    ).flatten(2).mT  # fmt: skip
    y = teacher()(X).flatten(2).mT
    token = -torch.cosine_similarity(phi, y, dim=2, eps=1e-6).mean()
    a, b = (v / v.norm(dim=2, keepdim=True).clamp_min(1e-6) for v in (phi, y))
    manifold = torch.stack([(p @ p.T - q @ q.T).square().mean() for p, q in zip(a, b, strict=True)]).mean()
    assert torch.allclose(found["token"], token, atol=1e-6)
    assert torch.allclose(found["manifold"], manifold, atol=1e-6)
    assert torch.allclose(found["total"], 0.7 * (0.3 * token + 2 * manifold), atol=1e-6)


def test_the_batch_scope_compares_tokens_of_all_images() -> None:
    model, align = aligned(scope="batch")
    model(X)
    found = align.loss(X)["manifold"]
    h = model.mid_block(model.down(X))  # type: ignore[operator]
    phi = resized(align.project(h.flatten(2).mT), (4, 4), (8, 8)).reshape(1, -1, 5)
    y = teacher()(X).flatten(2).mT.reshape(1, -1, 5)
    a, b = (v / v.norm(dim=2, keepdim=True).clamp_min(1e-6) for v in (phi, y))
    assert torch.allclose(found, (a @ a.mT - b @ b.mT).square().mean(), atol=1e-5)


def test_the_second_term_shrinks_along_its_own_gradient() -> None:
    """As printed, with a minus, it would grow."""
    model, align = aligned(token_weight=0.0, weight=1.0)
    model(X)
    before = align.loss(X)
    grads = torch.autograd.grad(before["total"], list(align.project.parameters()))
    with torch.no_grad():
        for p, g in zip(align.project.parameters(), grads, strict=True):
            p -= 0.5 * g
    model(X)
    assert float(align.loss(X)["manifold"]) < float(before["manifold"])


def test_at_weight_zero_training_is_bit_identical() -> None:
    def trained(align_too: bool) -> list[Tensor]:
        model = Small()
        align = aligned(model, weight=0.0)[1] if align_too else None
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            noise = torch.randn_like(X)
            loss = (model(X + noise) - noise).square().mean()
            if align is not None:
                loss = loss + align.loss(X)["total"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [*model.parameters(), torch.rand(3)]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


def test_a_linear_projection_commutes_with_upsampling_and_an_mlp_does_not() -> None:
    def phi(upsample: str, linear: bool) -> Tensor:
        model, align = aligned(upsample=upsample)
        if linear:
            torch.manual_seed(3)
            align.project = nn.Sequential(nn.Linear(6, 5))
        h, grid = model.mid_block(model.down(X)).flatten(2).mT, (4, 4)  # type: ignore[operator]
        return align._matched(h, grid, torch.zeros(4, 64, 5), (8, 8), None)[0]

    assert torch.allclose(phi("after", True), phi("before", True), atol=1e-6)
    assert not torch.allclose(phi("after", False), phi("before", False), atol=1e-4)


@pytest.mark.parametrize("upsample", ["after", "before", "inside", "teacher_down"])
def test_every_upsampling_trains_model_and_projector_and_never_the_teacher(upsample: str) -> None:
    model, align = aligned(upsample=upsample)
    model(X)
    align.loss(X)["total"].backward()
    assert all(p.grad is not None for p in align.project.parameters())
    assert model.down.weight.grad is not None  # type: ignore[union-attr]
    taught = align._teacher[0]
    assert taught is not None
    assert all(p.grad is None for p in taught.parameters())
    assert not set(map(id, taught.parameters())) & set(map(id, align.parameters()))
    assert not set(map(id, model.parameters())) & set(map(id, align.parameters()))


def test_images_and_maps_of_the_same_values_give_the_same_loss() -> None:
    found = []
    for tokens in (False, True):
        model, align = aligned(Small(tokens))
        model(X)
        found.append(float(align.loss(X)["total"]))
    assert found[0] == pytest.approx(found[1], abs=1e-7)


def test_cached_features_give_the_loss_of_live_ones() -> None:
    model, align = aligned()
    cached = align.cache(X, batch=3, dtype=torch.float32)
    assert cached.shape == (4, 64, 5)
    model(X)
    live = align.loss(X)
    model(X)
    assert torch.equal(live["total"], align.loss(cached)["total"])
    assert align.cache(X).dtype == torch.float16


def test_chunks_equal_the_whole() -> None:
    totals = []
    for chunk in (None, 1):
        model, align = aligned(chunk=chunk)
        model(X)
        loss = align.loss(X)["total"]
        totals.append((loss.detach(), torch.autograd.grad(loss, model.down.weight)[0]))  # type: ignore[arg-type]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*totals, strict=True))


def test_an_averaged_copy_of_the_model_keeps_nothing_and_remove_restores() -> None:
    model, align = aligned()
    shadow = copy.deepcopy(model)
    shadow(X)
    assert not align._seen
    assert not any("project" in name for name, _ in shadow.named_modules())
    model(X)
    align.loss(X)
    assert not align._seen  # the graph is let go after use
    model(X)
    align.remove()
    assert not align._seen
    model(X)
    assert not align._seen
    assert not model.mid_block._forward_hooks  # type: ignore[union-attr]
    lost = FeatureAlignment(model, teacher=teacher(), dim_out=5, hidden=4)
    del lost
    gc.collect()
    model(X)  # a hook whose owner is gone does nothing


def test_the_time_aware_projector_starts_as_the_plain_one_and_learns_time() -> None:
    t = torch.rand(4)
    model, align = aligned(time_aware=True)
    model(X)
    found = align.loss(X, t)["total"]
    plain = aligned()[1]
    assert float(found) == pytest.approx(float(_after(plain, Small())), abs=1e-6)
    with torch.no_grad():
        align.modulate[1].weight.normal_()  # type: ignore[index, union-attr, operator]
    values = []
    for times in (torch.full((4,), 0.1), torch.full((4,), 0.9)):
        model(X)
        values.append(float(align.loss(X, times)["total"]))
    assert values[0] != values[1]


def _after(align: FeatureAlignment, model: nn.Module) -> Tensor:
    align._seen[:] = [model.mid_block(model.down(X))]  # type: ignore[operator]
    return align.loss(X)["total"]


def test_a_weight_that_depends_on_time() -> None:
    model, align = aligned(weight=lambda t: 1 - t, scope="image")
    t = torch.tensor([0.0, 1.0, 1.0, 1.0])
    model(X)
    weighted = align.loss(X, t)["total"]
    alone = FeatureAlignment(model, teacher=teacher(), dim_out=5, hidden=16, weight=1.0)
    model(X[:1])
    assert float(weighted) == pytest.approx(float(alone.loss(X[:1])["total"]) / 4, abs=1e-6)


def test_the_taps_own_mismatch() -> None:
    model, align = aligned()
    model(X)
    found = align.mismatch(X)
    h = model.mid_block(model.down(X)).flatten(2).mT  # type: ignore[operator]
    y = nn.functional.adaptive_avg_pool2d(teacher()(X), 4).flatten(2).mT
    assert torch.allclose(found, relation_mismatch(h, y))


def test_diffusers_networks_and_a_hugging_face_teacher() -> None:
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=4,
        num_register_tokens=2,
    )
    vision = PatchTokens(transformers.Dinov2WithRegistersModel(config))
    images = X[:2].clamp(-1, 1)
    assert vision(images).shape == (2, 16, 8)
    big = nn.functional.interpolate((images + 1) / 2, (16, 16), mode="bilinear", antialias=True)
    whole = vision.model(pixel_values=(big - vision.mean) / vision.std).last_hidden_state
    assert torch.allclose(vision(images), whole[:, 3:], atol=1e-5)
    unet = diffusers.UNet2DModel(
        8, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=3, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=2, norm_num_groups=1,
    )  # fmt: skip
    y = torch.zeros(2, dtype=torch.long)
    runs = (
        (unet, "mid_block", lambda: unet(images, torch.tensor([3, 4]))),
        (dit, "transformer_blocks", lambda: dit(images, torch.tensor([3, 4]), class_labels=y)),
    )
    for net, tap, call in runs:
        align = FeatureAlignment(net, tap, vision, dim_in=8, hidden=8)
        call()
        loss = align.loss(images)["total"]
        loss.backward()
        assert bool(loss.isfinite())
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tap": "middle"}, "names 0 parts; the model has"),
        ({"tap": "conv", "position": 1}, "no list of blocks"),
        ({"teacher": teacher().train()}, "train mode"),
        ({"teacher": teacher().requires_grad_(True)}, "requires gradients"),
        ({"dim_out": None}, "dim_out is None"),
        ({"upsample": "nearest"}, "upsample"),
        ({"scope": "set"}, "scope"),
        ({"weight": -1.0}, "weight"),
        ({"manifold_weight": -1.0}, "manifold_weight"),
    ],
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        aligned(**options)


def test_refusals_of_losses() -> None:
    model, align = aligned()
    with pytest.raises(InputError, match="run the model on that batch first"):
        align.loss(X)
    model(X)
    with pytest.raises(InputError, match="run the model on that batch first"):
        align.loss(X[:2])
    with pytest.raises(InputError, match="no whole ratio"):
        align.loss(torch.randn(4, 49, 5))
    model(X)
    with pytest.raises(InputError, match="no square"):
        align.loss(torch.randn(4, 48, 5))
    model(X)
    with pytest.raises(InputError, match="dim_out is 5"):
        align.loss(torch.randn(4, 64, 7))
    taught = align._teacher[0]
    assert taught is not None
    taught.train()
    model(X)
    with pytest.raises(InputError, match="train mode"):
        align.loss(X)
    _, cached_only = aligned(model, teacher=None)
    model(X)
    with pytest.raises(InputError, match="teacher is None"):
        cached_only.loss(X)
    flat = nn.Sequential(nn.Conv2d(3, 4, 1), Wide())
    odd = FeatureAlignment(flat, "1", teacher(), dim_in=4, dim_out=5, hidden=4)
    flat(X)
    with pytest.raises(InputError, match=r"must be \(n, c, h, w\)"):
        odd.loss(X)
    _, timed = aligned(model, time_aware=True)
    model(X)
    with pytest.raises(InputError, match="needs the batch's times"):
        timed.loss(X)
    _, scheduled = aligned(model, weight=lambda t: t)
    model(X)
    with pytest.raises(InputError, match="depends on time"):
        scheduled.loss(X)


def test_grids_that_are_no_squares_or_in_no_whole_ratio_can_be_given() -> None:
    model, align = aligned(resize=True, teacher_grid=(4, 6))
    model(X)
    assert bool(align.loss(torch.randn(4, 24, 5))["total"].isfinite())
    model(X)
    with pytest.raises(InputError, match="product"):
        align.loss(torch.randn(4, 25, 5))


def test_blocks_of_sd3_and_flux_are_read_for_their_image_and_not_their_text() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=4,
        num_attention_heads=2, caption_projection_dim=8, joint_attention_dim=8, pooled_projection_dim=6,
    )  # fmt: skip
    flux = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    z, words, pooled, t = (
        torch.randn(2, 4, 4, 4),
        torch.randn(2, 5, 8),
        torch.randn(2, 6),
        torch.tensor([0.2, 0.7]),
    )
    given = {"encoder_hidden_states": words, "pooled_projections": pooled}
    ids = {"txt_ids": torch.zeros(5, 3), "img_ids": torch.zeros(16, 3)}
    runs = [(sd3, k, lambda: sd3(z, timestep=1000 * t, **given)) for k in (0, 1, 2)]
    runs += [(flux, 1, lambda: flux(z.flatten(2).mT, timestep=t, **given, **ids))]
    teacher = nn.Conv2d(3, 6, 1).eval().requires_grad_(False)
    for net, position, run in runs:
        align = FeatureAlignment(net, "transformer_blocks", teacher, 8, 6, position, hidden=8)
        block: nn.Module = net.transformer_blocks[position]
        seen: list[Any] = []
        handle = block.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        run()
        handle.remove()
        assert align._seen[0] is seen[0][1]  # (text or None, image)
        assert torch.isfinite(align.loss(torch.randn(2, 3, 4, 4))["total"])
        align.remove()


def test_a_block_that_gives_several_alike_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mid_block = Twice()

        def forward(self, x: Tensor) -> Tensor:
            return self.mid_block(x)[0]

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    net = Two()
    align = FeatureAlignment(net, dim_in=3, dim_out=6)
    with pytest.raises(InputError, match="2 of them shaped as its input"):
        net(X)
    align.remove()


def test_features_that_are_not_finite_stop_it_and_double_precision_is_kept() -> None:
    net = Small()
    align = FeatureAlignment(net, dim_out=5, hidden=8)
    net(X)
    with pytest.raises(InputError, match="the alignment loss has"):
        align.loss(torch.full((4, 16, 5), torch.nan))
    net(X)
    align.double()
    assert align.loss(torch.randn(4, 16, 5))["total"].dtype == torch.float64
