"""``gradmatch data``: bring a data set to this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from gradmatch.cli import _show

NAMES = ("digits", "fashion-mnist")


def register(app: typer.Typer) -> None:
    app.command("data")(data)


def _complete(incomplete: str) -> list[str]:
    return [n for n in NAMES if n.startswith(incomplete)]


def data(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="digits or fashion-mnist.", autocompletion=_complete)
    ],
) -> None:
    """Fetch a data set without root, or say exactly how it can be had.

    Fashion-MNIST: looked for on this machine; else Debian's package is downloaded and unpacked; else the Hugging Face
    hub is asked. It is kept in $GRADMATCH_DATA, or in the user's cache folder.

    Example: `gradmatch data fashion-mnist`
    """
    from gradmatch.core import checks
    from gradmatch.datasets import find_fashion_mnist
    from gradmatch.datasets._fetch import fetch_fashion_mnist

    checks.one_of("NAME", name, NAMES)
    if name == "digits":
        typer.echo("digits: nothing to fetch, they come with scikit-learn")
        return
    place = find_fashion_mnist()
    if place is None:
        place = fetch_fashion_mnist(say=_show.say)
    typer.echo(f"fashion-mnist: in {place}")
