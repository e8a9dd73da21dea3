"""Spectra of the loss: Empirical Analysis of the Hessian of Over-Parametrized Neural Networks.

Sagun, Evci, Guney, Dauphin, Bottou; ICLR 2018 workshop, arXiv 1706.04454. For L(w) = (1/N) sum_i l(f(w, x_i), y_i),

    H = G + R,    G = (1/N) sum_i J_i^T B_i J_i,    R = (1/N) sum_i sum_c (dl / df_c) d^2 f_c / dw^2,

with B_i the Hessian of the loss in the outputs: near a fit R vanishes and H is the covariance of scaled output
gradients. Its spectrum is a bulk near zero, which grows with the network, and a few outliers, which the data set.

Three ways to it. Exactly, by the P products with unit vectors; for G also by its Gram matrix of size N C, whose
non-zero eigenvalues are the same. The ends, by block Lanczos. The density, by stochastic Lanczos quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradmatch.analysis._spectrum import Spectrum
from gradmatch.core import checks
from gradmatch.core.curvature import Curvature, Kind
from gradmatch.core.gradients import gradient
from gradmatch.core.krylov import SpectralDensity, eigenpairs, probe_vectors, spectral_density
from gradmatch.core.problem import Loss, Problem
from gradmatch.core.segment import Segment
from gradmatch.core.segment import segment as _segment
from gradmatch.core.store import RunFolder, load_tensors, save_tensors

__all__ = ["Decomposition", "Segment", "Spectrum", "decompose", "segment", "spectrum"]

EXACT = 4000
"""Most parameters, or rows of a Gram matrix, for which all eigenvalues are computed unless asked otherwise."""
SUMS = ("ggn", "fisher", "sampled_fisher", "empirical_fisher")
Progress = Callable[[str, int, int], object]


def spectrum(
    model: nn.Module | Problem,
    data: Any = None,
    loss: str | Loss = "cross_entropy",
    *,
    kind: Kind = "hessian",
    method: Literal["auto", "exact", "gram", "lanczos"] = "auto",
    top: int = 20,
    bottom: int = 3,
    density: bool = False,
    steps: int = 100,
    probes: int = 4,
    select: str | Sequence[str] | None = None,
    allow: str | Sequence[str] = (),
    dtype: torch.dtype | None = None,
    samples: int = 1,
    tol: float = 1e-4,
    batch_size: int = 2048,
    seed: int = 0,
    run: RunFolder | None = None,
    progress: Progress | None = None,
) -> Spectrum:
    """Eigenvalues of the Hessian of a model's mean loss, or of another curvature matrix.

    Args:
        model: a module, in eval mode if it has dropout or batch norm; or a :class:`Problem` (then without ``data``).
        data: (inputs, target) tensors, a dict, a ``Dataset``, a ``DataLoader`` in fixed order or a list of batches.
        loss: "cross_entropy", "mse", "next_token", or a function of one loss for each example. Weight decay is not
            in it: it shifts every eigenvalue by its coefficient.
        kind: "hessian", "ggn", "residual", "fisher", "sampled_fisher", "empirical_fisher".
        method: "exact" (all P, by P products), "gram" (all, by the matrix of size N C; sums of squares only),
            "lanczos" (the ends only), or "auto": the first whose matrix has at most 4,000 rows, else "lanczos".
        top, bottom: eigenvalues wanted of each end; a sum of squares has no negative ones, so ``bottom`` is then 0.
        density: also the density, by ``probes`` runs of ``steps`` Lanczos steps (100 as in PyHessian).
        select: regular expression or names of the parameters, for the spectrum of a layer.
        allow: "dropout" or "batchnorm" to accept them in train mode; the loss is then no fixed function.
        dtype: type to compute in; default float64 for whole spectra, in which float32 leaves noise of 1e-6 of the
            largest eigenvalue, and the model's own for "lanczos" (float32 in place of half precision).
        samples: targets drawn an example, for "sampled_fisher".
        tol: residual norm of the ends relative to the largest |eigenvalue|.
        batch_size: examples at once, where the data has no batches of its own.
        seed: of every draw.
        run: a run folder in which finished parts are kept, so that a stopped call goes on.
        progress: called with (what is done, number, of how many).

    Raises:
        InputError: active dropout or batch norm, data that changes its order, a loss that does not give one number an
            example, a matrix too large for "exact", a module without second derivatives (named).

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> found = spectrum(model, (torch.randn(20, 3), torch.arange(20) % 2), top=5)
    >>> found.method, found.size, found.eigenvalues.shape
    ('exact', 26, torch.Size([26]))
    """
    checks.one_of("method", method, ("auto", "exact", "gram", "lanczos"))
    problem = _problem(model, data, loss, select, allow, batch_size)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, least=0))
    classes = _classes(problem)
    chosen = _method(problem, kind, method, classes, samples)
    if dtype is None:
        own = torch.promote_types(problem.space.dtype, torch.float32)
        dtype = own if chosen == "lanczos" else torch.float64
    if chosen != "lanczos" or dtype != problem.space.dtype:
        problem = problem.astype(dtype)
    curvature = Curvature(problem, kind, samples=samples, generator=generator)
    count = min(checks.whole("top", top), curvature.shape[0])
    low = min(checks.whole("bottom", bottom, least=0) if kind not in SUMS else 0, curvature.shape[0] - count)
    stages = _Stages(run, progress)
    draws = (checks.whole("steps", steps), checks.whole("probes", probes))
    if chosen == "lanczos":
        parts = stages.keep("ends", lambda: _ends(curvature, count, low, tol, seed, stages))
    else:
        parts = stages.keep("ends", lambda: _whole(curvature, chosen, count, low, stages))
    parts = {name: t.cpu() for name, t in parts.items()}
    found = _density(curvature, *draws, seed, stages) if density else None
    trace, error = _trace(parts, found)
    return Spectrum(
        kind,
        chosen,
        curvature.shape[0],
        curvature.n,
        classes,
        float(problem.example_losses().mean(dtype=torch.float64)),
        parts["top"],
        parts["bottom"],
        parts["vectors"],
        float(parts["residual"]),
        trace,
        error,
        parts.get("eigenvalues"),
        found,
    )


def _problem(
    model: nn.Module | Problem,
    data: Any,
    loss: str | Loss,
    select: str | Sequence[str] | None,
    allow: str | Sequence[str],
    batch_size: int,
) -> Problem:
    if isinstance(model, Problem):
        checks.require(
            data is None and select is None,
            "data or select is given beside a Problem, which has its own.",
        )
        return model
    checks.require(data is not None, "data is None; a spectrum needs the examples its loss is a mean over.")
    return Problem(model, loss, data, select=select, allow=allow, batch_size=batch_size)


def _classes(problem: Problem) -> int | None:
    """Width of the outputs, where they are one row for an example."""
    with torch.no_grad():
        outputs = problem.outputs(problem.live_params(), next(problem.batches()).inputs)
    return int(outputs.shape[1]) if isinstance(outputs, Tensor) and outputs.ndim == 2 else None


def _method(problem: Problem, kind: str, method: str, classes: int | None, samples: int) -> str:
    p, columns = (
        problem.space.size,
        {"ggn": classes, "fisher": classes, "sampled_fisher": samples}.get(kind, 1),
    )
    if method == "auto":
        rows = problem.n * columns if kind in SUMS and columns is not None else p
        return "gram" if rows < min(p, EXACT + 1) else "exact" if p <= EXACT else "lanczos"
    checks.require(
        method != "gram" or kind in SUMS,
        f'method is "gram" and kind is {kind!r}; only a sum of squares ({", ".join(SUMS)}) has a Gram matrix.',
    )
    return method


class _Stages:
    """Finished parts on disk, where there is a run folder, and progress by part."""

    def __init__(self, run: RunFolder | None, progress: Progress | None) -> None:
        self.run, self.progress = run, progress

    def keep(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make`` gives, read back if it was finished before."""
        file = None if self.run is None else Path(self.run.path) / f"{name}.part.safetensors"
        if file is not None and file.exists():
            return load_tensors(file)[0]
        value = make()
        if file is not None:
            save_tensors(file, value)
        return value

    def tell(self, what: str, done: int, of: int) -> None:
        if self.progress is not None:
            self.progress(what, done, of)


