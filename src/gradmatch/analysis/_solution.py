"""What kind of solution a trained classifier is: fit, calibration, margin, flatness, rank, sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core import checks
from gradmatch.core.curvature import Curvature
from gradmatch.core.examples import Examples
from gradmatch.core.krylov import eigenpairs, hutchinson
from gradmatch.core.problem import Problem
from gradmatch.core.tap import capture, evaluating, last_of

__all__ = [
    "METRICS",
    "calibration_error",
    "class_cosines",
    "describe_solution",
    "effective_rank",
    "hidden_vectors",
    "hoyer",
    "stable_rank",
]

State = Mapping[str, Tensor]
PRUNED = (0.5, 0.8, 0.9, 0.95)


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the normalised singular values: n for the identity, 1 for rank one; 0 for zeros."""
    values = torch.linalg.svdvals(matrix.detach().double())
    share = values / values.sum().clamp(min=1e-300)
    return float(torch.special.entr(share).sum().exp()) if float(values.sum()) else 0.0


def stable_rank(matrix: Tensor) -> float:
    """|W|_F^2 / |W|_2^2, at most the rank; 0 for zeros."""
    squares = torch.linalg.svdvals(matrix.detach().double()).square()
    return float(squares.sum() / squares.max()) if float(squares.max()) else 0.0


def hoyer(vector: Tensor) -> float:
    """(sqrt P - l1 / l2) / (sqrt P - 1): 1 for a single non-zero entry, 0 for a constant."""
    v = vector.detach().double().flatten()
    checks.require(len(v) > 1, "vector has one entry; Hoyer's sparsity needs two.")
    root = math.sqrt(len(v))
    return float((root - v.abs().sum() / v.norm().clamp(min=1e-300)) / (root - 1))


def calibration_error(logits: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| in bins of equal width, weighted by their size."""
    confidence, guess = torch.softmax(logits.double(), 1).max(1)
    place = (confidence * bins).long().clamp(max=bins - 1)
    right = (guess == y).double()
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right - confidence)
    return float(gap.abs().sum() / len(y))


def class_cosines(hidden: Tensor, y: Tensor, classes: int) -> Tensor:
    """Cosines [C, C] of the classes' mean hidden vectors; NaN where a mean is zero or a class is absent."""
    sums = torch.zeros(classes, hidden.shape[1], dtype=torch.float64).index_add_(0, y, hidden.double())
    means = sums / torch.bincount(y, minlength=classes)[:, None]
    norms = means.norm(dim=1, keepdim=True)
    unit = means / torch.where(norms > 0, norms, torch.nan)
    cosines = unit @ unit.T
    return cosines.fill_diagonal_(1).masked_fill_(torch.isnan(unit[:, :1] + unit[:, 0]), torch.nan)


class _Subject:
    """A network and data with what several metrics need, computed once."""

    def __init__(
        self, model: nn.Module, train: Examples, test: Examples, start: State | None, sample: int, seed: int
    ) -> None:
        self.model, self.train, self.test, self.start, self.seed = model, train, test, start, seed
        some = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:sample]
        self.few = train.take(some.sort().values)
        self.logits, self.hidden = hidden_vectors(model, test)
        self.weights = {k: p.detach() for k, p in model.named_parameters() if p.ndim >= 2}


def hidden_vectors(model: nn.Module, data: Examples) -> tuple[Tensor, Tensor]:
    """Logits and what the last linear layer reads, on the CPU."""
    head = last_of(model, nn.Linear)
    device = next(model.parameters()).device
    logits, hidden = [], []
    with torch.no_grad(), capture(model, head, side="input") as seen:
        for part in torch.split(data.x, 500):
            logits.append(model(part.to(device)).cpu())
            hidden.append(seen[head].flatten(1).cpu())
    return torch.cat(logits), torch.cat(hidden)


def _fit(s: _Subject) -> dict[str, float]:
    train_logits, _ = hidden_vectors(s.model, s.train)
    return {
        "train_loss": float(F.cross_entropy(train_logits, s.train.y)),
        "train_acc": float((train_logits.argmax(1) == s.train.y).double().mean()),
        "test_loss": float(F.cross_entropy(s.logits, s.test.y)),
        "test_acc": float((s.logits.argmax(1) == s.test.y).double().mean()),
    }


def _calibration(s: _Subject) -> dict[str, float]:
    return {"calibration_error": calibration_error(s.logits, s.test.y)}


def _margin(s: _Subject) -> dict[str, float]:
    """Distance to the decision boundary to first order, and the length of the loss's gradient in the input."""
    device = next(s.model.parameters()).device
    x = s.few.x.to(device).requires_grad_()
    y = s.few.y.to(device)
    with torch.enable_grad():
        logits = s.model(x)
        others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf).max(1).values
        gaps = logits.gather(1, y[:, None])[:, 0] - others
        slopes = torch.autograd.grad(gaps.sum(), x, retain_graph=True)[0]
        pulls = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)[0]
    distance = gaps.detach() / slopes.flatten(1).norm(dim=1).clamp(min=1e-12)
    return {
        "margin": float(distance.median()),
        "input_gradient": float(pulls.flatten(1).norm(dim=1).mean()),
    }


def _flatness(s: _Subject) -> dict[str, float]:
    """Largest eigenvalue and trace of the Hessian of the loss on some training examples."""
    problem = Problem(s.model, "cross_entropy", (s.few.x, s.few.y))
    hessian = Curvature(problem, "hessian")
    generator = torch.Generator().manual_seed(s.seed)
    top = eigenpairs(hessian, 1, generator=generator, tol=1e-3, max_products=200)
    trace = hutchinson(hessian, 16, generator=generator)
    return {"hessian_max": float(top.values[0]), "hessian_trace": trace.value}


