"""Low-rank matrix completion by robust alternating minimisation (Gu, Song, Yin, Zhang; ICLR 2024, arXiv 2302.11068).

M is an m x n matrix of rank k of which the entries in Omega were observed, a share p. From U = the k leading left
singular vectors of P_Omega(M) / p, with entries too large for an incoherent basis set to 0, each sweep takes ::

    V ~ argmin_V |P_Omega(U V^T - M)|_F^2 + ridge |V|_F^2        (a small regression for every column)
    U ~ argmin_U |P_Omega(U V^T - M)|_F^2 + ridge |U|_F^2        (and one for every row)

Exact solutions cost O(|Omega| k^2) a sweep (Jain, Netrapalli, Sanghavi; 2013). The paper's point is that solutions to
a fixed relative accuracy keep the linear rate at the same number of samples, and they cost O(|Omega| k). Before each
half the fixed factor is made orthonormal, U = Q R, and R carried into the other, V <- V R^T, so that U V^T, hence the
start of the inexact solver, is what it was; without the carry it does not converge. As the fixed factor is
orthonormal, both halves descend the same |P_Omega(X - M)|_F^2 + ridge |X|_F^2 (our reading: the paper has no ridge).
"""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.solve._entries import Entries, Side, as_entries, require_identifiable, whole_numbers
from gradmatch.solve._offsets import BIASES, Offsets
from gradmatch.solve._regressions import SOLVERS, Inner, exact
from gradmatch.solve._spectral import clipped, incoherence, leading_vectors, subspace_distance

__all__ = ["MatrixCompletion", "Sweep", "incoherence", "subspace_distance"]

DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Sweep:
    """One sweep of alternating minimisation.

    Attributes:
        rank: of the factors.
        middle, misfit: |P_Omega(U V^T - M)|_F / |P_Omega(M)|_F after V and after U were updated.
        held_out: the same on the held-out entries, if there are any.
        incoherence: sqrt(m / k) times the longest row of the orthonormal fixed factor, the larger of both.
        inner_steps: steps of the inner solver for a regression, averaged over all.
        seconds: since the fit began.
    """

    rank: int
    middle: float
    misfit: float
    held_out: float | None
    incoherence: float
    inner_steps: float
    seconds: float


