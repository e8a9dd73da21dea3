"""The empirical neural tangent kernel of a network on a probe set, and how far it moves."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from gradmatch.core import checks

__all__ = ["empirical_ntk", "kernel_distance"]


def empirical_ntk(
    module: nn.Module, x: Tensor, params: dict[str, Tensor] | None = None
) -> Float[Tensor, "nC nC"]:
    """K = J J^T, with J (n C, P) the Jacobian of all C outputs at all n probe inputs in the parameters.

    Row i C + c stands for output c at input i. Taken in eval mode; the module is left as found. J is held at once,
    so keep the probe set small.

    Args:
        module: gives outputs (n, C).
        x: probe inputs (n, ...).
        params: where to take it; default the module's own parameters.

    >>> linear = nn.Linear(3, 2, bias=False)
    >>> x = torch.randn(4, 3)
    >>> torch.allclose(empirical_ntk(linear, x), torch.kron(x @ x.T, torch.eye(2)), atol=1e-5)
    True
    """
    checks.finite("x", x)
    at = {k: p.detach() for k, p in (dict(module.named_parameters()) if params is None else params).items()}
    buffers = dict(module.named_buffers())
    modes = [(m, m.training) for m in module.modules()]

    def outputs(p: dict[str, Tensor], one: Tensor) -> Tensor:
        result: Tensor = functional_call(module, p | buffers, (one[None],))[0]
        return result

    module.eval()
    try:
        jacobians = vmap(jacrev(outputs), (None, 0))(at, x)
    finally:
        for m, training in modes:
            m.training = training
    flat = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2).flatten(0, 1)
    return checks.finite("the kernel", flat @ flat.T)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """1 - <A, B> / (|A| |B|) of two kernels as flat vectors: 0 where one is a positive multiple of the other."""
    checks.require(
        a.shape == b.shape, f"a is {tuple(a.shape)} and b is {tuple(b.shape)}; they must be alike."
    )
    norms = a.norm() * b.norm()
    checks.require(bool(norms > 0), "a or b is zero; the distance of kernels needs both above zero.")
    return float(1 - (a * b).sum() / norms)
