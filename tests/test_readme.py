"""The README's Python runs as it stands, and its commands name options that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from typer.main import get_command

from gradmatch.cli import app

TEXT = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(gradmatch .*?)(?:  +#.*)?$", TEXT, re.MULTILINE)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) > 0.3  # ten images of ten classes; chance is 0.1
    assert (tmp_path / "small" / "synthetic.safetensors").is_file()


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_readme_are_accepted(line):
    program, name, *rest = shlex.split(line)
    command = get_command(app).commands[name]
    while isinstance(command, click.Group):
        name, *rest = rest
        command = command.commands[name]
    command.make_context(f"{program} {name}", rest)  # parses without running; refuses what does not exist


def test_the_readme_shows_commands():
    assert len(COMMANDS) >= 3
