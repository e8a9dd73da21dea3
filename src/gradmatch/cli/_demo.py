"""``gradmatch demo``: the main job on real data, within three minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradmatch.cli import _distill, _show

MARK = ".gradmatch-demo"
FILES = (
    "run.json",
    "state.safetensors",
    "synthetic.safetensors",
    "contact_sheet.png",
    "report.html",
    "summary.json",
)
CHOICES = ("auto", "digits", "fashion-mnist")
PER_CLASS, NETWORKS, WIDTH, EPOCHS = 10, 3, 32, 300


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the result; an earlier demo's is replaced.")
    ] = Path("demo"),
    source: Annotated[
        str, typer.Option("--data", help="auto (Fashion-MNIST where it can be had), digits or fashion-mnist.")
    ] = "auto",
    per_class: Annotated[int, typer.Option("--per-class", help="Learned images per class.")] = PER_CLASS,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of the recipe in all; default its own.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs of each evaluation network.")] = EPOCHS,
    seed: Annotated[int, typer.Option("--seed", help="Decides everything drawn.")] = 0,
) -> None:
    """Distil a real data set into a hundred images and see what networks learn from them.

    Examples: `gradmatch demo`, `gradmatch demo --data digits --out demo-digits`
    """
    from gradmatch.cli import _methods, _report
    from gradmatch.core import checks

    checks.one_of("--data", source, CHOICES)
    checks.whole("--epochs", epochs)
    maker = _methods.distiller("auto", per_class=per_class, steps=steps, seed=seed)
    _report.require_libraries()
    clear(out)
    split = _distill.load_data(choose(source), None)
    judge = _distill.network_of(None, split, WIDTH)
    _show.say(_distill.describe(split))
    learned, seconds, losses = _distill.learn(maker, split, None, out=out, resume=False, init=None)
    scores = _distill.compare(learned, split, judge, NETWORKS, epochs, seed)
    network = f"ConvNet of width {WIDTH}"
    _distill.finish(out, learned, split, scores, maker.describe(), seconds, losses, "auto", network)
    typer.echo(f"look at {out / 'report.html'}; your own data: gradmatch distill DATA --out FOLDER")


def choose(source: str) -> str:
    """Fashion-MNIST where its files are on this machine, else the digits; says which."""
    from gradmatch.datasets import find_fashion_mnist

    if source != "auto":
        return source
    if find_fashion_mnist() is not None:
        _show.say("demo on Fashion-MNIST")
        return "fashion-mnist"
    _show.say(
        "demo on scikit-learn's digits: Fashion-MNIST is not on this machine ('gradmatch data fashion-mnist' gets it)"
    )
    return "digits"


def clear(out: Path) -> None:
    """Make room for a demo: an earlier demo's files go, anything else is left and refused."""
    from gradmatch.core import checks
    from gradmatch.core.store import write_bytes

    checks.require(not out.exists() or out.is_dir(), f"--out is {str(out)!r}, a file; it must be a folder.")
    checks.require(
        (out / MARK).exists() or not any((out / f).exists() for f in FILES),
        f"--out {str(out)!r} holds results that no demo made; name another folder.",
    )
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    write_bytes(out / MARK, b"Made by 'gradmatch demo', which replaces the files of an earlier demo here.\n")
