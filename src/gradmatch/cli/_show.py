"""What the commands share in talking to the user: consoles, tables, the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer


def say(text: str) -> None:
    """A line of progress for the user, on stderr, so that stdout holds only results."""
    typer.echo(text, err=True)


def interactive() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], wide: Sequence[int] = ()) -> None:
    """Print a table; columns in ``wide`` may be folded over several lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(title, style="bold"), title_justify="left", header_style="bold")
    for k, name in enumerate(head):
        out.add_column(name, overflow="fold", no_wrap=not (k in wide or not wide))
    for row in rows:
        out.add_row(*(Text(cell) for cell in row))
    # piped output keeps whole lines, whatever the width of the terminal it came from
    Console(width=None if interactive() else 160).print(out)


@contextmanager
def progress_bar(
    label: str, total: int | None = None, *, at_once: bool = True
) -> Iterator[Callable[[int, int, Mapping[str, Any]], None]]:
    """A bar on stderr; gives the function (done, all, figures) that a distiller calls after every step.

    Without ``at_once`` it shows from the first step on, so that a refusal before that stands alone.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(label, total=total, figures="")

    def advance(done: int, steps: int, figures: Mapping[str, Any]) -> None:
        bar.start()
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        bar.update(task, completed=done, total=steps, figures=shown)

    if at_once:
        bar.start()
    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def minutes(seconds: float) -> str:
    """A duration for people.

    >>> minutes(3.21), minutes(75), minutes(7300)
    ('3.2 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def complete_slug(incomplete: str) -> list[str]:
    """Slugs that begin so, for the shell."""
    from gradmatch import catalog

    return [s.slug for s in catalog.SYSTEMS if s.slug.startswith(incomplete)]
