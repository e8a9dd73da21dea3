"""SVD-free low-rank AdamW (Modoranu, Safaryan, Schultheis, Alistarh; arXiv 2505.17967): r columns of a fixed basis.

For a weight matrix and its gradient G, brought to shape [n, d] with d the side that is projected, Q an orthonormal
basis of R^d (cosines) and idx the r columns along which G Q is largest:

    A = G (+ E),   S = A Q,   idx = top r of |S[:, j]|_p,   a = S[:, idx],   (E <- A - a Q[:, idx]^T)
    w <- (1 - lr wd) w,   m, v <- averages of a,   w <- w - lr [m_hat / (sqrt(v_hat) + eps)] Q[:, idx]^T

No singular value decomposition, and the projector's state is r whole numbers. When idx changes, averages of columns
that stay move to their new places and those of new columns start at 0 (``rotate``), or stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradmatch.core import bases, checks
from gradmatch.optim._adam import AdamFamily, Projector
from gradmatch.optim._base import Numbers, State, scale_
from gradmatch.optim._projectors import Columns, Fixed, Orthonormal, Singular

PROJECTORS = ("columns", "svd", "random")
SIDES = ("auto", "left", "right")
RESIDUALS = ("none", "error_feedback", "sign", "scaled")
TRANSFORMS = ("auto", "matmul", "fft")
LIMIT = 1.01
"""Most by which the norm of a scaled residual may grow from step to step (Fira)."""


class LowRankAdamW(AdamFamily):
    """AdamW whose averages live in r directions of every matrix.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer.
        lr: learning rate.
        rank: r, of every matrix; 0 is plain AdamW, a number in (0, 1) that share of the smaller side. A group may have
            its own. Vectors, and matrices with a side of ``max_dim`` or more, are given plain AdamW steps.
        projector: "columns" chooses from ``basis``; "svd" takes leading singular vectors (GaLore); "random" a random
            subspace for good; or an object with ``down(gradient, state)`` and ``up(update, state)`` on [n, d].
        basis: "dct2" (cosines over the coordinate), "dct3", "random" (Q of a seeded Gaussian), "hadamard", "identity".
        side: which side of (rows, columns) is projected: "right" columns, "left" rows, "auto" the smaller one (columns
            if equal), so that averages are n x r.
        update_gap: directions are chosen anew at a parameter's first step and at every multiple of this; default 1.
        select_norm: p of the scores, 1 (public code) or 2 (default: the least error of projection).
        rotate: averages follow their columns; with "svd" they are turned by the product of old and new vectors.
        residual: what is done with the gradient outside of the r directions. "none"; "error_feedback" adds it to the
            next gradient (a buffer of the weight's size); "sign" steps along its sign (FRUGAL); "scaled" scales it row
            by row as Adam scaled the projected part, its norm growing by 1 % a step at most (Fira).
        weight_decay: decoupled, times lr; default 0.
        betas: rates of the two averages, default (0.9, 0.999).
        eps: default 1e-8.
        max_dim: side from which a matrix gets plain AdamW, default 32,000 (embeddings, heads).
        transform: "fft", "matmul" or "auto", by size, for basis "dct2".
        flatten_conv: take a convolution's weight as a matrix of out x rest; else it is refused.
        clamp_rank: lower the rank to the smaller side where it is above; else that is refused.
        seed: of random bases.
        maximize: ascend.
        foreach: for what gets plain AdamW: False updates tensor by tensor.

    ``select_norm=1, rotate=False`` is the public code's setting. State of a projected matrix is "exp_avg" and
    "exp_avg_sq" [n, r], and "indices" (int32 [r]); for "svd" "vectors" [d, r]. A column that enters late starts with
    steps of (1 - b1) / sqrt(1 - b2) times lr, as the bias correction is that of the parameter.

    Raises:
        InputError: settings out of range, a rank above the smaller side, a Hadamard basis of no power of 2, weights of
            convolutions without ``flatten_conv``, sparse gradients, or a rank changed after the first step.

    >>> w = torch.nn.Parameter(torch.ones(8, 4))
    >>> optimizer = LowRankAdamW([w], lr=0.1, rank=1)
    >>> w.sum().backward()  # the same in every column: the first cosine
    >>> optimizer.step()
    >>> round(float(w.detach().mean()), 4), optimizer.state[w]["indices"].tolist()
    (0.95, [0])
    """

    counters: ClassVar[tuple[str, ...]] = ("step",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        rank: float,
        *,
        projector: str | Projector = "columns",
        basis: str = "dct2",
        side: str = "auto",
        update_gap: int = 1,
        select_norm: int = 2,
        rotate: bool = True,
        residual: str = "none",
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_dim: int = 32_000,
        transform: str = "auto",
        flatten_conv: bool = False,
        clamp_rank: bool = False,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        self._own = None if isinstance(projector, str) else projector
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        space = {
            "rank": rank,
            "projector": projector if isinstance(projector, str) else "own",
            "basis": basis,
            "side": side,
            "update_gap": update_gap,
            "select_norm": select_norm,
            "rotate": rotate,
            "residual": residual,
            "max_dim": max_dim,
            "transform": transform,
            "flatten_conv": flatten_conv,
            "clamp_rank": clamp_rank,
            "seed": seed,
        }
        super().__init__(params, {**adam, **space, "maximize": maximize, "foreach": foreach})

    # --- which matrices, in which shape --------------------------------------------------------------------

    def _whole(self, p: Tensor, group: dict[str, Any]) -> bool:
        return group["rank"] != 0 and p.ndim >= 2 and p.numel() > 0 and max(_shape(p)) < group["max_dim"]

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> State:
        return {} if self._whole(p, group) else super()._new_state(p, group)

    def projector(self, p: Tensor, group: dict[str, Any]) -> Projector | None:
        """The projector of a matrix; None for what gets plain AdamW."""
        if not self._whole(p, group):
            return None
        if self._own is not None:
            return self._own
        rank, d, gap = _rank(p, group), _sides(p, group)[1], group["update_gap"]
        if group["projector"] == "svd":
            return Singular(rank, gap, group["rotate"])
        if group["projector"] == "random":
            return Fixed(rank, d, group["seed"])
        names = ("basis", "select_norm", "rotate", "transform", "seed")
        return Columns(rank, d, gap, *(group[name] for name in names))

    # --- the step ------------------------------------------------------------------------------------------

    def _update_whole(self, p: Tensor, g: Tensor, s: State, c: Numbers, group: dict[str, Any]) -> None:
        projector = self.projector(p, group)
        assert projector is not None
        turned, kind = _turned(p, group), group["residual"]
        weight = _view(p, turned) if kind == "none" and isinstance(projector, Orthonormal) else None
        gradient = _matrix(g, turned, copy=weight is None)
        if kind == "error_feedback" and "error" in s:
            gradient = gradient + s["error"]
        if self._own is None and "exp_avg" in s:
            held, rank = s["exp_avg"].shape[1], _rank(p, group)
            checks.require(
                held == rank,
                f"rank is {rank} for a weight whose state has {held}; it cannot change after the first step.",
            )
        a = projector.down(gradient, s)
        if "exp_avg" not in s:
            s.update({name: torch.zeros_like(a) for name in self.buffers})
        numerator, denominator = self._direction(a, s, c)
        u = numerator / denominator
        if weight is not None and isinstance(projector, Orthonormal):
            projector.descend(weight, u, s, c["step_size"], c["decay"])
            return
        update = projector.up(u, s).mul_(c["step_size"])
        if kind != "none":
            rest = gradient - projector.up(a, s)
            if kind == "error_feedback":
                s["error"] = rest
            else:
                update += c["lr"] * (rest.sign_() if kind == "sign" else _scaled(rest, u * c["unit"], a, s))
        scale_(p, c["decay"])
        p.sub_((update.T.contiguous() if turned else update).view(p.shape))

    def _numbers(self, group: dict[str, Any], counts: State) -> Numbers:
        lr, t, (beta1, beta2) = float(group["lr"]), counts["step"], group["betas"]
        unit = math.sqrt(1 - beta2**t) / (1 - beta1**t)
        return {**super()._numbers(group, counts), "lr": lr, "unit": unit}

    # --- checks --------------------------------------------------------------------------------------------

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        checks.nonnegative("rank", group["rank"])
        if group["rank"] > 1:
            checks.whole("rank", group["rank"])
        checks.one_of("projector", group["projector"], (*PROJECTORS, *(("own",) if self._own else ())))
        choices = {"basis": bases.KINDS, "side": SIDES, "residual": RESIDUALS, "transform": TRANSFORMS}
        for name, values in {**choices, "select_norm": (1, 2)}.items():
            checks.one_of(name, group[name], values)
        checks.whole("update_gap", group["update_gap"])
        checks.whole("max_dim", group["max_dim"])
        checks.whole("seed", group["seed"], 0)
        checks.require(
            group["transform"] != "fft" or group["basis"] == "dct2",
            f'transform is "fft" with basis {group["basis"]!r}; it computes "dct2" alone.',
        )
        for i, p in enumerate(group["params"]):
            if self._whole(p, group):
                _check_matrix(i, p, group)


def _shape(p: Tensor) -> tuple[int, int]:
    """A weight as a matrix of out x rest."""
    return p.shape[0], p.numel() // max(1, p.shape[0])


def _turned(p: Tensor, group: dict[str, Any]) -> bool:
    """Whether the rows are projected."""
    n, m = _shape(p)
    return bool(group["side"] == "left" or (group["side"] == "auto" and n < m))


def _sides(p: Tensor, group: dict[str, Any]) -> tuple[int, int]:
    """(n, d): the side that stays, and that which is projected."""
    n, m = _shape(p)
    return (m, n) if _turned(p, group) else (n, m)


def _rank(p: Tensor, group: dict[str, Any]) -> int:
    least = min(_shape(p))
    share = group["rank"]
    return min(least, int(share)) if share >= 1 else max(1, round(share * least))


def _matrix(g: Tensor, turned: bool, copy: bool) -> Tensor:
    """[n, d]; with ``copy`` laid out as such in memory also where it is turned."""
    matrix = g.reshape(g.shape[0], -1).contiguous()
    if not turned:
        return matrix
    return matrix.T.contiguous() if copy else matrix.T


def _view(p: Tensor, turned: bool) -> Tensor | None:
    """The weight as [n, d], if its memory can be seen so and products are the same in either order.

    In float64 they differ in the last bit, and the left case is to be the right one of the transpose.
    """
    if not p.is_contiguous() or p.dtype is not torch.float32:
        return None
    matrix = p.view(p.shape[0], -1)
    return matrix.T if turned else matrix


def _check_matrix(i: int, p: Tensor, group: dict[str, Any]) -> None:
    checks.require(
        p.ndim == 2 or group["flatten_conv"],
        f"parameter {i} has shape {tuple(p.shape)}; pass flatten_conv=True to take it as a matrix of out x rest, or "
        "give it a group with rank=0.",
    )
    least = min(_shape(p))
    checks.require(
        group["rank"] <= least or group["clamp_rank"],
        f"rank is {group['rank']} and parameter {i} has shape {tuple(p.shape)}; it must be at most {least}, or pass "
        "clamp_rank=True.",
    )
    if group["projector"] == "columns":
        bases.check_basis(group["basis"], _sides(p, group)[1])


def _scaled(rest: Tensor, u: Tensor, a: Tensor, s: State) -> Tensor:
    """Fira's residual: rows scaled by |u| / |a|, the norm of all limited in its growth."""
    scaled: Tensor = rest * (u.norm(dim=1, keepdim=True) / (a.norm(dim=1, keepdim=True) + 1e-8))
    norm = scaled.norm()
    if "residual_norm" in s:
        before = s["residual_norm"]
        factor = torch.where(before > 0, LIMIT * before / norm.clamp_min(1e-30), 1.0).clamp(max=1.0)
        scaled, norm = scaled * factor, norm * factor
    s["residual_norm"] = norm
    return scaled
