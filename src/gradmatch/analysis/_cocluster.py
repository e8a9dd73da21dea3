"""Groups of units of two networks that span the same features: spectral clustering of their joint correlations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradmatch.analysis._activations import Activations
from gradmatch.core import checks

AFFINITIES = ("absolute", "positive")
MOST = 64
"""Most clusters that the eigengap may choose."""


@dataclass(frozen=True)
class Cluster:
    """Units of both networks that go together.

    Attributes:
        a, b: units of the first and of the second network.
        mean: mean affinity within, over pairs of different units.
        angles: principal angles (radians, smallest first) between what a and b span on the data.
    """

    a: Tensor
    b: Tensor
    mean: float
    angles: Tensor


@dataclass(frozen=True)
class CoClusters:
    """Clusters of one layer, the tightest first.

    Attributes:
        clusters: of at least one unit.
        tree: how they join when the nearest by mean affinity are merged, as scipy's ``linkage`` has it.
    """

    layer: str
    clusters: tuple[Cluster, ...]
    tree: np.ndarray | None = None

    def shared(self) -> float:
        """Share of the units that are in clusters of both networks."""
        sizes = [(len(c.a) + len(c.b), len(c.a) > 0 and len(c.b) > 0) for c in self.clusters]
        return sum(n for n, both in sizes if both) / sum(n for n, _ in sizes)


def cocluster(
    activations: Activations,
    layer: str,
    nets: tuple[int, int] = (0, 1),
    n_clusters: int | str = "eigengap",
    *,
    affinity: str = "absolute",
    within: bool = True,
    hierarchy: bool = False,
) -> CoClusters:
    """Cut the graph of two networks' units by normalised cut.

    Args:
        activations: of :func:`gradmatch.analysis.collect`.
        layer: which.
        nets: which two networks.
        n_clusters: how many, or "eigengap": where the eigenvalues of the normalised Laplacian jump most, from 2
            to 64. (The paper took about 40 for 96 + 96 units; from memory.)
        affinity: "absolute" correlation, or its "positive" part; affinities may not be negative.
        within: count correlations within a network, not only between them.
        hierarchy: also join the clusters into a tree.

    Raises:
        InputError: more clusters than units, or all units dead.
    """
    from sklearn.cluster import SpectralClustering

    checks.one_of("affinity", affinity, AFFINITIES)
    a, b = nets
    alive = [activations.alive(layer, k) for k in nets]
    weights = _affinities(activations, layer, nets, alive, affinity, within)
    n = len(weights)
    if n_clusters != "eigengap":
        checks.whole("n_clusters", n_clusters, 1, n)
    count = _eigengap(weights) if n_clusters == "eigengap" else int(n_clusters)
    model = SpectralClustering(count, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    labels = torch.zeros(n) if count == 1 else torch.from_numpy(model.fit_predict(weights.numpy()))
    found = []
    for label in sorted(set(labels.tolist())):
        of = torch.nonzero(labels == label).flatten()
        units_a, units_b = alive[0][of[of < len(alive[0])]], alive[1][of[of >= len(alive[0])] - len(alive[0])]
        pairs = weights[of][:, of]
        inside = (pairs.sum() - pairs.diagonal().sum()) / max(len(of) * (len(of) - 1), 1)
        found.append(
            Cluster(
                units_a, units_b, float(inside), principal_angles(activations, layer, a, b, units_a, units_b)
            )
        )
    found.sort(key=lambda c: -c.mean)
    tree = _tree(weights, found, alive) if hierarchy and len(found) > 1 else None
    return CoClusters(layer, tuple(found), tree)


def _affinities(
    activations: Activations,
    layer: str,
    nets: tuple[int, int],
    alive: Sequence[Tensor],
    affinity: str,
    within: bool,
) -> Tensor:
    between = activations.correlation(layer, *nets)[alive[0]][:, alive[1]]
    own = [
        activations.correlation(layer, k, k)[units][:, units] for k, units in zip(nets, alive, strict=True)
    ]
    if not within:
        own = [torch.eye(len(c), dtype=c.dtype) for c in own]
    whole = torch.cat([torch.cat([own[0], between], 1), torch.cat([between.T, own[1]], 1)])
    return whole.abs() if affinity == "absolute" else whole.clamp_min(0)


def _eigengap(weights: Tensor) -> int:
    """Two, or as many eigenvalues of I - D^-1/2 W D^-1/2 as come before its largest jump."""
    root = weights.sum(1).clamp_min(1e-12).rsqrt()
    values = torch.linalg.eigvalsh(
        torch.eye(len(weights), dtype=weights.dtype) - root[:, None] * weights * root
    )
    jumps = values.diff()[1:MOST]  # the first is that of one cluster, the largest of any connected graph
    return int(jumps.argmax()) + 2


def principal_angles(
    activations: Activations, layer: str, a: int, b: int, units_a: Tensor, units_b: Tensor, tol: float = 1e-8
) -> Tensor:
    """Angles between the spaces that units of two networks span on the data, from their covariances alone."""
    if not len(units_a) or not len(units_b):
        return torch.empty(0, dtype=torch.float64)
    bases = []
    for network, units in ((a, units_a), (b, units_b)):
        values, vectors = torch.linalg.eigh(activations.correlation(layer, network, network)[units][:, units])
        keep = values > tol * values[-1]
        bases.append(vectors[:, keep] / values[keep].sqrt())
    cross = activations.correlation(layer, a, b)[units_a][:, units_b]
    cosines: Tensor = torch.linalg.svdvals(bases[0].T @ cross @ bases[1])
    return cosines.clamp(0, 1).acos()


def _tree(weights: Tensor, clusters: Sequence[Cluster], alive: Sequence[Tensor]) -> np.ndarray:
    """Average linkage of one minus the mean affinity between clusters."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    member = torch.zeros(len(clusters), len(weights), dtype=weights.dtype)
    for k, c in enumerate(clusters):
        member[k, torch.searchsorted(alive[0], c.a)] = 1
        member[k, len(alive[0]) + torch.searchsorted(alive[1], c.b)] = 1
    member /= member.sum(1, keepdim=True)
    between = member @ weights @ member.T
    distances = (1 - between).clamp_min(0)
    distances.fill_diagonal_(0)
    return np.asarray(linkage(squareform(distances.numpy(), checks=False), "average"))
