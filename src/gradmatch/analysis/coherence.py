"""Coherence: On the Generalization Mystery in Deep Learning (Chatterjee and Zielinski, 2022, arXiv 2203.10036).

How much the gradients g_z of different examples agree, at fixed weights, is

    alpha = |E g_z|^2 / E |g_z|^2 = E[g_z . g_z'] / E[g_z . g_z]    in [0, 1],

0 if they cancel, 1 if they are equal. Of a sample of m, alpha_m = |mean g|^2 / mean |g|^2, and m alpha_m, the
m-coherence, says how many examples a step on one of them helps: 1 if all gradients are orthogonal and equally long, m
if they are equal. alpha_m of m independent draws exceeds alpha by about (1 - alpha) / m; leaving out the products of
gradients with themselves gives the unbiased form (own addition)

    (|sum g|^2 - sum |g|^2) / (m (m - 1)) / mean |g|^2.

Over orthogonal parts, such as layers, alpha = sum_i f_i alpha_i with f_i the part's share of E |g|^2. The mean of k
independent gradients has k alpha / (1 + (k - 1) alpha), which is inverted to read alpha off micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradmatch.analysis._coherence import ESTIMATORS, Coherence, Estimator, Groups, ratio
from gradmatch.core import checks
from gradmatch.core.gradients import gradient_norms, gradient_products, gradient_sums, group_gradients
from gradmatch.core.problem import Loss, Problem, hard_labels

__all__ = [
    "coherence",
    "coherence_from_microbatches",
    "cross_coherence",
    "example_scores",
    "microbatch_coherence",
    "relative_gap_bound",
]


def coherence(
    model: nn.Module | Problem,
    loss: str | Loss = "cross_entropy",
    data: Any = None,
    *,
    groups: Groups | None = "layer",
    subset: Tensor | Sequence[int] | None = None,
    estimator: Estimator = "sample",
    chunk: int = 256,
) -> Coherence:
    """Coherence of the per-example gradients, from one pass in memory that does not grow with the examples.

    Norms are read off the pass where layers are known (see :mod:`gradmatch.core.gradients`); sums are kept in float64.

    Args:
        model: in eval mode if it has dropout or batch norm; or a ``Problem``, which has the loss and the data.
        loss: "cross_entropy", "mse", "next_token" or any function that gives one loss for each example.
        data: what ``Problem`` takes, in fixed order.
        groups: "layer" (parameters of one module together), "parameter" or None. A whole network's alpha is that of
            the layers with the largest gradients, so look at these.
        subset: indices or a mask: only these examples.
        estimator: "sample" (as published) or "unbiased" (of the population; may be negative).
        chunk: examples at once.

    Raises:
        InputError: a loss that gives one number for a batch, fewer than two examples, active dropout or batch norm.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> found = coherence(net, "cross_entropy", (torch.randn(50, 3), torch.arange(50) % 2))
    >>> 0 <= found.alpha <= 1, found.groups
    (True, ('0', '2'))
    """
    checks.one_of("estimator", estimator, ESTIMATORS)
    problem = _problem(model, loss, data, chunk)
    mask = None if subset is None else _mask("subset", subset, problem.n)
    count = problem.n if mask is None else int(mask.sum())
    checks.require(count >= 2, f"data has {count} example; coherence needs at least 2.")
    found = gradient_sums(problem, chunk=checks.whole("chunk", chunk), subset=mask)
    return Coherence.of(found.stats, found.norms, groups, estimator)


def _problem(model: nn.Module | Problem, loss: str | Loss, data: Any, chunk: int) -> Problem:
    if isinstance(model, Problem):
        return model
    checks.require(data is not None, "data is None; a model needs data.")
    return Problem(model, loss, data, batch_size=chunk)


def _mask(name: str, subset: Tensor | Sequence[int], n: int) -> Tensor:
    index = torch.as_tensor(subset)
    if index.dtype == torch.bool:
        return index
    fits = index.ndim == 1 and not index.is_floating_point() and len(index) > 0
    checks.require(
        fits and int(index.min()) >= 0 and int(index.max()) < n,
        f"{name} is {index.dtype} of shape {tuple(index.shape)}; it must be a mask or indices below {n}, at least one.",
    )
    return torch.zeros(n, dtype=torch.bool).index_fill_(0, index, True)


def cross_coherence(
    model: nn.Module | Problem,
    loss: str | Loss = "cross_entropy",
    data: Any = None,
    *,
    a: Tensor | Sequence[int],
    b: Tensor | Sequence[int],
    chunk: int = 256,
) -> float:
    """<mean g_A, mean g_B> / sqrt(E |g_A|^2 E |g_B|^2) of two sets of examples: whether one helps the other.

    With A = B this is alpha_A. Arguments as :func:`coherence`; ``a`` and ``b`` are indices or masks.
    """
    problem = _problem(model, loss, data, chunk)
    one, other = (
        gradient_sums(problem, chunk=chunk, subset=_mask(k, s, problem.n)).stats
        for k, s in (("a", a), ("b", b))
    )
    scale = torch.sqrt(one.norm2_mean * other.norm2_mean)
    return float((one.mean * other.mean).sum() / scale)


def example_scores(
    model: nn.Module | Problem,
    loss: str | Loss = "cross_entropy",
    data: Any = None,
    *,
    by: Literal["class", "crowd"] = "class",
    chunk: int = 256,
) -> Tensor:
    """How much the other examples help each one [n]; low for corrupt labels.

    "crowd" is g_i . mean g. "class" (own addition, and the better score: it works throughout training, the other only
    in its first epochs and on centred inputs) is g_i . mean of g over the examples with i's label / |g_i|, and 0 for
    a zero gradient. No per-example gradient is formed: one pass for the means, one for norms, and one in forward mode.
    """
    checks.one_of("by", by, ("class", "crowd"))
    problem = _problem(model, loss, data, chunk)
    if by == "crowd":
        return gradient_products(problem, gradient_sums(problem, chunk=chunk).stats.mean)
    labels = torch.cat([hard_labels(batch.target).cpu() for batch in problem.data])
    ids = torch.unique(labels, return_inverse=True)[1]  # a part of a data set may lack classes
    norms = gradient_norms(problem)
    products = gradient_products(problem, group_gradients(problem, ids), ids)
    return torch.where(norms > 0, products / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0.0)


def coherence_from_microbatches(gradients: Tensor | Sequence[Sequence[Tensor]], k: int) -> float:
    """alpha of single examples, from the mean gradients of independent micro-batches of k examples.

    Their own unbiased coherence a is inverted: alpha = a / (k - (k - 1) a). The identity is one of the population;
    with the sample form it would be off by about 1 / (number of micro-batches).

    Args:
        gradients: [G, P], or for each micro-batch its gradients, as ``torch.autograd.grad`` gives them.

    Raises:
        InputError: fewer than two micro-batches.
    """
    checks.whole("k", k)
    if not isinstance(gradients, Tensor):
        gradients = torch.stack([torch.cat([g.flatten() for g in one]) for one in gradients])
    checks.require(
        gradients.ndim == 2 and len(gradients) >= 2,
        f"gradients has shape {tuple(gradients.shape)}; it must be (micro-batches, P) with at least 2.",
    )
    rows = checks.finite("gradients", gradients).double()
    a = float(ratio(rows.sum(0).square().sum(), rows.square().sum(), len(rows), "unbiased"))
    return a / (k - (k - 1) * a)


def microbatch_coherence(alpha: float, k: int) -> float:
    """Coherence of means of k independent gradients whose own is ``alpha``: k alpha / (1 + (k - 1) alpha).

    >>> microbatch_coherence(0.5, 1), microbatch_coherence(1.0, 7)
    (0.5, 1.0)
    """
    return checks.whole("k", k) * checks.number("alpha", alpha) / (1 + (k - 1) * alpha)


def relative_gap_bound(
    alphas: Sequence[float], rates: float | Sequence[float], smoothness: float, examples: int
) -> float:
    """The paper's bound on the generalisation gap, up to the factor L^2 of the Lipschitz constant.

    (1 / m) sum_t eta_t prod_{s > t} (1 + eta_s beta) sqrt(2 (1 - alpha_{t-1})) over the steps of gradient descent. In
    absolute terms it says nothing for real networks; it compares runs.

    Args:
        alphas: coherence before each step.
        rates: step sizes, or one for all.
        smoothness: beta.
        examples: m.
    """
    checks.whole("examples", examples)
    checks.nonnegative("smoothness", smoothness)
    steps = [float(rates)] * len(alphas) if isinstance(rates, (int, float)) else list(rates)
    checks.same_length("alphas", alphas, "rates", steps)
    bound, growth = 0.0, 1.0
    for alpha, rate in zip(reversed(alphas), reversed(steps), strict=True):
        checks.fraction("alphas", alpha, zero=True)
        bound += rate * growth * math.sqrt(2 * (1 - alpha))
        growth *= 1 + rate * smoothness
    return bound / examples
