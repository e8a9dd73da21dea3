"""Fisher-weighted averaging of models (Matena, Raffel; NeurIPS 2022, arXiv 2111.09832).

Models theta_i of one architecture, fine-tuned from one checkpoint, become one network without training. With a
Gaussian of precision F_i (the diagonal of the Fisher information) around each model, the point of highest joint
density is

    theta_p = sum_i lambda_i F_ip theta_ip / sum_i lambda_i F_ip,   F_i = E_x E_{c ~ p(c|x)} (d log p(c|x) / d theta)^2;

with F_i = 1 it is plain averaging. As the authors' code does (read off it; the paper does not say): lambda_i is
divided by the norm of F_i over all merged entries, unclamped, and a floor of 1e-6 is put under the raw Fisher of the
target (the first model) alone, so that where no model cares the target's value stays.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.diagonal import squared_pullbacks
from gradmatch.core.problem import Problem
from gradmatch.core.state_dicts import SHARD, write_state_dict
from gradmatch.core.store import RunFolder
from gradmatch.core.tap import evaluating
from gradmatch.weights._fisher_data import First, Scores, Unlabelled, Wrapped, is_causal
from gradmatch.weights._merging import Filter, Merging, chosen, plan
from gradmatch.weights._statistics import reset_statistics, tracking

__all__ = ["fisher_diagonal", "merge", "search"]

LABELS = ("exact", "sample", "empirical")


def fisher_diagonal(
    model: nn.Module,
    data: Any,
    *,
    n_examples: int = 4096,
    labels: str = "exact",
    n_samples: int = 1,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    params: Filter | Sequence[str] = None,
    causal: bool | None = None,
    seed: int = 0,
    batch_size: int = 64,
    chunk: int | None = None,
    run: RunFolder | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of a classifier or language model, per parameter.

    The mean over examples of E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2, in eval mode (modes come back after
    it), squared for each example and label before anything is summed. It runs where the model is.

    For outputs (m, T, C) the classes are on the last axis and the log-probability of a sequence is the sum
    over its positions; their labels are independent given the inputs, so no cross terms remain. Positions
    count where there is a label other than -100, or by ``attention_mask``.

    Args:
        model: any module whose output is logits (m, C) or (m, T, C), or has them as ``.logits``.
        data: inputs, (x, y), a dict of tensors, a ``Dataset``, or an iterable of batches; labels are used by
            "empirical" only. It may be shuffled: the first ``n_examples`` of one walk are taken.
        n_examples: most examples used; 4096 as published.
        labels: "exact" (the expectation over all classes, C - 1 backward passes a batch), "sample"
            (``n_samples`` labels drawn from the model, unbiased; for large label spaces) or "empirical" (the
            data's own labels, which is another quantity).
        forward: ``forward(model, batch) -> logits`` where the model is called otherwise.
        params: pattern, names or function that choose parameters; default all that require grad. Tied weights
            are one.
        causal: whether the output at t is about token t + 1 of the same input; default what a transformers
            model says.
        seed: of sampled labels.
        batch_size: of data that has no batches.
        chunk: examples at once; default what fits 32 MiB of layer gradients.
        run: a run folder that keeps the sums about every half minute; a stopped run goes on from it.
        progress: called with (examples done, all).

    Returns:
        A tensor of the shape of each parameter, in single precision (double for a double model).

    Raises:
        InputError: no data, outputs that are no finite logits, or more than 4,096 backward passes a batch.

    >>> net = nn.Linear(3, 2)
    >>> fisher_diagonal(net, (torch.randn(8, 3), torch.zeros(8)))["weight"].shape
    torch.Size([2, 3])
    """
    checks.one_of("labels", labels, LABELS)
    checks.whole("n_samples", n_samples)
    count = checks.whole("n_examples", n_examples)
    source = First(data, count, batch_size, whole=forward is not None)
    module = model if forward is None else Wrapped(model, forward)
    prefix = "" if forward is None else "model."
    with evaluating(module):
        problem = Problem(
            module, lambda outputs, _: outputs.flatten(1).sum(1), source, select=_selected(model, params, prefix),
            batch_size=batch_size, allow="order",
        )  # fmt: skip
        scores = Scores(
            labels, n_samples, is_causal(model) if causal is None else causal, problem.space.device, seed
        )
        sums = _accumulated(problem, scores, chunk, run, progress)
    return {k.removeprefix(prefix): t / problem.n for k, t in sums.items()}


def _selected(model: nn.Module, params: Filter | Sequence[str], prefix: str) -> list[str] | None:
    """Names of the chosen parameters, as the problem calls them."""
    if params is None:
        return None
    names = [k for k, p in model.named_parameters() if p.requires_grad]
    if isinstance(params, str) or callable(params):
        keep = chosen(params)
        found = [k for k in names if keep(k)]
    else:
        found = list(params)
    checks.require(bool(found), f"params chooses none of {checks.listing(names)}.")
    return [prefix + k for k in found]


