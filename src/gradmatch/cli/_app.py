"""The program itself: exit codes, one-sentence errors, version, completion.

Exit codes: 0 done; 1 failed; 2 bad input or usage; 130 stopped by Ctrl-C. Errors are one sentence on stderr;
``gradmatch --debug COMMAND`` raises them with their traceback.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

_USAGE_ERROR = typer.BadParameter.__mro__[
    2
]  # click's own base class, which some versions of typer carry inside
FAILED, BAD_INPUT, STOPPED = 1, 2, 130


class Stopped(Exception):
    """Ctrl-C, with a sentence on how to go on."""


class Program(TyperGroup):
    """A group of commands whose every failure ends in one sentence and an exit code."""

    debugging = False

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command line; leaves by ``SystemExit``, whether the command succeeds or not."""
        _short_warnings()
        try:
            code = super().main(*args, **(extra | {"standalone_mode": False}))
        except typer.Abort:
            _leave("stopped", STOPPED)
        except Stopped as stop:
            _leave(str(stop), STOPPED)
        except Exception as error:
            if self.debugging:
                raise
            _leave(*_sentence(error))
        if code == STOPPED:
            _leave("stopped by Ctrl-C", STOPPED)
        sys.exit(code if isinstance(code, int) else 0)


def _leave(sentence: str, code: int) -> NoReturn:
    typer.echo(f"gradmatch: {sentence}{'' if sentence.endswith('?') else '.'}", err=True)
    sys.exit(code)


def _sentence(error: Exception) -> tuple[str, int]:
    """What to tell the user, and the exit code."""
    if isinstance(error, _USAGE_ERROR):
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "gradmatch"
        message = _line(error.format_message())  # type: ignore[attr-defined]
        return message if message.endswith("?") else f"{message}; see '{command} --help'", BAD_INPUT
    from gradmatch.core.checks import InputError

    if isinstance(error, InputError):
        return _line(str(error)), BAD_INPUT
    name = type(error).__name__
    return f"failed with {name}: {_line(str(error))}; 'gradmatch --debug ...' shows where", FAILED


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _short_warnings() -> None:
    """Warnings as one line without the code that raised them."""

    def shown(message: Any, category: Any, *_: Any, **__: Any) -> None:
        typer.echo(f"gradmatch: note: {_line(str(message))}.", err=True)

    warnings.showwarning = shown
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)


def _version(asked: bool) -> None:
    if asked:
        from gradmatch import __version__

        typer.echo(f"gradmatch {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Program,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: gradmatch demo. Results of every system: gradmatch list.",
)


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Align one thing with another by following gradients: distil and select training data, and more."""
    if isinstance(context.command, Program):
        context.command.debugging = debug
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
