"""From two vocabularies and their matrices to the rows of the transplanted model, and the report of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.store import write_json
from gradmatch.weights._rebuild import METHODS, Anchors, Task, choose_k, mixed, pursued
from gradmatch.weights._vocabulary import Vocabulary, shared, undertrained


class Matrices(NamedTuple):
    """Input embedding [V, d]; head [V, d], None where that is the input embedding or not there; the head's bias [V]."""

    embed: Tensor
    head: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class TransplantReport:
    """What became of every donor token.

    Attributes:
        copied, approximated, zeroed: donor tokens, as the donor writes them.
        shared: tokens that both vocabularies have, anchors among them.
        k: atoms used; ``tried`` has the hidden anchors' mean cosine for every k, with k="auto".
        donor_error: mean relative error of the mixes in the donor's input embedding (omp only).
        norm_ratio: mean norm of the rebuilt rows over that of the copied ones, input embedding.
        tied: whether input embedding and head are one matrix.
    """

    method: str
    copied: tuple[str, ...]
    approximated: tuple[str, ...]
    zeroed: tuple[str, ...]
    shared: int
    k: int
    tried: dict[int, float]
    donor_error: float | None
    norm_ratio: float | None
    tied: bool

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.__dict__, "tried": {str(k): v for k, v in self.tried.items()}}

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        return write_json(path, self.facts())


@dataclass(frozen=True)
class Options:
    """Everything but the models."""

    k: int | str
    method: str
    normalize_atoms: bool
    ridge: float
    byte_match: bool
    prefix_match: bool
    drop_undertrained: bool
    seed: int
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        checks.one_of("method", self.method, tuple(METHODS))
        if self.k != "auto":
            checks.whole("k", self.k)
        checks.nonnegative("ridge", self.ridge)


def rebuilt(
    base: Matrices, base_tokenizer: Any, donor: Matrices, donor_tokenizer: Any, tied: bool, options: Options
) -> tuple[Matrices, TransplantReport]:
    """New matrices of the base's type, and the report; a tied base is built once."""
    _refuse_unfit(base, donor)
    old, new = Vocabulary.of(base_tokenizer), Vocabulary.of(donor_tokenizer)
    plan = _planned(old, new, base, donor, options)
    k, tried = _settled_k(plan, base, donor, options)
    pieces: Sequence[Sequence[int]] = ()
    if options.method.startswith("subword"):
        pieces = _pieces(base_tokenizer, donor_tokenizer, plan.targets, len(base.embed))
    generator = torch.Generator().manual_seed(options.seed)

    def task(matrix: Tensor, source: Tensor, head: bool) -> Task:
        device = matrix.device if options.device is None else options.device
        return Task(
            plan.anchors(matrix, source, device), _single(source[plan.targets], device), _single(matrix, device),
            pieces, head, k, options.normalize_atoms, options.ridge, generator,
        )  # fmt: skip

    embed, error, ratio = _matrix(
        task(base.embed, donor.embed, False), base.embed, plan, new.size, options.method
    )
    head = None
    if base.head is not None:
        source = donor.embed if donor.head is None else donor.head
        head = _matrix(task(base.head, source, True), base.head, plan, new.size, options.method)[0]
    names = (tuple(new.tokens[i] for i in ids) for ids in (plan.copied, plan.targets, plan.zeroed))
    copied, mixed_tokens, zeroed = names
    report = TransplantReport(
        options.method, copied, mixed_tokens, zeroed, len(plan.anchor_ids), k, tried, error, ratio, tied
    )
    return Matrices(embed, head, None if base.bias is None else _bias(base.bias, plan, new.size)), report


def _refuse_unfit(base: Matrices, donor: Matrices) -> None:
    for whose, matrices in (("base", base), ("donor", donor)):
        for name, matrix in (("embedding", matrices.embed), ("head", matrices.head)):
            if matrix is not None:
                checks.require(
                    matrix.dtype.is_floating_point and matrix.ndim == 2,
                    f"{whose} {name} is {matrix.dtype} of shape {tuple(matrix.shape)}; it must be floating (V, d), not "
                    "quantised.",
                )
                checks.finite(f"{whose} {name}", matrix)