class MatrixCompletion:
    """Fill in a matrix of low rank from some of its entries.

    Args:
        rank: k, the number of columns of the factors.
        solver: of the small regressions: "exact" (batched Cholesky), "pcg" (conjugate gradients on all at once),
            "sketch" (the paper's: each preconditioned by a subsampled randomised Hadamard transform; pays above 32 k
            entries a regression, fewer are solved exactly), or "auto": exact below rank 8 and for regressions
            with up to 2 k entries, conjugate gradients otherwise.
        max_iter: most sweeps.
        tol: the fit ends when the relative misfit falls to ``tol``, or by less than this share in a sweep.
        inner_tol: a regression ends when its gradient has fallen to this share.
        inner_max: most steps of a regression.
        init: "spectral" (the paper's) or "random".
        clip: set entries of the spectral start above 2 mu sqrt(k / m) to 0.
        mu: incoherence for the clipping; "auto" is sqrt(m / k) times the 0.9 quantile of the row norms.
        split: use a fresh part of the entries, of 2 max_iter + 1, for the start and each half: what the proof
            assumes, wasteful in practice.
        ridge: weight of |U V^T|_F^2; 0 suits noiseless data of exactly this rank.
        bias: what is subtracted before: "none", the "mean", or "additive" (mean and offsets of rows and columns).
        rank_schedule: ranks to grow through before ``rank``, such as (2, 5).
        sketch_rows: rows of a sketch for each of k.
        dtype: "float64" or "float32", of the factors. Inner directions are in single precision as long as
            ``inner_tol`` is 1e-4 or more; the residuals that they correct are in ``dtype``.
        device: where to compute; default where the values are.
        seed: of the start, the sketches and the split.

    Attributes:
        U_, V_: the factors (m, k) and (n, k), arrays or tensors as the data were; V_ has orthonormal columns.
        history_: a :class:`Sweep` for each sweep.
        offsets_: what ``bias`` took away.
        n_iter_: sweeps made.

    Raises:
        InputError: options out of range.

    >>> rng = np.random.default_rng(0)
    >>> M = rng.standard_normal((60, 3)) @ rng.standard_normal((3, 50))
    >>> seen = np.where(rng.random(M.shape) < 0.5, M, np.nan)
    >>> model = MatrixCompletion(rank=3).fit(seen)
    >>> bool(np.abs(model.complete() - M).max() < 1e-3)
    True
    """

    def __init__(
        self,
        rank: int = 10,
        *,
        solver: str = "auto",
        max_iter: int = 100,
        tol: float = 1e-6,
        inner_tol: float = 0.1,
        inner_max: int = 4,
        init: str = "spectral",
        clip: bool = True,
        mu: float | str = "auto",
        split: bool = False,
        ridge: float = 0.0,
        bias: str = "none",
        rank_schedule: Sequence[int] = (),
        sketch_rows: int = 16,
        dtype: str = "float64",
        device: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        self.rank = checks.whole("rank", rank)
        self.solver = checks.one_of("solver", solver, SOLVERS)
        self.max_iter, self.tol = checks.whole("max_iter", max_iter), checks.nonnegative("tol", tol)
        self.inner_tol = checks.fraction("inner_tol", inner_tol, zero=True)
        self.inner_max = checks.whole("inner_max", inner_max)
        self.init, self.clip = checks.one_of("init", init, ("spectral", "random")), clip
        self.mu = mu if mu == "auto" else checks.positive("mu", mu)
        self.split, self.ridge = split, checks.nonnegative("ridge", ridge)
        self.bias = checks.one_of("bias", bias, BIASES)
        self.rank_schedule = rank_schedule
        stages = [*rank_schedule, rank]
        checks.require(
            all(0 < a < b for a, b in itertools.pairwise(stages)),
            f"rank_schedule is {tuple(rank_schedule)}; it must rise and stay below rank {rank}.",
        )
        checks.require(
            not (split and rank_schedule), "split and rank_schedule exclude each other; choose one."
        )
        self.sketch_rows = checks.whole("sketch_rows", sketch_rows)
        checks.one_of("dtype", dtype, DTYPES)
        self.dtype, self.device, self.seed = dtype, device, checks.whole("seed", seed, 0)

    def fit(
        self, X: Any, cols: Any = None, values: Any = None, shape: Any = None, *, held_out: Any = None
    ) -> MatrixCompletion:
        """Fit the factors.

        Args:
            X: a scipy sparse matrix or torch sparse tensor (what is stored is what was observed, zeros too), or a
                dense one with NaN where nothing was (or a masked array); or row numbers, with ``cols``, ``values`` and
                ``shape``.
            cols, values: column numbers and values of the entries.
            shape: (m, n); default the largest numbers.
            held_out: (rows, cols, values) of entries not to be fitted, whose misfit the history shows.

        Raises:
            InputError: rank above min(m, n); an entry twice, or not finite; a row or column with fewer entries than
                ``rank`` while ridge is 0, which leaves its factor undetermined.
        """
        began = time.perf_counter()
        entries = as_entries(X, cols, values, shape, DTYPES[self.dtype], self.device)
        self._tensors = isinstance(X if values is None else values, Tensor)
        self.offsets_ = Offsets.fit(entries, self.bias)
        entries = self.offsets_.removed(entries)
        others = None if held_out is None else self._held_out(held_out, entries)
        generator = torch.Generator().manual_seed(self.seed)
        parts = self._parts(entries, generator)
        for part in parts:
            require_identifiable(part, self.rank, self.ridge, split=self.split)
        U = self._start(parts[0], [*self.rank_schedule, self.rank][0], generator)
        V = U.new_zeros(entries.shape[1], U.shape[1])
        self.history_: list[Sweep] = []
        for rank in [*self.rank_schedule, self.rank]:
            U, V = self._grown(entries, U, V, rank, generator)
            U, V = self._sweeps(parts, U, V, others, generator, began)
        self.n_iter_ = len(self.history_)
        self._U, self._V = checks.finite("U", U), checks.finite("V", V)
        self.U_, self.V_ = self._given(U), self._given(V)
        return self

    def predict(self, rows: Any, cols: Any) -> Any:
        """Values at the given coordinates, (N,)."""
        self._require_fit()
        rows, cols = (whole_numbers(k, t).to(self._U.device) for k, t in (("rows", rows), ("cols", cols)))
        checks.same_length("rows", rows, "cols", cols)
        return self._given(self._values(rows, cols))

    def complete(self) -> Any:
        """The whole matrix (m, n), dense."""
        self._require_fit()
        return self._given(self._U @ self._V.T + self.offsets_.dense())

    def transform(self, X: Any) -> Any:
        """New rows (q, n) with their missing entries filled in, given the factors of the columns; what is there stays.

        Args:
            X: as in :meth:`fit`, with the same columns; every row needs as many entries as the rank if ridge is 0.
        """
        self._require_fit()
        new = as_entries(X, None, None, None, DTYPES[self.dtype], self._U.device)
        n = len(self._V)
        checks.require(
            new.shape[1] == n, f"X has {new.shape[1]} columns; this model was fitted to matrices of {n}."
        )
        require_identifiable(new, self.rank, self.ridge, names=("row",))
        offsets = self.offsets_.of_rows(new)
        _, side = offsets.removed(new).sides()
        W = self._V.new_zeros(new.shape[0], self.rank)
        W = exact(side, self._V, W, side.values, self._inner("exact", torch.Generator()))
        filled = W @ self._V.T + offsets.dense()
        filled[new.rows, new.cols] = new.values
        return self._given(filled)

    def fit_transform(self, X: Any, y: None = None) -> Any:
        """Fit and fill in the missing entries of ``X``, (m, n)."""
        return self.fit(X).transform(X)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments, for ``sklearn.base.clone``."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> MatrixCompletion:
        """Change some of the constructor's arguments."""
        known = self.get_params()
        for name in params:
            checks.one_of("parameter", name, known)
        self.__init__(**(known | params))  # type: ignore[misc]
        return self

    # --- the algorithm -------------------------------------------------------------------------------------

    def _parts(self, entries: Entries, generator: torch.Generator) -> list[Entries]:
        """All entries, or with ``split`` 2 T + 1 random parts of them: the start, T updates of V, T of U."""
        if not self.split:
            return [entries]
        order = torch.randperm(len(entries), generator=generator).to(entries.rows.device)
        return [entries.take(part.sort().values) for part in order.tensor_split(2 * self.max_iter + 1)]

    def _start(self, entries: Entries, rank: int, generator: torch.Generator) -> Tensor:
        m = entries.shape[0]
        if self.init == "random":
            drawn = torch.randn(m, rank, generator=generator, dtype=torch.float64)
            basis: Tensor = torch.linalg.qr(drawn.to(entries.values)).Q
            return basis
        by_row = entries.sides()[1]
        U = leading_vectors(by_row, by_row.values, rank, generator)
        return clipped(U, self.mu) if self.clip else U

    def _grown(
        self, entries: Entries, U: Tensor, V: Tensor, rank: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Columns added to U: the leading left singular vectors of what is not yet explained."""
        more = rank - U.shape[1]
        if not more:
            return U, V
        by_row = entries.sides()[1]
        new = leading_vectors(by_row, by_row.residual(V, U), more, generator)
        return torch.cat([U, new], 1), torch.cat([V, V.new_zeros(len(V), more)], 1)

    def _sweeps(
        self,
        parts: list[Entries],
        U: Tensor,
        V: Tensor,
        others: tuple[Tensor, Tensor, Tensor] | None,
        generator: torch.Generator,
        began: float,
    ) -> tuple[Tensor, Tensor]:
        inner, sides = self._inner(self.solver, generator), [part.sides() for part in parts]
        by_column, last = sides[1 % len(sides)][0], float("inf")
        r = by_column.residual(U, V)
        for t in range(self.max_iter):
            U, V = orthonormal(U, V)
            spread, (change, steps) = incoherence(U), inner.change(by_column, U, V, r)
            V, U = orthonormal(V + change, U)
            by_row = sides[(self.max_iter + t + 1) % len(sides)][1]
            r = by_row.residual(V, U)
            middle = misfit(by_row, r)
            change, own = inner.change(by_row, V, U, r)
            U = U + change
            by_column = sides[(t + 2) % len(sides)][0]
            r = by_column.residual(U, V)
            now = misfit(by_column, r)
            apart = None if others is None else self._misfit_of(U, V, others)
            spread, seconds = max(spread, incoherence(V)), time.perf_counter() - began
            self.history_.append(Sweep(U.shape[1], middle, now, apart, spread, (steps + own) / 2, seconds))
            if now <= self.tol or (t and last - now <= self.tol * last):
                break
            last = now
        return U, V

    def _inner(self, solver: str, generator: torch.Generator) -> Inner:
        return Inner(solver, self.inner_tol, self.inner_max, self.ridge, self.sketch_rows, generator)

    # --- checks and conversions ----------------------------------------------------------------------------

    def _require_fit(self) -> None:
        checks.require(hasattr(self, "U_"), "this MatrixCompletion is not fitted yet; call fit first.")

    def _held_out(self, held_out: Any, entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols, values = held_out
        found = as_entries(rows, cols, values, entries.shape, entries.values.dtype, entries.values.device)
        found = self.offsets_.removed(found)
        return found.rows, found.cols, found.values

    def _misfit_of(self, U: Tensor, V: Tensor, others: tuple[Tensor, Tensor, Tensor]) -> float:
        rows, cols, values = others
        return float(((U[rows] * V[cols]).sum(1) - values).norm() / values.norm())

    def _values(self, rows: Tensor, cols: Tensor) -> Tensor:
        for name, numbers, size in (("rows", rows, len(self._U)), ("cols", cols, len(self._V))):
            checks.require(
                bool(((numbers >= 0) & (numbers < size)).all()), f"{name} must lie in 0..{size - 1}."
            )
        found: Tensor = (self._U[rows] * self._V[cols]).sum(1) + self.offsets_.at(rows, cols)
        return found

    def _given(self, found: Tensor) -> Any:
        """As the data came: a tensor, or an array."""
        return found if self._tensors else np.asarray(found.cpu())


def orthonormal(fixed: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The fixed factor with orthonormal columns, fixed = Q R, and R carried into the other: the product stays."""
    Q, R = torch.linalg.qr(fixed)
    return Q, free @ R.T


def misfit(side: Side, r: Tensor) -> float:
    """|r| relative to the values that it is left of; 0 where those are all 0."""
    return float(r.norm() / side.values.norm().clamp_min(torch.finfo(r.dtype).tiny))
