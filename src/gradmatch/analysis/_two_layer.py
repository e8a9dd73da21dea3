"""The paper's network of two layers, and tangent kernels: its own at infinite width, and any network's as it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from gradmatch.core import checks

__all__ = ["EmpiricalKernel", "ReLUKernel", "TwoLayerReLU", "with_time"]


def with_time(x: Tensor, t: Tensor, t_min: float) -> Tensor:
    """phi = (x, t - t_min, 1) [n, d + 2]; the last entry is the bias."""
    return torch.cat([x, (t - t_min).to(x)[:, None], torch.ones_like(x[:, :1])], 1)


class TwoLayerReLU(nn.Module):
    """f^i(x, t) = m^{-1/2} sum_r a_r^i (relu(w_r . phi) - relu(w_r(0) . phi)), w trained and the signs a fixed.

    Trained outer weights would add a second kernel and break the correspondence with the one here. The function at
    initialisation is of size |phi| and would be what the path starts from, so it is subtracted.

    Args:
        dim: d, of inputs and outputs.
        width: m.
        t_min: the smallest time.
        seed: of w ~ N(0, I) and the signs.

    >>> net = TwoLayerReLU(2, 64)
    >>> float(net(torch.randn(5, 2), torch.ones(5)).abs().max())
    0.0
    """

    start: Tensor
    signs: Tensor

    def __init__(self, dim: int, width: int = 512, *, t_min: float = 0.05, seed: int = 0) -> None:
        super().__init__()
        m, d = checks.whole("width", width), checks.whole("dim", dim)
        generator = torch.Generator().manual_seed(checks.whole("seed", seed, least=0))
        self.weight = nn.Parameter(torch.randn(m, d + 2, generator=generator))
        self.register_buffer("start", self.weight.detach().clone())
        self.register_buffer("signs", 2.0 * torch.randint(0, 2, (m, d), generator=generator) - 1)
        self.t_min = t_min

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(n, d) at inputs (n, d) and times (n,)."""
        phi = with_time(x, t, self.t_min)
        hidden = torch.relu(phi @ self.weight.T) - torch.relu(phi @ self.start.T)
        return hidden @ self.signs / math.sqrt(len(self.weight))

    def slopes(
        self, x: Tensor, t: Tensor, y: Tensor
    ) -> Callable[[], tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
        """A function that gives mean |f - y|^2 on fixed data and its gradient; what stays the same is computed once."""
        phi, signs = with_time(x, t, self.t_min), self.signs / math.sqrt(len(self.weight))
        wanted = y + torch.relu(phi @ self.start.T) @ signs

        @torch.no_grad()
        def slopes() -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
            before = phi @ self.weight.T
            live = before > 0
            apart = before.mul_(live) @ signs - wanted
            back = (apart @ signs.T).mul_(live)
            return apart.square().sum(1).mean(), [(self.weight, (2 / len(y)) * (back.T @ phi))]

        return slopes


class ReLUKernel:
    """Tangent kernel of :class:`TwoLayerReLU` at infinite width, for each output: phi . phi' (pi - angle) / (2 pi)."""

    def __init__(self, t_min: float = 0.05) -> None:
        self.t_min = t_min

    def __call__(self, x: Tensor, t: Tensor, x2: Tensor, t2: Tensor) -> Tensor:
        a, b = with_time(x, t, self.t_min), with_time(x2, t2, self.t_min)
        products = a @ b.T
        cosine = products / (a.norm(dim=1)[:, None] * b.norm(dim=1))
        return products * (math.pi - torch.acos(cosine.clamp(-1, 1))) / (2 * math.pi)


class EmpiricalKernel:
    """J J^T of any network ``net(x, t)`` at its present parameters [n outputs, m outputs], in eval mode."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.params = {k: p.detach().clone() for k, p in net.named_parameters() if p.requires_grad}
        checks.require(bool(self.params), "the network has no parameters that can be trained.")

    def jacobian(self, x: Tensor, t: Tensor) -> Tensor:
        """[n outputs, P], row i C + c for output c at input i."""
        kind = next(iter(self.params.values()))
        rest = dict(self.net.named_buffers())

        def one(p: dict[str, Tensor], x1: Tensor, t1: Tensor) -> Tensor:
            found: Tensor = functional_call(self.net, p | rest, (x1[None], t1[None]))[0]
            return found

        modes = [(m, m.training) for m in self.net.modules()]
        self.net.eval()
        try:
            parts = vmap(jacrev(one), (None, 0, 0))(self.params, x.to(kind), t.to(kind))
        finally:
            for module, training in modes:
                module.training = training
        return torch.cat([j.flatten(2) for j in parts.values()], 2).flatten(0, 1)

    def __call__(self, x: Tensor, t: Tensor, x2: Tensor, t2: Tensor) -> Tensor:
        left = self.jacobian(x, t).double()
        return left @ (left if x is x2 and t is t2 else self.jacobian(x2, t2).double()).T