def _whole(curvature: Curvature, method: str, top: int, bottom: int, stages: _Stages) -> dict[str, Tensor]:
    """All eigenvalues, ascending, with the eigenvectors of the largest."""
    p = curvature.shape[0]
    if method == "exact":
        values, vectors = torch.linalg.eigh(curvature.dense(lambda *k: stages.tell("products", *k)))
    else:
        x = torch.cat(list(curvature.rows()))
        values, left = torch.linalg.eigh(x @ x.T / curvature.n)
        values, left = values[-min(p, len(values)) :], left[:, -min(p, len(values)) :]
        scale = (values.clamp(min=0) * curvature.n).sqrt()
        keep = scale > 1e-8 * scale[-1]
        vectors = x.T @ (left[:, keep] / scale[keep])
        values = torch.cat([values.new_zeros(p - int(keep.sum())), values[keep]])
    top = min(top, vectors.shape[1])
    return {
        "eigenvalues": values,
        "top": values[-top:].flip(0),
        "bottom": values[:bottom].flip(0),
        "vectors": vectors[:, -top:].flip(1),
        "residual": torch.zeros((), dtype=torch.float64),
    }


def _ends(
    curvature: Curvature, top: int, bottom: int, tol: float, seed: int, stages: _Stages
) -> dict[str, Tensor]:
    """The ends of the spectrum, by block Lanczos."""
    limit = max(2000, 40 * (top + bottom))
    found = eigenpairs(
        curvature,
        top,
        bottom,
        generator=torch.Generator().manual_seed(seed),
        tol=tol,
        max_products=limit,
        progress=lambda done, _: stages.tell("ends", done, limit),
    )
    return {
        "top": found.values[:top],
        "bottom": found.values[top:],
        "vectors": found.vectors[:, :top].contiguous(),
        "residual": found.residuals.max(),
    }


