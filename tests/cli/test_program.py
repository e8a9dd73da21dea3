"""Exit codes, one-sentence errors, help, version, completion; and the commands about the catalog and results."""

import json
import subprocess
import sys

import pytest

from gradmatch import __version__, catalog
from gradmatch.cli import _show
from gradmatch.cli._app import app
from gradmatch.core.checks import InputError
from gradmatch.evidence import _common

COMMANDS = ("list", "show", "demo", "distill", "select", "evidence", "board", "data")


@pytest.fixture
def results(here):
    """One recorded result."""
    result = _common.Result(
        "dcc",
        "A title",
        "a claim",
        "a rule",
        "holds in part",
        "a reason",
        "accuracy",
        (_common.Row("ours", (0.5, 0.7), "2 s"), _common.Row("random", (0.25,))),
    )
    _common.write_result(result, _common.Settings(out=here / "results"), 75.0)
    return here / "results"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"gradmatch {command}" in " ".join(result.stdout.replace("│", "").split())
    assert "Example" in result.stdout


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "gradmatch", "--version"], capture_output=True, text=True, check=True
    )
    assert __version__ in done.stdout


def test_version_and_bare_program(run):
    assert run("--version").stdout == f"gradmatch {__version__}\n"
    bare = run()
    assert bare.exit_code == 0
    assert all(c in bare.stdout for c in COMMANDS)


@pytest.mark.parametrize("words", [["distill", "--help"], ["list"], ["show", "dcc"]])
def test_help_and_catalogue_need_no_heavy_library(words):
    code = (
        "import sys; from gradmatch.cli import app\n"
        f"try: app({words})\n"
        "except SystemExit as e: assert e.code == 0\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["distil"], "No such command 'distil'"),
        (["show"], "Missing argument 'SLUG'"),
        (["show", "dccc"], "did you mean dcc"),
        (["list", "--family", "nope"], "--family is 'nope'"),
        (["list", "--verdict", "good"], "--verdict is 'good'"),
        (["list", "--wrong"], "No such option: --wrong"),
        (["evidence"], "needs a SLUG"),
        (["evidence", "nonsense"], "SLUG is 'nonsense'"),
        (["evidence", "pareto-da"], "not built yet"),
        (["evidence", "dcc", "--budget", "huge"], "budget is 'huge'"),
        (["evidence", "dcc", "--seeds", "0"], "seeds is 0"),
        (["evidence", "dcc", "--workers", "0"], "--workers is 0"),
        (["board", "--readme", "none.md"], "--readme is 'none.md'"),
        (["board", "--results", "none"], "'none' does not exist"),
        (["list", "--results", "none"], "'none' does not exist"),
        (["data", "imagenet"], "NAME is 'imagenet'"),
        (["demo", "--data", "imagenet"], "--data is 'imagenet'"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(refused, words, says):
    assert says in refused(*words)


def test_debug_raises_the_error_itself(run):
    result = run("--debug", "show", "dccc")
    assert isinstance(result.exception, InputError)


def test_other_failures_are_one_sentence_and_exit_code_1(run, monkeypatch):
    monkeypatch.setattr(catalog, "find", lambda slug: [][0])
    result = run("show", "dcc")
    assert result.exit_code == 1
    assert result.stderr == (
        "gradmatch: failed with IndexError: list index out of range; 'gradmatch --debug ...' shows where.\n"
    )


def test_list_is_one_line_a_system_when_piped(run, results):
    lines = run("list").stdout.splitlines()
    assert len(lines) == 66
    rows = {line.split("\t")[0]: line.split("\t") for line in lines}
    assert rows["dcc"][1:3] == ["data", "holds in part"]
    for system in catalog.SYSTEMS:
        assert (rows[system.slug][2] == "not yet") == (not system.built)


def test_list_filters(run, results):
    slugs = {line.split("\t")[0] for line in run("list", "--family", "data").stdout.splitlines()}
    assert slugs == {s.slug for s in catalog.SYSTEMS if s.family == "data"}
    assert [
        line.split("\t")[0] for line in run("list", "--verdict", "holds-in-part").stdout.splitlines()
    ] == ["dcc"]
    built = run("list", "--built").stdout
    assert len(built.splitlines()) == sum(s.built for s in catalog.SYSTEMS)
    assert "not yet" not in built


def test_list_is_a_table_on_a_terminal(run, monkeypatch):
    monkeypatch.setattr(_show, "interactive", lambda: True)
    assert "66 systems" in run("list").stdout


def test_show_tells_facts_and_the_recorded_result(run, results):
    text = run("show", "dcc").stdout
    for part in (
        "arXiv 2202.02916",
        "gradmatch.data.DCC",
        "0.6 ± 0.14",
        "0.25",
        "holds in part",
        "1 min 15 s",
    ):
        assert part in text
    waiting = next(entry for entry in catalog.SYSTEMS if not entry.built)
    assert "not yet built" in run("show", waiting.slug).stdout


def test_evidence_runs_and_records(run, here, monkeypatch):
    class Experiment:
        CLAIM, RULE = "it learns", "more than chance"

        @staticmethod
        def run(settings):
            row = _common.Row("ours", tuple(0.9 + 0.01 * s for s in settings.seed_list(2)))
            return _common.Result("dcc", "T", "it learns", "more", "holds", "it did", "accuracy", (row,))

    monkeypatch.setattr(_common, "experiments", lambda: ["dcc"])
    monkeypatch.setattr(_common, "experiment", lambda slug: Experiment)
    result = run("evidence", "--all", "--seeds", "3", "--quiet")
    assert result.exit_code == 0, result.stderr
    recorded = json.loads((here / "results" / "dcc.json").read_text())
    assert recorded["rows"][0]["values"] == pytest.approx([0.9, 0.91, 0.92])
    assert "0.91 ± 0.01" in result.stdout
    assert "verdict: holds" in result.stdout
    assert "written: results/dcc.json" in result.stdout


def test_board_writes_the_site_and_the_readme(run, results, here):
    from gradmatch.board import BEGIN, END

    (here / "README.md").write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    result = run("board", "--out", "site", "--readme", "README.md")
    assert result.exit_code == 0, result.stderr
    assert "holds in part" in (here / "site" / "dcc.html").read_text()
    text = (here / "README.md").read_text()
    assert "a reason" in text
    assert "stale" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_completion_offers_slugs_methods_and_networks():
    from gradmatch.cli._distill import complete_method, complete_network

    assert _show.complete_slug("dc") == [s.slug for s in catalog.SYSTEMS if s.slug.startswith("dc")]
    assert [name for name, _ in complete_method("d")] == ["dcc", "dc", "dsa", "dsac"]
    assert complete_network("c") == ["convnet"]


def test_completion_through_the_shell_protocol(monkeypatch, capsys):
    monkeypatch.setenv("_GRADMATCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "gradmatch show dc")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit):
        app(prog_name="gradmatch")
    assert "dcc" in capsys.readouterr().out.split()
