"""``gradmatch board``: the page of results, and the table in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmatch.cli import _catalog


def register(app: typer.Typer) -> None:
    app.command("board")(board)


def board(
    out: Annotated[Path, typer.Option("--out", help="Folder for the page.")] = Path("site"),
    results: _catalog.Results = None,
    readme: Annotated[
        Path | None, typer.Option("--readme", help="README whose results section is renewed as well.")
    ] = None,
) -> None:
    """Build the static page of all results; with --readme also renew its table.

    Examples: `gradmatch board`, `gradmatch board --out public --readme README.md`
    """
    from gradmatch import board as pages

    if readme is not None:
        changed = pages.update_readme(readme, results)
        typer.echo(f"{'written' if changed else 'unchanged'}: {readme}")
    typer.echo(f"written: {pages.build(results=results, out=out)}")
