"""The catalog: sixty-six rows that agree with the design, and rooms where every built system says they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from gradmatch import catalog
from gradmatch.core.checks import InputError

ROOT = Path(__file__).resolve().parents[1]
BUILT = [s for s in catalog.SYSTEMS if s.built]
IN_FAMILY = {
    "data": 8,
    "optim": 9,
    "solve": 3,
    "analysis": 7,
    "weights": 5,
    "adapt": 5,
    "embed": 7,
    "explain": 3,
    "generate": 12,
    "vision": 7,
}


def test_sixty_six_systems_in_ten_families():
    assert len(catalog.SYSTEMS) == 66
    assert len({s.slug for s in catalog.SYSTEMS}) == 66
    assert Counter(s.family for s in catalog.SYSTEMS) == IN_FAMILY
    assert catalog.families() == tuple(IN_FAMILY)


@pytest.mark.parametrize("system", catalog.SYSTEMS, ids=lambda s: s.slug)
def test_a_row_is_complete_and_well_formed(system):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", system.slug)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", system.arxiv)
    assert system.title.strip()
    assert system.paper.strip()
    assert system.claim.endswith(".")
    assert len(system.claim) <= 110
    assert system.entry == catalog.NOT_YET or system.entry.startswith(f"gradmatch.{system.family}.")


@pytest.mark.parametrize("system", BUILT, ids=lambda s: s.slug)
def test_a_built_entry_point_exists(system):
    assert callable(system.load())


@pytest.mark.parametrize("room", ["source", "evidence", "test", "race", "result", "page"])
@pytest.mark.parametrize("system", BUILT, ids=lambda s: s.slug)
def test_a_built_system_has_its_room(system, room):
    path = system.rooms()[room]
    assert (ROOT / path).is_file(), f"{system.slug} is built but has no {path}"


def test_what_has_a_source_is_listed_as_built():
    for system in catalog.SYSTEMS:
        assert system.built == (ROOT / system.rooms()["source"]).is_file(), system.slug


def test_find_names_near_slugs():
    assert catalog.find("DCC").slug == "dcc"
    with pytest.raises(InputError, match="did you mean lion"):
        catalog.find("lino")
    with pytest.raises(InputError, match="gradmatch list"):
        catalog.find("xyzzy")


def test_an_unbuilt_system_says_so():
    unbuilt = next(s for s in catalog.SYSTEMS if not s.built)
    assert catalog.verdict(unbuilt, {}) == "not yet"
    with pytest.raises(InputError, match="not built yet"):
        unbuilt.load()


def test_verdicts_are_read_from_result_files(tmp_path):
    row = {"slug": "dcc", "verdict": "holds in part", "rows": [], "metric": "accuracy (%)"}
    (tmp_path / "dcc.json").write_text(json.dumps(row))
    found = catalog.results(tmp_path)
    assert catalog.verdict(catalog.find("dcc"), found) == "holds in part"
    assert catalog.verdict(catalog.find("dq"), found) == "no result yet"


@pytest.mark.parametrize("text", ["{", "[]", '{"slug": "dcc"}'])
def test_a_broken_result_file_is_refused(tmp_path, text):
    (tmp_path / "dcc.json").write_text(text)
    with pytest.raises(InputError, match="not a result file"):
        catalog.results(tmp_path)
