"""Parts of networks by name, and their tokens on square grids."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks

Grid = tuple[int, int]


def tapped(model: Any, tap: str, position: int | None) -> nn.Module:
    """The part called ``tap``, by its whole name or its unique end; of a list, the block at ``position``."""
    checks.require(isinstance(model, nn.Module), f"model is a {type(model).__name__}; it must be a module.")
    parts = dict(model.named_modules())
    ends = [name for name in parts if name == tap or name.endswith(f".{tap}")]
    if tap not in parts and len(ends) != 1:
        known = [n for n in parts if n and n.count(".") < 2]
        checks.refuse(
            f"tap is {tap!r}, which names {len(ends)} parts; the model has {checks.listing(known, 20)}."
        )
    part = parts[tap if tap in parts else ends[0]]
    if not isinstance(part, nn.ModuleList):
        checks.require(position is None, f"position is {position}, but tap {tap!r} is no list of blocks.")
        found: nn.Module = part
        return found
    where = len(part) // 2 if position is None else checks.whole("position", position, 0, len(part) - 1)
    block: nn.Module = part[where]
    return block


def width(part: nn.Module, tap: str) -> int:
    """What the part's last convolution or linear layer gives."""
    found = [m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    checks.require(
        bool(found), f"dim_in is None and tap {tap!r} has no linear layer or convolution; give dim_in."
    )
    last = found[-1]
    return last.out_channels if isinstance(last, nn.Conv2d) else last.out_features


def square(tokens: int, grid: Grid | None, name: str) -> Grid:
    """(h, w) of so many tokens: ``grid`` if it fits, else a square."""
    side = math.isqrt(tokens)
    found = grid or (side, side)
    checks.require(
        found[0] * found[1] == tokens,
        f"{name} is {grid} for {tokens} tokens; "
        + (
            "they are no square, so give it as (h, w)."
            if grid is None
            else "its product must be their number."
        ),
    )
    return found


def resized(tokens: Tensor, grid: Grid, to: Grid) -> Tensor:
    """Tokens (n, h w, d) on another grid: bilinear where it is finer, averages where it is coarser."""
    if grid == to:
        return tokens
    x = tokens.mT.reshape(len(tokens), -1, *grid)
    finer = to[0] >= grid[0]
    x = F.interpolate(x, to, mode="bilinear", align_corners=False) if finer else F.adaptive_avg_pool2d(x, to)
    return x.flatten(2).mT
