"""The static site: an index of all systems and a page for each, readable from disk without a server."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from gradmatch import catalog
from gradmatch.core import checks
from gradmatch.core.store import write_bytes

TONES = {"holds": "yes", "holds in part": "part", "does not hold": "no"}
_TEMPLATES = Path(__file__).parent / "templates"


def build(out: str | Path = "site", results: str | Path | None = None) -> Path:
    """Write the site and return its ``index.html``.

    Args:
        out: folder of the site; its pages are replaced, other files are left alone.
        results: folder of the result files; default the project's.

    Raises:
        InputError: jinja2 is missing, or a file in ``results`` is no result or names a picture outside it.
    """
    folder = Path(results) if results is not None else catalog.results_folder()
    found, site = catalog.results(folder), Path(out)
    pages = _environment()
    shared: dict[str, Any] = {
        "results": found,
        "systems": catalog.SYSTEMS,
        "families": catalog.families(),
        "style": (_TEMPLATES / "style.css").read_text(encoding="utf-8"),
    }
    known = {s.slug for s in catalog.SYSTEMS}
    others = {slug: r for slug, r in found.items() if slug not in known}
    counts = Counter(catalog.verdict(s, found) for s in catalog.SYSTEMS)
    for slug, result in found.items():
        _copy_pictures(folder, site, slug, result)
    for system in catalog.SYSTEMS:
        page = pages.get_template("system.html.j2").render(
            shared, system=system, result=found.get(system.slug)
        )
        write_bytes(site / f"{system.slug}.html", page.encode())
    for slug, result in others.items():
        page = pages.get_template("system.html.j2").render(shared, system=None, result=result)
        write_bytes(site / f"{slug}.html", page.encode())
    index = pages.get_template("index.html.j2").render(shared, others=others, counts=counts)
    return write_bytes(site / "index.html", index.encode())


def _environment() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise checks.InputError("the board needs jinja2: 'pip install gradmatch[board]'.") from error
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"tone": tone, "figure": figure, "measured": measured, "safe_link": safe_link}
    environment.globals |= {"verdict": catalog.verdict, "share": share}
    return environment


def tone(verdict: str) -> str:
    """The colour of a verdict: "yes", "part", "no", or "none" where there is no result."""
    return TONES.get(verdict, "none")


def figure(value: float) -> str:
    """A number for people: four significant digits, no needless exponent.

    >>> figure(76.98), figure(0.000123), figure(1234.56), figure(100.0)
    ('76.98', '0.000123', '1235', '100')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def measured(row: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds.

    >>> measured({"mean": 76.98, "std": 0.4512, "values": [1, 2]}), measured({"mean": 3.0, "std": 0, "values": [3]})
    ('76.98 ± 0.45', '3')
    """
    return figure(row["mean"]) + (f" ± {row['std']:.2g}" if len(row["values"]) > 1 else "")


def share(row: dict[str, Any], result: dict[str, Any]) -> float:
    """Length of a row's bar, in per cent of the longest; from 0 if nothing is negative, else from the lowest."""
    means = [r["mean"] for r in result["rows"]]
    low, high = min(0.0, *means), max(means)
    return 100.0 if high == low else round(100 * (row["mean"] - low) / (high - low), 1)


def safe_link(address: str) -> str:
    """The address if it is a web page, else nothing: result files may come from elsewhere."""
    return address if address.startswith(("https://", "http://")) else ""


def _copy_pictures(folder: Path, site: Path, slug: str, result: dict[str, Any]) -> None:
    checks.require(Path(slug).name == slug and slug not in ("", ".", "..", "index"), f"{slug!r} is no slug.")
    for name in result.get("pictures", ()):
        checks.require(
            Path(name).name == name and name.endswith(".png") and (folder / name).is_file(),
            f"result {slug!r} names the picture {name!r}, which is no .png file in {folder}.",
        )
        (site / "pictures").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, site / "pictures" / name)
