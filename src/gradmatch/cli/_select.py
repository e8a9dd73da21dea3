"""``gradmatch select``: the share of a data set worth keeping, and what it is worth beside random shares."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradmatch.cli import _show
from gradmatch.cli._distill import (
    DATA_HELP,
    NETWORK_HELP,
    command_line,
    complete_data,
    complete_network,
    describe,
    load_data,
    score,
)

if TYPE_CHECKING:
    from torch import nn

    from gradmatch.cli._score import Score
    from gradmatch.core.networks import Network
    from gradmatch.data import Selection
    from gradmatch.datasets import Split

METHODS = ("dq", "random")
SELECTED, INDICES = "selected.safetensors", "selection.json"


def register(app: typer.Typer) -> None:
    app.command("select")(select)


def select(
    source: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP, autocompletion=complete_data)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the result.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="dq (dataset quantization) or random.",
            autocompletion=lambda incomplete: [m for m in METHODS if m.startswith(incomplete)],
        ),
    ] = "dq",
    ratio: Annotated[
        float, typer.Option("--ratio", help="Share of every class kept, above 0 and up to 1.")
    ] = 0.1,
    bins: Annotated[int, typer.Option("--bins", help="Bins of dq.")] = 10,
    network: Annotated[
        str | None,
        typer.Option(
            "--network",
            help=NETWORK_HELP
            + " dq then compares its gradients, after training it; default: principal components.",
            autocompletion=complete_network,
        ),
    ] = None,
    width: Annotated[int, typer.Option("--width", help="Width of convnet or mlp.")] = 32,
    epochs: Annotated[int, typer.Option("--epochs", help="Most epochs of each network trained.")] = 300,
    seed: Annotated[int, typer.Option("--seed", help="Decides everything drawn.")] = 0,
    size: Annotated[
        int | None, typer.Option("--size", help="Side to which a folder's images are brought.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--eval/--no-eval", help="Train networks on the selection and on random ones.")
    ] = False,
    networks: Annotated[int, typer.Option("--eval-networks", help="Networks, and random draws.")] = 3,
) -> None:
    """Choose a small, diverse share of a data set.

    Writes selection.safetensors (the bins, so that other shares can be drawn), selection.json (the places, and files,
    of what is kept), selected.safetensors (the examples themselves, which `gradmatch distill` reads), report.html and
    summary.json.

    Examples: `gradmatch select digits --ratio 0.1 --out kept --eval`,
    `gradmatch select photos/ --size 32 --network mynet:make --ratio 0.3 --out kept`
    """
    from gradmatch.cli import _report
    from gradmatch.cli._network import network_for
    from gradmatch.core import checks

    checks.one_of("--method", method, METHODS)
    checks.fraction("--ratio", ratio)
    checks.whole("--bins", bins)
    checks.whole("--epochs", epochs)
    checks.whole("--eval-networks", networks)
    checks.whole("--seed", seed, least=0)
    checks.require(
        network is None or method == "dq" or evaluate,
        "--network is given with --method random, which uses none without --eval.",
    )
    checks.require(not out.exists() or out.is_dir(), f"--out is {str(out)!r}, a file; it must be a folder.")
    _report.require_libraries()
    split = load_data(source, size)
    factory = None
    if network is not None or evaluate:
        factory = network_for(network or "convnet", split.train, width)
    _show.say(describe(split))
    began = time.perf_counter()
    chosen = choose(method, split, ratio, bins, seed, factory if network is not None else None, epochs)
    seconds = time.perf_counter() - began
    scores = compare(chosen, split, factory, ratio, networks, epochs, seed) if evaluate and factory else []
    finish(out, chosen, split, scores, method, network, seconds)


def choose(
    method: str, split: Split, ratio: float, bins: int, seed: int, network: Network | None, epochs: int
) -> Selection:
    """The selection from the training examples."""
    from gradmatch.data import DQ, random_selection

    if method == "random":
        return random_selection(split.train, ratio, seed=seed)
    trained = None if network is None else _trained(split, network, epochs, seed)
    return DQ(n_bins=bins, ratio=ratio, seed=seed).select(split.train, trained)


def _trained(split: Split, network: Network, epochs: int, seed: int) -> nn.Module:
    """A network trained on the training examples, whose gradients say what they are like."""
    from gradmatch.cli._score import all_epochs
    from gradmatch.core.ensemble import train_ensemble

    count = all_epochs(len(split.train), epochs)
    with _show.progress_bar("training the network", count) as advance:
        made = train_ensemble(
            network,
            split.train,
            1,
            epochs=count,
            seed=seed,
            program="loop",
            progress=lambda done, total: advance(done, total, {}),
        )
    return made.module(0)


def compare(
    chosen: Selection, split: Split, network: Network, ratio: float, networks: int, epochs: int, seed: int
) -> list[Score]:
    """Networks trained on the selection, on random shares of the same size, and on everything."""
    from gradmatch.cli import _score
    from gradmatch.data import random_selection

    count = _score.all_epochs(len(chosen), epochs)
    draws = [
        _score.part_of(split.train, random_selection(split.train, ratio, seed=seed + 1 + k).indices)
        for k in range(networks)
    ]
    groups = [
        _score.learned("selected images", _score.part_of(split.train, chosen.indices), networks, count),
        _score.drawn("random images", draws, count),
        _score.everything(split.train, epochs),
    ]
    return score(groups, split, network, seed)


def finish(
    out: Path,
    chosen: Selection,
    split: Split,
    scores: list[Score],
    method: str,
    network: str | None,
    seconds: float,
) -> None:
    """Write the files and print the table."""
    from gradmatch.cli import _report, _score
    from gradmatch.core.store import save_tensors, write_json

    kept = split.train.take(chosen.indices)
    places = chosen.indices if split.rows is None else split.rows[chosen.indices]
    found = {
        "indices": places.tolist(),
        "files": [split.files[i] for i in chosen.indices.tolist()] if split.files else [],
    }
    files = [
        chosen.save(out),
        write_json(out / INDICES, found),
        save_tensors(
            out / SELECTED, {"x": kept.x, "y": kept.y, "x_test": split.test.x, "y_test": split.test.y}
        ),
    ]
    report = _report.Report(
        title=f"{len(chosen):,} of {len(split.train):,} examples of {split.name}",
        data=describe(split),
        facts={
            "method": method,
            "kept": f"{len(chosen):,} of {len(split.train):,} training examples",
            "selection": _show.minutes(seconds),
            "network": network or "none for the selection",
        },
        head=_score.HEAD,
        rows=[s.cells() for s in scores],
        summary={
            "method": method,
            "kept": len(chosen),
            "of": len(split.train),
            "compression_ratio": len(split.train) / len(chosen),
            "selection_seconds": seconds,
            "rows": [s.facts() for s in scores],
        },
        settings={k: v for k, v in chosen.meta.items() if k != "method"}
        | {"ratio": chosen.ratio, "seed": chosen.seed},
        command=command_line(),
    )
    files += _report.write(out, report, None, split.train)
    if scores:
        _show.table(report.title, _score.HEAD, report.rows, wide=(4,))
    typer.echo(f"kept {len(chosen):,} of {len(split.train):,} training examples in {_show.minutes(seconds)}")
    typer.echo(f"written: {', '.join(str(f) for f in files)}")
