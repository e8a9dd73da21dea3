"""Training supernets by sampled single paths (RSPS), DARTS (first or second order) or SNAS, judging their children.

- "rsps": every step trains one architecture, uniform among those allowed and connected (Li, Talwalkar; UAI 2019).
- "darts": every edge is the softmax mixture of alpha; alpha learns on validation batches (Liu, Simonyan, Yang; ICLR
  2019). "darts2" takes the second-order term, by finite differences.
- "snas": every edge is a Gumbel-softmax draw, whose temperature falls from 1 to 0.1; alpha learns on the training
  batches (Xie, Zheng, Liu, Lin; ICLR 2019).

Alphas are frozen until the last split.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.tap import evaluating
from gradmatch.weights._spaces import Architecture, Genotype, SearchSpace
from gradmatch.weights._splitter import draw, softened

SEARCHES = ("rsps", "darts", "darts2", "snas")
TEMPERATURES = (1.0, 0.1)
NUDGE = 0.01
"""Length of the step of DARTS's finite difference, as published."""


@dataclass(frozen=True)
class Recipe:
    """How supernets are trained; defaults are those published for NAS-Bench-201.

    Attributes:
        search: one of ``SEARCHES``.
        lr, lr_min: at the start and the end of a cosine over the epochs.
        momentum, weight_decay, clip: of SGD with Nesterov's momentum (default decay 1e-4 for "rsps", 5e-4 for others);
            largest norm of a gradient.
        alpha_lr, alpha_decay: of Adam (betas 0.5, 0.999) on alpha.
    """

    search: str = "rsps"
    lr: float = 0.025
    lr_min: float = 0.001
    momentum: float = 0.9
    weight_decay: float | None = None
    clip: float = 5.0
    alpha_lr: float = 3e-4
    alpha_decay: float = 1e-3

    def __post_init__(self) -> None:
        checks.one_of("search", self.search, SEARCHES)
        checks.positive("lr", self.lr)
        for name in ("lr_min", "momentum", "decay", "alpha_lr", "alpha_decay"):
            checks.nonnegative({"decay": "weight_decay"}.get(name, name), getattr(self, name))
        checks.positive("clip", self.clip)

    @property
    def decay(self) -> float:
        """The weight decay in force."""
        published = 1e-4 if self.search == "rsps" else 5e-4
        return published if self.weight_decay is None else self.weight_decay


