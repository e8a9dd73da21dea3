"""The network that proposes search directions: two levels of small convolutions, the same for any grid size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.networks import seeded

LAYOUTS = {"64": (1, 3, 2), "128": (2, 5, 3)}
"""Residual pairs at the fine level, at the coarse one, and after coming back; published for 64^3 and 128^3."""


class _Pair(nn.Module):
    """x + relu(conv(relu(conv(x))))."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.first, self.second = _conv(dims, channels, channels), _conv(dims, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return _sum(torch.relu_(self.second(torch.relu_(self.first(x)))), x)


def _sum(fresh: Tensor, x: Tensor) -> Tensor:
    """fresh + x, in place where no gradient needs ``fresh``: at 256 x 256 new memory costs more than the arithmetic."""
    return fresh + x if torch.is_grad_enabled() else fresh.add_(x)


class DirectionNet(nn.Module):
    """Directions (b, 1, *grid) from unit residuals of that shape, zero outside the domain.

    A linear convolution, convolutions with residual pairs, half the resolution and back by nearest neighbours with a
    skip, and a linear map of the channels of each cell. Nothing depends on the grid, whose sides must be even. All
    kernels have side 3 and bias; weights start as Glorot's uniform ones, biases at 0, as in the published code.

    Args:
        dims: 2 or 3 dimensions of the grid.
        layout: "64" (97,457 parameters in 3-D, 32,657 in 2-D) or "128" (152,881 and 51,217), by the published grids.
        channels: 16 as published.
        seed: of the weights; the global generator is left as found.

    >>> sum(p.numel() for p in DirectionNet(3).parameters())
    97457
    """

    pooling = 2

    def __init__(self, dims: int = 2, layout: str = "64", channels: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.dims = checks.one_of("dims", dims, (2, 3))
        self.layout, self.channels = (
            checks.one_of("layout", layout, LAYOUTS),
            checks.whole("channels", channels),
        )
        top, below, after = LAYOUTS[layout]
        with seeded(checks.whole("seed", seed, 0)):
            self.lift, self.enter = _conv(dims, 1, channels), _conv(dims, channels, channels)
            self.top = nn.Sequential(*(_Pair(dims, channels) for _ in range(top)))
            self.leave = _conv(dims, channels, channels)
            self.below = nn.Sequential(*(_Pair(dims, channels) for _ in range(below)))
            self.after = nn.Sequential(*(_Pair(dims, channels) for _ in range(after)))
            self.mix = _conv(dims, channels, 1, size=1)

    def forward(self, r: Tensor) -> Tensor:
        pool = F.avg_pool2d if self.dims == 2 else F.avg_pool3d
        skip = torch.relu_(self.leave(self.top(torch.relu_(self.enter(self.lift(r))))))
        coarse = self.below(pool(skip, self.pooling))
        d: Tensor = self.mix(self.after(_sum(F.interpolate(coarse, scale_factor=self.pooling), skip)))
        return d


def _conv(dims: int, before: int, after: int, size: int = 3) -> nn.Module:
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    layer = kind(before, after, size, padding=size // 2)
    layer.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)  # type: ignore[call-overload]
    nn.init.xavier_uniform_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
