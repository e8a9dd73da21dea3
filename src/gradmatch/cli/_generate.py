"""``gradmatch generate``: train a generator, sample it, compare schedules at equal network calls."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradmatch.cli import _show
from gradmatch.cli._app import Stopped
from gradmatch.cli._distill import DATA_HELP, checked_device, complete_data, load_data

if TYPE_CHECKING:
    import torch

    from gradmatch.cli._generator import Generator

METHODS, SCHEDULES = ("lfm",), ("uniform", "bellman")
SHEET = 64
_HEAD = ("schedule", "calls", "end-point error", "Frechet distance", "seconds", "times from noise")


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="Train generators and sample them in few network calls.", no_args_is_help=True)
    group.command("train")(train)
    group.command("sample")(sample)
    group.command("compare")(compare)
    app.add_typer(group, name="generate")


def train(
    source: Annotated[str, typer.Option("--data", help=DATA_HELP, autocompletion=complete_data)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the model.")],
    method: Annotated[str, typer.Option("--method", help="lfm: flow matching in latent space.")] = "lfm",
    steps: Annotated[int, typer.Option("--steps", help="Updates of the flow.")] = 3000,
    autoencoder_steps: Annotated[
        int,
        typer.Option("--autoencoder-steps", help="Updates of the autoencoder; 0 trains the flow on pixels."),
    ] = 1500,
    backbone: Annotated[str, typer.Option("--backbone", help="unet or dit.")] = "unet",
    width: Annotated[int, typer.Option("--width", help="Channels of the backbone.")] = 48,
    batch: Annotated[int, typer.Option("--batch", help="Images a step.")] = 128,
    lr: Annotated[float, typer.Option("--lr", help="Largest learning rate of the flow.")] = 2e-3,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Condition on class labels.")] = True,
    size: Annotated[
        int | None, typer.Option("--size", help="Side to which a folder's images are brought.")
    ] = None,
    sheet_every: Annotated[int, typer.Option("--sheet-every", help="Steps between sample sheets.")] = 500,
    save_every: Annotated[
        float, typer.Option("--save-every", help="Seconds between the states that --resume goes on from.")
    ] = 15.0,
    seed: Annotated[int, typer.Option("--seed", help="Decides everything drawn.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
) -> None:
    """Train a generator on images.

    An autoencoder is trained first, then the flow on its latents. A sheet of samples is written every so often. A run
    that was stopped or killed goes on with --resume and ends with the same weights.

    Example: `gradmatch generate train --method lfm --data fashion-mnist --out flow`
    """
    from gradmatch.cli._generator import Generator
    from gradmatch.core import checks

    checks.one_of("--method", method, METHODS)
    checks.whole("--sheet-every", sheet_every)
    checks.nonnegative("--save-every", save_every)
    checked_device(device)
    split = load_data(source, size)
    config = {
        "method": method,
        "data": source,
        "steps": steps,
        "autoencoder_steps": autoencoder_steps,
        "backbone": backbone,
        "width": width,
        "batch": batch,
        "lr": lr,
        "classes": split.classes if labels else 0,
        "shape": list(split.shape),
        "size": size,
        "seed": seed,
    }
    model = Generator(config, out, device)
    began = time.perf_counter()
    try:
        model.train(
            split.train, resume, save_every, lambda k: _sheet(model, k) if k % sheet_every == 0 else None
        )
    except KeyboardInterrupt as stop:
        raise Stopped(f"stopped by Ctrl-C; the same command with --resume goes on from {out}") from stop
    file = _sheet(model, steps)
    typer.echo(
        f"trained in {_show.minutes(time.perf_counter() - began)}; written: {out}, newest sheet {file}"
    )


def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A trained model.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the samples.")],
    steps: Annotated[int, typer.Option("--steps", help="Network calls for each image.")] = 8,
    schedule: Annotated[str, typer.Option("--schedule", help="uniform or bellman.")] = "uniform",
    n: Annotated[int, typer.Option("--n", help="Number of images.")] = 64,
    label: Annotated[int | None, typer.Option("--label", help="One class; default all in turn.")] = None,
    guidance: Annotated[
        float, typer.Option("--guidance", help="Of labels; 1 is none. Other values call the network twice.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
) -> None:
    """Draw images from a trained model.

    Writes samples.safetensors (images in [0, 1]) and samples.png.

    Example: `gradmatch generate sample flow --steps 8 --schedule bellman --n 64 --out samples`
    """
    from gradmatch.cli._generator import Generator
    from gradmatch.core import checks
    from gradmatch.core.store import save_tensors

    checks.one_of("--schedule", schedule, SCHEDULES)
    checks.whole("--steps", steps)
    model = Generator.load(folder, checked_device(device))
    labels = model.labels(checks.whole("--n", n), label)
    times = model.times(schedule, steps, guidance)
    began = time.perf_counter()
    found = model.flow.sample(model.noise(n, seed), labels, guidance, "euler", times=times)
    seconds = time.perf_counter() - began
    images = model.pixels(found.images)
    facts = {"times": times.tolist(), "seed": seed, "guidance": guidance, "calls": int(found.nfe[0])}
    save_tensors(out / "samples.safetensors", {"images": images}, facts)
    file = model.picture([images[:SHEET]], out / "samples.png")
    typer.echo(
        f"{n} images, {int(found.nfe[0])} network calls each, {_show.minutes(seconds)}; written: "
        f"{out / 'samples.safetensors'}, {file}"
    )


def compare(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A trained model.")],
    schedules: Annotated[
        str, typer.Option("--schedules", help="Of uniform and bellman.")
    ] = "uniform,bellman",
    steps: Annotated[str, typer.Option("--steps", help="Numbers of network calls.")] = "2,4,8",
    n: Annotated[int, typer.Option("--n", help="Images for each row.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise, the same for all rows.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
) -> None:
    """Compare schedules at equal network calls: a table, and the same noises side by side.

    The end-point error is against 100 uniform steps; the Frechet distance to test images is in the features of the
    shipped judge for Fashion-MNIST and in 32 principal components for other data. Writes compare.json and compare.png.

    Example: `gradmatch generate compare flow --schedules uniform,bellman --steps 2,4,8`
    """
    from gradmatch.cli._generator import Generator
    from gradmatch.core import checks
    from gradmatch.core.store import write_json

    names = [checks.one_of("--schedules", s.strip(), SCHEDULES) for s in schedules.split(",")]
    counts = [checks.whole("--steps", k.strip(), 1, 100) for k in steps.split(",")]
    checks.whole("--n", n, 33)
    model = Generator.load(folder, checked_device(device))
    distance, where = model.distance()
    z, labels = model.noise(n, seed), model.labels(n)
    fine = model.flow.sample(z, labels, 1.0, "euler", 100)
    rows, strips = [], [model.pixels(fine.images[:10])]
    todo = [(name, k) for k in counts for name in names]
    with _show.progress_bar("comparing") as advance:
        for done, (name, k) in enumerate(todo):
            times, began = model.times(name, k), time.perf_counter()
            found = model.flow.sample(z, labels, 1.0, "euler", times=times)
            seconds = time.perf_counter() - began
            rows.append(_row(name, times, found, fine.images, distance(model.pixels(found.images)), seconds))
            strips.append(model.pixels(found.images[:10]))
            advance(done + 1, len(todo), {})
    file = write_json(folder / "compare.json", {"n": n, "seed": seed, "frechet": where, "rows": rows})
    picture = model.picture(strips, folder / "compare.png")
    table = [_cells(r) for r in rows]
    table.append(["100 uniform steps", "100", "0", f"{distance(model.pixels(fine.images)):.3g}", "", ""])
    _show.table(f"{n} images; Frechet distance in {where}", _HEAD, table, wide=(5,))
    typer.echo(f"written: {file}, {picture} (first row: 100 steps, then the rows of the table)")


def _row(
    name: str, times: torch.Tensor, found: Any, fine: torch.Tensor, distance: float, seconds: float
) -> dict[str, Any]:
    error = (found.images - fine).flatten(1).square().sum(1).mean().sqrt()
    return {
        "schedule": name,
        "calls": int(found.nfe[0]),
        "times": times.tolist(),
        "error": float(error),
        "frechet": distance,
        "seconds": seconds,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    times = " ".join(f"{1 - t:.2f}" for t in row["times"])
    return [
        row["schedule"],
        str(row["calls"]),
        f"{row['error']:.3g}",
        f"{row['frechet']:.3g}",
        f"{row['seconds']:.1f}",
        times,
    ]


def _sheet(model: Generator, step: int) -> Path:
    """A sheet of samples by the weights of now, always of the same noises."""
    found = model.flow.sample(model.noise(SHEET, 0), model.labels(SHEET), 1.0, "heun", 10)
    return model.picture([model.pixels(found.images)], model.folder / f"sheet-{step:06d}.png")
