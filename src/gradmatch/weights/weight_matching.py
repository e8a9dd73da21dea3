"""Networks permuted so that they average well (Ito, Yamada, Kumagai; ICLR 2025, arXiv 2402.04051).

Two networks trained from different seeds compute alike with hidden units in another order. With one permutation P_l
for each group of units (P_0 = P_L = I), W_l -> P_l W_l P_{l-1}^T and b_l -> P_l b_l leave the function alone, and
among them one is sought after which the straight line between the networks shows no barrier:

- weight matching (Ainsworth, Hayase, Srinivasa; ICLR 2023, arXiv 2209.04836): min_pi |theta_a - pi(theta_b)|^2, by
  exact assignments of one group at a time, in random order, until none gains;
- activation matching: one assignment for each group, of the units' activations on data, sum z^a (z^b)^T;
- straight-through estimation (:func:`ste_match`): the loss in the middle decides, not the weights.

What the paper adds is why it works (:func:`analyze_merge`): the distance falls only a little, but singular vectors
with large singular values become aligned.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradmatch.core import checks
from gradmatch.core._axes import leaves
from gradmatch.core._batches import OrderedData
from gradmatch.core.assign import Permutation, PermutationSpec, Weights, expose, linear_assignments
from gradmatch.core.tap import capture, evaluating
from gradmatch.weights._ascent import Ascent

__all__ = ["activation_match", "matched_tensors", "weight_match"]

Filter = str | Callable[[str], bool] | None
SCORES = ("product", "correlation")


def weight_match(
    spec: PermutationSpec,
    a: Weights,
    b: Weights,
    init: Permutation | None = None,
    max_sweeps: int = 100,
    seed: int = 0,
    *,
    restarts: int = 1,
    biases: bool = True,
    layers: Filter = None,
    progress: Callable[[int, float], Any] | None = None,
) -> Permutation:
    """The permutation of B that brings its weights near those of A.

    A local optimum: on residual networks, whose streams share one order over many layers, even a hidden permutation
    is often missed from a plain start. There, start from :func:`activation_match` or restart.

    Args:
        spec: the groups of units, see :meth:`PermutationSpec.from_module`.
        a, b: networks or state dicts of one architecture; neither is changed.
        init: where to start; default every unit in its place.
        max_sweeps: most sweeps over all groups of one start; 100 as in the public code.
        seed: of the order of visits and of the restarts.
        restarts: starts; all but the first from random permutations. The one with the largest sum of products wins.
        biases: count vectors too (biases, scales and shifts of norms); running statistics never count.
        layers: pattern (``re.search``) or function of names: which tensors count; default all.
        progress: called after each sweep with its number and the sum of products.

    Returns:
        The permutation: ``.apply(b)`` is the permuted state dict.

    Raises:
        InputError: weights that differ in names or shapes, or are not finite; no tensor left to match.

    >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> spec = PermutationSpec.from_module(net, torch.zeros(1, 4))
    >>> hidden = Permutation.random(spec, seed=1)
    >>> found = weight_match(spec, net, hidden.apply(net))
    >>> torch.equal(found.order["0"], hidden.inverse().order["0"])
    True
    """
    checks.whole("max_sweeps", max_sweeps)
    checks.whole("restarts", restarts)
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
    states = spec.check(a, "a"), spec.check(b, "b")
    keys = matched_tensors(spec, states[0], biases, layers)
    start = Permutation.identity(spec) if init is None else init
    checks.require(start.spec.sizes == spec.sizes, "init is a permutation of another specification.")
    best, value = start, float("-inf")
    for run in range(restarts):
        orders = start.order if run == 0 else _random(spec, generator)
        ascent = Ascent(spec, *states, keys, orders)
        ascent.run(max_sweeps, lambda n: torch.randperm(n, generator=generator).tolist(), progress)
        if ascent.value > value:
            best, value = Permutation(spec, ascent.orders), ascent.value
    return best


def _random(spec: PermutationSpec, generator: torch.Generator) -> dict[str, Tensor]:
    return {k: torch.randperm(n, generator=generator) for k, n in spec.sizes.items()}


def matched_tensors(
    spec: PermutationSpec, state: dict[str, Tensor], biases: bool = True, layers: Filter = None
) -> list[str]:
    """Names of the tensors that weight matching counts.

    Raises:
        InputError: none.
    """
    keep = (
        layers if callable(layers) else (lambda name: layers is None or re.search(layers, name) is not None)
    )
    found = [
        k
        for k, axes in spec.axes.items()
        if k not in spec.buffers
        and state[k].is_floating_point()
        and len(axes) > (0 if biases else 1)
        and any(leaf.name for axis in axes for _, leaf in leaves(axis))
        and keep(k)
    ]
    checks.require(bool(found), f"layers={layers!r}, biases={biases} leave no tensor with units to match.")
    return found


def activation_match(
    spec: PermutationSpec,
    a: Weights,
    b: Weights,
    data: Any,
    *,
    model: nn.Module | None = None,
    score: str = "product",
    batch_size: int = 512,
) -> Permutation:
    """The permutation of B whose units respond to data as those of A do; one assignment a group, no iteration.

    A group's activations are read where they enter the modules that hold a weight of it, so after the nonlinearity;
    those of a residual stream at every block. Positions of a map and tokens count as further examples.

    Args:
        spec: of :meth:`PermutationSpec.from_module`, which knows where activations are read.
        a, b: networks, or state dicts with ``model``.
        data: inputs with or without use of their labels: (x, y), a ``Dataset`` or ``DataLoader``.
        model: the network that the state dicts belong to.
        score: "product" (sums of products, as in the public code) or "correlation" (over all examples).
        batch_size: of data without batches.

    Raises:
        InputError: a specification by hand, no network, or data that do not fit.
    """
    checks.one_of("score", score, SCORES)
    module, states = network_of(spec, a, b, model)
    unread = [g for g in spec.sizes if not spec.readings.get(g)]
    checks.require(
        not unread,
        f"spec does not know where to read the units of {checks.listing(unread)}; activations need a specification "
        "made by from_module.",
    )
    moments = {g: _Moments(n) for g, n in spec.sizes.items()}
    with evaluating(module), torch.no_grad():
        for batch in OrderedData(data, batch_size, check_order=False):
            pair = [activations(spec, module, state, batch.inputs) for state in states]
            for g, own in moments.items():
                for za, zb in zip(pair[0][g], pair[1][g], strict=True):
                    own.add(za, zb)
    scores = [m.correlation() if score == "correlation" else m.products for m in moments.values()]
    return Permutation(spec, dict(zip(moments, linear_assignments(scores), strict=True)))


def network_of(
    spec: PermutationSpec, a: Weights, b: Weights, model: nn.Module | None
) -> tuple[nn.Module, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """A module to run, and both state dicts."""
    module = model if model is not None else a if isinstance(a, nn.Module) else b
    checks.require(
        isinstance(module, nn.Module), "a and b are state dicts; give the network they belong to as model=."
    )
    assert isinstance(module, nn.Module)
    return module, (spec.check(a, "a"), spec.check(b, "b"))


def activations(
    spec: PermutationSpec, module: nn.Module, state: dict[str, Tensor], inputs: Any
) -> dict[str, list[Tensor]]:
    """Each group's activations (units, samples) at each place where they are read."""
    names = {r.module for readings in spec.readings.values() for r in readings}
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    with capture(module, *names, side="input") as seen:
        if isinstance(inputs, dict):
            functional_call(module, state, (), inputs)
        else:
            functional_call(module, state, arguments)
    found: dict[str, list[Tensor]] = {}
    for group, readings in spec.readings.items():
        exposed = (expose(seen[r.module], r.dim, r.axis, r.path) for r in readings)
        found[group] = [z.movedim(d, 0).flatten(1) for z, d in exposed]
    return found


class _Moments:
    """Sums over samples of products and squares of two networks' units, float64."""

    def __init__(self, n: int) -> None:
        self.products = torch.zeros(n, n, dtype=torch.float64)
        self.sums = [torch.zeros(n, dtype=torch.float64) for _ in range(2)]
        self.squares = [torch.zeros(n, dtype=torch.float64) for _ in range(2)]
        self.count = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in activations (n, samples) of both."""
        self.products += (a @ b.T).double().cpu()
        self.count += a.shape[1]
        for k, z in enumerate((a, b)):
            self.sums[k] += z.sum(1, dtype=torch.float64).cpu()
            self.squares[k] += z.square().sum(1, dtype=torch.float64).cpu()

    def correlation(self) -> Tensor:
        """Correlations (n, n); 0 for units that are constant."""
        n = self.count
        covariance = self.products - self.sums[0][:, None] * self.sums[1] / n
        deviations = [
            (q - s.square() / n).clamp_min(0).sqrt() for q, s in zip(self.squares, self.sums, strict=True)
        ]
        scale = deviations[0][:, None] * deviations[1]
        return torch.where(scale > 1e-6 * scale.max(), covariance / scale.clamp_min(1e-300), 0)
