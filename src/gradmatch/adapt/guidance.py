"""Guidance: training the untrainable by representational alignment (Subramaniam, Mayo, Conwell, Poggio, Katz, Cheung,
Barbu; NeurIPS 2025, arXiv 2410.20035).

A target network's hidden layers are pulled, batch by batch, towards those of a frozen guide, trained or not, that sees
the same inputs:

    loss = task(target(x), y) + alpha sum over pairs (a, b) of (1 - CKA(target layer b (x), guide layer a (x)))

CKA sees how examples relate to each other, whatever the width, so the guide's architecture may be any. The biased
estimate is the published one; for features wider than the batch it nears 1 whatever they are, and then presses the
target's examples apart more than it transfers a relation: use ``distance="cka_debiased"`` where that matters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core._similarity import _norm, _relation, _varies, rsa
from gradmatch.core._spec import call
from gradmatch.core.tap import submodule

__all__ = ["Guidance", "calibrate_batch_norm", "noise_input", "uniform_map"]

DISTANCES, REDUCTIONS, TOKENS = ("cka", "cka_debiased", "rsa"), ("sum", "mean"), ("flatten", "each")
KINDS = (
    nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.LayerNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer, nn.AdaptiveAvgPool2d,
)  # fmt: skip
"""Modules whose outputs are compared, as published."""
Pairs = Sequence[tuple[str, str]]
"""(guide layer, target layer)."""


class Guidance:
    """Pulls a target's layers towards a guide's while the target trains.

    Args:
        target: the network that is trained; it may be moved and changed as any.
        guide: a frozen network in eval mode, trained or not; its parameters and buffers stay as they are.
        layer_map: "uniform" (guide layer i of m goes to target layer round(i (t - 1) / (m - 1)), as published),
            "last" (the last hidden layers alone), or (guide layer, target layer) pairs of names. Layers are the
            outputs of convolutions, linear, recurrent, norm and attention layers in the order of the run, without
            the logits.
        distance: "cka", "cka_debiased" or "rsa".
        alpha: weight, 1 as published.
        stop_after: steps after which the guide is let go (300 in the paper's early stop); default never.
        reduction: of the pairs, "sum" as published (alpha then depends on how many there are) or "mean".
        official: where several guide layers meet one target layer keep the last alone, as the public code does;
            else all count.
        tokens: for sequences (n, time, d): "flatten" them, or compare "each" position and sum.
        guide_input: what the guide sees, a function of x; default x itself. See :func:`noise_input`.
        select: the tensor of a module's output, a function of (name, output), for modules that give something else.
        batch_axis: of the target's and the guide's outputs.
        pool: maps (n, c, h, w) are averaged to at most this many pixels a side; default all.

    Attributes:
        similarities: of the last step, by pair.
        flat: how often a layer did not vary over a batch; its similarity is then 0.
        steps: calls of :meth:`loss` so far, in which gradients were on.

    Raises:
        InputError: options out of range, one network given twice, a guide in train mode, unknown layers.

    >>> net, guide = (nn.Sequential(nn.Linear(6, w), nn.ReLU(), nn.Linear(w, 3)) for w in (8, 16))
    >>> guidance, x = Guidance(net, guide.eval()), torch.randn(32, 6)
    >>> with guidance.capture():
    ...     out = net(x)
    ...     loss = out.square().mean() + guidance.loss(x)
    >>> loss.backward(), list(guidance.similarities)
    (None, [('0', '0')])
    """

    def __init__(
        self,
        target: nn.Module,
        guide: nn.Module,
        *,
        layer_map: str | Pairs = "uniform",
        distance: str = "cka",
        alpha: float = 1.0,
        stop_after: int | None = None,
        reduction: str = "sum",
        official: bool = False,
        tokens: str = "flatten",
        guide_input: Callable[[Any], Any] | None = None,
        select: Callable[[str, Any], Tensor] | None = None,
        batch_axis: int | tuple[int, int] = 0,
        pool: int | None = None,
    ) -> None:
        checks.require(target is not guide, "guide is target; a network cannot guide itself.")
        checks.require(not guide.training, "guide is in train mode; call guide.eval() first.")
        checks.one_of("distance", distance, DISTANCES)
        checks.one_of("reduction", reduction, REDUCTIONS)
        checks.one_of("tokens", tokens, TOKENS)
        self.target, self.guide, self.distance = target, guide, distance
        if isinstance(layer_map, str):
            checks.one_of("layer_map", layer_map, ("uniform", "last"))
        else:
            checks.require(len(layer_map) > 0, "layer_map is empty; at least one pair is needed.")
            for a, b in layer_map:
                submodule(guide, a), submodule(target, b)
        self.layer_map, self.official = layer_map, bool(official)
        self.alpha = checks.nonnegative("alpha", alpha)
        self.stop_after = None if stop_after is None else checks.whole("stop_after", stop_after, 0)
        self.reduction, self.tokens = reduction, tokens
        self.guide_input, self.select = guide_input, select
        self.axes = (batch_axis, batch_axis) if isinstance(batch_axis, int) else batch_axis
        self.pool = None if pool is None else checks.whole("pool", pool)
        self.similarities: dict[tuple[str, str], float] = {}
        self.flat, self.steps = 0, 0
        self._seen: dict[str, Any] | None = None
        self._kept: dict[str, Tensor] | None = None

    @property
    def active(self) -> bool:
        """Whether the guide still acts."""
        return self.alpha > 0 and (self.stop_after is None or self.steps < self.stop_after)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Within the block the target's layers are seen, with their graph; hooks go when it ends."""
        names = None if isinstance(self.layer_map, str) else [b for _, b in self.layer_map]
        with _recorded(self.target, names if self.active else []) as self._seen:
            try:
                yield
            finally:
                self._seen = None

    def loss(self, x: Any, index: Tensor | None = None) -> Tensor:
        """alpha times the distance of the layers seen from the guide's, a scalar with its graph.

        Args:
            x: the batch that the target was just called with: a tensor, positional arguments as a tuple, or
                keyword arguments as a mapping (a tokenizer's batch).
            index: places of its examples in what :meth:`remember` was given; the guide is then not run.

        Raises:
            InputError: outside ``capture()``, before the target was called, a batch of fewer than 2 examples
                (debiased 4, RSA 3), or outputs that are no tensors or have the batch on another axis.
        """
        device = next(self.target.parameters()).device
        if not self.active:
            return torch.zeros((), device=device)
        checks.require(
            self._seen is not None, "loss is called outside capture(); the target's layers were not seen."
        )
        assert self._seen is not None
        checks.require(bool(self._seen), "the target was not called inside capture().")
        seen = self._features(self._seen, self.target, 0)
        if index is not None:
            checks.require(
                self._kept is not None, "index is given, but nothing is remembered; call remember() first."
            )
            assert self._kept is not None
            guide = {k: t[index] for k, t in self._kept.items()}
        else:
            guide = self._guide_features(x)
        pairs = self._pairs(list(guide), list(seen))
        terms = self._compared(guide, seen, pairs)
        self.similarities = {p: float(s.detach()) for p, s in terms.items()}
        chosen = {b: s for (_, b), s in terms.items()}.values() if self.official else terms.values()
        total = torch.stack([1 - s for s in chosen])
        if torch.is_grad_enabled():
            self.steps += 1
        return self.alpha * (total.sum() if self.reduction == "sum" else total.mean())

    def remember(self, x: Any, batch_size: int = 256) -> None:
        """Run the guide over all inputs once and keep its features, for ``loss(x, index=...)``."""
        if isinstance(x, Mapping):
            pieces = zip(*(torch.split(v, batch_size) for v in x.values()), strict=True)
            chunks: list[Any] = [dict(zip(x, piece, strict=True)) for piece in pieces]
        else:
            chunks = list(torch.split(x, batch_size))
        parts = [self._guide_features(chunk) for chunk in chunks]
        self._kept = {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    @torch.no_grad()
    def _guide_features(self, x: Any) -> dict[str, Tensor]:
        checks.require(not self.guide.training, "guide is in train mode; call guide.eval() first.")
        names = None if isinstance(self.layer_map, str) else [a for a, _ in self.layer_map]
        with torch.random.fork_rng(devices=[]), _recorded(self.guide, names) as seen:
            given = x if self.guide_input is None else self.guide_input(x)
            call(self.guide, given)
        return self._features(seen, self.guide, 1)

    def _features(self, seen: Mapping[str, Any], network: nn.Module, side: int) -> dict[str, Tensor]:
        """Outputs as (n, ...), the batch first; of automatic maps without the last, the logits."""
        names = list(seen)
        if isinstance(self.layer_map, str):
            checks.require(
                len(names) > 1,
                f"{('target', 'guide')[side]} has {len(names)} layer to compare; it needs two, as logits are left out.",
            )
            names = names[:-1]
        return {n: self._tensor(n, submodule(network, n), seen[n], side) for n in names}

    def _tensor(self, name: str, module: nn.Module, value: Any, side: int) -> Tensor:
        if self.select is not None:
            value = self.select(name, value)
        elif isinstance(module, nn.RNNBase | nn.MultiheadAttention) and isinstance(value, tuple):
            value = value[0]
        checks.require(
            isinstance(value, Tensor) and value.ndim >= 2,
            f"the output of layer {name!r} is a {type(value).__name__}; name its tensor by select=...",
        )
        found: Tensor = value.movedim(self.axes[side], 0)
        if self.pool is not None and found.ndim == 4 and found.shape[-1] > self.pool:
            found = F.adaptive_avg_pool2d(found, self.pool)
        return found

    def _pairs(self, guide: list[str], target: list[str]) -> Pairs:
        if not isinstance(self.layer_map, str):
            return self.layer_map
        if self.layer_map == "last":
            return [(guide[-1], target[-1])]
        return [(a, target[j]) for a, j in zip(guide, uniform_map(len(guide), len(target)), strict=True)]

    def _compared(
        self, guide: Mapping[str, Tensor], target: Mapping[str, Tensor], pairs: Pairs
    ) -> dict[tuple[str, str], Tensor]:
        """Similarity of every pair; what only depends on one layer is computed once."""
        least = {"cka": 2, "cka_debiased": 4, "rsa": 3}[self.distance]
        for a, b in pairs:
            n, m = len(target[b]), len(guide[a])
            checks.require(
                n == m,
                f"layer {b!r} of the target has {n} rows and {a!r} of the guide {m}; is the batch on another axis "
                "(batch_axis)?",
            )
            checks.require(n >= least, f"the batch has {n} examples; {self.distance} needs at least {least}.")
        if self.tokens == "each":
            return {(a, b): self._by_token(guide[a], target[b]) for a, b in pairs}
        if self.distance == "rsa":
            return {(a, b): rsa(_flat(target[b]), _flat(guide[a])) for a, b in pairs}
        own = {b: self._gram(target[b]) for _, b in pairs}
        other = {a: self._gram(guide[a]) for a, _ in pairs}
        return {(a, b): self._cka(own[b], other[a]) for a, b in pairs}

    def _by_token(self, a: Tensor, b: Tensor) -> Tensor:
        checks.require(
            a.ndim == 3 and b.ndim == 3 and a.shape[1] == b.shape[1],
            f"tokens='each' needs sequences (n, time, d) of equal length; got {tuple(a.shape)} and {tuple(b.shape)}.",
        )
        sides = zip(a.unbind(1), b.unbind(1), strict=True)
        if self.distance == "rsa":
            return torch.stack([rsa(v.float(), u.float()) for u, v in sides]).sum()
        return torch.stack([self._cka(self._gram(v), self._gram(u)) for u, v in sides]).sum()

    def _gram(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The centred Gram matrix, as a vector, and its norm."""
        rows = _flat(features)
        checks.finite("a layer's output", rows.detach())
        mean = rows.detach().mean(0)
        if not bool(_varies((rows.detach() - mean).square().sum(), mean, len(rows))):
            self.flat += 1
            if self.flat == 1:
                warnings.warn(
                    "a layer does not vary over the batch; its similarity is 0 (Guidance.flat counts how often).",
                    stacklevel=5,
                )
        debiased = self.distance == "cka_debiased"
        gram = _relation(rows, debiased).flatten()
        return gram, _norm(gram.square().sum(), debiased)

    @staticmethod
    def _cka(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        return (a[0] @ b[0].to(a[0])) / (a[1] * b[1].to(a[1]))


def _flat(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    return rows if rows.dtype == torch.float64 else rows.float()


@contextmanager
def _recorded(network: nn.Module, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Outputs of the named modules, default all of ``KINDS``, in the order in which they first run."""
    seen: dict[str, Any] = {}
    parts = dict(network.named_modules())
    chosen = (
        [n for n, m in parts.items() if isinstance(m, KINDS)] if names is None else list(dict.fromkeys(names))
    )
    handles = [
        parts[n].register_forward_hook(lambda _, __, out, n=n: seen.__setitem__(n, out)) for n in chosen
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def uniform_map(guide: int, target: int) -> list[int]:
    """Target layer of each guide layer, spread evenly from first to last; ties of rounding go to the even one.

    >>> uniform_map(3, 6)
    [0, 2, 5]
    """
    checks.whole("guide", guide)
    checks.whole("target", target)
    return [0] if guide == 1 else [round(i * (target - 1) / (guide - 1)) for i in range(guide)]


def noise_input(seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A ``guide_input`` of standard normal noise from a generator of its own (the paper's noise variant)."""
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
    return lambda x: torch.randn(x.shape, generator=generator).to(x)


@torch.no_grad()
def calibrate_batch_norm(guide: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Set a guide's running statistics to those of some inputs, and leave it in eval mode.

    An untrained guide's batch-norm layers otherwise do nothing in eval mode (mean 0, variance 1), and the activations
    of a deep one grow or vanish.
    """
    norms = [
        m for m in guide.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    before = [m.momentum for m in norms]
    guide.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain mean over the batches
        m.train()
    try:
        with torch.random.fork_rng(devices=[]):
            for x in batches:
                guide(x[0] if isinstance(x, tuple | list) else x)
    finally:
        for m, momentum in zip(norms, before, strict=True):
            m.momentum = momentum
        guide.eval()
    return guide
