"""Feature rows to select by: a classifier's last-layer gradients or last inputs, or the inputs themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.kernel import KernelName, Kind
from gradmatch.core.networks import fitted
from gradmatch.core.tap import capture, evaluating, last_of

PCA_WIDTH = 50
GRAM_BYTES = 2**29


@dataclass(frozen=True)
class Rows:
    """Feature rows, or last-layer gradients [delta, delta outer h] in their two factors."""

    matrix: Tensor
    inner: Tensor | None = None

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on another device."""
        return Rows(self.matrix.to(device), None if self.inner is None else self.inner.to(device))

    def of(self, own: Tensor, similarity: KernelName) -> tuple[Tensor, Kind]:
        """What the picker needs of some items: their rows, or their similarity matrix made of the factors."""
        own = own.to(self.matrix.device)
        first = self.matrix[own]
        if self.inner is None:
            return first, "features"
        second = self.inner[own]
        if callable(similarity) or len(own) ** 2 * 4 > GRAM_BYTES:
            return outer_rows(first, second.double()).float(), "features"
        products = (first @ first.T).float() * (1 + second.float() @ second.float().T)
        if similarity == "dot":
            return products, "similarity"
        lengths = (first.norm(dim=1) * (1 + second.double().square().sum(1)).sqrt()).float()
        return products.div_(lengths[:, None]).div_(lengths).mul_(0.5).add_(0.5), "similarity"


@torch.no_grad()
def penultimate(
    network: nn.Module, x: Tensor, *, head: str | None = None, batch_size: int = 256
) -> tuple[Float[Tensor, "n e"], Float[Tensor, "n c"]]:
    """The input of a classifier's last linear layer, and its logits, in eval mode and batches.

    Raises:
        InputError: no linear layer, or one whose outputs are not the network's.
    """
    name = head if head is not None else last_of(network, nn.Linear)
    inner, outer = [], []
    with evaluating(network), capture(network, name, side="input") as ins, capture(network, name) as outs:
        for part in torch.split(x, batch_size):
            logits = network(fitted(network, part))
            h = ins.get(name)
            checks.require(
                h is not None
                and h.ndim == 2
                and logits.shape == outs[name].shape
                and torch.allclose(logits, outs[name]),
                f"network does not end with its module {name!r}; name its last linear layer as head.",
            )
            assert h is not None
            inner.append(h)
            outer.append(logits)
    return checks.finite("penultimate features", torch.cat(inner)), checks.finite("logits", torch.cat(outer))


def loss_slope(logits: Tensor, y: Tensor, double_softmax: bool = False) -> Tensor:
    """d CE / d logits [n, c] in float64, without the cancellation of p_y - 1 that confident logits would bring."""
    p = F.softmax(logits.double(), 1)
    if not double_softmax:
        others = p.scatter(1, y[:, None], 0.0)
        return others.scatter(1, y[:, None], -others.sum(1, keepdim=True))
    v = F.softmax(p, 1) - F.one_hot(y, p.shape[1])
    return p * (v - (p * v).sum(1, keepdim=True))


def outer_rows(delta: Tensor, h: Tensor) -> Tensor:
    """[delta, delta outer h], a row an item."""
    return torch.cat([delta, (delta[:, :, None] * h[:, None, :]).flatten(1)], 1)


def gradient_embedding(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    double_softmax: bool = False,
    head: str | None = None,
    batch_size: int = 256,
) -> Float[Tensor, "n d"]:
    """Gradients of each item's cross-entropy by the last linear layer: [bias (c), weight (c * e) by rows], float64.

    Args:
        network: trained classifier; nothing of it is changed.
        x, y: inputs and their classes.
        double_softmax: the loss is taken of softmax outputs, as the public code does.
    """
    h, logits = penultimate(network, x, head=head, batch_size=batch_size)
    return outer_rows(loss_slope(logits, y.to(logits.device), double_softmax), h.double())


def pixel_features(x: Tensor, width: int | None = PCA_WIDTH) -> Float[Tensor, "n m"]:
    """Inputs flattened, each entry standardised over the items (constant ones left at 0), float64.

    ``width`` takes that many principal components (of at most the entries and items there are); None takes none.
    """
    flat = x.flatten(1).double()
    flat = flat - flat.mean(0)
    spread = flat.std(0, unbiased=False)
    flat = torch.where(spread > 1e-12, flat / spread.clamp_min(1e-12), torch.zeros_like(flat))
    if width is None or width >= flat.shape[1]:
        return flat
    count = min(width, len(flat))
    if flat.shape[1] <= len(flat):
        axes = torch.linalg.eigh(flat.T @ flat)[1][:, -count:].flip(1)
        found = flat @ axes
    else:  # more entries than items: the same components by the items' products
        values, axes = torch.linalg.eigh(flat @ flat.T)
        found = (axes * values.clamp_min(0).sqrt())[:, -count:].flip(1)
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    signed: Tensor = found * torch.where(largest < 0, -1.0, 1.0)
    return signed
