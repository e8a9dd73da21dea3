"""Stationary representations (Biondi, Pernici, Ricci, Del Bimbo; CVPR 2024, arXiv 2405.02581).

A search service embeds its gallery anew whenever the model is updated, unless features of the new model can be compared
with the old one's. Compatibility asks that for all images i, j

    d(new(x_i), old(x_j)) <= d(old(x_i), old(x_j)) for one class, and >= for different ones.

A classifier whose weights are the fixed vertices of a regular simplex, for more classes than there are yet, pins each
class to one direction for ever: under it the features of a class tend to its vertex, so that between updates expected
distances within a class do not grow and those between classes do not shrink. Cross-entropy aligns first moments only;
the higher-order compatibility loss (:func:`hoc_loss`) adds the pairwise ones, against the frozen old model:

    L = lambda CE(W z, slot(y)) + (1 - lambda) L_HOC,
    L_HOC = mean_i [ -mu <o_i, z_i> + log sum_{j: y_j != y_i} exp(mu <o_i, z_j>) ].

Official code: miccunifi/iamcl2r; ``official=True`` keeps its reading of the sum.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks

__all__ = ["CompatibleModel", "DSimplex", "StationaryHead", "hoc_loss", "unit_rows"]

VERSION = 1
"""Of the construction of the vertices: two parties' features compare only if it is the same."""
ORDERS = ("from_end", "from_start")
Slots = str | Mapping[int, int]


def DSimplex(num_classes: int = 1024) -> Float[Tensor, "k d"]:
    """The vertices of a regular simplex: unit rows (K, K-1), pairwise cosine -1 / (K-1), summing to 0; float32.

    Built in float64: the identity's rows and (1 - sqrt(1 + d)) / d everywhere, less their mean, normalised.

    >>> w = DSimplex(4)
    >>> torch.allclose(w @ w.T, torch.eye(4) * 4 / 3 - 1 / 3, atol=1e-6)
    True
    """
    d = checks.whole("num_classes", num_classes, 2) - 1
    rows = torch.cat(
        [torch.eye(d, dtype=torch.float64), torch.full((1, d), (1 - (1 + d) ** 0.5) / d, dtype=torch.float64)]
    )
    return F.normalize(rows - rows.mean(0)).float()


