"""The sixty-six systems: what each is, who published it, where it lives here, and what it claims.

The rows are in ``catalog.toml`` beside this file; verdicts come from result files, never from here.
"""

from __future__ import annotations

import importlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmatch.core import checks

NOT_YET = "not yet"
NO_VERDICT = "no result yet"
VERDICTS = ("holds", "holds in part", "does not hold")


@dataclass(frozen=True)
class System:
    """One row of the catalog.

    Attributes:
        slug: its name on the command line, in ``results/`` and ``docs/systems/``.
        title, paper, arxiv: the publication; arxiv is an id such as "2202.02916", or empty.
        family: the package it lives in, such as "data".
        entry: its public name, such as "gradmatch.data.DCC", or "not yet".
        claim: what the paper says, in one line.
    """

    slug: str
    title: str
    paper: str
    arxiv: str
    family: str
    entry: str
    claim: str

    @property
    def built(self) -> bool:
        """Whether it can be used."""
        return self.entry != NOT_YET

    @property
    def module(self) -> str:
        """Its name in Python file names: a dash is an underscore."""
        return self.slug.replace("-", "_")

    @property
    def link(self) -> str:
        """Address of the paper, or empty."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def load(self) -> Any:
        """The public class or function.

        Raises:
            InputError: it is not built yet.
        """
        checks.require(self.built, f"{self.slug!r} is not built yet; 'gradmatch list --built' shows what is.")
        home, name = self.entry.rsplit(".", 1)
        return getattr(importlib.import_module(home), name)

    def rooms(self) -> dict[str, str]:
        """Where everything about it lives, as paths from the repository's root."""
        family, module = self.family, self.module
        return {
            "source": f"src/gradmatch/{family}/{module}.py",
            "evidence": f"src/gradmatch/evidence/{family}/{module}.py",
            "test": f"tests/{family}/test_{module}.py",
            "race": f"benchmarks/race_{module}.py",
            "result": f"results/{self.slug}.json",
            "page": f"docs/systems/{self.slug}.md",
        }


def _table() -> Iterator[System]:
    table = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    for family, rows in table.items():
        for slug, row in rows.items():
            yield System(slug=slug, family=family, **row)


SYSTEMS = tuple(_table())
"""All rows, family by family."""


def families() -> tuple[str, ...]:
    """The families in the order of the catalog."""
    return tuple(dict.fromkeys(s.family for s in SYSTEMS))


def find(slug: str) -> System:
    """The row of that slug.

    Raises:
        InputError: there is none; the message names near ones.
    """
    import difflib

    for system in SYSTEMS:
        if system.slug == slug.lower():
            return system
    near = difflib.get_close_matches(slug.lower(), [s.slug for s in SYSTEMS], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "'gradmatch list' shows all."
    return checks.refuse(f"SLUG is {slug!r}, which is no system of the catalog; {hint}")


def results_folder() -> Path:
    """``results`` of the present folder, else that of the source tree the package is run from."""
    here = Path("results")
    source = Path(__file__).resolve().parents[2] / "results"
    return here if here.is_dir() or not source.is_dir() else source


def results(folder: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """All result files of a folder by slug, in alphabetical order.

    Raises:
        InputError: a file that is no result.
    """
    return dict(_read(Path(folder) if folder is not None else results_folder()))


def _read(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(folder.glob("*.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise checks.InputError(f"{file} is not a result file: {error}.") from error
        checks.require(
            isinstance(found, dict) and {"slug", "verdict", "rows", "metric"} <= found.keys(),
            f"{file} is not a result file: it lacks slug, verdict, rows or metric.",
        )
        checks.one_of(f"verdict of {file}", found["verdict"], VERDICTS)
        yield found["slug"], found


def verdict(system: System, found: dict[str, dict[str, Any]]) -> str:
    """What the system's result says; "not yet" or "no result yet" where there is none."""
    if system.slug in found:
        return str(found[system.slug]["verdict"])
    return NO_VERDICT if system.built else NOT_YET
