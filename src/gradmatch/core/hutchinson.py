"""One estimate of a Hessian's diagonal from gradients that carry their graph, as optimizers need at every step.

With signs z, independent and +-1, E[z * (H z)] is the diagonal of H; where H is diagonal every single z gives it
exactly. H z is one more backward pass, through the gradients. For curvature over a whole data set, with standard
errors, see :mod:`gradmatch.core.curvature` and :mod:`gradmatch.core.krylov`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def signs_like(tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Independent +-1 shaped as each tensor; drawn in one piece where the generator lives, as whole numbers.

    The same seed gives the same signs for every type of number, and for the same tensors in one list or several.

    >>> [s.abs().tolist() for s in signs_like([torch.zeros(2), torch.zeros(1)], torch.Generator().manual_seed(0))]
    [[1.0, 1.0], [1.0]]
    """
    sizes = [t.numel() for t in tensors]
    bits = torch.empty(sum(sizes), dtype=torch.int8, device=generator.device)
    signs = bits.random_(0, 2, generator=generator).mul_(2).sub_(1)
    if len({(t.dtype, t.device) for t in tensors}) == 1:
        signs = signs.to(tensors[0])  # one conversion for all
    parts = signs.split_with_sizes(sizes)
    return [s.view(t.shape).to(t) for s, t in zip(parts, tensors, strict=True)]


def hessian_diagonals(
    gradients: Sequence[Tensor],
    params: Sequence[Tensor],
    generator: torch.Generator,
    samples: int = 1,
) -> list[Tensor]:
    """z * (H z), averaged over ``samples`` draws of z, shaped as each parameter.

    The graph of the gradients is freed. A gradient without graph is constant: its curvature is 0.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> slopes = torch.autograd.grad((w**3).sum(), w, create_graph=True)
    >>> hessian_diagonals(slopes, [w], torch.Generator().manual_seed(0))
    [tensor([ 6., 12.])]
    """
    totals: list[Tensor] = []
    moving = [i for i, g in enumerate(gradients) if g.requires_grad]
    for k in range(samples if moving else 0):
        z = signs_like(params, generator)
        products = torch.autograd.grad(
            [gradients[i] for i in moving],
            params,
            [z[i] for i in moving],
            retain_graph=k + 1 < samples,
            allow_unused=True,
            materialize_grads=True,
        )
        with torch.no_grad():
            found = list(torch._foreach_mul(z, products))
            if totals:
                torch._foreach_add_(totals, found)
            else:
                totals = found
    if samples > 1 and totals:
        torch._foreach_mul_(totals, 1 / samples)
    return totals or [torch.zeros_like(p) for p in params]
