"""Data whose classes share something large that has nothing to do with the task, in exactly known amounts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.examples import Examples
from gradmatch.datasets._load import Split
from gradmatch.datasets.fashion_mnist import NAMES, fashion_mnist

__all__ = ["CLOTHES", "add_patches", "add_pattern", "clothes", "photograph_patches", "shared_direction"]

CLOTHES = (0, 2, 3, 4, 6)
"""The fine-grained group of Fashion-MNIST: T-shirt, pullover, dress, coat, shirt."""


def shared_direction(
    ratio: float,
    *,
    classes: int = 5,
    dim: int = 50,
    per_class: int = 200,
    test_per_class: int = 400,
    signal: float = 3.0,
    spread: float = 0.5,
    seed: int = 0,
) -> Split:
    """A linear task under one direction that all classes share, of varying strength.

    x = a b + s_c + e with e ~ N(0, I); class vectors s_c ~ N(0, I), centred over the classes and scaled to a mean
    norm of ``signal``; b of norm ``ratio * signal``; and for each example a ~ N(1, spread^2). A linear classifier
    that is blind to b is right nearly always, whatever the ratio.

    Returns:
        Split of inputs (n, dim), float32.

    >>> shared_direction(10.0).train.x.shape
    torch.Size([1000, 50])
    """
    checks.nonnegative("ratio", ratio)
    checks.whole("classes", classes, least=2)
    checks.whole("dim", dim)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, least=0))
    own = torch.randn(classes, dim, generator=generator)
    own = own - own.mean(0)
    own = own * (checks.positive("signal", signal) / own.norm(dim=1).mean())
    shared = F.normalize(torch.randn(dim, generator=generator), dim=0) * ratio * signal
    checks.nonnegative("spread", spread)

    def draw(count: int) -> Examples:
        y = torch.arange(classes).repeat_interleave(count)
        strength = 1 + spread * torch.randn(len(y), 1, generator=generator)
        noise = torch.randn(len(y), dim, generator=generator)
        return Examples(strength * shared + own[y] + noise, y, classes)

    train = draw(checks.whole("per_class", per_class))
    test = draw(checks.whole("test_per_class", test_per_class))
    names = tuple(f"class {c}" for c in range(classes))
    return Split(train, test, names, f"shared direction, ratio {ratio:g}")


def clothes(size: int = 28) -> Split:
    """The :data:`CLOTHES` of Fashion-MNIST relabelled 0..4, at ``size`` 28, or 14 by the mean of 2 x 2 pixels."""
    checks.one_of("size", size, (28, 14))
    whole = fashion_mnist()
    train, test = (_only(part, CLOTHES, 28 // size) for part in (whole.train, whole.test))
    return Split(train, test, tuple(NAMES[c] for c in CLOTHES), f"fashion-mnist clothes {size}x{size}")


def _only(examples: Examples, classes: tuple[int, ...], factor: int) -> Examples:
    table = torch.full((examples.classes,), -1)
    table[list(classes)] = torch.arange(len(classes))
    y = table[examples.y]
    x = examples.x[y >= 0]
    return Examples(F.avg_pool2d(x, factor) if factor > 1 else x, y[y >= 0], len(classes))


def add_pattern(
    examples: Examples,
    pattern: Tensor,
    amplitude: float = 3.0,
    *,
    scale: float | None = None,
    spread: float = 0.5,
    seed: int = 0,
) -> Examples:
    """Add one fixed pattern to every image, with a strength that varies from image to image.

    Image i gets a_i * amplitude * scale * pattern with a_i ~ N(1, spread^2).

    Args:
        examples: images (n, channels, h, w).
        pattern: (channels, h, w), or (1, h, w) for all channels; mean 0 and deviation 1 is sensible.
        amplitude: in units of ``scale``.
        scale: default the standard deviation of all pixels of ``examples``; give that of the training set for a
            test set.
        spread: of the strength; 0 adds the same to every image.
        seed: of the strengths.
    """
    _images(examples)
    checks.require(
        pattern.ndim == 3
        and pattern.shape[1:] == examples.x.shape[2:]
        and pattern.shape[0] in (1, examples.x.shape[1]),
        f"pattern has shape {tuple(pattern.shape)}; it must be that of an image, {tuple(examples.x.shape[1:])}.",
    )
    checks.finite("pattern", pattern)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, least=0))
    strength = 1 + checks.nonnegative("spread", spread) * torch.randn(len(examples), generator=generator)
    unit = checks.nonnegative("amplitude", amplitude) * (float(examples.x.std()) if scale is None else scale)
    added = strength.reshape(-1, 1, 1, 1).to(examples.x) * unit * pattern.to(examples.x)
    return Examples(examples.x + added, examples.y, examples.classes)


def add_patches(
    examples: Examples, amplitude: float = 1.5, *, scale: float | None = None, seed: int = 0
) -> Examples:
    """Add to every image another random patch of a photograph, always of the same strength.

    Args:
        examples: images (n, channels, h, w); the patch is grey, the same in every channel.
        amplitude: standard deviation of the patch in units of ``scale``.
        scale: as for :func:`add_pattern`.
        seed: of the places.
    """
    _images(examples)
    height, width = examples.x.shape[2:]
    patches = photograph_patches(len(examples), (int(height), int(width)), seed).to(examples.x)
    unit = checks.nonnegative("amplitude", amplitude) * (float(examples.x.std()) if scale is None else scale)
    return Examples(examples.x + unit * patches, examples.y, examples.classes)


def photograph_patches(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Random grey patches (count, 1, h, w) of scikit-learn's photograph of a temple, each of mean 0 and deviation 1.

    The photograph is taken at a quarter of its size (106 x 160), so that small patches hold shapes; patches
    nearly without contrast are left out.
    """
    from sklearn.datasets import load_sample_image

    grey = torch.tensor(load_sample_image("china.jpg")).float().mean(2)[None, None] / 255
    grey = F.avg_pool2d(grey, 4)[0, 0]
    height, width = size
    checks.require(
        1 < height <= grey.shape[0] and 1 < width <= grey.shape[1],
        f"size is {size}; patches must be at least 2 x 2 and fit into {tuple(grey.shape)}.",
    )
    all_patches = grey.unfold(0, height, 1).unfold(1, width, 1).flatten(0, 1)
    usable = torch.nonzero(all_patches.flatten(1).std(1) > 0.02).flatten()
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, least=0))
    chosen = torch.randint(len(usable), (checks.whole("count", count),), generator=generator)
    patches = all_patches[usable[chosen]]
    patches = patches - patches.mean((1, 2), keepdim=True)
    return (patches / patches.std((1, 2), keepdim=True))[:, None]


def _images(examples: Examples) -> None:
    checks.require(
        examples.x.ndim == 4,
        f"examples has inputs of shape {tuple(examples.x.shape[1:])}; images (channels, h, w) are needed.",
    )
