"""A spectrum as a value: eigenvalues, density, what they amount to, and its files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.krylov import SpectralDensity, gaussian_width, smoothed
from gradmatch.core.store import load_tensors, read_json, save_tensors, write_bytes, write_json

FILES = ("spectrum.json", "spectrum.safetensors", "spectrum.png")
NEAR_ZERO = 1e-3
"""Share of the largest eigenvalue under which one counts as near zero."""


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a curvature matrix of a model's mean loss.

    Attributes:
        kind: which matrix, as in :class:`gradmatch.core.curvature.Curvature`.
        method: "exact", "gram" (exact, by a smaller matrix) or "lanczos".
        size, n: parameters P and examples.
        classes: outputs of an example, where these are one row of logits; else None.
        loss: mean loss where the spectrum was taken.
        top, bottom: largest eigenvalues descending, and smallest (the last is the smallest of all).
        vectors: eigenvectors of ``top`` as columns [P, k].
        residual: largest |A v - value v| among the given pairs.
        trace, trace_error: the trace and its standard error (0 if exact; NaN where it was not asked for).
        eigenvalues: all P ascending, unless the method is "lanczos".
        density: nodes and weights of stochastic Lanczos quadrature, if asked for.
    """

    kind: str
    method: str
    size: int
    n: int
    classes: int | None
    loss: float
    top: Float[Tensor, " k"]
    bottom: Float[Tensor, " j"]
    vectors: Float[Tensor, "P k"]
    residual: float
    trace: float
    trace_error: float
    eigenvalues: Float[Tensor, " P"] | None = None
    density: SpectralDensity | None = None

    def masses(self) -> tuple[Tensor, Tensor] | None:
        """Places and their shares of the spectrum: all eigenvalues, or the nodes of the density, or None."""
        if self.eigenvalues is not None:
            return self.eigenvalues, torch.full_like(self.eigenvalues, 1 / self.size)
        if self.density is None:
            return None
        return self.density.nodes.flatten(), self.density.weights.flatten() / len(self.density.weights)

    def curve(self, points: int = 2000, width: float | None = None) -> tuple[Tensor, Tensor]:
        """Grid and density of integral 1; an exact spectrum gets the Gaussian width that 100 steps would have."""
        if self.density is not None:
            grid = self.density.grid(points, width)
            return grid, self.density.evaluate(grid, width)[0]
        if self.eigenvalues is None:
            checks.refuse("the spectrum has neither all eigenvalues nor a density; ask for density=True.")
        low, high = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        sigma = gaussian_width(low, high, 100) if width is None else width
        grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64)
        return grid, smoothed(grid, self.eigenvalues, width=sigma)

    def gap(self) -> tuple[int, float]:
        """Place i (from 1) and size of the largest ratio of neighbours, eigenvalue i over i + 1, among i = 1..3C.

        Only positive eigenvalues are compared, as far as they are known and above 1e-12 of the largest. (0, 1) where
        there is no pair.
        """
        most = 3 * self.classes if self.classes is not None else len(self.top) - 1
        known = self.top if self.eigenvalues is None else self.eigenvalues.flip(0)
        values = [v for v in known.tolist() if v > 1e-12 * float(known[0])]
        ratios = [a / b for a, b in itertools.pairwise(values)][:most]
        if not ratios:
            return 0, 1.0
        best = max(range(len(ratios)), key=ratios.__getitem__)
        return best + 1, ratios[best]

    def share_below(self, fraction: float = NEAR_ZERO) -> float | None:
        """Share of eigenvalues with |value| under ``fraction`` of the largest."""
        found = self.masses()
        return None if found is None else float(found[1][found[0].abs() < fraction * self.top[0]].sum())

    def bulk_edge(self) -> float | None:
        """The 90 % quantile of |value|, the reading taken here of where the bulk ends."""
        found = self.masses()
        if found is None:
            return None
        order = found[0].abs().argsort()
        return float(found[0].abs()[order][int((found[1][order].cumsum(0) < 0.9 - 1e-9).sum())])

    def above(self, level: float) -> float | None:
        """How many eigenvalues exceed ``level`` (from the density, an estimate)."""
        found = self.masses()
        return None if found is None else float(found[1][found[0] > level].sum()) * self.size

    def report(self) -> dict[str, Any]:
        """What there is to say in numbers; None stands for what was not computed."""
        edge, (place, ratio) = self.bulk_edge(), self.gap()
        top_share = None
        if self.classes is not None and self.trace and math.isfinite(self.trace):
            top_share = float(self.top[: self.classes].sum()) / self.trace
        low = self.eigenvalues if self.eigenvalues is not None else self.bottom
        return {
            "kind": self.kind,
            "method": self.method,
            "parameters": self.size,
            "examples": self.n,
            "classes": self.classes,
            "loss": self.loss,
            "largest": float(self.top[0]),
            "smallest": float(low.min()) if len(low) else None,
            "trace": self.trace if math.isfinite(self.trace) else None,
            "trace_error": self.trace_error if math.isfinite(self.trace_error) else None,
            "share_near_zero": self.share_below(),
            "trace_share_of_top_classes": top_share,
            "bulk_edge": edge,
            "count_above_10_bulk_edges": None if edge is None else self.above(10 * edge),
            "gap_after": place,
            "gap_ratio": ratio,
            "largest_residual": self.residual,
        }

    # --- files ---------------------------------------------------------------------------------------------

    def picture(self, title: str = "") -> bytes:
        """A PNG: the density on a logarithmic scale, and the eigenvalues in order."""
        from gradmatch.analysis._spectrum_picture import draw

        return draw(self, title)

    def save(self, folder: str | Path, title: str = "", about: Mapping[str, Any] | None = None) -> list[Path]:
        """Write ``spectrum.json`` (with ``about``, whatever else is to stand there), ``.safetensors`` and ``.png``."""
        folder = Path(folder)
        tensors = {"top": self.top, "bottom": self.bottom, "vectors": self.vectors}
        if self.eigenvalues is not None:
            tensors["eigenvalues"] = self.eigenvalues
        if self.density is not None:
            tensors |= {"nodes": self.density.nodes, "weights": self.density.weights}
        lists = {k: t.tolist() for k, t in tensors.items() if k in ("top", "bottom")}
        return [
            write_json(folder / FILES[0], self.report() | lists | {"about": dict(about or {})}),
            save_tensors(folder / FILES[1], tensors),
            write_bytes(folder / FILES[2], self.picture(title)),
        ]

    @classmethod
    def load(cls, folder: str | Path) -> Spectrum:
        """Read what :meth:`save` wrote."""
        facts, tensors = read_json(Path(folder) / FILES[0]), load_tensors(Path(folder) / FILES[1])[0]
        density = None
        if "nodes" in tensors:
            density = SpectralDensity(tensors["nodes"], tensors["weights"], facts["parameters"])
        return cls(
            facts["kind"],
            facts["method"],
            facts["parameters"],
            facts["examples"],
            facts["classes"],
            facts["loss"],
            tensors["top"],
            tensors["bottom"],
            tensors["vectors"],
            facts["largest_residual"],
            math.nan if facts["trace"] is None else facts["trace"],
            math.nan if facts["trace_error"] is None else facts["trace_error"],
            tensors.get("eigenvalues"),
            density,
        )
