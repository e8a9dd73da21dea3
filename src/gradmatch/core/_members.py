"""One member of an ensemble: its seeds, its training loop and its test accuracy.

This loop defines what every program of ``core.ensemble`` has to reproduce.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gradmatch.core import checks
from gradmatch.core.networks import Network, build
from gradmatch.core.pooling import with_product_pools

Params = dict[str, Tensor]
GradFn = Callable[[Params], Params]
Update = Callable[[Params, GradFn, Params, float], tuple[Params, Params]]
"""``update(params, grad_fn, state, lr) -> (params, state)``: one step of an optimiser, without in-place changes."""
Augment = Callable[[Tensor, torch.Generator], Tensor]

_CHECK_EVERY = 16  # epochs between two looks at the losses; a look waits for the device


class MemberSeeds(NamedTuple):
    """The four independent seeds of one member."""

    init: int
    order: int
    augment: int
    layers: int


def member_seeds(seed: int, member: int) -> MemberSeeds:
    """Seeds of member 0, 1, ... of an ensemble: initial weights, batch order, augmentation, random layers.

    >>> member_seeds(0, 1) == member_seeds(0, 1) != member_seeds(0, 2)
    True
    """
    words = np.random.SeedSequence(seed, spawn_key=(member,)).generate_state(4, np.uint64)
    return MemberSeeds(*(int(word) >> 1 for word in words))


@dataclass(frozen=True)
class Recipe:
    """How every member is trained; see ``train_ensemble``."""

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    milestones: tuple[int, ...]
    gamma: float
    augment: Augment | None
    update: Update | None
    record: tuple[int, ...]
    seed: int

    def rate(self, epoch: int) -> float:
        """Learning rate of epoch 0, 1, ...: divided at every milestone already reached."""
        return self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)


@dataclass
class Trained:
    """What comes out of one member, or of several with a first axis of members."""

    params: Params
    buffers: Params
    losses: Tensor
    snapshots: Tensor
    accuracy: Any = None


def flat(params: Mapping[str, Tensor]) -> Tensor:
    """Parameters as one float32 vector on the CPU, in the order of their names' appearance; always a copy."""
    return torch.cat([p.detach().reshape(-1).to("cpu", torch.float32) for p in params.values()])


def batches(count: int, batch_size: int, order: torch.Generator) -> list[Tensor | None]:
    """Index batches of one epoch; one batch that holds everything keeps the order of the data (``None``)."""
    if count <= batch_size:
        return [None]
    return list(torch.randperm(count, generator=order).split(batch_size))


def train_member(
    network: Network,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    member: int,
    progress: Callable[[int], object] | None = None,
) -> tuple[nn.Module, Trained]:
    """Train member ``member`` on its own; ``progress`` is called after every epoch with 1."""
    module = fresh_member(network, x, recipe, member)
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(member_seeds(recipe.seed, member).layers)
        return train_module(module, x, y, recipe, member, progress)


def fresh_member(network: Network, x: Tensor, recipe: Recipe, member: int) -> nn.Module:
    """Member ``member`` before its first step, in train mode, of the kind of ``x``."""
    init = member_seeds(recipe.seed, member).init
    return with_product_pools(build(network, init)).to(device=x.device, dtype=x.dtype).train()


def train_module(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    member: int,
    progress: Callable[[int], object] | None = None,
) -> tuple[nn.Module, Trained]:
    """The training itself; random layers draw from the global generator as they find it."""
    seeds = member_seeds(recipe.seed, member)
    order = torch.Generator().manual_seed(seeds.order)
    draws = torch.Generator(device=x.device).manual_seed(seeds.augment)
    step = _sgd_step(module, recipe) if recipe.update is None else _update_step(module, recipe)
    losses = torch.zeros(recipe.epochs, dtype=x.dtype, device=x.device)
    snapshots = [flat(dict(module.named_parameters()))] if 0 in recipe.record else []
    for epoch in range(recipe.epochs):
        for index in batches(len(x), recipe.batch_size, order):
            xb, yb = (x, y) if index is None else (x[index], y[index])
            if recipe.augment is not None:
                xb = recipe.augment(xb, draws)
            losses[epoch] += step(xb, yb, recipe.rate(epoch)) * (len(xb) / len(x))
        if epoch + 1 in recipe.record:
            snapshots.append(flat(dict(module.named_parameters())))
        if (epoch + 1) % _CHECK_EVERY == 0 or epoch + 1 == recipe.epochs:
            refuse_divergence(losses[None, : epoch + 1], recipe.lr, member)
        if progress is not None:
            progress(1)
    params = {k: p.detach() for k, p in module.named_parameters()}
    for name, p in params.items():
        checks.finite(f"parameter {name} of member {member} after training", p)
    buffers = {k: b.detach() for k, b in module.named_buffers()}
    kept = torch.stack(snapshots) if snapshots else torch.zeros(0, sum(p.numel() for p in params.values()))
    return module.eval(), Trained(params, buffers, losses, kept)