def _density(curvature: Curvature, steps: int, probes: int, seed: int, stages: _Stages) -> SpectralDensity:
    """Every probe with a seed of its own, so that finished ones are kept; some at once where they fit."""
    together = max(1, min(probes, 2**27 // (curvature.shape[0] * min(steps, curvature.shape[0]))))
    parts = []
    for first in range(0, probes, together):
        count = min(together, probes - first)

        def make(first: int = first, count: int = count) -> dict[str, Tensor]:
            found = spectral_density(
                curvature,
                steps,
                count,
                generator=torch.Generator().manual_seed(seed + 1 + first),
                progress=lambda done, of: stages.tell("density", first * steps + done, probes * steps),
            )
            return {"nodes": found.nodes, "weights": found.weights}

        parts.append(stages.keep(f"density-{first}-{count}", make))
    return SpectralDensity(
        torch.cat([p["nodes"] for p in parts]), torch.cat([p["weights"] for p in parts]), curvature.shape[0]
    )


def _trace(parts: dict[str, Tensor], density: SpectralDensity | None) -> tuple[float, float]:
    if "eigenvalues" in parts:
        return float(parts["eigenvalues"].sum()), 0.0
    if density is None:
        return math.nan, math.nan
    found = density.trace()
    return found.value, found.error


# --- the two parts of the Hessian --------------------------------------------------------------------------


@dataclass(frozen=True)
class Decomposition:
    """How much of the Hessian is the covariance of output gradients, and where its leading eigenvectors lie.

    Attributes:
        hessian, ggn, residual: Frobenius norms of H, G and R.
        exact: whether they come from whole matrices, not from random vectors.
        logit_energy: mean share of the squared length of the C leading eigenvectors of H inside the span of the C mean
            logit gradients (1/N) sum_i df_c(x_i) / dw (Fort and Ganguli, arXiv 1910.05929); None without logits.
    """

    hessian: float
    ggn: float
    residual: float
    exact: bool
    logit_energy: float | None

    @property
    def residual_share(self) -> float:
        """Norm of R over that of H."""
        return self.residual / self.hessian if self.hessian else 0.0


def decompose(
    model: nn.Module | Problem,
    data: Any = None,
    loss: str | Loss = "cross_entropy",
    *,
    probes: int = 32,
    select: str | Sequence[str] | None = None,
    allow: str | Sequence[str] = (),
    batch_size: int = 2048,
    seed: int = 0,
) -> Decomposition:
    """Split H = G + R and compare their sizes; arguments as in :func:`spectrum`.

    Up to 4,000 parameters whole matrices in float64 are compared; above, |A|_F^2 is the mean of |A z|^2 over
    ``probes`` random signs z, the same for all three.

    >>> linear = nn.Linear(3, 2)
    >>> decompose(linear, (torch.randn(9, 3), torch.arange(9) % 2)).residual
    0.0
    """
    problem = _problem(model, data, loss, select, allow, batch_size)
    exact = problem.space.size <= EXACT
    problem = problem.astype(torch.float64) if exact else problem
    kinds: tuple[Kind, ...] = ("hessian", "ggn", "residual")
    matrices = [Curvature(problem, k) for k in kinds]
    if exact:
        h, g = matrices[0].dense(), matrices[1].dense()
        norms = (float(h.norm()), float(g.norm()), float(matrices[2].dense().norm()))
        vectors = torch.linalg.eigh(h)[1].flip(1)
    else:
        count = checks.whole("probes", probes)
        h_norm, g_norm, r_norm = (_frobenius(m, count, seed) for m in matrices)
        norms = (h_norm, g_norm, r_norm)
        generator = torch.Generator().manual_seed(seed)
        vectors = eigenpairs(matrices[0], _classes(problem) or 1, generator=generator, tol=1e-3).vectors
    return Decomposition(*norms, exact=exact, logit_energy=_logit_energy(problem, vectors))


def _frobenius(curvature: Curvature, probes: int, seed: int) -> float:
    """|A|_F from the mean of |A z|^2."""
    generator, total = torch.Generator().manual_seed(seed), 0.0
    for first in range(0, probes, 16):
        z = probe_vectors(curvature, min(16, probes - first), generator)
        total += float(curvature.matvec(z).square().sum(dtype=torch.float64))
    return math.sqrt(total / probes)


def _logit_energy(problem: Problem, vectors: Tensor) -> float | None:
    classes = _classes(problem)
    if classes is None or problem.active("batchnorm"):
        return None
    means = [_mean_logit_gradient(problem, c) for c in range(min(classes, vectors.shape[1]))]
    q = torch.linalg.svd(torch.stack(means, 1), full_matrices=False)
    span = q[0][:, q[1] > 1e-10 * q[1][0]]
    leading = vectors[:, : len(means)]
    return float((span.T @ leading).square().sum(0).mean())


def _mean_logit_gradient(problem: Problem, c: int) -> Tensor:
    one = copy(problem)
    one.loss = lambda outputs, _: outputs[:, c]
    return problem.space.flatten(gradient(one))


# --- two solutions -----------------------------------------------------------------------------------------


def segment(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Any,
    loss: str | Loss = "cross_entropy",
    *,
    points: int = 25,
    split: str = "train",
    allow: str | Sequence[str] = (),
    batch_size: int = 2048,
) -> Segment:
    """The loss on the straight line between two networks: do they lie in one basin?

    Args:
        model_a, model_b: two networks of one architecture, in eval mode.
        data: what the loss is a mean over; an overfitted pair can be without barrier on test data only.
        points: of the grid, with both ends; an odd number.
        split: the name of the data, for the record.
        loss, allow, batch_size: as in :func:`spectrum`.

    Returns:
        :class:`gradmatch.core.segment.Segment`: losses, barrier, signed gap in the middle, distance, and
        ``inside(vectors)``, the share of the displacement in the span of ``spectrum(...).vectors``.

    >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> segment(a, b, (torch.randn(8, 2), torch.arange(8) % 2)).barrier
    0.0
    """
    problem = Problem(model_a, loss, data, allow=allow, batch_size=batch_size)
    return _segment(problem, model_a, model_b, points, split)
