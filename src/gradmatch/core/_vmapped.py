"""Members of an ensemble trained as one batched program over stacked parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from gradmatch.core import checks
from gradmatch.core._members import (
    SGD,
    GradFn,
    Params,
    Recipe,
    Trained,
    batches,
    flat,
    forward_flops,
    member_seeds,
    refuse_divergence,
)
from gradmatch.core.networks import Network, active_dropout, build

_PLAIN = (nn.Linear, nn.Flatten, nn.Unflatten, nn.Identity, nn.LayerNorm)
_FEWEST, _MOST_PARAMETERS, _MOST_FLOPS = 8, 50_000, 4e6  # members; of one member; of one member's step
_RANDOM = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def why_not(module: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """Why members like ``module`` (in train mode) cannot be one batched program; ``None`` if they can."""
    if next(module.buffers(), None) is not None:
        return "the network has buffers (running statistics), which a batched program would not keep apart"
    if active_dropout(module) or any(isinstance(m, _RANDOM) for m in module.modules()):
        return "the network draws random numbers, which a batched program would draw otherwise"
    if any(not p.requires_grad for p in module.parameters()):
        return "the network has frozen parameters"
    params = {k: p.detach().expand(2, *p.shape) for k, p in module.named_parameters()}
    try:
        vmap(grad_and_value(_loss(module)), in_dims=(0, None, None))(params, x[:2], y[:2])
    except RuntimeError as error:
        return f"torch.func.vmap cannot run the network ({str(error).splitlines()[0][:120]})"
    return None


def pays_on_cpu(module: nn.Module, x: Tensor, n: int, batch: int) -> bool:
    """Whether batching is sure to beat a loop on a CPU: several small networks of linear and elementwise layers.

    What batching saves is the dispatch of each member's operations, about a third of a millisecond a step. Measured on
    one core, 8 to 32 members: 1.3x to 5x below the limits here, even at four times the operations, a loss above;
    2 to 4 members gain nothing; nor do convolutions (grouped convolutions are slow).
    """
    leaves = [m for m in module.modules() if next(m.children(), None) is None]
    plain = all(isinstance(m, _PLAIN) or type(m).__module__ == nn.ReLU.__module__ for m in leaves)
    if n < _FEWEST or not plain or sum(p.numel() for p in module.parameters()) > _MOST_PARAMETERS:
        return False
    return 3 * forward_flops(module, x[:1]) * min(len(x), batch) <= _MOST_FLOPS


def _loss(template: nn.Module) -> Callable[[Params, Tensor, Tensor], Tensor]:
    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(template, params, (x,)), y)

    return loss


def train_stacked(
    network: Network,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    members: range,
    progress: Callable[[int], object] | None = None,
) -> Trained:
    """Train ``members`` together; every tensor of the result has them on its first axis."""
    n = len(members)
    seeds = [member_seeds(recipe.seed, k) for k in members]
    modules = [build(network, s.init).to(device=x.device, dtype=x.dtype).train() for s in seeds]
    params = {k: p.detach() for k, p in stack_module_state(modules)[0].items()}
    orders = [torch.Generator().manual_seed(s.order) for s in seeds]
    draws = [torch.Generator(device=x.device).manual_seed(s.augment) for s in seeds]
    losses = torch.zeros(n, recipe.epochs, dtype=x.dtype, device=x.device)
    step = (_sgd_step if recipe.update is None else _update_step)(modules[0], params, recipe)
    snapshots = [_flats(params)] if 0 in recipe.record else []
    for epoch in range(recipe.epochs):
        for index in zip(*(batches(len(x), recipe.batch_size, g) for g in orders), strict=True):
            xb, yb, axis = _gather(x, y, index, recipe, draws)
            share = (len(x) if index[0] is None else len(index[0])) / len(x)
            losses[:, epoch] += step(xb, yb, axis, recipe.rate(epoch)) * share
        if epoch + 1 in recipe.record:
            snapshots.append(_flats(params))
        if (epoch + 1) % 16 == 0 or epoch + 1 == recipe.epochs:
            refuse_divergence(losses[:, : epoch + 1], recipe.lr, members[0])
        if progress is not None:
            progress(n)
    width = sum(p[0].numel() for p in params.values())
    kept = torch.stack(snapshots, 1) if snapshots else torch.zeros(n, 0, width)
    return Trained(params, {}, losses, kept)


def _flats(params: Params) -> Tensor:
    count = len(next(iter(params.values())))
    return torch.stack([flat({k: p[m] for k, p in params.items()}) for m in range(count)])


def _gather(
    x: Tensor, y: Tensor, index: tuple[Tensor | None, ...], recipe: Recipe, draws: list[torch.Generator]
) -> tuple[Tensor, Tensor, int | None]:
    """Batches of all members and the axis that tells them apart; ``None`` where all share the whole data."""
    if recipe.augment is not None:
        parts = [recipe.augment(x if i is None else x[i], g) for i, g in zip(index, draws, strict=True)]
        return torch.stack(parts), torch.stack([y if i is None else y[i] for i in index]), 0
    rows = [i for i in index if i is not None]
    if not rows:
        return x, y, None
    picked = torch.stack(rows).to(x.device)
    return x[picked], y[picked], 0


StackedStep = Callable[[Tensor, Tensor, int | None, float], Tensor]


def _sgd_step(template: nn.Module, params: Params, recipe: Recipe) -> StackedStep:
    sgd = SGD(list(params.values()), recipe.momentum, recipe.weight_decay)
    loss = _loss(template)

    def step(x: Tensor, y: Tensor, axis: int | None, lr: float) -> Tensor:
        at = {k: p.detach().requires_grad_() for k, p in params.items()}
        values = vmap(loss, in_dims=(0, axis, axis))(at, x, y)
        # one backward of the sum gives every member its own gradient, without a second layer of transforms
        grads = torch.autograd.grad(
            values.sum(), list(at.values()), allow_unused=True, materialize_grads=True
        )
        sgd.step(grads, lr)
        return values.detach()

    return step


def _update_step(template: nn.Module, params: Params, recipe: Recipe) -> StackedStep:
    loss, update = _loss(template), recipe.update
    assert update is not None
    state: Params = {}

    def step(x: Tensor, y: Tensor, axis: int | None, lr: float) -> Tensor:
        nonlocal state

        def one(own: Params, held: Params, xb: Tensor, yb: Tensor) -> tuple[Params, Params, Tensor]:
            seen: list[Tensor] = []

            def grad_fn(at: Params) -> Params:
                grads, value = grad_and_value(loss)(at, xb, yb)
                seen.append(value)
                return grads

            asked: GradFn = grad_fn
            new, kept = update(own, asked, held, lr)
            checks.require(bool(seen), "update never called grad_fn; it must ask for at least one gradient.")
            return new, kept, seen[0]

        new, state, values = vmap(one, in_dims=(0, 0, axis, axis))(params, state, x, y)
        for name, p in params.items():
            p.copy_(new[name])
        return values

    return step
