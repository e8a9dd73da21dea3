"""The site and the README's table: made from result files alone, and in step with them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gradmatch import board, catalog
from gradmatch.core.checks import InputError

ROOT = Path(__file__).resolve().parents[1]
RESULT = {
    "slug": "dcc",
    "title": "Contrastive <script>alert(1)</script> signals",
    "claim": "Contrastive beats class-wise.",
    "rule": "Holds if it does by two standard errors.",
    "verdict": "holds in part",
    "reason": "On digits | not on patches.",
    "metric": "accuracy (%)",
    "higher_is_better": True,
    "rows": [
        {"method": "dcc", "mean": 80.0, "std": 0.512, "values": [79.5, 80.5], "cost": "100 steps"},
        {"method": "random", "mean": 40.0, "std": 0.0, "values": [40.0], "cost": ""},
    ],
    "budget": "small",
    "seeds": 2,
    "wall_seconds": 90.0,
    "command": "gradmatch evidence dcc",
    "versions": {"torch": "2.13.0"},
    "pictures": ["dcc.png"],
    "links": {"page": "https://example.org/x", "bad": "javascript:alert(1)"},
}


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "dcc.json").write_text(json.dumps(RESULT))
    (folder / "dcc.png").write_bytes(b"png")
    table = RESULT | {"slug": "fashion-mnist-table", "title": "Table", "pictures": [], "verdict": "holds"}
    (folder / "fashion-mnist-table.json").write_text(json.dumps(table))
    return folder


@pytest.fixture
def site(results, tmp_path) -> Path:
    return board.build(tmp_path / "site", results).parent


class Links(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k in ("href", "src")]


def test_the_index_shows_all_systems_with_their_verdicts(site):
    text = (site / "index.html").read_text()
    rows = re.findall(r'<tr data-family="(.*?)" data-verdict="(.*?)"', text)
    assert len(rows) == 66
    assert ("data", "holds in part") in rows
    unbuilt = sum(not s.built for s in catalog.SYSTEMS)
    assert [v for _, v in rows].count("not yet") == unbuilt
    assert f"{unbuilt} not built yet" in text


def test_every_link_and_picture_of_the_site_exists(site):
    pages = list(site.glob("*.html"))
    assert len(pages) == 1 + 66 + 1
    for page in pages:
        for target in Links(page.read_text()).found:
            assert target.startswith("https://") or (site / target).is_file(), (page.name, target)


def test_a_page_shows_rows_rule_reason_and_command(site):
    text = (site / "dcc.html").read_text()
    for part in (
        "80 ± 0.51",
        "Holds if it does by two standard errors.",
        "gradmatch evidence dcc",
        "100 steps",
    ):
        assert part in text
    assert "40 ±" not in text  # one seed has no deviation
    assert 'style="--share: 50.0%"' in text


def test_result_files_cannot_put_code_into_the_site(site):
    text = (site / "dcc.html").read_text() + (site / "index.html").read_text()
    assert "<script>alert" not in text
    assert "javascript:" not in text


def test_an_unbuilt_page_says_so(site):
    unbuilt = next(s.slug for s in catalog.SYSTEMS if not s.built)
    assert "not built yet" in (site / f"{unbuilt}.html").read_text()


@pytest.mark.parametrize("picture", ["../secret.png", "missing.png", "dcc.json"])
def test_pictures_outside_the_folder_are_refused(results, tmp_path, picture):
    (tmp_path / "secret.png").write_bytes(b"png")
    (results / "dcc.json").write_text(json.dumps(RESULT | {"pictures": [picture]}))
    with pytest.raises(InputError, match="names the picture"):
        board.build(tmp_path / "site", results)


def test_a_slug_that_is_a_path_is_refused(results, tmp_path):
    (results / "dcc.json").write_text(json.dumps(RESULT | {"slug": "../dcc"}))
    with pytest.raises(InputError, match="is no slug"):
        board.build(tmp_path / "site", results)


def test_the_readme_table_shows_verdict_reason_and_figures(results):
    text = board.readme_table(results)
    assert "[**holds in part**](results/dcc.json) | On digits \\| not on patches. |" in text
    assert "| no result yet | run `gradmatch evidence dq` |" in text
    assert "| dcc | 80 ± 0.51 (100 steps) |" in text
    for system in catalog.SYSTEMS:
        assert re.search(rf"\b{system.slug}\b", text)


def test_sizes_are_columns_of_the_readmes_table(results):
    rows = [
        {"method": f"a, b, {n} per class", "mean": n, "std": 0.0, "values": [n], "cost": "2 s; soft; x"}
        for n in (1, 10)
    ]
    rows.append(rows[0] | {"method": "c, 10 per class", "cost": ""})
    table = RESULT | {"slug": "fashion-mnist-table", "rows": rows}
    (results / "fashion-mnist-table.json").write_text(json.dumps(table))
    text = board.readme_table(results)
    assert "| method | 1 per class | 10 per class |\n|---|---|---|\n" in text
    assert "| a, b | 1 (2 s, soft) | 10 (2 s, soft) |\n| c |  | 1 |\n" in text


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("Error 0.5; more. Conditions met: 6 of 7 (not 5).", "6 of 7 conditions met. Error 0.5; more."),
        ("3 of 5 conditions met (1, 2, 3). Error 0.5.", "3 of 5 conditions met. Error 0.5."),
        ("2 of 9 conditions met: a 1 of 2; b 1 of 7.", "2 of 9 conditions met. a 1 of 2; b 1 of 7."),
        ("Low: 3.5. " + "Long " * 40 + ".", "Low: 3.5."),
        ("a 1, " * 50, "a 1, " * 30 + "..."),
    ],
)
def test_a_reason_is_shortened_to_the_count_and_the_first_figures(results, reason, shown):
    (results / "dcc.json").write_text(json.dumps(RESULT | {"reason": reason}))
    assert f"(results/dcc.json) | {shown} |" in board.readme_table(results)


def test_the_readme_is_renewed_between_its_marks_only(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"top\n{board.BEGIN}\nstale line\n{board.END}\nbottom\n")
    assert board.update_readme(readme, results)
    assert readme.read_text() == f"top\n{board.BEGIN}\n{board.readme_table(results)}{board.END}\nbottom\n"
    assert not board.update_readme(readme, results)


@pytest.mark.parametrize("text", ["nothing", board.BEGIN + "\n", f"{board.END}\n{board.BEGIN}\n"])
def test_a_readme_without_its_marks_is_refused_and_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(InputError, match="needs a line"):
        board.update_readme(readme, tmp_path)
    assert readme.read_text() == text


def test_the_projects_readme_agrees_with_its_results():
    text = (ROOT / "README.md").read_text()
    found = text.split(board.BEGIN + "\n")[1].split(board.END)[0]
    assert found == board.readme_table(ROOT / "results"), "run: gradmatch board --readme README.md"


def test_the_site_of_the_projects_own_results_builds(tmp_path):
    assert board.build(tmp_path, ROOT / "results").is_file()


def test_broken_links_are_named(tmp_path):
    (tmp_path / "a.md").write_text(
        "[b](b.md) [c](<c d.md>) [d](<e f.md>) ![p](no.png) [w](https://x.org/y) [h](#part) [q](b.md#part)\n"
        "```\n[code](nowhere.md)\n```\n`[also](code.md)`\n"
    )
    (tmp_path / "b.md").write_text("[up](../missing.md)")
    (tmp_path / "c d.md").write_text("")
    found = board.broken_links([tmp_path])
    assert [f.split(": ")[1] for f in found] == ["e f.md", "no.png", "../missing.md"]
    assert board.broken_links([tmp_path / "gone.md"]) == [f"{tmp_path / 'gone.md'}: {tmp_path / 'gone.md'}"]


def test_the_projects_own_pages_have_no_broken_links():
    assert board.broken_links([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs"]) == []
