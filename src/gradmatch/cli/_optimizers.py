"""``gradmatch optimizers``: what kind of solution each optimizer gives."""

from __future__ import annotations

import base64
import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradmatch.cli import _show
from gradmatch.cli._app import Stopped
from gradmatch.cli._distill import (
    DATA_HELP,
    NETWORK_HELP,
    checked_device,
    command_line,
    complete_data,
    complete_network,
    describe,
    load_data,
)

if TYPE_CHECKING:
    from gradmatch.analysis import SolutionReport
    from gradmatch.core.examples import Examples

ADAPTIVE, PLAIN = (3e-4, 1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2, 1e-1)
KNOWN: dict[str, tuple[str, str, tuple[float, ...], dict[str, Any]]] = {
    "sgd": ("torch.optim", "SGD", PLAIN, {"momentum": 0.9}),
    "plain-sgd": ("torch.optim", "SGD", (0.03, 0.1, 0.3, 1.0), {}),
    "adam": ("torch.optim", "Adam", ADAPTIVE, {}),
    "adamw": ("torch.optim", "AdamW", ADAPTIVE, {}),
    "adagrad": ("torch.optim", "Adagrad", PLAIN, {}),
    "rmsprop": ("torch.optim", "RMSprop", ADAPTIVE, {}),
    "nadam": ("torch.optim", "NAdam", ADAPTIVE, {}),
    "radam": ("torch.optim", "RAdam", ADAPTIVE, {}),
    "lion": ("gradmatch.optim", "Lion", (1e-4, 3e-4, 1e-3, 3e-3), {}),
    "adahessian": ("gradmatch.optim", "AdaHessian", (1e-2, 3e-2, 1e-1, 3e-1), {}),
    "diffgrad": ("gradmatch.optim", "DiffGrad", ADAPTIVE, {}),
    "lowrank-adamw": ("gradmatch.optim", "LowRankAdamW", ADAPTIVE, {}),
    "shampoo": ("gradmatch.analysis", "Shampoo", PLAIN, {}),
}
"""Name: where its class is, what it is called, the rates tried, and options."""
PAGE, PICTURE = "report.html", "solutions.png"
TEST = 2000

