"""DQ: dataset quantization (Zhou, Wang, Gu, Peng, Lian, Zhang, You, Feng; ICCV 2023, arXiv 2308.10524).

One greedy selection from all the data takes its first picks from the dense centre and loses diversity. DQ repeats
the selection on what remains until the data is cut into N bins, then draws the same share of every bin uniformly.

1. Bins. For b = 1..N, K = round(remaining / bins left) items are picked greedily from the remaining set R by the
   graph-cut gain sum_{p in R} s(p, x) - 2 sum_{a in A} s(a, x), where A is what the bin holds so far. (For unit
   features this is the published C1 - C2 of squared distances up to a constant.) Within each class if balanced.
2. Sampling. Each class keeps round(ratio * size) items, shared over its bins by largest remainder.
3. Pixels, optional: see :class:`PatchQuantizer`.

The similarity is (1 + cos) / 2 of last-layer gradients: with logits z and the last layer's input h, delta = dCE/dz
and the row is [delta, delta outer h], so that <row, row'> = <delta, delta'> (1 + <h, h'>) and rows need not be made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.examples import as_examples, as_tensor
from gradmatch.core.kernel import KernelName, as_float, unit_rows
from gradmatch.core.pick import Picks, graph_cut_bins
from gradmatch.data._features import (
    GRAM_BYTES,
    PCA_WIDTH,
    Rows,
    gradient_embedding,
    loss_slope,
    penultimate,
    pixel_features,
)
from gradmatch.data._patches import PatchQuantizer, class_activation_map
from gradmatch.data._selection import Selection, draw

__all__ = [
    "DQ",
    "PatchQuantizer",
    "class_activation_map",
    "gradient_embedding",
    "penultimate",
    "pixel_features",
    "quantize",
]

FEATURES = ("gradient", "penultimate", "pixels", "pca")


class DQ:
    """Choose a small, diverse share of a training set that is not tied to one network.

    Args:
        n_bins: bins of the recursive selection, 10 as published; 1 is uniform random sampling.
        ratio: share of items kept, in (0, 1].
        features: "gradient" (last-layer gradients, as published for images), "penultimate", both of which need a
            trained network; "pixels" (flattened, standardised), "pca" (their first 50 principal components); rows
            (n, m) of your own; or a function of the inputs. Default: "gradient" with a network, "pca" without.
        similarity: "cosine" ((1 + cos) / 2), "dot" (as published for text, with unit rows), or a function of two
            blocks of rows.
        balance: bins and draws within each class.
        lam: weight of similarity to the remaining items; 1 as published.
        double_softmax: take gradients of cross-entropy on softmax outputs, as the public code does.
        head: name of the network's last linear layer; default its last ``nn.Linear``.
        batch_size: inputs at once.
        seed: of the draw; bins depend on the data alone.
        device: where similarities are computed; default where the features are (the network's device). A network
            is not moved: inputs go to where it is.

    Raises:
        InputError: options out of range.

    >>> data = torch.randn(40, 1, 4, 4), torch.arange(40) % 2
    >>> selection = DQ(n_bins=4, ratio=0.25).select(data)
    >>> len(selection), [len(b) for b in selection.bins]
    (10, [10, 10, 10, 10])
    """

    def __init__(
        self,
        *,
        n_bins: int = 10,
        ratio: float = 0.1,
        features: Any = None,
        similarity: KernelName = "cosine",
        balance: bool = True,
        lam: float = 1.0,
        double_softmax: bool = False,
        head: str | None = None,
        batch_size: int = 256,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.device = device
        self.n_bins = checks.whole("n_bins", n_bins)
        self.ratio = checks.fraction("ratio", ratio)
        if isinstance(features, str):
            checks.one_of("features", features, FEATURES)
        self.features = features
        if not callable(similarity):
            checks.one_of("similarity", similarity, ("cosine", "dot"))
        self.similarity, self.balance = similarity, bool(balance)
        self.lam = checks.positive("lam", lam)
        self.double_softmax, self.head = bool(double_softmax), head
        self.batch_size, self.seed = checks.whole("batch_size", batch_size), checks.whole("seed", seed, 0)

    def select(self, dataset: Any, network: nn.Module | None = None) -> Selection:
        """Cut ``dataset`` into bins and keep ``ratio`` of each.

        Args:
            dataset: labelled data (see :func:`gradmatch.core.examples.as_examples`).
            network: a trained classifier, for gradient or penultimate features.

        Raises:
            InputError: a class smaller than ``n_bins`` or one that would keep nothing, features with NaN or
                zero rows (cosine only) or of another length, or a network that does not fit.
        """
        examples = as_examples(dataset)
        return self._select(examples.x, examples.y, network)

    def _select(self, x: Tensor, y: Tensor | None, network: nn.Module | None) -> Selection:
        labels = y.cpu() if self.balance and y is not None else None
        sizes = [len(x)] if labels is None else torch.bincount(labels).tolist()
        smallest = min(range(len(sizes)), key=lambda c: sizes[c])
        of = "the data has" if labels is None else f"class {smallest} has"
        checks.require(
            self.n_bins <= sizes[smallest],
            f"n_bins is {self.n_bins}, but {of} {sizes[smallest]} items; every bin needs at least one.",
        )
        checks.require(
            round(self.ratio * sizes[smallest]) >= 1,
            f"ratio is {self.ratio:g}, but {of} {sizes[smallest]} items and would keep none; raise it.",
        )
        rows, kind = self._rows(x, y, network)
        rows = rows if self.device is None else rows.to(self.device)
        groups = (
            [torch.arange(len(x))]
            if labels is None
            else [torch.nonzero(labels == c).flatten() for c in range(len(sizes))]
        )
        cut = [self._bins(rows, own) for own in groups]
        bins = [
            torch.cat([own[c[b].indices.cpu()] for own, c in zip(groups, cut, strict=True)])
            for b in range(self.n_bins)
        ]
        gains = [torch.cat([c[b].gains for c in cut]) for b in range(self.n_bins)]
        similarity = self.similarity if isinstance(self.similarity, str) else "function"
        meta = {
            "method": "dq",
            "n_bins": self.n_bins,
            "features": kind,
            "similarity": similarity,
            "balance": labels is not None,
            "lam": self.lam,
        }
        return draw(bins, gains, self.ratio, self.seed, labels, meta)

    def _bins(self, rows: Rows, own: Tensor) -> list[Picks]:
        sizes, left = [], len(own)
        for b in range(self.n_bins):
            sizes.append(round(left / (self.n_bins - b)))
            left -= sizes[-1]
        source, kind = rows.of(own, self.similarity)
        return graph_cut_bins(
            source, sizes, lam=self.lam, kind=kind, kernel=self.similarity, gram_limit=GRAM_BYTES
        )

    def _rows(self, x: Tensor, y: Tensor | None, network: nn.Module | None) -> tuple[Rows, str]:
        wanted = self.features
        if wanted is None:
            wanted = "gradient" if network is not None else "pca"
        if wanted in ("gradient", "penultimate") if isinstance(wanted, str) else False:
            return self._from_network(x, y, network, wanted), wanted
        if isinstance(wanted, str):
            found, kind = pixel_features(x, None if wanted == "pixels" else PCA_WIDTH), wanted
        elif callable(wanted):
            with torch.no_grad():
                parts = [torch.as_tensor(wanted(part)) for part in torch.split(x, self.batch_size)]
            found, kind = torch.cat(parts), "function"
        else:
            found, kind = wanted, "given"
        matrix = _finite_rows(found)
        checks.require(
            matrix.ndim == 2 and len(matrix) == len(x),
            f"features is of shape {tuple(matrix.shape)}; it must be ({len(x)}, m), a row for each item.",
        )
        if self.similarity == "cosine":
            unit_rows(matrix)  # names zero rows by their place in the whole data, before any work
        return Rows(matrix), kind

    def _from_network(self, x: Tensor, y: Tensor | None, network: nn.Module | None, kind: str) -> Rows:
        checks.require(
            isinstance(network, nn.Module),
            f"network is a {type(network).__name__}; features={kind!r} needs a trained nn.Module.",
        )
        assert network is not None
        h, logits = penultimate(network, x, head=self.head, batch_size=self.batch_size)
        if kind == "penultimate":
            if self.similarity == "cosine":
                unit_rows(h)
            return Rows(h)
        checks.require(y is not None, "labels is None; features='gradient' needs the class of every item.")
        assert y is not None
        checks.require(
            int(y.max()) < logits.shape[1],
            f"network has {logits.shape[1]} outputs; it must have one for each of {int(y.max()) + 1} classes.",
        )
        delta = loss_slope(logits, y.to(logits.device), self.double_softmax)
        unit_rows(delta, "features (last-layer gradients)")
        return Rows(delta, h)


def _finite_rows(source: Any) -> Tensor:
    """Floating rows (n, ...); those with NaN or infinity are named by their place."""
    rows = source.detach() if isinstance(source, Tensor) else as_tensor("features", source)
    if rows.is_floating_point() and rows.ndim >= 2:
        bad = torch.nonzero(~rows.flatten(1).isfinite().all(1)).flatten().tolist()
        checks.require(
            not bad, f"features has NaN or infinite values in row {checks.listing(bad)}; it must be finite."
        )
    return as_float("features", rows)


def quantize(
    dataset_or_features: Any,
    labels: Any = None,
    n_bins: int = 10,
    ratio: float = 0.1,
    features: Any = None,
    similarity: KernelName = "cosine",
    balance: bool = True,
    seed: int = 0,
    *,
    network: nn.Module | None = None,
    **options: Any,
) -> Selection:
    """Dataset quantization as one call; see :class:`DQ` for the options.

    Args:
        dataset_or_features: labelled data, or an array: feature rows (n, m) that are used as they are unless
            ``features`` says otherwise, or inputs (n, ...).
        labels: class of each item, where the first argument is an array; may be left out with ``balance=False``.

    >>> rows = torch.randn(30, 5)
    >>> len(quantize(rows, balance=False, n_bins=3, ratio=0.1))
    3
    """
    dq = DQ(
        n_bins=n_bins,
        ratio=ratio,
        features=features,
        similarity=similarity,
        balance=balance,
        seed=seed,
        **options,
    )
    if not hasattr(dataset_or_features, "shape"):
        checks.require(labels is None, "labels is given twice; the data set has its own.")
        return dq.select(dataset_or_features, network)
    x = _finite_rows(dataset_or_features)
    checks.require(x.ndim >= 2 and len(x) > 0, f"features is of shape {tuple(x.shape)}; it must be (n, m).")
    if x.ndim == 2 and features is None and network is None:
        dq.features = x
    if labels is None:
        checks.require(not balance, "labels is None; balance=True needs the class of every item.")
        return dq._select(x, None, network)
    y = as_tensor("labels", labels)
    checks.same_length("features", x, "labels", y)
    checks.labels("labels", y)
    return dq._select(x, y.long(), network)