class Trainee:
    """A supernet restricted by an encoding, with its alpha and the state of its training.

    Args:
        space: of the network.
        net: the supernet.
        encoding: allowed operations (E, O).
        recipe: how it is trained.
        epochs: length of the cosine.
        alpha: start of alpha (E, O); default zeros, so that all operations weigh alike.
    """

    def __init__(
        self,
        space: SearchSpace,
        net: nn.Module,
        encoding: Tensor,
        recipe: Recipe,
        epochs: int,
        alpha: Tensor | None = None,
    ) -> None:
        self.space, self.net, self.encoding, self.recipe, self.epochs = space, net, encoding, recipe, epochs
        device = next(net.parameters()).device
        start = torch.zeros(encoding.shape) if alpha is None else alpha.detach().clone()
        self.alpha = nn.Parameter(start.to(device))
        self.optimizer = torch.optim.SGD(
            net.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.decay,
            nesterov=recipe.momentum > 0,
        )  # fmt: skip
        self.alpha_optimizer = torch.optim.Adam(
            [self.alpha], recipe.alpha_lr, betas=(0.5, 0.999), weight_decay=recipe.alpha_decay
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs, recipe.lr_min)

    def child(self, encoding: Tensor) -> Trainee:
        """The same with other operations allowed: weights, alpha, optimisers and schedule are inherited."""
        made = Trainee(self.space, copy.deepcopy(self.net), encoding, self.recipe, self.epochs, self.alpha)
        made.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        made.alpha_optimizer.load_state_dict(copy.deepcopy(self.alpha_optimizer.state_dict()))
        made.scheduler.load_state_dict(copy.deepcopy(self.scheduler.state_dict()))
        return made

    def epoch(
        self,
        train: Iterable[Any],
        valid: Iterator[Any],
        learn_alpha: bool,
        share: float,
        g: torch.Generator,
    ) -> None:
        """One pass over ``train``.

        Args:
            valid: endless batches, for alpha (DARTS).
            learn_alpha: whether alpha moves.
            share: of all epochs done, for SNAS's temperature.
        """
        search = self.recipe.search
        self.net.train()
        for x, y in train:
            if learn_alpha and search.startswith("darts"):
                self._learn_alpha((x, y), next(valid), search == "darts2")
            learns = learn_alpha and search == "snas"
            self.optimizer.zero_grad()
            self.alpha.grad = None
            loss = F.cross_entropy(self.net(x, self._architecture(share, g, learns)), y)
            checks.finite("loss of the supernet", loss.detach())
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip)
            self.optimizer.step()
            if learns:
                self.alpha_optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def _architecture(self, share: float, g: torch.Generator, learns: bool) -> Architecture:
        alpha = self.alpha if learns else self.alpha.detach()
        if self.recipe.search == "rsps":
            return draw(self.space, self.encoding, g)
        if self.recipe.search == "snas":
            noise = -torch.empty(alpha.shape).exponential_(generator=g).log().to(alpha)
            first, last = TEMPERATURES
            return softened((alpha + noise) / (first + (last - first) * share), self.encoding)
        return softened(alpha, self.encoding)

    def _learn_alpha(self, train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], second: bool) -> None:
        """A step of alpha on the validation loss; with ``second`` at the weights one step of SGD ahead."""
        params = {n: p.detach() for n, p in self.net.named_parameters()}
        ahead, rate = params, float(self.optimizer.param_groups[0]["lr"])
        if second:
            slopes = self._slopes(params, *train)[0]
            ahead = {n: p - rate * slopes[n] for n, p in params.items()}
        pull, slope = self._slopes(ahead, *valid)
        if second:
            norm = torch.stack([v.square().sum() for v in pull.values()]).sum().sqrt().clamp_min(1e-12)
            eps = NUDGE / norm
            sides = [
                self._slopes({n: p + s * eps * pull[n] for n, p in params.items()}, *train)[1]
                for s in (1, -1)
            ]
            slope = slope - rate * (sides[0] - sides[1]) / (2 * eps)
        self.alpha.grad = slope
        self.alpha_optimizer.step()

    def _slopes(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of the loss in the weights and in alpha."""
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        alpha = self.alpha.detach().requires_grad_()
        loss = F.cross_entropy(functional_call(self.net, leaves, (x, softened(alpha, self.encoding))), y)
        *own, last = torch.autograd.grad(loss, [*leaves.values(), alpha], materialize_grads=True)
        return dict(zip(leaves, own, strict=True)), last

    def candidates(self, count: int, g: torch.Generator) -> list[Genotype]:
        """Architectures to judge: argmax of alpha (DARTS, SNAS), else up to ``count`` different draws."""
        if self.recipe.search != "rsps":
            best = self.alpha.detach().cpu().masked_fill(~self.encoding, -torch.inf).argmax(1)
            return [tuple(best.tolist())]
        found: dict[Genotype, None] = {}
        for _ in range(4 * count):
            found.setdefault(draw(self.space, self.encoding, g))
            if len(found) == count:
                break
        return list(found)

    @torch.no_grad()
    def accuracy(self, genotype: Sequence[int], batches: Iterable[Any]) -> float:
        """Of one architecture with the supernet's weights."""
        right, count = 0, 0
        with evaluating(self.net):
            for x, y in batches:
                right += int((self.net(x, genotype).argmax(1) == y).sum())
                count += len(y)
        checks.require(count > 0, "valid is empty; at least one batch is needed.")
        return right / count