group = typer.Typer(help="Compare optimizers by the solutions they give.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="optimizers")


def complete_optimizers(incomplete: str) -> list[str]:
    done, comma, last = incomplete.rpartition(",")
    return [f"{done}{comma}{name}" for name in KNOWN if name.startswith(last)]


@group.command("compare")
def compare(
    out: Annotated[Path, typer.Option("--out", help="Folder for the result.")],
    source: Annotated[
        str, typer.Option("--data", metavar="DATA", help=DATA_HELP, autocompletion=complete_data)
    ] = "fashion-mnist",
    optimizers: Annotated[
        str,
        typer.Option(
            "--optimizers",
            help=f"Names with commas between: {', '.join(KNOWN)}, or module:Class of your own.",
            autocompletion=complete_optimizers,
        ),
    ] = "sgd,adam,lion",
    match: Annotated[
        str, typer.Option("--match", help="train_loss, new_task_acc (with --stream) or none.")
    ] = "train_loss",
    stream: Annotated[
        int,
        typer.Option("--stream", help="Learn so many classes at a time, one task after the other; 0: all."),
    ] = 0,
    network: Annotated[
        str,
        typer.Option("--network", help=NETWORK_HELP, autocompletion=complete_network),
    ] = "mlp",
    width: Annotated[int, typer.Option("--width", help="Width of convnet or mlp.")] = 32,
    rates: Annotated[
        list[str] | None,
        typer.Option("--rates", metavar="NAME=A,B,...", help="Learning rates tried; repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of every optimizer.")] = 3,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs, of every task.")] = 10,
    batch: Annotated[int, typer.Option("--batch", help="Examples in a step.")] = 64,
    schedule: Annotated[str, typer.Option("--schedule", help="constant or cosine.")] = "constant",
    target: Annotated[
        float | None, typer.Option("--target", help="Loss or accuracy to match; default what all reach.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", help="Training examples, drawn evenly from the classes; 0: all.")
    ] = 4000,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics", help="fit, calibration, margin, flatness, rank, sparsity, codes, distance."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes of one thread each.")] = 1,
    size: Annotated[
        int | None, typer.Option("--size", help="Side to which a folder's images are brought.")
    ] = None,
) -> None:
    """Say which optimizer gives what kind of solution, at an equal fit.

    Every optimizer starts from the same weights and sees the same batches; rates are chosen on held-out examples.
    Writes solutions.json, solutions.png, weights.safetensors and report.html into the folder of --out. The same command
    goes on where a stopped one ended. Inputs are standardised with one mean and deviation.

    Examples: `gradmatch optimizers compare --data fashion-mnist --optimizers sgd,adam,lion --out found`,
    `gradmatch optimizers compare --stream 2 --match new_task_acc --optimizers sgd,adam,shampoo --out kept`
    """
    from gradmatch.analysis import compare_optimizers
    from gradmatch.cli._network import network_for
    from gradmatch.cli._report import require_libraries
    from gradmatch.core import checks

    makers, grids = _makers(optimizers, rates or [])
    checks.one_of("--match", match, ("train_loss", "new_task_acc", "none"))
    checks.one_of("--schedule", schedule, ("constant", "cosine"))
    for name, value, least in (("--limit", limit, 0), ("--stream", stream, 0), ("--seeds", seeds, 1)):
        checks.whole(name, value, least)
    checks.require(
        match == "none" or (match == "new_task_acc") == bool(stream),
        f"--match is {match}; one task is matched by train_loss, and --stream by new_task_acc.",
    )
    checks.require(not out.exists() or out.is_dir(), f"--out is {str(out)!r}, a file; it must be a folder.")
    require_libraries()
    checked_device(device)
    split = load_data(source, size)
    _show.say(describe(split))
    train, test = _standardised(_drawn(split.train, limit), _drawn(split.test, min(limit or TEST, TEST)))
    data = _stream(train, test, stream) if stream else (train, test)
    began = time.perf_counter()
    try:
        with _show.progress_bar("training") as advance:
            report = compare_optimizers(
                network_for(network, train, width),
                makers,
                data,
                match_on=None if match == "none" else match,  # type: ignore[arg-type]
                rates=grids,
                target=target,
                seeds=seeds,
                epochs=epochs,
                batch_size=batch,
                schedule="cosine" if schedule == "cosine" else None,
                metrics=None if metrics is None else metrics.split(","),
                device=device,
                workers=workers,
                out=out,
                progress=lambda what, done, of: advance(done, of, {}),
            )
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on from here") from None
    _finish(out, report, describe(split), time.perf_counter() - began)


def _makers(names: str, given: list[str]) -> tuple[dict[str, Any], dict[str, tuple[float, ...]]]:
    """Factories and grids by name."""
    from gradmatch.core import checks

    grids = dict(_grid(text) for text in given)
    makers: dict[str, Any] = {}
    chosen: dict[str, tuple[float, ...]] = {}
    for name in (n.strip() for n in names.split(",")):
        checks.require(bool(name), f"--optimizers is {names!r}; it must be names with commas between.")
        checks.require(name not in makers, f"--optimizers names {name} twice.")
        makers[name], rates = _named(name)
        chosen[name] = grids.pop(name, rates)
    checks.require(not grids, f"--rates has {', '.join(grids)}, which --optimizers has not.")
    return makers, chosen


def _named(name: str) -> tuple[Any, tuple[float, ...]]:
    """Factory and rates of an optimizer by name."""
    from functools import partial

    from gradmatch.core import checks

    module, colon, attribute = name.partition(":")
    if colon:
        from gradmatch.cli._network import imported

        own_class: Any = imported(name, module, attribute, "--optimizers")
        checks.require(callable(own_class), f"--optimizers {name} is no class or function.")
        return own_class, ADAPTIVE
    checks.require(
        name in KNOWN, f"--optimizers has {name!r}; it must be among {', '.join(KNOWN)}, or module:Class."
    )
    home, own, rates, options = KNOWN[name]
    made: Any = getattr(importlib.import_module(home), own, None)
    checks.require(made is not None, f"--optimizers has {name}, which is not built yet.")
    return partial(made, **options) if options else made, rates


