"""Packages that load their public names when used."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import gradmatch
from gradmatch import catalog
from gradmatch.core.lazy import lazily

FAMILIES = sorted({s.family for s in catalog.SYSTEMS if s.built})


def test_names_come_from_where_they_are_said_to_be() -> None:
    load, names = lazily("gradmatch.core", {"lazily": "lazy", "require": "gradmatch.core.checks"})
    assert load("lazily") is lazily
    assert load("require") is importlib.import_module("gradmatch.core.checks").require
    assert {"lazily", "require"} <= set(names())
    with pytest.raises(AttributeError, match=r"module 'gradmatch\.core' has no attribute 'nothing'"):
        load("nothing")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_public_name_of_a_family_loads_and_every_family_is_an_attribute(family: str) -> None:
    package = getattr(gradmatch, family)
    assert set(package._HOMES) == set(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))


def test_the_families_themselves_are_imported_without_torch() -> None:
    code = f"import sys\nfor f in {FAMILIES!r}: __import__('gradmatch.' + f)\nprint('torch' in sys.modules)"
    source = str(Path(gradmatch.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": source}
    )
    assert found.stdout.strip() == "False"
