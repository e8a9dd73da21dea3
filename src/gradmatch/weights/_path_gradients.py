"""Gradients of a supernet's loss for many architectures, of the same batches, without a trace on the network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.tap import evaluating


class PathGradients:
    """Gradients (paths, P) of the mean loss for many architectures, of one batch for each draw."""

    def __init__(self, net: nn.Module, loss: Any, vectorized: bool | None, most: int) -> None:
        self.net, self.loss, self.most = net, loss, most
        self.params = {n: p.detach() for n, p in trained(net)}
        self.forced = vectorized is not None
        convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in net.modules())
        self.vectorized = not convolves if vectorized is None else vectorized

    def unflatten(self, row: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.params.values()]
        return [r.view_as(p) for r, p in zip(torch.split(row, sizes), self.params.values(), strict=True)]

    def __call__(self, paths: list[list[Any]], batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        equal = len({tuple(x.shape) for x, _ in batches}) == 1 and len({len(p) for p in paths}) == 1
        if self.vectorized and equal:
            try:
                return list(self._together(paths, batches))
            except RuntimeError:  # a layer, such as an LSTM, that vmap cannot batch
                if self.forced:
                    raise
                self.vectorized = False
        return [self._one_by_one(p, *b) for p, b in zip(paths, batches, strict=True)]

    def _together(self, paths: list[list[Any]], batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        weights = torch.stack([torch.stack([_weights(p, self.most) for p in ps]) for ps in paths])
        x, y = (torch.stack(side) for side in zip(*batches, strict=True))

        def flat(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
            slopes = grad(lambda p: self.loss(functional_call(self.net, p, (x, theta)), y))(self.params)
            return torch.cat([slopes[n].reshape(-1) for n in self.params])

        return vmap(vmap(flat, (0, None, None)))(weights.to(x), x, y)

    def _one_by_one(self, paths: list[Any], x: Tensor, y: Tensor) -> Tensor:
        params = [p for _, p in trained(self.net)]
        rows = []
        for path in paths:
            with torch.enable_grad():
                slopes = torch.autograd.grad(
                    self.loss(self.net(x, path), y), params, allow_unused=True, materialize_grads=True
                )
            rows.append(torch.cat([s.reshape(-1) for s in slopes]))
        return torch.stack(rows)


def _weights(path: Any, width: int) -> Tensor:
    if isinstance(path, Tensor):
        return path
    return F.one_hot(torch.tensor(path), width).float()


def shared_columns(net: nn.Module, edge: int) -> Bool[Tensor, " P"]:
    """Which entries of the flat gradient are shared: all but the edge's own."""
    own = set(net.edge_parameters(edge))  # type: ignore[operator]
    return torch.cat([torch.full((p.numel(),), n not in own) for n, p in trained(net)])


def trained(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters without those that are frozen, which no architecture pulls anywhere."""
    return [(n, p) for n, p in net.named_parameters() if p.requires_grad]


def again_and_again(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without an end."""
    while True:
        empty = True
        for x, y in loader:
            empty = False
            yield x, y
        checks.require(not empty, "loader is empty; at least one batch is needed.")


@contextmanager
def still(net: nn.Module) -> Iterator[None]:
    """Within the block norms take the batch's statistics and leave the running ones alone, and nothing is dropped."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    before = [m.track_running_stats for m in norms]
    with evaluating(net):
        for m in norms:
            m.track_running_stats, m.training = False, True
        try:
            yield
        finally:
            for m, track in zip(norms, before, strict=True):
                m.track_running_stats = track
