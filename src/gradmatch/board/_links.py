"""Links of Markdown files that lead nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

_LINK = re.compile(r"\[[^\]]*\]\(\s*(?:<([^>\n]+)>|([^)\s]+))")
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def broken_links(paths: Iterable[str | Path]) -> list[str]:
    """Relative links, in the files or folders of Markdown given, whose file does not exist: "page.md: target".

    Addresses of the web and places within a page are not followed; code is not read.
    """
    pages: list[Path] = []
    for path in map(Path, paths):
        pages += sorted(path.rglob("*.md")) if path.is_dir() else [path]
    return [f"{page}: {target}" for page in pages for target in _targets(page) if not _leads(page, target)]


def _targets(page: Path) -> list[str]:
    if not page.is_file():
        return [str(page)]
    found = _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8")))
    return [quoted or plain for quoted, plain in found]


def _leads(page: Path, target: str) -> bool:
    if re.match(r"[a-z][a-z0-9+.-]*:", target) or target.startswith("#"):
        return True
    return (page.parent / unquote(target.split("#")[0])).exists()
