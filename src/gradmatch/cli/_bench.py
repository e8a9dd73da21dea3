"""``gradmatch optimizers bench``: any optimizer on small trainings, each at its tuned rate, with the cost of a step."""

from __future__ import annotations

import importlib
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from gradmatch.cli import _optimizers
from gradmatch.core.picture import png, subplots


def register(app: typer.Typer) -> None:
    """Attach to the group that ``_optimizers`` made."""
    _optimizers.group.command("bench")(bench)


def bench(
    out: Annotated[Path, typer.Option("--out", help="Folder for the result.")],
    optimizers: Annotated[
        str, typer.Option("--optimizers", help="Names with commas between, or module:Class of your own.")
    ] = "sgd,adam,lion,adahessian",
    tasks: Annotated[str, typer.Option("--tasks", help="Names with commas between.")] = (
        "quadratics,rosenbrock,digits-mlp,fashion-cnn,char-transformer"
    ),
    seeds: Annotated[int, typer.Option("--seeds", help="Runs at the tuned rate.")] = 3,
    steps: Annotated[
        int, typer.Option("--steps", help="Updates of every run; 0: the task's own number.")
    ] = 0,
) -> None:
    """Bench optimizers: the loss after equal updates, each at the rate that is best on a hold-out.

    Writes bench.json and bench.png into the folder of --out. The same command goes on where a stopped one ended.

    Example: `gradmatch optimizers bench --optimizers sgd,adam,torch.optim:RAdam --tasks digits-mlp --out bench`
    """
    from rich.progress import track
    from rich.table import Table

    from gradmatch.cli import _bench_tasks as work
    from gradmatch.core import checks
    from gradmatch.core.store import RunFolder, read_json, write_bytes, write_json

    names, places = [n for n in optimizers.split(",") if n], [t for t in tasks.split(",") if t]
    for t in places:
        checks.one_of("tasks", t, tuple(work.STEPS))
    checks.whole("seeds", seeds)
    checks.whole("steps", steps, least=0)
    kinds = {n: _kind(n) for n in names}
    RunFolder(out, {"optimizers": names, "tasks": places, "seeds": seeds, "steps": steps}, resume=True)

    def done(task: str, name: str, rate: float | None, seed: int, tuning: bool) -> dict[str, float]:
        label = f"{task}-{name}-{rate}-{seed}-{'rate' if tuning else 'run'}".replace(":", ".").replace(
            "/", "."
        )
        file = out / "parts" / f"{label}.json"
        if not file.exists():
            write_json(file, work.train(task, kinds[name], rate, seed, tuning, steps or work.STEPS[task]))
        found: dict[str, float] = read_json(file)
        return found

    rows: list[dict[str, Any]] = []
    for task, name in track([(t, n) for t in places for n in names], "bench"):
        rate = None
        if work.rate_name(kinds[name]) is not None:
            rate = min(work.RATES, key=lambda r, t=task, n=name: done(t, n, r, 0, True)["loss"])  # type: ignore[misc]
        runs = [done(task, name, rate, s, False) for s in range(seeds)]
        losses = [r["loss"] for r in runs]
        spread = statistics.stdev(losses) if seeds > 1 else 0.0
        ms = 1e3 * statistics.median(r["seconds"] for r in runs)
        rows.append(
            {
                "task": task,
                "optimizer": name,
                "rate": rate,
                "loss": statistics.fmean(losses),
                "std": spread,
                "ms": ms,
            }
        )
    write_json(out / "bench.json", {"rows": rows})
    write_bytes(out / "bench.png", _picture(rows, places))
    table = Table("task", "optimizer", "rate", "loss", "ms a step")
    for r in rows:
        shown = "none" if r["rate"] is None else f"{r['rate']:g}"
        shown += " (end of the grid)" if r["rate"] in (work.RATES[0], work.RATES[-1]) else ""
        table.add_row(
            r["task"], r["optimizer"], shown, f"{r['loss']:.4g} +- {r['std']:.2g}", f"{r['ms']:.3g}"
        )
    from rich.console import Console

    Console().print(table)


def _kind(name: str) -> Any:
    from functools import partial

    from gradmatch.core import checks

    if ":" in name:
        home, _, attribute = name.partition(":")
        options: dict[str, Any] = {}
    else:
        home, attribute, _, options = _optimizers.KNOWN[
            checks.one_of("optimizers", name, tuple(_optimizers.KNOWN))
        ]
    try:
        found = getattr(importlib.import_module(home), attribute)
    except (ImportError, AttributeError) as error:
        raise checks.InputError(f"optimizers names {name!r}, which is not found: {error}.") from error
    return partial(found, **options) if options else found


def _picture(rows: list[dict[str, Any]], places: list[str]) -> bytes:
    figure, axes = subplots(1, len(places), figsize=(3.4 * len(places), 3), squeeze=False)
    for axis, task in zip(axes[0], places, strict=True):
        own = [r for r in rows if r["task"] == task]
        for r in own:
            axis.errorbar(
                r["ms"], max(r["loss"], 1e-12), r["std"], marker="o", capsize=2, label=r["optimizer"]
            )
        axis.set(xscale="log", yscale="log", xlabel="ms a step", ylabel="loss")
        axis.set_title(task, loc="left", fontsize=10)
    axes[0, 0].legend(fontsize=7)
    return png(figure, dpi=120)
