"""Gradient matching: the gradient that images get from making a network's gradient on them that of real data.

The network is held as a function (:class:`Learner`); its parameters and buffers are dictionaries kept outside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from gradmatch.core import checks
from gradmatch.core.distance import gradient_distance
from gradmatch.core.networks import Network, active_dropout, build, seeded
from gradmatch.core.ntk import empirical_ntk, kernel_distance
from gradmatch.data._common import SyntheticDataset, standardise

Tensors = dict[str, Tensor]
View = Callable[[Tensor], Tensor]
CHUNK = 256
"""Real images in one pass; gradients of several passes are added."""


@dataclass(frozen=True)
class Learner:
    """A network's computation, at whatever parameters and buffers.

    Attributes:
        module: gives the computation; its own tensors are neither read nor changed.
        matched: names of the parameters whose gradients are compared; frozen ones are not.
        distance: how, see :func:`gradmatch.core.distance.gradient_distance`.
    """

    module: nn.Module
    matched: tuple[str, ...]
    distance: str

    @classmethod
    def of(cls, module: nn.Module, distance: str) -> Learner:
        """The learner of a module; "filter_cosine" leaves out parameters of one dimension, which cost nothing there.

        Raises:
            InputError: no parameter is left, or a layer normalises by the batch and keeps no statistics to freeze.
        """
        free = [(k, p) for k, p in module.named_parameters() if p.requires_grad]
        names = tuple(k for k, p in free if distance != "filter_cosine" or p.ndim >= 2)
        checks.require(bool(names), f"network has no parameter that the distance {distance!r} compares.")
        loose = [k for k, m in module.named_modules() if _is_batch_norm(m) and not m.track_running_stats]
        checks.require(
            not loose,
            f"network normalises by the batch without running statistics at {checks.listing(loose)}; "
            "matching needs statistics that can be frozen.",
        )
        return cls(module, names, distance)

    def gradient(
        self, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, weight: Tensor | None = None
    ) -> list[Tensor]:
        """Gradient of the mean cross-entropy of a batch, or of its sum weighted by ``weight`` (n,).

        Taken with dropout off and statistics frozen; one tensor for each matched parameter. The graph is kept where
        ``x`` requires grad.
        """
        self.module.eval()
        live = {k: p.detach().requires_grad_(k in self.matched) for k, p in params.items()}
        logits = functional_call(self.module, live | buffers, (x,))
        if weight is None:
            loss = F.cross_entropy(logits, y)
        else:
            loss = (F.cross_entropy(logits, y, reduction="none") * weight).sum()
        wanted = [live[k] for k in self.matched]
        return list(
            torch.autograd.grad(
                loss, wanted, create_graph=x.requires_grad, allow_unused=True, materialize_grads=True
            )
        )

    def real_gradient(
        self, params: Tensors, buffers: Tensors, batches: Sequence[Tensor], classes: Sequence[int]
    ) -> list[Tensor]:
        """Mean over the classes of the gradients of their batches, by one backward pass through all of them."""
        x = torch.cat(list(batches))
        sizes = torch.tensor([len(b) for b in batches], device=x.device)
        y = torch.tensor(classes, device=x.device).repeat_interleave(sizes)
        weight = (1 / (len(batches) * sizes.to(x.dtype))).repeat_interleave(sizes)
        total: list[Tensor] | None = None
        for i in range(0, len(x), CHUNK):
            here = slice(i, i + CHUNK)
            part = self.gradient(params, buffers, x[here], y[here], weight[here])
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
        assert total is not None
        return total

    def image_gradients(
        self,
        params: Tensors,
        buffers: Tensors,
        real: Sequence[Tensor],
        synthetic: Sequence[Tensor],
        contrastive: bool,
        *,
        classes: Sequence[int] | None = None,
        views: Sequence[View] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The matching loss, and its gradient in the synthetic images of each class.

        Args:
            real, synthetic: a batch (n_c, ...) of each class.
            contrastive: compare the means over the classes, instead of every class on its own (and add up).
            classes: the class of each batch; default 0, 1, ...
            views: for each class a function applied to its real and to its synthetic images.
        """
        classes = range(len(real)) if classes is None else classes
        leaves = [s.detach().requires_grad_() for s in synthetic]
        shown, seen = list(leaves), list(real)
        if views is not None:
            shown = [view(s) for view, s in zip(views, leaves, strict=True)]
            seen = [view(r) for view, r in zip(views, real, strict=True)]
        groups = [list(range(len(leaves)))] if contrastive else [[c] for c in range(len(leaves))]
        total = torch.zeros((), dtype=leaves[0].dtype, device=leaves[0].device)
        grads: list[Tensor] = []
        for group in groups:
            target = self.real_gradient(
                params, buffers, [seen[c] for c in group], [classes[c] for c in group]
            )
            x = torch.cat([shown[c] for c in group])
            y = torch.cat([torch.full((len(shown[c]),), classes[c], device=x.device) for c in group])
            loss = gradient_distance(self.gradient(params, buffers, x, y), target, self.distance)
            grads += torch.autograd.grad(loss, [leaves[c] for c in group])
            total = total + loss.detach()
        return total, grads

    def freeze_statistics(self, params: Tensors, buffers: Tensors, x: Tensor) -> None:
        """Make the running statistics in ``buffers`` those of the batch ``x``, in place."""
        self.module.eval()
        with torch.no_grad(), _collecting(self.module):
            functional_call(self.module, params | buffers, (x,))

    def train(
        self,
        params: Tensors,
        buffers: Tensors,
        batches: Iterator[tuple[Tensor, Tensor]],
        lr: float,
        seed: int,
    ) -> Tensors:
        """The parameters after an SGD step on each batch, in train mode; running statistics stay, frozen layers too."""
        self.module.train()
        scratch = {k: b.clone() for k, b in buffers.items()}  # train mode writes statistics: into a copy
        free = {k for k, p in self.module.named_parameters() if p.requires_grad}
        live = {k: p.detach().clone().requires_grad_(k in free) for k, p in params.items()}
        tensors = [p for p in live.values() if p.requires_grad]
        with _dropout_seeded(self.module, seed):
            for x, y in batches:
                loss = F.cross_entropy(functional_call(self.module, live | scratch, (x,)), y)
                grads = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
                with torch.no_grad():
                    torch._foreach_add_(tensors, grads, alpha=-lr)
        return {k: p.detach() for k, p in live.items()}


