"""``gradmatch search-optimizer``: evolution over optimizer programs on a small task of the user's data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradmatch.cli import _show
from gradmatch.cli._app import Stopped
from gradmatch.cli._distill import DATA_HELP, complete_data

if TYPE_CHECKING:
    from gradmatch.optim import Program, SearchResult
    from gradmatch.optim.program_search import MLPTask

STARTS = ("adamw", "lion", "momentum", "sgd")
ROWS = 1000
RATES = tuple(1e-4 * 1.4**k for k in range(29))


def register(app: typer.Typer) -> None:
    app.command("search-optimizer")(search_optimizer)


def search_optimizer(
    out: Annotated[Path, typer.Option("--out", help="Folder for the result.")],
    budget: Annotated[int, typer.Option("--budget", help="Programs to try.")] = 500,
    source: Annotated[
        str, typer.Option("--data", metavar="DATA", help=DATA_HELP, autocompletion=complete_data)
    ] = "digits",
    start: Annotated[
        str,
        typer.Option("--start", help="adamw, lion, momentum, sgd, or a file with a program's source."),
    ] = "adamw",
    strategy: Annotated[str, typer.Option("--strategy", help="evolution, random or chains.")] = "evolution",
    population: Annotated[int, typer.Option("--population", help="Programs alive.")] = 100,
    tournament: Annotated[int, typer.Option("--tournament", help="Programs drawn for each parent.")] = 25,
    max_len: Annotated[int, typer.Option("--max-len", help="Longest program.")] = 20,
    steps: Annotated[int, typer.Option("--steps", help="Updates of a run that scores a program.")] = 60,
    hidden: Annotated[int, typer.Option("--hidden", help="Width of the network that is trained.")] = 16,
    runs: Annotated[int, typer.Option("--runs", help="Runs of which a score is the mean.")] = 2,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak rate; default what suits the start best.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides everything drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    save_every: Annotated[
        float, typer.Option("--save-every", help="Seconds between the states that --resume goes on from.")
    ] = 2.0,
) -> None:
    """Search for an optimizer: programs are mutated, and live or die by how well they train a small network.

    Up to 1,000 training examples of DATA are split into those that a network of one hidden layer learns and those that
    score it. Writes best.py, simplified.py and result.json into the folder of --out and prints the program found.

    Examples: `gradmatch search-optimizer --budget 500 --out found`,
    `gradmatch search-optimizer --data fashion-mnist --start found/best.py --budget 2000 --out more`,
    `gradmatch search-optimizer --budget 500 --out found --resume`
    """
    from gradmatch.core import checks
    from gradmatch.core.cpu import threads
    from gradmatch.optim.program_search import STRATEGIES, ProgramSearch, tuned

    for name, value in (("--budget", budget), ("--population", population), ("--tournament", tournament)):
        checks.whole(name, value)
    checks.one_of("--strategy", strategy, STRATEGIES)
    checks.nonnegative("--save-every", save_every)
    program = _start(start)
    _require_free(out, resume)
    task, examination = _tasks(source, steps, hidden, runs, seed)
    with threads(1):  # operations are too small to share
        if lr is None:
            task = tuned(task, program, RATES)
            _show.say(f"peak rate {task.lr:.4g} suits {start} best, of {len(RATES)} tried")
        else:
            task = task.with_lr(lr)
        search = ProgramSearch(
            program,
            tasks=task,
            population=population,
            tournament=min(tournament, population),
            max_len=max(max_len, len(program)),
            strategy=strategy,
            seed=seed,
        )
        try:
            with _show.progress_bar("searching", budget, at_once=False) as advance:
                found = search.run(budget, out=out, resume=resume, save_every=save_every, progress=advance)
        except KeyboardInterrupt as stop:
            raise Stopped(f"stopped by Ctrl-C; the same command with --resume goes on from {out}") from stop
        _report(out, found, program, task, examination.with_lr(task.lr))


def _start(start: str) -> Program:
    from gradmatch.core import checks
    from gradmatch.optim import Program, programs

    if start in STARTS:
        return getattr(programs, start)()  # type: ignore[no-any-return]
    checks.require(
        Path(start).is_file(),
        f"--start is {start!r}; it must be one of {', '.join(STARTS)}, or a file with a program.",
    )
    try:
        return Program.parse(Path(start).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise checks.InputError(f"--start {start!r} is not a text file.") from error


def _require_free(out: Path, resume: bool) -> None:
    from gradmatch.core import checks

    checks.require(
        resume or not (out / "run.json").exists(),
        f"--out {str(out)!r} already holds a run; continue it with --resume or name another folder.",
    )


def _tasks(source: str, steps: int, hidden: int, runs: int, seed: int) -> tuple[MLPTask, MLPTask]:
    """What scores programs during the search, and the same with the two halves of the rows exchanged."""
    import torch

    from gradmatch.core.examples import Examples
    from gradmatch.datasets import load
    from gradmatch.optim.program_search import MLPTask

    train = load(source).train
    order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(seed))[:ROWS]
    x = train.x[order].float()
    x = (x - x.mean()) / x.std().clamp_min(1e-12)
    cut = (6 * len(order)) // 10
    parts = [Examples(x[own], train.y[order[own]], train.classes) for own in (slice(cut), slice(cut, None))]
    options = {"steps": steps, "hidden": hidden, "runs": runs}
    return (
        MLPTask(parts[0], parts[1], seed=seed, **options),
        MLPTask(parts[1], parts[0], seed=seed + 1, **options),
    )


def _report(out: Path, found: SearchResult, start: Program, task: MLPTask, examination: MLPTask) -> None:
    """Write the simplified program; print scores and source."""
    from gradmatch.core.store import write_bytes
    from gradmatch.optim.program_search import simplify

    short = simplify(found.best, task)
    write_bytes(out / "simplified.py", short.to_source().encode())
    rows = [
        (name, str(len(p.trimmed())), f"{task(p):.4f}", f"{examination(p):.4f}")
        for name, p in (("start", start), ("found", found.best), ("simplified", short))
    ]
    title = f"{len(found.history)} programs, {found.hit_rate:.0%} known from others that compute the same"
    _show.table(title, ("program", "statements", "loss it was chosen by", "loss on exchanged rows"), rows)
    typer.echo(short.to_source())
    typer.echo(f"written: {', '.join(str(out / f) for f in ('best.py', 'simplified.py', 'result.json'))}")
