"""``gradmatch evidence``: run the experiments that prove the systems."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmatch.cli import _catalog, _show
from gradmatch.cli._app import Stopped


def register(app: typer.Typer) -> None:
    app.command("evidence")(evidence)


def _complete(incomplete: str) -> list[str]:
    from gradmatch.evidence import _common

    return [s for s in _common.experiments() if s.startswith(incomplete)]


def evidence(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG...", help="Which.", autocompletion=_complete)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every experiment there is.")] = False,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Number of seeds; default its own.")] = None,
    budget: Annotated[
        str,
        typer.Option("--budget", help="small (minutes on two cores) or full (towards the paper's scale)."),
    ] = "small",
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = Path("results"),
    workers: Annotated[int, typer.Option("--workers", help="Processes of one thread each.")] = 2,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Run experiments; print each method's figures and whether the claim holds by the rule written before.

    Stopped and run again, long experiments go on from their last finished part.

    Examples: `gradmatch evidence dcc`, `gradmatch evidence ftd tesla --seeds 5`, `gradmatch evidence --all`
    """
    from gradmatch.core import checks
    from gradmatch.core.store import read_json
    from gradmatch.evidence import _common

    chosen = _common.experiments() if everything else _known(slugs or [])
    checks.require(bool(chosen), "evidence needs a SLUG, or --all; 'gradmatch list --built' shows them.")
    checks.whole("--workers", workers)
    settings = _common.Settings(seeds=seeds, budget=budget, out=out, workers=workers, quiet=quiet)
    for slug in chosen:
        _show.say(f"{slug}: running with budget {budget}")
        try:
            _, file = _common.run_experiment(slug, settings)
        except KeyboardInterrupt as stop:
            raise Stopped(
                f"stopped by Ctrl-C; the same command keeps the parts of {slug} that were done"
            ) from stop
        _catalog.print_result(read_json(file))
        typer.echo(f"written: {file}\n")


def _known(slugs: list[str]) -> list[str]:
    """Refuse all that cannot be run before anything is run."""
    from gradmatch import catalog
    from gradmatch.evidence import _common

    for slug in slugs:
        if slug not in _common.experiments():
            catalog.find(slug)
            _common.experiment(slug)
    return list(dict.fromkeys(slugs))