def _grid(text: str) -> tuple[str, tuple[float, ...]]:
    from gradmatch.core import checks

    name, equals, values = text.partition("=")
    try:
        found = tuple(float(v) for v in values.split(","))
    except ValueError:
        found = ()
    checks.require(
        bool(equals and name and found) and all(v > 0 for v in found),
        f"--rates is {text!r}; it must be NAME=A,B,... with rates above 0, such as adam=0.001,0.003.",
    )
    return name, found


def _drawn(examples: Examples, limit: int) -> Examples:
    """The first examples of every class, as many of each as there are on average."""
    import torch

    if not limit or limit >= len(examples):
        return examples
    count = max(2, limit // examples.classes)
    index = torch.cat([examples.of_class(c)[:count] for c in range(examples.classes)])
    return examples.take(index.sort().values)


def _standardised(train: Examples, test: Examples) -> tuple[Examples, Examples]:
    from gradmatch.core.examples import Examples

    mean, std = train.x.mean(), train.x.std().clamp_min(1e-6)
    return Examples((train.x - mean) / std, train.y, train.classes), Examples(
        (test.x - mean) / std, test.y, test.classes
    )


def _stream(train: Examples, test: Examples, per_task: int) -> Any:
    from gradmatch.analysis import class_stream

    return class_stream(train, test, per_task)


def _finish(out: Path, report: SolutionReport, data: str, seconds: float) -> None:
    from gradmatch.core.store import write_bytes

    report.save(out)
    picture = report.picture()
    write_bytes(out / PICTURE, picture)
    write_bytes(out / PAGE, _page(report, picture, data).encode())
    rows = [
        [r["metric"], *(f"{r[n][0]:.3g} ± {r[n][1]:.2g}" for n in report.optimizers)] for r in report.table()
    ]
    _show.table(_heading(report), ["metric", *report.optimizers], rows)
    typer.echo(report.summary())
    typer.echo(
        f"compared in {_show.minutes(seconds)}; written: {out / PAGE}, {out / PICTURE}, {out / 'solutions.json'}"
    )


def _heading(report: SolutionReport) -> str:
    if report.matched_on is None:
        return "each at its best rate"
    what = {"train_loss": "training loss", "new_task_acc": "accuracy on new tasks"}[report.matched_on]
    return f"at an equal {what} of {report.target:.3g}"


def _page(report: SolutionReport, picture: bytes, data: str) -> str:
    """One HTML page with everything inline."""
    import jinja2

    from gradmatch.cli._report import versions

    places = ["matched", "best"] if report.matched_on else ["best"]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE).render(
        title=f"{', '.join(report.optimizers)}: {_heading(report)}",
        data=data,
        picture=base64.b64encode(picture).decode(),
        names=report.optimizers,
        tables=[(place, report.table(place)) for place in places],
        differences=report.summary().splitlines(),
        curve=report.curve,
        command=command_line(),
        versions=versions(),
    )


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2b36; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; }
th { border-bottom: 2px solid #33485a; } td { border-bottom: 1px solid #d5dee5; }
img { max-width: 100%; } code { overflow-wrap: anywhere; } .scroll { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ data }}</p>
<img alt="all metrics by optimizer, rates tried, and how solutions relate" src="data:image/png;base64,{{ picture }}">
<h2>Differences that exceed the noise and 5 %, paired by seed</h2>
<ul>
{% for line in differences %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% for place, rows in tables %}
<h2>{{ "At the matched point" if place == "matched" else "Each at its best rate" }}</h2>
<div class="scroll"><table>
<tr><th>metric</th>{% for n in names %}<th>{{ n }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td>{{ row.metric }}</td>
{% for n in names %}
<td>{{ "%.3g"|format(row[n][0]) }} ± {{ "%.2g"|format(row[n][1]) }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
{% endfor %}
<h2>Rates tried</h2>
<div class="scroll"><table>
<tr>{% for k in curve[0] %}<th>{{ k }}</th>{% endfor %}</tr>
{% for c in curve %}
<tr>{% for v in c.values() %}<td>{{ "%.4g"|format(v) if v is number else v }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p><code>{{ command }}</code></p>
<p>{% for k, v in versions.items() %}{{ k }} {{ v }}{{ ", " if not loop.last }}{% endfor %}</p>
</body>
</html>
"""