Step = Callable[[Tensor, Tensor, float], Tensor]


def _sgd_step(module: nn.Module, recipe: Recipe) -> Step:
    params: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    sgd = SGD(params, recipe.momentum, recipe.weight_decay)

    def step(x: Tensor, y: Tensor, lr: float) -> Tensor:
        loss = F.cross_entropy(module(x), y)
        sgd.step(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True), lr)
        return loss.detach()

    return step


class SGD:
    """In-place SGD with heavy-ball momentum and L2 decay on a list of tensors, as ``torch.optim.SGD`` does it."""

    def __init__(self, params: list[Tensor], momentum: float, weight_decay: float) -> None:
        self.params, self.momentum, self.weight_decay = params, momentum, weight_decay
        self.velocity = [torch.zeros_like(p) for p in params] if momentum else []

    @torch.no_grad()
    def step(self, grads: tuple[Tensor, ...], lr: float) -> None:
        if self.weight_decay:
            grads = torch._foreach_add(grads, self.params, alpha=self.weight_decay)
        if self.momentum:
            torch._foreach_mul_(self.velocity, self.momentum)
            torch._foreach_add_(self.velocity, grads)
            grads = tuple(self.velocity)
        torch._foreach_add_(self.params, grads, alpha=-lr)


def _update_step(module: nn.Module, recipe: Recipe) -> Step:
    own = {k: p for k, p in module.named_parameters() if p.requires_grad}
    state: Params = {}
    update = recipe.update
    assert update is not None

    def step(x: Tensor, y: Tensor, lr: float) -> Tensor:
        nonlocal state
        seen: list[Tensor] = []

        def grad_fn(params: Params) -> Params:
            at = {k: p.detach().requires_grad_() for k, p in params.items()}
            # only the first gradient of a step may move running statistics
            held = {k: b.clone() for k, b in module.named_buffers()} if seen else {}
            loss = F.cross_entropy(functional_call(module, {**at, **held}, (x,)), y)
            grads = torch.autograd.grad(loss, list(at.values()), allow_unused=True, materialize_grads=True)
            seen.append(loss.detach())
            return dict(zip(at, grads, strict=True))

        new, state = update({k: p.detach() for k, p in own.items()}, grad_fn, state, lr)
        checks.require(bool(seen), "update never called grad_fn; it must ask for at least one gradient.")
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(new[name])
        return seen[0]

    return step


def refuse_divergence(losses: Tensor, lr: float, first: int = 0) -> None:
    """Refuse losses (members, epochs) that are not all finite, naming the first member and epoch."""
    bad = torch.nonzero(~torch.isfinite(losses))
    if len(bad):
        member, epoch = bad[0].tolist()
        checks.refuse(
            f"the training loss of member {first + member} is {float(losses[member, epoch])} in epoch {epoch}; "
            f"it must stay finite (lower lr, now {lr:g}, or look at the data)."
        )


@torch.no_grad()
def logits_of(module: nn.Module, x: Tensor, batch: int) -> Tensor:
    """Outputs (m, C) of a module in its present mode."""
    return torch.cat([module(part) for part in x.split(batch)])


def accuracy_of(logits: Tensor, y: Tensor) -> Any:
    """Share of right answers along the last axis but one of (..., m, C); labels may be probabilities."""
    hard = y.argmax(-1) if y.is_floating_point() else y
    return (logits.argmax(-1) == hard).double().mean(-1)


def forward_flops(module: nn.Module, x: Tensor) -> int:
    """Operations of one forward pass in the layers with weight matrices or filters."""
    total = 0

    def count(layer: nn.Module, _: Any, out: Any) -> None:
        nonlocal total
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and isinstance(out, Tensor):
            total += 2 * out.numel() * weight[0].numel()

    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    was = module.training
    try:
        with torch.no_grad():
            module.eval()(x)
    finally:
        module.train(was)
        for hook in hooks:
            hook.remove()
    return total