class StationaryHead(nn.Module):
    """A trainable projection to K-1 features, and a classifier on them that never changes.

    ``forward`` gives features z; :meth:`classify` the logits of all K slots, of which those no class has yet stay as
    negatives. Retrieval uses z / |z|. The logits are W z, z as it is.

    Args:
        in_features: of the backbone.
        num_classes: slots K, near the number of classes of a lifetime; features have K - 1 numbers. 1024 as published.
        slots: "from_end" (label y has slot K-1-y), "from_start" (slot y, for a provider's own classes), or a map from
            labels to slots.
        scale: of the logits. 1 as published; unit vertices make a soft cross-entropy, short trainings may want more.

    The state dict holds a fingerprint of the space (version, K, slots); a head of another space refuses it.

    Raises:
        InputError: fewer than two slots, slots out of range or taken twice.
    """

    vertices: Tensor
    space: Tensor

    def __init__(
        self, in_features: int, num_classes: int = 1024, slots: Slots = "from_end", *, scale: float = 1.0
    ) -> None:
        super().__init__()
        vertices = DSimplex(num_classes)
        self.slots = _checked_slots(slots, num_classes)
        self.scale = checks.positive("scale", scale)
        self.projection = nn.Linear(checks.whole("in_features", in_features), num_classes - 1, bias=False)
        self.register_buffer("vertices", vertices, persistent=False)
        self.register_buffer("space", torch.tensor([VERSION, num_classes, _fingerprint(self.slots)]))

    @property
    def num_classes(self) -> int:
        """Slots K."""
        return len(self.vertices)

    def forward(self, hidden: Float[Tensor, "n h"]) -> Float[Tensor, "n d"]:
        """Features z."""
        features: Tensor = self.projection(hidden)
        return features

    def classify(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Logits of every slot; under autocast, too, in single precision, as cosines differ by about 1 / K only."""
        width = self.num_classes - 1
        checks.require(
            features.shape[-1] == width,
            f"features have {features.shape[-1]} numbers; a head of {self.num_classes} slots takes {width}.",
        )
        with torch.autocast(features.device.type, enabled=False):
            wide = features.to(torch.promote_types(features.dtype, torch.float32))
            return self.scale * F.linear(wide, self.vertices.to(wide.dtype))

    def targets(self, labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The slot of each label.

        Raises:
            InputError: labels that are no whole numbers, or for which there is no slot.
        """
        checks.require(
            not labels.is_floating_point() and labels.dtype != torch.bool,
            f"labels are {labels.dtype}; they must be whole numbers.",
        )
        if isinstance(self.slots, str):
            bad = (labels < 0) | (labels >= self.num_classes)
            found = labels if self.slots == "from_start" else self.num_classes - 1 - labels
        else:
            known = torch.tensor(sorted(self.slots), device=labels.device)
            at = torch.searchsorted(known, labels.contiguous()).clamp_max(len(known) - 1)
            bad = known[at] != labels
            found = torch.tensor([self.slots[k] for k in sorted(self.slots)], device=labels.device)[at]
        checks.require(
            not bool(bad.any()),
            f"labels {checks.listing(sorted(set(labels[bad].tolist())))} have no slot among the {self.num_classes}; a "
            "head needs one for every class it will ever see.",
        )
        return found

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        own, other = self.space.tolist(), state.get(f"{prefix}space")
        if other is not None:
            for name, mine, theirs in zip(
                ("construction", "number of slots", "slot map"), own, other.tolist(), strict=True
            ):
                checks.require(
                    mine == theirs,
                    f"the state dict has features of another space: its {name} is {theirs}, this head's is {mine}.",
                )
        super()._load_from_state_dict(state, prefix, *rest)


def _checked_slots(slots: Slots, num_classes: int) -> str | dict[int, int]:
    if isinstance(slots, str):
        return str(checks.one_of("slots", slots, ORDERS))
    found = {int(k): checks.whole(f"slots[{k}]", v, 0, num_classes - 1) for k, v in slots.items()}
    checks.require(bool(found), "slots is empty; it must map at least one label to its slot.")
    taken = sorted(found.values())
    twice = sorted({a for a, b in itertools.pairwise(taken) if a == b})
    checks.require(not twice, f"slots gives slot {checks.listing(twice)} to more than one label.")
    return found


def _fingerprint(slots: str | dict[int, int]) -> int:
    text = slots if isinstance(slots, str) else repr(sorted(slots.items()))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


class CompatibleModel(nn.Module):
    """A backbone and a :class:`StationaryHead`; called on inputs it gives features (n, K-1).

    Args:
        backbone: gives (n, h), maps that are flattened, or a Hugging Face output with ``pooler_output``.
        head: takes what the backbone gives.

    >>> model = CompatibleModel(nn.Flatten(), StationaryHead(12, num_classes=8))
    >>> model(torch.randn(5, 3, 2, 2)).shape
    torch.Size([5, 7])
    """

    def __init__(self, backbone: nn.Module, head: StationaryHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, inputs: Any) -> Float[Tensor, "n d"]:
        """Features z, as the classifier takes them."""
        out = self.backbone(**inputs) if isinstance(inputs, Mapping) else self.backbone(inputs)
        hidden = out if isinstance(out, Tensor) else getattr(out, "pooler_output", None)
        checks.require(
            isinstance(hidden, Tensor),
            f"backbone gives a {type(out).__name__}; it must be a tensor or have a pooler_output.",
        )
        assert isinstance(hidden, Tensor)
        features: Tensor = self.head(hidden.flatten(1))
        return features


def unit_rows(name: str, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of length 1.

    Raises:
        InputError: rows that are 0 or not finite, and have no direction.
    """
    checks.finite(name, features)
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    bad = int((norms == 0).sum())
    checks.require(not bad, f"{name} has {bad} rows that are 0; they have no direction.")
    unit: Tensor = features / norms
    return unit


def hoc_loss(
    new: Float[Tensor, "n d"],
    old: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    mu: float = 10.0,
    official: bool = False,
) -> Float[Tensor, ""]:
    """Higher-order compatibility loss of a batch: the same image across models attracts, other classes' repel.

    Args:
        new, old: features of the same images by the model in training and by the frozen old one; normalised here.
        labels: pairs of one class are no negatives; the positive is not in the sum either.
        mu: inverse temperature; 10 as published.
        official: as the released code has it, where a pair of one class enters the sum as exp(0) = 1 instead of not
            at all. Then the sum is never empty. By default the sum of an image without negatives counts as log 1.

    Raises:
        InputError: features of different shape, of no direction, or an old model that would be trained too.
    """
    checks.require(
        new.shape == old.shape and new.ndim == 2,
        f"new is {tuple(new.shape)} and old {tuple(old.shape)}; both must be (images, features) of one size.",
    )
    checks.same_length("labels", labels, "new", new)
    checks.require(
        not old.requires_grad,
        "old requires a gradient; the old model stays as it is, so compute it in no_grad.",
    )
    checks.positive("mu", mu)
    z, o = unit_rows("new", new), unit_rows("old", old)
    similarities = mu * (o @ z.T)
    different = labels[:, None] != labels
    positive = similarities.diagonal()
    if official:
        return (torch.logsumexp(similarities * different, 1) - positive).mean()
    some = different.any(1)
    # rows are selected before the sum: log 0 would have a finite loss but NaN gradients
    negative = torch.logsumexp(similarities[some].masked_fill(~different[some], -torch.inf), 1)
    return (negative.sum() - positive.sum()) / len(new)
