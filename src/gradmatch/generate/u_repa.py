"""U-REPA: denoisers whose middle is drawn towards a vision encoder (Tian et al.; NeurIPS 2025, arXiv 2503.18414).

Let h be what the centre of a U-Net holds while it denoises, and y* = f(x) the patch tokens that a frozen encoder gives
for the clean image. With phi = Up(MLP(h)) on the encoder's grid, to any training loss is added

    weight * ( -mean_n cos(y*_n, phi_n)  +  3 mean_ij (S_y - S_phi)_ij^2 ),    S_y[i, j] = cos(y*_i, y*_j),

the second term being what a U-Net needs beside REPA's first: it aligns how tokens relate where they cannot be matched
one by one. Semantics sit in the middle of a U-Net, and its middle is projected first and upsampled after.

Readings: the paper prints the second term with a minus, with which it would grow apart; it is minimised here. Its mean
is over entries and over all pairs of tokens of one image (scope="image"); its text also says "between samples"
(scope="batch"). Upsampling is bilinear without aligned corners. The projector is REPA's: three layers, SiLU, 2048 wide.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.bridge import Denoiser
from gradmatch.core.networks import seeded
from gradmatch.core.relational import relation_mismatch, token_cosine
from gradmatch.generate._patch_tokens import PatchTokens
from gradmatch.generate._token_grid import Grid, resized, square, tapped, width

__all__ = ["FeatureAlignment", "PatchTokens"]

UPSAMPLES = ("after", "before", "inside", "teacher_down")
_TIME_WIDTH = 128


class FeatureAlignment(nn.Module):
    """Aligns what a part of a model holds with a teacher's features of the clean image.

    Its own parameters are the projector's: give both to the optimiser, and keep only the model for sampling.

    Args:
        model: the network that is trained; only read. A network from ``from_diffusers`` is read inside.
        tap: name of the part to read, as in ``named_modules`` or its unique end ("mid_block" by default); its output
            must be (n, c, h, w) or (n, tokens, c); of a block that gives several tensors, the one shaped as its input.
        teacher: frozen module, clean images -> (n, tokens, d) or (n, d, h, w), such as :class:`PatchTokens`; None where
            only cached features are given.
        dim_in: width at the tap; default what its last convolution or linear layer gives.
        dim_out: width of the teacher's tokens; default ``teacher.dim``.
        position: which block, where ``tap`` names a list; default the centre one.
        upsample: "after" the projector (published), "before" it, "inside" (pixel shuffle of its last layer), or
            "teacher_down" (the teacher's features are averaged to the tap's grid).
        token_weight, manifold_weight: of the two terms; 1 and 3 as published.
        weight: of their sum, 0.5 as published; a number or a function of t (n,) -> (n,).
        scope: pairs of tokens of one "image", or of the whole "batch".
        time_aware: scale and shift the projection by functions of t, as in the paper's appendix.
        hidden: width of the projector.
        grid: (h, w) at the tap where its tokens are no square.
        teacher_grid: the teacher's, where its tokens are no square.
        resize: allow grids whose ratio is no whole number.
        chunk: examples at once in the second term, for less memory.
        seed: of the projector.

    Raises:
        InputError: as said in each argument; :meth:`loss` without a forward pass of the same batch before it.

    >>> from gradmatch.zoo import unet
    >>> net = unet(1, 8, 16, levels=2)
    >>> align = FeatureAlignment(net, teacher=nn.Conv2d(1, 6, 1).eval().requires_grad_(False), dim_out=6, hidden=32)
    >>> x = torch.randn(4, 1, 8, 8)
    >>> out = net(0.5 * x + 0.5 * torch.randn_like(x), torch.full((4,), 0.5))
    >>> sorted(align.loss(x))
    ['manifold', 'token', 'total']
    """

    def __init__(
        self,
        model: Any,
        tap: str = "mid_block",
        teacher: nn.Module | None = None,
        dim_in: int | None = None,
        dim_out: int | None = None,
        position: int | None = None,
        upsample: str = "after",
        token_weight: float = 1.0,
        manifold_weight: float = 3.0,
        weight: float | Callable[[Tensor], Tensor] = 0.5,
        scope: str = "image",
        time_aware: bool = False,
        *,
        hidden: int = 2048,
        grid: Grid | None = None,
        teacher_grid: Grid | None = None,
        resize: bool = False,
        chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        part = tapped(model.module if isinstance(model, Denoiser) else model, tap, position)
        self.tap, self.upsample = tap, checks.one_of("upsample", upsample, UPSAMPLES)
        self.scope = checks.one_of("scope", scope, ("image", "batch"))
        self.token_weight = checks.nonnegative("token_weight", token_weight)
        self.manifold_weight = checks.nonnegative("manifold_weight", manifold_weight)
        self.weight = weight if callable(weight) else checks.nonnegative("weight", weight)
        self.grid, self.teacher_grid, self.resize, self.chunk = grid, teacher_grid, resize, chunk
        self._teacher = (teacher,)  # a tuple: not a part of this module, so neither trained nor saved with it
        self._check_teacher()
        self.dim_in = checks.whole("dim_in", dim_in if dim_in is not None else width(part, tap))
        out = dim_out if dim_out is not None else getattr(teacher, "dim", None)
        checks.require(out is not None, "dim_out is None; give the width of the teacher's tokens.")
        self.dim_out, self._ratio = checks.whole("dim_out", out), 2
        with seeded(seed):
            last = self.dim_out * (self._ratio**2 if upsample == "inside" else 1)
            self.project = nn.Sequential(
                nn.Linear(self.dim_in, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, last),
            )  # fmt: skip
            self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(_TIME_WIDTH, 2 * last)) if time_aware else None
        if self.modulate is not None:
            nn.init.zeros_(self.modulate[1].weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.modulate[1].bias)  # type: ignore[arg-type]
        self._seen: list[Tensor] = []
        self._handle = _listen(part, self)

    def loss(self, clean: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        """The terms for the batch that the model has just seen; the tapped tensor is then let go.

        Args:
            clean: the clean images (n, c, h, w), in the teacher's own units and never the noised ones; or their
                features (n, tokens, d) from :meth:`cache`.
            t: the batch's times (n,), where the projector or the weight depends on them.

        Returns:
            "token" (-1 is perfect), "manifold" (0 is perfect) and "total", their weighted sum, to be added to the loss.
        """
        h, grid = self._taken(len(clean))
        y, y_grid = self._features(clean)
        phi, y = self._matched(h, grid, y, y_grid, t)
        if phi.dtype == torch.float64:
            y = y.double()
        token = -token_cosine(phi, y)
        a, b = (v.flatten(0, 1)[None] if self.scope == "batch" else v for v in (phi, y))
        manifold = relation_mismatch(a, b, chunk=self.chunk)
        weight: Any = self.weight
        if callable(self.weight):
            if t is None:
                checks.refuse("t is None; a weight that depends on time needs the batch's times.")
            weight = self.weight(t)
        both = self.token_weight * token + self.manifold_weight * manifold
        total = checks.finite("the alignment loss", (weight * both).mean())
        return {"token": token.mean(), "manifold": manifold.mean(), "total": total}

    @torch.no_grad()
    def cache(self, images: Tensor, batch: int = 256, dtype: torch.dtype = torch.float16) -> Tensor:
        """The teacher's features (n, tokens, d) of all images, once, where nothing augments them."""
        checks.require(self._teacher[0] is not None, "teacher is None; there is nothing to cache.")
        return torch.cat([self._features(part)[0].to(dtype) for part in torch.split(images, batch)])

    @torch.no_grad()
    def mismatch(self, clean: Tensor) -> Tensor:
        """How far the tap itself, without a projector, is from relating as the teacher does (n,).

        Both are compared on the coarser of the two grids, after a forward pass as for :meth:`loss`.
        """
        h, grid = self._taken(len(clean))
        y, y_grid = self._features(clean)
        least = min(grid, y_grid)
        return relation_mismatch(resized(h, grid, least), resized(y, y_grid, least), chunk=self.chunk)

    def remove(self) -> None:
        """Take the hook off; the model is as it was."""
        self._handle.remove()
        self._seen.clear()

    def _taken(self, n: int) -> tuple[Tensor, Grid]:
        """What the tap held (n, tokens, c), and its grid."""
        checks.require(
            bool(self._seen) and len(self._seen[0]) == n,
            f"loss is asked for {n} examples; run the model on that batch first (the tap holds "
            f"{len(self._seen[0]) if self._seen else 'nothing'}).",
        )
        h = self._seen.pop()
        checks.require(
            h.ndim in (3, 4),
            f"the tap {self.tap!r} gives {tuple(h.shape)}; it must be (n, c, h, w) or (n, tokens, c).",
        )
        grid = (h.shape[2], h.shape[3]) if h.ndim == 4 else square(h.shape[1], self.grid, "grid")
        h = h.flatten(2).mT if h.ndim == 4 else h
        checks.require(
            h.shape[2] == self.dim_in,
            f"the tap {self.tap!r} is {h.shape[2]} wide; dim_in is {self.dim_in}.",
        )
        return h, grid

    def _features(self, clean: Tensor) -> tuple[Tensor, Grid]:
        if clean.ndim == 4:
            teacher = self._check_teacher()
            checks.require(
                teacher is not None, "teacher is None; give cached features (n, tokens, d), not images."
            )
            assert teacher is not None
            with torch.no_grad():
                clean = teacher(clean)
        checks.require(
            clean.ndim in (3, 4),
            f"the teacher's features are {tuple(clean.shape)}; they must be (n, tokens, d) or (n, d, h, w).",
        )
        grid = (clean.shape[2], clean.shape[3]) if clean.ndim == 4 else None
        tokens = clean.flatten(2).mT if clean.ndim == 4 else clean
        checks.require(
            tokens.shape[2] == self.dim_out,
            f"the teacher's tokens are {tokens.shape[2]} wide; dim_out is {self.dim_out}.",
        )
        grid = grid or square(tokens.shape[1], self.teacher_grid, "teacher_grid")
        return tokens.detach(), grid

    def _check_teacher(self) -> nn.Module | None:
        teacher = self._teacher[0]
        if isinstance(teacher, nn.Module):
            checks.require(not teacher.training, "teacher is in train mode; call teacher.eval() first.")
            learns = any(p.requires_grad for p in teacher.parameters())
            checks.require(
                not learns, "teacher requires gradients; call teacher.requires_grad_(False) first."
            )
        return teacher

    def _matched(
        self, h: Tensor, grid: Grid, y: Tensor, y_grid: Grid, t: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """phi and y on one grid, both (n, tokens, d)."""
        whole = all(max(a, b) % min(a, b) == 0 for a, b in zip(grid, y_grid, strict=True))
        checks.require(
            whole or self.resize,
            f"the tap's grid {grid} and the teacher's {y_grid} are in no whole ratio; pass resize=True to allow it.",
        )
        h = h.to(next(self.project.parameters()).dtype)
        if self.upsample == "before":
            return self._projected(resized(h, grid, y_grid), t), y
        phi = self._projected(h, t)
        if self.upsample == "teacher_down":
            return phi, resized(y, y_grid, grid)
        if self.upsample == "inside":
            image = phi.mT.reshape(len(phi), -1, *grid)
            phi, grid = F.pixel_shuffle(image, self._ratio).flatten(2).mT, (2 * grid[0], 2 * grid[1])
        return resized(phi, grid, y_grid), y

    def _projected(self, h: Tensor, t: Tensor | None) -> Tensor:
        phi: Tensor = self.project(h)
        if self.modulate is None:
            return phi
        checks.require(t is not None, "t is None; a time-aware projector needs the batch's times.")
        assert t is not None
        half = _TIME_WIDTH // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        angles = 1000 * t.float()[:, None] * rates
        gamma, beta = self.modulate(torch.cat([angles.cos(), angles.sin()], 1))[:, None].chunk(2, -1)
        moved: Tensor = (1 + gamma) * phi + beta
        return moved


def _listen(part: nn.Module, owner: FeatureAlignment) -> Any:
    """A hook that keeps the part's last output for ``owner``; a copy of the model (an average, say) keeps nothing."""
    mine, it = weakref.ref(owner), weakref.ref(part)

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        align = mine()
        if align is not None and module is it():
            align._seen[:] = [_hidden(out, kwargs.get("hidden_states", args[0] if args else None))]

    return part.register_forward_hook(keep, with_kwargs=True)


def _hidden(out: Any, given: Any) -> Tensor:
    """The image's part of what a block gives: of several tensors (SD3's and Flux's blocks give the text's first)
    the one shaped as the ``hidden_states`` it was given."""
    if isinstance(out, Tensor):
        return out
    tensors = [o for o in out if isinstance(o, Tensor)]
    alike = [o for o in tensors if isinstance(given, Tensor) and o.shape == given.shape]
    checks.require(
        len(tensors) == 1 or len(alike) == 1,
        f"the tapped part gives tensors of shapes {[tuple(o.shape) for o in tensors]}, {len(alike)} of them shaped as "
        "its input; tap a part inside it that gives one.",
    )
    return alike[0] if alike else tensors[0]
