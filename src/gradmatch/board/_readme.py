"""The README's part that comes from results: the table of what is built, and what is not yet."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gradmatch import catalog
from gradmatch.board._site import measured
from gradmatch.core import checks
from gradmatch.core.store import write_bytes

BEGIN, END = "<!-- results -->", "<!-- /results -->"
"""The lines of a README between which ``gradmatch board --readme`` puts the table."""
TABLE = "fashion-mnist-table"
_LONG = 150
_COUNT = re.compile(
    r"Conditions met: (\d+ of \d+)(?: \([^)]*\)|; not met: [^.]*)?[.;]?\s*"
    r"|(\d+ of \d+) conditions met(?: \([^)]*\)|, not [^.]*)?[.;:]?\s*"
)


def update_readme(readme: str | Path, results: str | Path | None = None) -> bool:
    """Write the table between the two marks anew; says whether anything changed.

    Raises:
        InputError: the file is missing or lacks the two marks.
    """
    path = Path(readme)
    checks.require(path.is_file(), f"--readme is {str(path)!r}; there is no such file.")
    before = path.read_text(encoding="utf-8")
    head, begin, rest = before.partition(f"{BEGIN}\n")
    _, end, tail = rest.partition(END)
    checks.require(
        bool(begin and end), f"--readme {str(path)!r} needs a line {BEGIN} and a line {END} after it."
    )
    after = head + begin + readme_table(results) + end + tail
    if after != before:
        write_bytes(path, after.encode())
    return after != before


def readme_table(results: str | Path | None = None) -> str:
    """Markdown: built systems with their verdicts, the Fashion-MNIST table, and the systems not built yet."""
    found = catalog.results(results)
    built = [s for s in catalog.SYSTEMS if s.built]
    lines = ["| system | the paper's claim | here it | because |", "|---|---|---|---|"]
    for s in built:
        result = found.get(s.slug)
        verdict = catalog.verdict(s, found)
        shown = f"[**{verdict}**](results/{s.slug}.json)" if result else verdict
        reason = _cell(_because(result["reason"])) if result else f"run `gradmatch evidence {s.slug}`"
        lines.append(f"| [{s.slug}](docs/systems/{s.slug}.md) | {_cell(s.claim)} | {shown} | {reason} |")
    if TABLE in found:
        lines += ["", *_table(found[TABLE])]
    waiting = [s for s in catalog.SYSTEMS if not s.built]
    if waiting:
        lines += ["", f"**{len(waiting)} of the {len(catalog.SYSTEMS)} systems are not built yet:**"]
        for family in catalog.families():
            slugs = [s.slug for s in waiting if s.family == family]
            lines += [
                f"{family} ({', '.join(slugs)})" + ("," if family != waiting[-1].family else ".")
            ] * bool(slugs)
    return "\n".join(lines) + "\n"


def _table(result: dict[str, Any]) -> list[str]:
    """A row for each method, a column for each size; rows that name no size stand in the last column."""
    parts = {r["method"]: re.fullmatch(r"(.*), (\d+ per class)", r["method"]) for r in result["rows"]}
    sizes = list(dict.fromkeys(m[2] for m in parts.values() if m)) or ["measured"]
    cells: dict[str, dict[str, str]] = {}
    for r in result["rows"]:
        found = parts[r["method"]]
        name, size = (found[1], found[2]) if found else (r["method"], sizes[-1])
        notes = ", ".join(r["cost"].split("; ")[:2])
        cells.setdefault(name, {})[size] = _cell(f"{measured(r)} ({notes})" if notes else measured(r))
    lines = [f"{result['title']} ({result['metric']}; {result['verdict']}: {_cell(result['reason'])})", ""]
    lines += [f"| method | {' | '.join(sizes)} |", "|---" * (1 + len(sizes)) + "|"]
    return lines + [
        f"| {_cell(name)} | {' | '.join(row.get(size, '') for size in sizes)} |"
        for name, row in cells.items()
    ]


def _because(reason: str) -> str:
    """How many conditions are met and the first figures of a reason; the result file and the site have all of it."""
    count = _COUNT.search(reason)
    rest = reason if count is None else f"{reason[: count.start()]}{reason[count.end() :]}"
    rest = rest.strip(" ;:,.")
    clauses, shown = re.split(r"(?<=[;.])\s+", rest), ""
    for clause in clauses:
        if shown and len(shown) + len(clause) >= _LONG:
            break
        shown = f"{shown} {clause}".strip()
    if len(shown) > _LONG:
        shown = shown[:_LONG].rpartition(", ")[0] + ", ..."
    met = "" if count is None else f"{count[1] or count[2]} conditions met"
    whole = ". ".join(
        part for part in (met, shown.rstrip(" ;:,") if not shown.endswith("...") else shown) if part
    )
    return whole if whole.endswith(".") else whole + "."


def _cell(text: str) -> str:
    """Text that cannot break a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
