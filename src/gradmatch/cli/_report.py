"""What a run leaves behind: the contact sheet, a self-contained page and a summary."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gradmatch.core import checks
from gradmatch.core.examples import Examples
from gradmatch.core.store import write_bytes, write_json
from gradmatch.data import SyntheticDataset

SHEET, PAGE, SUMMARY = "contact_sheet.png", "report.html", "summary.json"
_LEAST_SIDE = 56


@dataclass
class Report:
    """Everything the files say."""

    title: str
    data: str
    facts: dict[str, Any]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: dict[str, Any]
    settings: Mapping[str, Any]
    command: str
    caption: str = ""
    losses: list[tuple[int, float]] = field(default_factory=list)


def require_libraries() -> None:
    """Refuse before the work where the files could not be written after it."""
    for module, extra in (("PIL", "data"), ("jinja2", "board")):
        checks.require(
            find_spec(module) is not None,
            f"{module} is not installed; the report needs 'pip install gradmatch[{extra}]'.",
        )


def write(out: Path, report: Report, learned: SyntheticDataset | None, real: Examples) -> list[Path]:
    """Write the files into ``out``; the sheet only for images of one or three channels."""
    sheet = None if learned is None or learned.images.ndim != 4 else picture(learned, real)
    files = []
    if sheet is not None:
        files.append(write_bytes(out / SHEET, sheet))
    files.append(write_bytes(out / PAGE, page(report, sheet).encode()))
    files.append(write_json(out / SUMMARY, summary(report)))
    return files


def picture(learned: SyntheticDataset, real: Examples) -> bytes:
    """The contact sheet as PNG, small images enlarged by whole factors so that one can see them."""
    from PIL import Image

    sheet = learned.contact_sheet(real=real)
    k = max(1, _LEAST_SIDE // learned.images.shape[-1])
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(sheet.repeat(k, 0).repeat(k, 1))).save(buffer, "PNG")
    return buffer.getvalue()


def summary(report: Report) -> dict[str, Any]:
    """The JSON summary."""
    return {
        "title": report.title,
        "data": report.data,
        **report.summary,
        "settings": dict(report.settings),
        "command": report.command,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    return {"python": platform.python_version()} | {
        n: metadata.version(n) for n in ("gradmatch", "torch", "numpy")
    }


def page(report: Report, sheet: bytes | None) -> str:
    """One HTML page with everything inline."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_PAGE).render(
        r=report,
        sheet=None if sheet is None else base64.b64encode(sheet).decode(),
        curve=curve(report.losses),
        versions=versions(),
    )


def curve(losses: Sequence[tuple[int, float]], points: int = 200) -> str:
    """The loss over the steps as the points of an SVG polyline in a 600 x 120 box, averaged to ``points``."""
    if len(losses) < 2:
        return ""
    groups = np.array_split(np.asarray(losses, dtype=float), min(points, len(losses)))
    x, y = np.asarray([g.mean(0) for g in groups]).T
    width, height = max(float(np.ptp(x)), 1e-12), max(float(np.ptp(y)), 1e-12)
    across, down = 600 * (x - x.min()) / width, 120 * (1 - (y - y.min()) / height)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ r.title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2b36; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem 1rem .3rem 0; }
th { border-bottom: 2px solid #33485a; } td { border-bottom: 1px solid #d5dee5; vertical-align: top; }
img { max-width: 100%; image-rendering: pixelated; } code { overflow-wrap: anywhere; }
polyline { fill: none; stroke: #2a6f97; stroke-width: 1.5; } .scroll { overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ r.title }}</h1>
<p>Data: {{ r.data }}.</p>
<div class="scroll"><table>
{% for name, value in r.facts.items() %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>
{% if r.rows %}
<h2>Accuracy on the real test set</h2>
<div class="scroll"><table>
<tr>{% for name in r.head %}<th scope="col">{{ name }}</th>{% endfor %}</tr>
{% for row in r.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
{% if sheet %}
<h2>Images</h2>
<p>{{ r.caption }}</p>
<div class="scroll"><img alt="{{ r.caption }}" src="data:image/png;base64,{{ sheet }}"></div>
{% endif %}
{% if curve %}
<h2>Loss</h2>
<svg viewBox="-5 -5 610 130" width="100%" role="img"
 aria-label="Loss from step {{ r.losses[0][0] }} to step {{ r.losses[-1][0] }}">
<polyline points="{{ curve }}"/></svg>
<p>Steps {{ r.losses[0][0] }} to {{ r.losses[-1][0] }}; from {{ '%.4g' % r.losses[0][1] }} to \
{{ '%.4g' % r.losses[-1][1] }}.</p>
{% endif %}
<h2>How it was made</h2>
<p><code>{{ r.command }}</code></p>
<div class="scroll"><table>
{% for name, value in r.settings.items() %}
<tr><th scope="row">{{ name }}</th><td><code>{{ value }}</code></td></tr>
{% endfor %}
{% for name, value in versions.items() %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table></div>
</body>
</html>
"""