def kernel_velocity(
    synthetic: SyntheticDataset,
    network: Network,
    probe: Tensor,
    *,
    epochs: int = 20,
    lr: float = 0.01,
    seed: int = 0,
) -> Tensor:
    """How fast a network's tangent kernel turns while it is trained on a synthetic set, (epochs,).

    Entry t is the :func:`gradmatch.core.ntk.kernel_distance` of the kernels on ``probe`` before and after epoch t.
    The paper gives its warm-up this reason: contrastively condensed sets turn the kernel faster early on.

    Args:
        synthetic: trained on as one batch an epoch, standardised as it says.
        network: factory of the network.
        probe: a few dozen inputs (n, ...) in the scale of the data, standardised likewise.
        epochs, lr: plain SGD steps and their size.
        seed: of the network.
    """
    module = build(network, seed)
    learner = Learner.of(module, "mse")
    params = {k: p.detach() for k, p in module.named_parameters()}
    buffers = dict(module.named_buffers())
    x, at = synthetic.standardised(), standardise(probe, synthetic.mean, synthetic.std)
    kernels = [empirical_ntk(module, at, params)]
    for t in range(checks.whole("epochs", epochs)):
        params = learner.train(params, buffers, iter([(x, synthetic.labels)]), lr, seed + t)
        kernels.append(empirical_ntk(module, at, params))
    return torch.tensor([kernel_distance(a, b) for a, b in pairwise(kernels)])


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


@contextmanager
def _collecting(module: nn.Module) -> Iterator[None]:
    """Let the layers with running statistics replace them by those of the next batch."""
    layers = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    before = [m.momentum for m in layers]
    try:
        for m in layers:
            m.train()
            m.momentum = 1.0
        yield
    finally:
        for m, momentum in zip(layers, before, strict=True):
            m.eval()
            m.momentum = momentum


@contextmanager
def _dropout_seeded(module: nn.Module, seed: int) -> Iterator[None]:
    """Dropout draws from the global generator: seed it for the block, where there is any."""
    if not active_dropout(module):
        yield
        return
    with seeded(seed):
        yield
