"""Siamese augmentation against written-out references, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradmatch.core.augment import OPERATIONS, Augmentation, SiameseAugment
from gradmatch.core.checks import InputError

SIZE = (6, 7)


def _images(n: int = 3, channels: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draws(strategy: str, count: int, **options) -> list[Augmentation]:
    g = torch.Generator().manual_seed(1)
    augment = SiameseAugment(strategy, **options)
    return [augment.draw(SIZE, g) for _ in range(count)]


def _bilinear(x: Tensor, matrix: list[list[float]]) -> Tensor:
    """x sampled at matrix @ (column, row) in coordinates [-1, 1] whose ends are the outer pixel edges, by loops."""
    h, w = x.shape[2:]
    out = torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            u, v = (2 * j + 1) / w - 1, (2 * i + 1) / h - 1
            column = ((matrix[0][0] * u + matrix[0][1] * v + 1) * w - 1) / 2
            row = ((matrix[1][0] * u + matrix[1][1] * v + 1) * h - 1) / 2
            for r in (math.floor(row), math.floor(row) + 1):
                for c in (math.floor(column), math.floor(column) + 1):
                    if 0 <= r < h and 0 <= c < w:
                        out[:, :, i, j] += x[:, :, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return out


def _reference(x: Tensor, operation: str, v: list[float]) -> Tensor:
    h, w = x.shape[2:]
    out = torch.zeros_like(x)
    if operation == "color":
        x = x + v[0]
        gray = x.sum(1, keepdim=True) / x.shape[1]
        x = gray + v[1] * (x - gray)
        level = torch.stack([image.mean() for image in x]).reshape(-1, 1, 1, 1)
        return level + v[2] * (x - level)
    if operation == "flip":
        return torch.stack([x[..., w - 1 - j] for j in range(w)], dim=-1) if v[0] else x
    if operation == "scale":
        return _bilinear(x, [[v[0], 0.0], [0.0, v[1]]])
    if operation == "rotate":
        return _bilinear(x, [[math.cos(v[0]), -math.sin(v[0])], [math.sin(v[0]), math.cos(v[0])]])
    for i in range(h):
        for j in range(w):
            if operation == "crop":
                r, c = i + int(v[0]), j + int(v[1])
                if 0 <= r < h and 0 <= c < w:
                    out[:, :, i, j] = x[:, :, r, c]
            elif not (v[0] <= i < v[0] + v[2] and v[1] <= j < v[1] + v[3]):
                out[:, :, i, j] = x[:, :, i, j]
    return out


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_equals_its_loop(operation: str) -> None:
    x = _images()
    changed = 0
    for drawn in _draws(operation, 12, crop=0.4):
        out = drawn(x)
        assert out.dtype == torch.float64
        values = drawn.values.double()
        torch.testing.assert_close(out, _reference(x, operation, values[0].tolist()), rtol=1e-6, atol=1e-6)
        changed += not torch.equal(out, x)
    assert changed >= 4


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_draw_treats_two_batches_alike(operation: str) -> None:
    x, other = _images(5, seed=2), _images(40, seed=3)
    other[17] = x[3]
    for drawn in _draws(operation, 5):
        torch.testing.assert_close(drawn(x)[3], drawn(other)[17], rtol=0, atol=1e-12)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_numbers_of_their_own_for_every_image(operation: str) -> None:
    x = _images(8)
    augment = SiameseAugment(operation, crop=0.4)
    drawn = augment.draw(SIZE, torch.Generator().manual_seed(5), count=8)
    assert drawn.values.shape[0] == 8
    assert len(drawn.values.unique(dim=0)) > 1
    apart = [Augmentation(operation, drawn.values[i : i + 1], SIZE)(x[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(drawn(x), torch.cat(apart), rtol=0, atol=1e-12)
    torch.testing.assert_close(augment(x, torch.Generator().manual_seed(5)), drawn(x), rtol=0, atol=0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradient_equals_finite_differences(operation: str) -> None:
    x = _images(2).requires_grad_()
    assert torch.autograd.gradcheck(_draws(operation, 3)[-1], (x,))


def test_every_operation_is_drawn_and_its_numbers_stay_in_range() -> None:
    drawn = _draws("_".join(OPERATIONS), 400)
    by = {name: torch.cat([d.values for d in drawn if d.operation == name]) for name in OPERATIONS}
    assert min(len(v) for v in by.values()) >= 35
    assert bool((by["color"][:, 0].abs() <= 0.5).all())
    assert 0 <= by["color"][:, 1].min() < 0.4 < 1.6 < by["color"][:, 1].max() <= 2
    assert 0.5 <= by["color"][:, 2].min() < 0.7 < 1.3 < by["color"][:, 2].max() <= 1.5
    assert by["crop"].unique().tolist() == [-1.0, 0.0, 1.0]
    assert by["flip"].unique().tolist() == [0.0, 1.0]
    assert 1 / 1.2 <= by["scale"].min() < 0.87 < 1.15 < by["scale"].max() <= 1.2
    assert math.radians(13) < by["rotate"].abs().max() <= math.radians(15)
    tall, wide = 3, 4  # half of 6; 3.5 rounded up
    assert by["cutout"][:, 2:].unique(dim=0).tolist() == [[tall, wide]]
    assert by["cutout"][:, 0].unique().tolist() == list(range(-1, 5))
    assert by["cutout"][:, 1].unique().tolist() == list(range(-2, 6))


@pytest.mark.parametrize("parity", [False, True])
def test_numbers_of_one_operation_are_independent(parity: bool) -> None:
    for operation in ("scale", "crop", "cutout", "color"):
        augment = SiameseAugment(operation, crop=0.5, parity=parity)
        g = torch.Generator().manual_seed(0)
        values = torch.cat([augment.draw((40, 40), g).values[:, :3] for _ in range(200)])
        for j in range(1, 2 if operation != "color" else 3):
            pair = torch.stack([values[:, 0], values[:, j]]).double()
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.25, operation


def test_parity_takes_every_number_from_the_next_seed() -> None:
    augment = SiameseAugment("color_crop_cutout_flip_scale_rotate", parity=True)
    drawn = next(d for d in (augment.drawn_from(s, SIZE) for s in range(50)) if d.operation == "scale")
    seed = next(s for s in range(50) if augment.drawn_from(s, SIZE).operation == "scale")
    assert int(torch.randint(0, 6, (1,), generator=torch.Generator().manual_seed(seed))) == OPERATIONS.index(
        "scale"
    )
    u = [torch.rand(1, generator=torch.Generator().manual_seed(seed + k)).item() for k in (1, 2)]
    assert drawn.values[0].tolist() == pytest.approx([k * (1.2 - 1 / 1.2) + 1 / 1.2 for k in u])
    first, again = (augment.draw(SIZE, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.values, again.values)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    for parity in (False, True):
        SiameseAugment(parity=parity)(_images(), torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_none_does_nothing() -> None:
    x = _images()
    assert SiameseAugment("none")(x, torch.Generator()) is x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SiameseAugment("color_blur"), "augment names 'blur'"),
        (lambda: SiameseAugment(""), "augment names ''"),
        (lambda: SiameseAugment("crop", crop=1.5), "crop is 1.5"),
        (lambda: SiameseAugment("scale", scale=0.5), "scale is 0.5"),
        (lambda: SiameseAugment("rotate", rotate=float("nan")), "rotate is nan"),
        (lambda: _draws("crop", 1)[0](torch.zeros(2, 1, 5, 5)), "drawn for images of size"),
        (
            lambda: SiameseAugment("crop")(torch.zeros(2, 5), torch.Generator()),
            r"must be \(n, channels, h, w\)",
        ),
        (
            lambda: SiameseAugment("crop").draw(SIZE, torch.Generator(), 3)(torch.zeros(2, 1, *SIZE)),
            "x has 2 images",
        ),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
