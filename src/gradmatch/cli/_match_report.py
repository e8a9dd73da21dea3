"""What ``gradmatch match-weights`` writes and tells, and the picture of both paths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gradmatch.cli import _show
from gradmatch.core.picture import png, subplots

if TYPE_CHECKING:
    from gradmatch.cli._match_case import Case
    from gradmatch.weights import MergeAnalysis, Permutation, PermutationSpec

PERMUTATION, MATCHED, MERGED = "permutation.safetensors", "matched.safetensors", "merged.safetensors"
SUMMARY, PICTURE = "summary.json", "path.png"


def write(out: Path, case: Case, found: Permutation, reports: dict[str, MergeAnalysis]) -> list[Path]:
    """The files of the result."""
    from gradmatch.core.store import save_tensors, write_bytes, write_json
    from gradmatch.weights import reset_statistics
    from gradmatch.weights._statistics import tracking

    state, moved = case.a.state_dict(), found.apply(case.b)
    merged = {k: (t + moved[k]) / 2 if t.is_floating_point() else t for k, t in state.items()}
    if case.splits and tracking(case.a):
        merged = reset_statistics(case.a, merged, next(iter(case.splits.values())))
    facts = next(iter(reports.values())).facts()
    paths = ("naive", "matched")
    summary = {k: v for k, v in facts.items() if k not in paths}
    summary |= {"moved": found.moved(), "splits": {}}
    for name, report in reports.items():
        own = report.facts()
        if "naive" in own:
            summary["splits"][name] = {k: own[k] for k in paths}
    files = [
        found.save(out / PERMUTATION),
        save_tensors(out / MATCHED, moved),
        save_tensors(out / MERGED, merged),
        write_json(out / SUMMARY, summary),
    ]
    if case.splits:
        files.append(write_bytes(out / PICTURE, picture(reports)))
    return files


def tell(
    case: Case, spec: PermutationSpec, found: Permutation, reports: dict[str, MergeAnalysis], seconds: float
) -> None:
    """The table and the sentence for the user."""
    report = next(iter(reports.values()))
    rows = []
    for name, own in reports.items():
        for label, path in (("as they are", own.naive), ("matched", own.matched)):
            if path is not None:
                middle = len(path.t) // 2
                right = "" if path.accuracies is None else f"{float(path.accuracies[middle]):.2%}"
                loss = f"{float(path.losses[middle]):.4f}"
                rows.append([name, label, f"{path.barrier:.4f}", f"{path.midpoint_gap:+.4f}", loss, right])
    if rows:
        _show.table(
            "Between A and B",
            ["split", "B", "barrier", "gap in the middle", "loss there", "accuracy there"],
            rows,
        )
    units = sum(spec.sizes.values())
    share = sum(found.moved()[g] * n for g, n in spec.sizes.items()) / units
    typer.echo(
        f"matched {units:,} units in {len(spec.sizes)} groups in {_show.minutes(seconds)}; {share:.0%} change places; "
        f"distance {report.distance:.4g} to {report.distance_matched:.4g} (-{report.reduction:.1f}%), "
        f"agreement of leading directions {report.agreement:.3f} to {report.agreement_matched:.3f}"
    )


def picture(reports: dict[str, MergeAnalysis]) -> bytes:
    """The loss, and the accuracy where there is one, along both paths; a column for each split."""
    shown = {name: (r.naive, r.matched) for name, r in reports.items()}
    rows = 1 + any(
        path is not None and path.accuracies is not None for pair in shown.values() for path in pair
    )
    figure, axes = subplots(
        rows,
        len(shown),
        figsize=(5.2 * len(shown), 3.2 * rows),
        squeeze=False,
        sharex=True,
    )
    for column, (name, pair) in enumerate(shown.items()):
        for label, color, path in (("as they are", "#b3423a", pair[0]), ("matched", "#2f6f9f", pair[1])):
            assert path is not None
            axes[0, column].plot(
                path.t, path.losses, color=color, lw=2, label=f"{label}: barrier {path.barrier:.3f}"
            )
            if path.accuracies is not None:
                axes[1, column].plot(path.t, 100 * path.accuracies, color=color, lw=2)
        axes[0, column].set_title(f"{name} data", loc="left", fontsize=11)
        axes[0, column].legend(frameon=False, fontsize=9)
        axes[-1, column].set_xlabel("from A (0) to B (1)")
    axes[0, 0].set_ylabel("mean loss")
    if rows == 2:
        axes[1, 0].set_ylabel("accuracy (%)")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return png(figure)
