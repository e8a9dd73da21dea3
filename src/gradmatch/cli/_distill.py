"""``gradmatch distill``: a data set learned down to a few images a class, and the proof of what they are worth."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradmatch.cli import _show
from gradmatch.cli._app import Stopped

if TYPE_CHECKING:
    from gradmatch.cli._score import Group, Score
    from gradmatch.core.networks import Network
    from gradmatch.data import SyntheticDataset
    from gradmatch.datasets import Split

DATA_HELP = (
    "digits, fashion-mnist, a folder of class folders of images, an .npz or .safetensors file with arrays, "
    "or a Hugging Face data set id."
)
NETWORK_HELP = "convnet, mlp, or module:factory (your own; also from the current folder)."


def register(app: typer.Typer) -> None:
    app.command("distill")(distill)


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    from gradmatch.cli._methods import METHODS

    return [(k, v) for k, v in METHODS.items() if k.startswith(incomplete)]


def complete_network(incomplete: str) -> list[str]:
    return [n for n in ("convnet", "mlp") if n.startswith(incomplete)]


def complete_data(incomplete: str) -> list[str]:
    return [n for n in ("digits", "fashion-mnist") if n.startswith(incomplete)]


def distill(
    source: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP, autocompletion=complete_data)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the result.")],
    method: Annotated[
        str,
        typer.Option(
            "--method", help="auto, dcc, dc, dsa, dsac, ftd or tesla.", autocompletion=complete_method
        ),
    ] = "auto",
    per_class: Annotated[int, typer.Option("--per-class", help="Learned images per class.")] = 10,
    network: Annotated[
        str | None,
        typer.Option("--network", help=NETWORK_HELP + " Default convnet.", autocompletion=complete_network),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option("--width", help="Width of convnet or mlp; default 32, with --budget full 128."),
    ] = None,
    budget: Annotated[
        str,
        typer.Option("--budget", help="small (a laptop) or full (the papers' settings; auto: ten minutes)."),
    ] = "small",
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of the method, in all.")] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs of each evaluation network.")] = 300,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other option of the method.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides everything drawn.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    save_every: Annotated[
        float, typer.Option("--save-every", help="Seconds between the states that --resume goes on from.")
    ] = 5.0,
    init: Annotated[Path | None, typer.Option("--init", help="Start from an earlier result.")] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Side to which a folder's images are brought.")
    ] = None,
    evaluate: Annotated[bool, typer.Option("--eval/--no-eval", help="Compare with real images.")] = True,
    networks: Annotated[int, typer.Option("--eval-networks", help="Networks, and random draws.")] = 3,
) -> None:
    """Distil a data set into a few learned images per class.

    Writes synthetic.safetensors, contact_sheet.png, report.html and summary.json into the folder of --out, and prints
    how well fresh networks do that are trained on the learned images, on as many random real ones, and on all.

    Examples: `gradmatch distill digits --per-class 1 --out small`,
    `gradmatch distill photos/ --size 32 --method dcc --network mynet:make --out small`,
    `gradmatch distill photos/ --size 32 --method dcc --network mynet:make --out small --resume`
    """
    from gradmatch.cli import _methods, _report
    from gradmatch.core import checks
    from gradmatch.data import SyntheticDataset

    maker = _methods.distiller(
        method,
        per_class=per_class,
        steps=steps,
        seed=seed,
        device=checked_device(device),
        budget=budget,
        settings=settings or (),
    )
    checks.whole("--epochs", epochs)
    checks.whole("--eval-networks", networks)
    checks.nonnegative("--save-every", save_every)
    start = None if init is None else SyntheticDataset.load(init)
    require_free(out, resume)
    _report.require_libraries()
    split = load_data(source, size)
    judge = network_of(network, split, (128 if budget == "full" else 32) if width is None else width)
    _show.say(describe(split))
    maker.checkpoint_seconds = save_every
    learned, seconds, losses = learn(
        maker, split, None if fits_auto(method, network, split) else judge, out=out, resume=resume, init=start
    )
    scores = compare(learned, split, judge, networks, epochs, seed, device) if evaluate else []
    finish(out, learned, split, scores, maker.describe(), seconds, losses, method, network, resume)


def checked_device(device: str | None) -> str | None:
    """The device, refused where this machine has none such."""
    import torch

    from gradmatch.core import checks

    if device is not None:
        try:
            torch.empty(1, device=device).add_(1)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            line = str(error).strip().splitlines()[0]
            raise checks.InputError(f"--device is {device!r}, which cannot be used here: {line}") from error
    return device


def require_free(out: Path, resume: bool) -> None:
    """Refuse a folder that holds a run, before data are loaded for another."""
    from gradmatch.core import checks

    checks.require(not out.exists() or out.is_dir(), f"--out is {str(out)!r}, a file; it must be a folder.")
    checks.require(
        resume or not any((out / part / "run.json").exists() for part in ("", "experts")),
        f"--out {str(out)!r} already holds a run; continue it with --resume or name another folder.",
    )


def load_data(source: str, size: int | None) -> Split:
    """The data, with the C library set up for the work that follows."""
    from gradmatch.core import checks
    from gradmatch.core.cpu import keep_freed_memory
    from gradmatch.datasets import load

    keep_freed_memory()
    if size is not None:
        checks.whole("--size", size, least=2)
        checks.require(
            Path(source).is_dir(), f"--size is {size}, but DATA is {source!r}; it is for folders of images."
        )
    return load(source, size=size)


def describe(split: Split) -> str:
    """One line about the data."""
    shape = " x ".join(str(d) for d in split.shape)
    return (
        f"{split.name}: {len(split.train):,} training and {len(split.test):,} test examples of {shape}, "
        f"{split.classes} classes"
    )


def network_of(spec: str | None, split: Split, width: int) -> Network:
    """The network that is trained on the result."""
    from gradmatch.cli._network import network_for

    return network_for(spec or "convnet", split.train, width)


def fits_auto(method: str, network: str | None, split: Split) -> bool:
    """Whether ``auto`` takes networks of its own, which it has for square images of at least 8 pixels."""
    shape = split.shape
    return method == "auto" and network is None and len(shape) == 3 and shape[1] == shape[2] >= 8


def learn(
    maker: Any,
    split: Split,
    network: Network | None,
    *,
    out: Path,
    resume: bool,
    init: SyntheticDataset | None,
) -> tuple[SyntheticDataset, float, list[tuple[int, float]]]:
    """Run the method with a bar; what it learned, the seconds it took, and the loss at every step."""
    losses: list[tuple[int, float]] = []
    began = time.perf_counter()
    try:
        with _show.progress_bar("distilling", maker.steps) as advance:

            def progress(done: int, steps: int, figures: Any) -> None:
                if "loss" in figures:
                    losses.append((done, float(figures["loss"])))
                advance(done, steps, figures)

            learned = maker.distill(
                split.train, network, out=out, resume=resume, init=init, progress=progress
            )
    except KeyboardInterrupt as stop:
        raise Stopped(f"stopped by Ctrl-C; the same command with --resume goes on from {out}") from stop
    return learned, time.perf_counter() - began, losses


def compare(
    learned: SyntheticDataset,
    split: Split,
    network: Network,
    networks: int,
    epochs: int,
    seed: int = 0,
    device: str | None = None,
) -> list[Score]:
    """The three rows: learned, as many random real images, all real images."""
    from gradmatch.cli import _score
    from gradmatch.data import random_subset

    draws = [random_subset(split.train, len(learned) // split.classes, seed + k) for k in range(networks)]
    groups = [
        _score.learned("distilled images", learned, networks, epochs),
        _score.drawn("random real images", draws, epochs),
        _score.everything(split.train, epochs),
    ]
    return score(groups, split, network, seed, device)


def score(
    groups: list[Group], split: Split, network: Network, seed: int, device: str | None = None
) -> list[Score]:
    """Measure the rows, with a bar over the networks."""
    from gradmatch.cli import _score

    with _show.progress_bar("evaluating networks") as advance:
        return _score.compare(
            groups, network, split.test, seed=seed, device=device, advance=lambda k, n: advance(k, n, {})
        )


def finish(
    out: Path,
    learned: SyntheticDataset,
    split: Split,
    scores: list[Score],
    settings: dict[str, Any],
    seconds: float,
    losses: list[tuple[int, float]],
    method: str,
    network: str | None,
    resumed: bool = False,
) -> None:
    """Write the report and print the table."""
    from gradmatch.cli import _report, _score

    ratio = len(split.train) / len(learned)
    took = _show.minutes(seconds) + (" in this part of a resumed run" if resumed else "")
    labels = "learned or smoothed probabilities" if learned.soft else "one class each"
    facts = {
        "method": method,
        "learned images": f"{len(learned)} ({len(learned) // learned.classes} per class), labels: {labels}",
        "compression": f"{ratio:,.0f} times fewer images than the {len(split.train):,} they were learned from",
        "distillation": took,
        "evaluation network": network or "convnet",
    }
    report = _report.Report(
        title=f"{split.name} in {len(learned)} images",
        data=describe(split),
        facts=facts,
        head=_score.HEAD,
        rows=[s.cells() for s in scores],
        summary={
            "method": method,
            "images": len(learned),
            "compression_ratio": ratio,
            "distillation_seconds": seconds,
            "rows": [s.facts() for s in scores],
        },
        settings=settings,
        command=command_line(),
        caption="A row a class: learned images on the left, real ones on the right, each stretched over its own range.",
        losses=losses,
    )
    files = _report.write(out, report, learned, split.train)
    if scores:
        _show.table(report.title, _score.HEAD, report.rows, wide=(4,))
    typer.echo(f"compression {ratio:,.0f} : 1; distillation took {took}")
    typer.echo(f"written: {', '.join(str(f) for f in [out / 'synthetic.safetensors', *files])}")


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["gradmatch", *sys.argv[1:]])
