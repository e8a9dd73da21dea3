"""The results as a static site and as the README's table; both are made from ``results/*.json`` alone."""

from __future__ import annotations

from gradmatch.board._links import broken_links
from gradmatch.board._readme import BEGIN, END, readme_table, update_readme
from gradmatch.board._site import build

__all__ = ["BEGIN", "END", "broken_links", "build", "readme_table", "update_readme"]