def _rank(s: _Subject) -> dict[str, float]:
    """Ranks of weights and of their change since the start, and of hidden activations, pooled and by class."""
    matrices = {k: w.flatten(1) for k, w in s.weights.items()}
    classes = [s.hidden[s.test.y == c] for c in range(s.test.classes)]
    found = {
        "weight_effective_rank": _mean(effective_rank(m) for m in matrices.values()),
        "weight_stable_rank": _mean(stable_rank(m) for m in matrices.values()),
        "activation_effective_rank": effective_rank(s.hidden),
        "activation_class_rank": _mean(effective_rank(c) for c in classes),
    }
    if s.start is not None:
        moved = [m - s.start[k].to(m).flatten(1) for k, m in matrices.items()]
        found["change_effective_rank"] = _mean(map(effective_rank, moved))
        found["change_stable_rank"] = _mean(map(stable_rank, moved))
    return found


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _sparsity(s: _Subject) -> dict[str, float]:
    """Hoyer sparsity of the weights, share of silent units, and accuracy with the smallest weights set to zero."""
    flat = torch.cat([w.flatten() for w in s.weights.values()])
    found = {"hoyer": hoyer(flat), "activation_sparsity": float((s.hidden == 0).double().mean())}
    sizes = flat.abs().cpu().sort().values
    device = next(s.model.parameters()).device
    for share in PRUNED:
        limit = sizes[min(len(sizes) - 1, round(share * len(sizes)))].to(device)
        pruned = {k: torch.where(w.abs() < limit, 0, w) for k, w in s.weights.items()}
        with torch.no_grad():
            logits = torch.cat(
                [
                    torch.func.functional_call(s.model, pruned, (x.to(device),)).cpu()
                    for x in torch.split(s.test.x, 500)
                ]
            )
        found[f"acc_pruned_{share:.0%}".rstrip("%")] = float((logits.argmax(1) == s.test.y).double().mean())
    return found


def _codes(s: _Subject) -> dict[str, float]:
    """Mean cosine of the hidden means of different classes."""
    cosines = class_cosines(s.hidden, s.test.y, s.train.classes)
    apart = cosines[~torch.eye(len(cosines), dtype=torch.bool)]
    apart = apart[~torch.isnan(apart)]
    return {"class_cosine": float(apart.mean()) if len(apart) else math.nan}


def _distance(s: _Subject) -> dict[str, float]:
    if s.start is None:
        return {}
    now = {k: p.detach() for k, p in s.model.named_parameters()}
    moved = [(p - s.start[k].to(p)).flatten() for k, p in now.items()]
    return {"distance": float(torch.cat(moved).norm())}


METRICS: dict[str, Callable[[_Subject], dict[str, float]]] = {
    "fit": _fit,
    "calibration": _calibration,
    "margin": _margin,
    "flatness": _flatness,
    "rank": _rank,
    "sparsity": _sparsity,
    "codes": _codes,
    "distance": _distance,
}
"""Families of metrics by name."""


def describe_solution(
    model: nn.Module,
    data: Any,
    *,
    start: nn.Module | State | None = None,
    metrics: Any = None,
    sample: int = 500,
    seed: int = 0,
) -> dict[str, float]:
    """What kind of solution a trained classifier is, in eval mode.

    ===============  =======================================================================================
    "fit"            train_loss, train_acc, test_loss, test_acc
    "calibration"    calibration_error (15 bins of equal width, test)
    "margin"         margin: median distance to the decision boundary in the input, to first order (training);
                     input_gradient: mean length of the loss's gradient in the input
    "flatness"       hessian_max, hessian_trace of the training loss
    "rank"           effective ranks exp(entropy of singular values) and stable ranks |W|_F^2 / |W|_2^2, mean over
                     weights; of the change since ``start``, as a wide layer's own rank is mostly that of its
                     initialisation; of what the last linear layer reads, pooled and mean over classes
    "sparsity"       hoyer of all weights, share of zeros among activations, accuracy with 50 to 95 % pruned
    "codes"          class_cosine: mean cosine of class means of what the last linear layer reads
    "distance"       length of the way from ``start``
    ===============  =======================================================================================

    Args:
        model: an ``nn.Module`` that gives logits and ends with an ``nn.Linear``.
        data: (train, test) labelled data, or an object with both such as a ``Split``; one set alone (arrays, a
            ``Dataset`` or a ``DataLoader``) stands for both.
        start: the network or state it started from.
        metrics: names of the families wanted; default all.
        sample: training examples for margin and flatness.
        seed: of their choice, and of the Hessian's probes.

    >>> x, y = torch.randn(40, 6), torch.arange(40) % 2
    >>> net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sorted(describe_solution(net, ((x, y), (x, y)), metrics=["calibration", "codes"]))
    ['calibration_error', 'class_cosine']
    """
    from gradmatch.core.examples import as_examples

    two = isinstance(data, tuple | list) and len(data) == 2 and not hasattr(data[0], "shape")
    train, test = (data.train, data.test) if hasattr(data, "train") else data if two else (data, data)
    train = as_examples(train, name="train")
    test = as_examples(test, train.classes, name="test")
    wanted = list(METRICS) if metrics is None else list(metrics)
    for name in wanted:
        checks.one_of("metrics", name, METRICS)
    for name, p in model.named_parameters():
        checks.finite(f"parameter {name}", p.detach())
    state = dict(start.state_dict()) if isinstance(start, nn.Module) else start
    with evaluating(model):
        subject = _Subject(model, train, test, state, checks.whole("sample", sample), seed)
        found: dict[str, float] = {}
        for name in wanted:
            found |= METRICS[name](subject)
    return found
