"""The command line: ``gradmatch list``, ``show``, ``demo``, ``distill``, ``select``, ``generate``, ``evidence``, ...

Heavy libraries load inside the commands, so that help and completion answer at once.
"""

from __future__ import annotations

from gradmatch.cli import (
    _bench,
    _board,
    _catalog,
    _compress,
    _data,
    _demo,
    _distill,
    _evidence,
    _generate,
    _gradients,
    _match,
    _merge,
    _optimizers,
    _search_optimizer,
    _select,
    _spectrum,
    _transplant,
)
from gradmatch.cli._app import app

__all__ = ["app", "main"]

for module in (
    _catalog,
    _demo,
    _distill,
    _select,
    _gradients,
    _spectrum,
    _search_optimizer,
    _optimizers,
    _bench,
    _merge,
    _match,
    _transplant,
    _compress,
    _evidence,
    _generate,
    _board,
    _data,
):
    module.register(app)


def main() -> None:
    """Entry point of the program ``gradmatch``."""
    app(prog_name="gradmatch")
