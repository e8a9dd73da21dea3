"""Pictures drawn without pyplot, so that a session's backend and its open figures are left as they are."""

from __future__ import annotations

import io
from typing import Any


def blank(*, figsize: tuple[float, float]) -> Any:
    """An empty ``matplotlib`` figure of (width, height) inches, in the constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any) -> Any:
    """A figure and its axes, as ``pyplot.subplots`` gives them; ``options`` are those of ``Figure.subplots``."""
    figure = blank(figsize=figsize)
    return figure, figure.subplots(rows, columns, **options)


def png(figure: Any, dpi: int = 130) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    return buffer.getvalue()
