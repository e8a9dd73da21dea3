"""``gradmatch match-weights``: the order of one network's units in which it averages with another."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradmatch.cli import _match_report
from gradmatch.cli._distill import DATA_HELP, NETWORK_HELP, complete_data, complete_network

if TYPE_CHECKING:
    from gradmatch.cli._match_case import Case
    from gradmatch.weights import MergeAnalysis, Permutation, PermutationSpec

METHODS = ("weights", "activations", "straight-through")


def register(app: typer.Typer) -> None:
    app.command("match-weights")(match_weights)


def _complete(incomplete: str) -> list[str]:
    return [m for m in METHODS if m.startswith(incomplete)]


def match_weights(
    first: Annotated[str, typer.Argument(metavar="A", help="Hugging Face folder, or .safetensors file.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The one whose units are reordered.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the result.")],
    network: Annotated[
        str | None,
        typer.Option(
            "--network", help=NETWORK_HELP + " For .safetensors files.", autocompletion=complete_network
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help=DATA_HELP + " Text (.txt, .jsonl) for language models. For the barrier, and batch-norm.",
            autocompletion=complete_data,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--input", metavar="3,32,32", help="Shape of one input of --network, without --data."),
    ] = None,
    classes: Annotated[int, typer.Option("--classes", help="Its outputs, without --data.")] = 10,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="weights; activations or straight-through, which need --data.",
            autocompletion=_complete,
        ),
    ] = "weights",
    restarts: Annotated[int, typer.Option("--restarts", help="Starts of weights; the best is kept.")] = 1,
    examples: Annotated[
        int, typer.Option("--examples", help="Most examples of a split that are used.")
    ] = 5000,
    points: Annotated[int, typer.Option("--points", help="Places on the path, odd.")] = 25,
    width: Annotated[int, typer.Option("--width", help="Width of convnet or mlp.")] = 32,
    size: Annotated[
        int | None, typer.Option("--size", help="Side to which a folder's images are brought.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides everything drawn.")] = 0,
) -> None:
    """Reorder the units of B so that averaging it with A works, and show what that does to the loss between them.

    Writes permutation.safetensors, matched.safetensors (B reordered: it computes the same), merged.safetensors (the
    average, batch-norm's statistics measured anew on the data), summary.json (distances, aligned directions, barriers
    before and after) and path.png.

    Examples: `gradmatch match-weights a.safetensors b.safetensors --network mynet:make --data photos/ --out matched`,
    `gradmatch match-weights gpt-a/ gpt-b/ --data text.txt --out matched`
    """
    from gradmatch.cli._match_case import read, stand_in
    from gradmatch.core import checks

    checks.one_of("--method", method, METHODS)
    for name, value, least in (
        ("--restarts", restarts, 1),
        ("--examples", examples, 2),
        ("--points", points, 3),
    ):
        checks.whole(name, value, least)
    checks.require(
        points % 2 == 1, f"--points is {points}; it must be odd, so that the middle is among them."
    )
    checks.whole("--seed", seed, 0)
    checks.require(not out.exists() or out.is_dir(), f"--out is {str(out)!r}, a file; it must be a folder.")
    checks.require(
        method == "weights" or data is not None,
        f"--method is {method}, which needs --data to see the units work.",
    )
    if network is not None and data is None:
        split = stand_in(shape, classes)
    else:
        checks.require(shape is None, "--input is given; it is for --network without --data.")
        split = None
    case = read(first, second, network, data, examples, width, size, split)
    if data is not None:
        from gradmatch.cli._report import require_libraries

        require_libraries()  # of the picture
    began = time.perf_counter()
    spec, found = matched(case, method, restarts, seed)
    seconds = time.perf_counter() - began
    report = analysed(case, found, points)
    files = _match_report.write(out, case, found, report)
    _match_report.tell(case, spec, found, report, seconds)
    typer.echo(f"written: {', '.join(str(f) for f in files)}")


def matched(case: Case, method: str, restarts: int, seed: int) -> tuple[PermutationSpec, Permutation]:
    """The groups of units, and the order of B's."""
    from gradmatch.core import checks
    from gradmatch.weights import PermutationSpec, activation_match, ste_match, weight_match

    spec = PermutationSpec.from_module(case.a, case.example)
    checks.require(bool(spec.sizes), "no units of this network may change places; there is nothing to match.")
    state = case.a.state_dict()
    if method == "weights":
        found = weight_match(spec, state, case.b, restarts=restarts, seed=seed)
        return spec, found
    source = next(iter(case.splits.values()))
    if method == "activations":
        return spec, activation_match(spec, state, case.b, source, model=case.a)
    return spec, ste_match(spec, state, case.b, source, model=case.a, loss=case.loss, seed=seed)


def analysed(case: Case, found: Permutation, points: int) -> dict[str, MergeAnalysis]:
    """Distances and directions; with data the paths on each split, batch-norm's statistics from the first."""
    from gradmatch.core.problem import Problem
    from gradmatch.weights import analyze_merge
    from gradmatch.weights._statistics import tracking

    state = case.a.state_dict()
    if not case.splits:
        if tracking(case.a):
            import warnings

            warnings.warn(
                "these networks have batch-norm, and without --data the average keeps averaged statistics, with which "
                "it works badly",
                stacklevel=2,
            )
        return {"none": analyze_merge(state, case.b, found)}
    statistics = next(iter(case.splits.values()))
    return {
        name: analyze_merge(
            state,
            case.b,
            found,
            problem=Problem(case.a, case.loss, data, batch_size=500),
            statistics=statistics,
            points=points,
            split=name,
            taylor=False,
        )
        for name, data in case.splits.items()
    }
