"""``gradmatch list`` and ``gradmatch show``: the sixty-six systems and what is known of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gradmatch.cli import _show

Results = Annotated[
    Path | None,
    typer.Option(
        "--results", exists=True, file_okay=False, help="Folder of recorded results; default the project's."
    ),
]


def register(app: typer.Typer) -> None:
    app.command("list")(list_systems)
    app.command("show")(show)


def _complete_verdict(incomplete: str) -> list[str]:
    from gradmatch.catalog import VERDICTS

    return [v.replace(" ", "-") for v in VERDICTS if v.replace(" ", "-").startswith(incomplete)]


def _complete_family(incomplete: str) -> list[str]:
    from gradmatch import catalog

    return [f for f in catalog.families() if f.startswith(incomplete)]


def list_systems(
    family: Annotated[
        str | None, typer.Option("--family", help="Only this family.", autocompletion=_complete_family)
    ] = None,
    verdict: Annotated[
        str | None,
        typer.Option(
            "--verdict",
            help="Only systems whose evidence says so: holds, holds-in-part, does-not-hold.",
            autocompletion=_complete_verdict,
        ),
    ] = None,
    built: Annotated[bool, typer.Option("--built", help="Only systems that can be used now.")] = False,
    results: Results = None,
) -> None:
    """List the systems: one line each; those not built yet say so.

    Examples: `gradmatch list --built`, `gradmatch list --family data`, `gradmatch list --verdict holds`,
    `gradmatch list | wc -l`
    """
    from gradmatch import catalog
    from gradmatch.core import checks

    if family is not None:
        checks.one_of("--family", family, catalog.families())
    if verdict is not None:
        verdict = checks.one_of("--verdict", verdict.replace("-", " "), catalog.VERDICTS)
    found = catalog.results(results)
    rows = [
        (s.slug, s.family, catalog.verdict(s, found), s.title)
        for s in catalog.SYSTEMS
        if family in (None, s.family)
        and verdict in (None, catalog.verdict(s, found))
        and (s.built or not built)
    ]
    if _show.interactive():
        _show.table(f"{len(rows)} systems", ("slug", "family", "evidence", "title"), rows, wide=(3,))
    else:
        for row in rows:
            typer.echo("\t".join(row))


def show(
    slug: Annotated[
        str, typer.Argument(metavar="SLUG", help="A system's slug.", autocompletion=_show.complete_slug)
    ],
    results: Results = None,
) -> None:
    """Show one system: what it is, how to use it, what its evidence found.

    Example: `gradmatch show dcc`
    """
    from gradmatch import catalog

    system = catalog.find(slug)
    typer.echo(f"{system.slug}: {system.title}")
    typer.echo(f"paper   {system.paper}" + (f" (arXiv {system.arxiv})" if system.arxiv else ""))
    typer.echo(f"family  {system.family}")
    typer.echo(f"use     {system.entry if system.built else 'not yet built'}")
    typer.echo(f"claim   {system.claim}")
    result = catalog.results(results).get(system.slug)
    if result is not None:
        print_result(result)
    elif system.built:
        typer.echo(f"no evidence recorded yet; 'gradmatch evidence {system.slug}' runs it")


def print_result(result: dict[str, Any]) -> None:
    """The table of a recorded result, its rule and its verdict."""
    rows = [
        (
            row["method"],
            f"{row['mean']:.4g} ± {row['std']:.2g}" if len(row["values"]) > 1 else f"{row['mean']:.4g}",
            str(len(row["values"])),
            row["cost"],
        )
        for row in result["rows"]
    ]
    better = "higher" if result["higher_is_better"] else "lower"
    typer.echo("")
    _show.table(
        f"{result['title']}: {result['metric']} ({better} is better)",
        ("method", "mean ± std", "seeds", "cost"),
        rows,
        wide=(0, 3),
    )
    for name in ("claim", "rule", "verdict", "reason"):
        typer.echo(f"{name + ':':9}{result[name]}")
    took = _show.minutes(result["wall_seconds"])
    typer.echo(f"by:      {result['command']} ({result['budget']} budget, {took})")