def _accumulated(
    problem: Problem, scores: Scores, chunk: int | None, run: RunFolder | None,
    progress: Callable[[int, int], object] | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The sums over all examples, kept in ``run`` from time to time."""
    start, saved = None, time.monotonic()
    if run is not None and (found := run.load()) is not None:
        done, kept, _ = found
        start = (done, {k: t.to(problem.space.device) for k, t in kept.items()})

    def after(done: int, sums: Mapping[str, Tensor]) -> None:
        nonlocal saved
        if run is not None and (time.monotonic() - saved > 30 or done == problem.n):
            run.save(done, sums)
            saved = time.monotonic()
        if progress is not None:
            progress(done, problem.n)

    return squared_pullbacks(problem, scores, chunk=chunk, after=after, start=start)


# --- merging -----------------------------------------------------------------------------------------------


def merge(
    models: Sequence[Any],
    fishers: Sequence[Any] | None = None,
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = True,
    floor: float = 1e-6,
    favor_target: bool = True,
    mergeable: Filter = None,
    buffers: Any = "target",
    out: str | Path | None = None,
    shard_bytes: float = SHARD,
    progress: Callable[[int, int], object] | None = None,
) -> Any:
    """Merge models of one architecture and one initialisation, by their Fisher information or plainly.

    Integers, parameters that ``mergeable`` leaves out (heads) and buffers are the target's, which is the
    first model. Models
    on disk are never held: memory is a few pieces of one tensor.

    Args:
        models: modules, state dicts, .safetensors files or folders of them (Hugging Face shards), in any
            mixture.
        fishers: the diagonal of each (see :func:`fisher_diagonal`), likewise; default all 1, plain averaging.
        weights: lambda_i of at least 0, brought to sum 1; default equal.
        normalize: divide each by the norm of its Fisher over all merged entries (the authors' default). Not
            always best: compare both.
        floor: least value of a raw Fisher, 1e-6 as published.
        favor_target: the floor holds for the target's Fisher alone, so that where all are 0 the target's
            value stays; otherwise for every model's.
        mergeable: pattern or function that chooses the parameters to merge; default all.
        buffers: "target", "average", or data as for :func:`fisher_diagonal`, on which batch-norm statistics
            are computed anew (modules only).
        out: a .safetensors path or a new folder to write to, in a stream and atomically; the folder also gets
            the target's configuration and tokenizer files.
        shard_bytes, progress: see :func:`gradmatch.core.state_dicts.write_state_dict`.

    Returns:
        ``out`` as a path; without it a new module or a dict of tensors, as the target is one. Inputs stay
        untouched.

    Raises:
        InputError: models that differ in names or shapes (the first is named), weights that are negative, NaN
            or all 0, Fishers of another number, with negative or NaN entries, or all 0 with ``normalize``.

    >>> merge([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=[3, 1])
    {'w': tensor([0.2500, 0.2500])}
    """
    found = plan(models, fishers, weights, normalize, floor, favor_target, mergeable, buffers)
    target = found.models[0]
    if out is not None:
        checks.require(
            isinstance(buffers, str), "buffers is data, which needs a module; with out it must be a word."
        )
        return write_state_dict(
            out, target.specs, found.pieces, like=target, shard_bytes=shard_bytes, progress=progress
        )
    if isinstance(models[0], nn.Module):
        return _as_module(models[0], found, buffers)
    whole = {name: _whole(found, name) for name in target.specs}
    return whole | {name: whole[first] for name, first in target.tied.items()}


def _whole(found: Merging, name: str) -> Tensor:
    spec, parts = found.models[0].spec(name), [p.clone() for p in found.pieces(name)]
    return torch.cat(parts).reshape(spec.shape) if parts else torch.empty(spec.shape, dtype=spec.dtype)


@torch.no_grad()
def _as_module(target: nn.Module, found: Merging, buffers: Any) -> nn.Module:
    """A copy of the target with the merged values."""
    module = copy.deepcopy(target)
    held = module.state_dict()
    for name in found.names | found.averaged:
        held[name].copy_(_whole(found, name))
    if not isinstance(buffers, str) and tracking(module):
        module.load_state_dict(reset_statistics(module, held, Unlabelled(buffers)))
    return module


def search(
    models: Sequence[nn.Module],
    fishers: Sequence[Any] | None,
    evaluate: Callable[[nn.Module], float],
    n: int = 51,
    mode: str | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[list[tuple[tuple[float, ...], float]], tuple[tuple[float, ...], float]]:
    """Merge with many weights and score each: the published way to choose lambda, on validation data.

    Args:
        models: modules, the target first.
        fishers: as in :func:`merge`.
        evaluate: score of a module, higher is better; it must leave the module as it is.
        n: merges tried, 51 as published.
        mode: "grid" (two models, both ends included) or "dirichlet" (draws from Dirichlet(1, ..., 1));
            default by number.
        seed: of the draws.
        **options: of :func:`merge`.

    Returns:
        All (weights, score), and the best of them (the first of equals).
    """
    mode = checks.one_of("mode", mode or ("grid" if len(models) == 2 else "dirichlet"), ("grid", "dirichlet"))
    checks.whole("n", n, 2 if mode == "grid" else 1)
    checks.require(
        all(isinstance(m, nn.Module) for m in models),
        "models must be modules, which evaluate is called with.",
    )
    checks.require(
        mode != "grid" or len(models) == 2,
        f"mode is 'grid', which is for two models; there are {len(models)}.",
    )
    tried: list[tuple[float, ...]]
    if mode == "grid":
        tried = [(1 - k / (n - 1), k / (n - 1)) for k in range(n)]
    else:
        generator = torch.Generator().manual_seed(seed)
        draws = -torch.rand(n, len(models), generator=generator, dtype=torch.float64).clamp_(min=1e-300).log()
        tried = [tuple((d / d.sum()).tolist()) for d in draws]
    scores = []
    for weights in tried:
        score = checks.number("evaluate's score", evaluate(merge(models, fishers, weights, **options)))
        scores.append((weights, score))
    return scores, max(scores, key=lambda found: found[1])