def _matrix(
    task: Task, matrix: Tensor, plan: _Plan, size: int, method: str
) -> tuple[Tensor, float | None, float | None]:
    """One new matrix, the mean relative error of its mixes in the donor, and the norm ratio of its rebuilt rows."""
    out = matrix.new_zeros(size, matrix.shape[1])
    out[list(plan.copied)] = matrix[list(plan.copied.values())]
    if not plan.targets:
        return out, None, None
    error = None
    if method == "omp":
        support = pursued(task)
        rows, again = mixed(support, task.anchors.base), mixed(support, task.anchors.donor)
        lengths = task.targets.norm(dim=1).clamp(min=1e-30)
        error = float(((again - task.targets).norm(dim=1) / lengths).mean())
    else:
        rows = METHODS[method](task)
    out[plan.targets] = rows.to(matrix)
    copied = task.anchors.base.norm(dim=1).mean().clamp(min=1e-30)
    return out, error, float(rows.norm(dim=1).mean() / copied)


def _bias(bias: Tensor, plan: _Plan, size: int) -> Tensor:
    """The head's bias: copied, the mean for rebuilt tokens, 0 for rows that no token uses."""
    out = bias.new_zeros(size)
    out[list(plan.copied)] = bias[list(plan.copied.values())]
    out[plan.targets] = bias.mean()
    return out


@dataclass(frozen=True)
class _Plan:
    """Donor ids: copied (with their base ids), targets, zeroed; and the anchors in the order of donor ids."""

    copied: dict[int, int]
    targets: list[int]
    zeroed: list[int]
    anchor_ids: dict[int, int]

    def anchors(self, base: Tensor, donor: Tensor, device: torch.device | str) -> Anchors:
        """The anchors' rows in both spaces, in single precision (double if they are)."""
        ours, theirs = base[list(self.anchor_ids.values())], donor[list(self.anchor_ids)]
        return Anchors(_single(theirs, device), _single(ours, device))


def _single(rows: Tensor, device: torch.device | str = "cpu") -> Tensor:
    return rows.detach().to(device, torch.promote_types(rows.dtype, torch.float32))


def _planned(old: Vocabulary, new: Vocabulary, base: Matrices, donor: Matrices, options: Options) -> _Plan:
    exact, loose = shared(old, new, byte_match=options.byte_match, prefix_match=options.prefix_match)
    exact, loose = ({d: b for d, b in ids.items() if b < len(base.embed)} for ids in (exact, loose))
    known = {d: b for d, b in exact.items() if d < len(donor.embed)}
    beyond = [d for d in new.tokens if d >= len(donor.embed)]
    if beyond:
        warnings.warn(
            f"donor has {len(beyond)} tokens beyond its {len(donor.embed)} rows; those not shared become zeros.",
            stacklevel=4,
        )
    zeroed = [d for d in beyond if d not in exact and d not in loose]
    if options.drop_undertrained:
        bad_new = undertrained(new, _single(donor.embed), None if donor.head is None else _single(donor.head))
        bad_old = undertrained(old, _single(base.embed), None if base.head is None else _single(base.head))
        both = [d for d, b in known.items() if bool(bad_new[d]) and bool(bad_old[b])]
        zeroed += both
        exact = {d: b for d, b in exact.items() if d not in set(both)}
        known = {d: b for d, b in known.items() if not bool(bad_new[d]) and not bool(bad_old[b])}
    checks.require(bool(known), "the tokenizers share no token; there is nothing to rebuild the others from.")
    copied = dict(sorted({**loose, **exact}.items()))
    rest = set(new.tokens) - set(copied) - set(zeroed)
    return _Plan(copied, sorted(rest), sorted(zeroed), dict(sorted(known.items())))


def _settled_k(
    plan: _Plan, base: Matrices, donor: Matrices, options: Options
) -> tuple[int, dict[int, float]]:
    count, width = len(plan.anchor_ids), donor.embed.shape[1]
    if options.k == "auto":
        device = base.embed.device if options.device is None else options.device
        anchors = plan.anchors(base.embed, donor.embed, device)
        return choose_k(anchors, method=options.method, normalize=options.normalize_atoms, seed=options.seed)
    k = int(options.k)
    if options.method == "omp" and plan.targets:
        checks.require(
            k <= count, f"k is {k}, but the tokenizers share {count} tokens; it must be at most that."
        )
        checks.require(
            k <= width, f"k is {k}, but the donor's width is {width}; no more atoms are independent."
        )
        if k > width / 4:
            warnings.warn(
                f"k is {k}, above a quarter of the donor's width {width}, and will fit its noise; try k='auto'.",
                stacklevel=4,
            )
    return k, {}


def _pieces(base_tokenizer: Any, donor_tokenizer: Any, targets: Sequence[int], rows: int) -> list[list[int]]:
    """Base ids of each target's text; a token that is part of a character, or special, has none."""
    found = []
    for token in targets:
        text = donor_tokenizer.decode([token], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ids = (
            []
            if "\N{REPLACEMENT CHARACTER}" in text
            else base_tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        found.append([i for i in ids if i < rows])
    return found
