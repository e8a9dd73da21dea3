"""``gradmatch spectrum``: the eigenvalues of a model's loss, as a picture and as numbers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradmatch.cli import _show
from gradmatch.cli._app import Stopped
from gradmatch.cli._distill import DATA_HELP, checked_device, command_line, complete_data
from gradmatch.cli._gradients import MODEL_HELP, TEXT_HELP

if TYPE_CHECKING:
    from torch import nn

    from gradmatch.analysis import Spectrum
    from gradmatch.core.problem import Problem

MODES = ("eval", "train")
EXAMPLES = 2000
"""Examples the loss is a mean over unless --examples says otherwise."""


def register(app: typer.Typer) -> None:
    app.command("spectrum")(spectrum)


def spectrum(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    source: Annotated[
        str,
        typer.Option("--data", metavar="DATA", help=DATA_HELP + TEXT_HELP, autocompletion=complete_data),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the result.")],
    weights: Annotated[
        Path | None, typer.Option("--weights", help="safetensors file with the state dict of MODEL.")
    ] = None,
    kind: Annotated[
        str,
        typer.Option("--kind", help="hessian, ggn, residual, fisher, sampled_fisher or empirical_fisher."),
    ] = "hessian",
    top: Annotated[int, typer.Option("--top", help="Largest eigenvalues wanted.")] = 20,
    bottom: Annotated[int, typer.Option("--bottom", help="Smallest eigenvalues wanted.")] = 3,
    density: Annotated[
        bool, typer.Option("--density/--no-density", help="The density of all eigenvalues, too.")
    ] = False,
    steps: Annotated[int, typer.Option("--steps", help="Lanczos steps of each probe of the density.")] = 100,
    probes: Annotated[int, typer.Option("--probes", help="Random vectors of the density.")] = 4,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="auto (whole matrices up to 4,000 parameters), exact, gram or lanczos."
        ),
    ] = "auto",
    params: Annotated[
        str | None,
        typer.Option("--params", metavar="REGEX", help="Parameters whose name matches; default all."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option("--mode", help="eval, or train: refused where dropout or batch norm is active then."),
    ] = "eval",
    part: Annotated[str, typer.Option("--split", help="train or test.")] = "train",
    examples: Annotated[
        int, typer.Option("--examples", help="Examples drawn for the loss; 0 takes all.")
    ] = EXAMPLES,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Examples at once; default 2000, for language models 8.")
    ] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens of one example.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="A Hugging Face folder, or bytes; default that of MODEL."),
    ] = None,
    tol: Annotated[
        float, typer.Option("--tol", help="Residual of the ends, relative to the largest.")
    ] = 1e-4,
    seed: Annotated[int, typer.Option("--seed", help="Decides everything drawn.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Side to which a folder's images are brought.")
    ] = None,
) -> None:
    """Show the eigenvalues of a model's loss: a few large ones, and the bulk around zero.

    Writes spectrum.png, spectrum.json and spectrum.safetensors. The model is taken in eval mode (dropout off, batch
    norm with its running statistics), in which the loss is a fixed function. The same command goes on where a stopped
    one ended.

    Examples: `gradmatch spectrum mynet:make --weights net.safetensors --data fashion-mnist --density --out DIR`,
    `gradmatch spectrum gpt2-folder/ --data text.txt --params 'mlp' --out DIR`
    """
    from gradmatch.core import checks

    checks.one_of("--mode", mode, MODES)
    checks.one_of("--split", part, ("train", "test"))
    for name, value, least in (("--top", top, 1), ("--examples", examples, 0), ("--seed", seed, 0)):
        checks.whole(name, value, least=least)
    checked_device(device)
    problem = _problem(
        model, source, weights, part, length, tokenizer, seed, size, mode, examples, batch, params, device
    )
    options = {
        "kind": kind,
        "method": method,
        "top": top,
        "bottom": bottom,
        "density": density,
        "steps": steps,
        "probes": probes,
        "tol": tol,
        "seed": seed,
    }
    about = {"model": model, "data": f"{source} ({part})", "parameters": params or "all", "mode": mode}
    began = time.perf_counter()
    found = _compute(problem, options, about, out)
    seconds = time.perf_counter() - began
    title = (
        f"{kind.replace('_', ' ').capitalize()} of {model}: {found.size:,} parameters, {found.n:,} examples"
    )
    files = found.save(out, title, about | {"settings": options, "command": command_line()})
    for file in out.glob("*.part.safetensors"):
        file.unlink()
    _tell(found, seconds)
    typer.echo(f"written: {', '.join(str(f) for f in files)}")


def _problem(
    model: str,
    source: str,
    weights: Path | None,
    part: str,
    length: int | None,
    tokenizer: str | None,
    seed: int,
    size: int | None,
    mode: str,
    examples: int,
    batch: int | None,
    params: str | None,
    device: str | None,
) -> Problem:
    from gradmatch.cli._gradients import _made
    from gradmatch.cli._gradients import _problem as of_model
    from gradmatch.core.checks import InputError

    network, loss, data = of_model(model, source, weights, part, length, tokenizer, seed, size)
    network = network if device is None else network.to(device)
    _set_mode(network, mode)
    try:
        return _made(
            network,
            loss,
            _drawn(data, examples, seed),
            params,
            batch or (8 if loss == "next_token" else 2000),
        )
    except InputError as error:
        if mode == "train" and "has active" in str(error):
            raise InputError(f"{str(error).rstrip('.')}; here that is --mode eval.") from error
        raise


def _set_mode(network: nn.Module, mode: str) -> None:
    """Bring the network into its mode, and say so where that makes a difference."""
    from gradmatch.core.networks import active_dropout, has_batchnorm

    network.train()
    kinds = [
        ("dropout off", bool(active_dropout(network))),
        ("batch norm as it stands", has_batchnorm(network)),
    ]
    network.train(mode == "train")
    if mode == "eval" and any(there for _, there in kinds):
        _show.say(f"eval mode: {' and '.join(name for name, there in kinds if there)}, as when predicting")


def _drawn(data: Any, count: int, seed: int) -> Any:
    """So many of the examples, drawn without replacement and kept in their order."""
    import torch
    from torch.utils._pytree import tree_leaves, tree_map

    n = len(tree_leaves(data)[0])
    if not count or count >= n:
        return data
    index = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    _show.say(f"{count:,} of {n:,} examples, drawn at random; --examples 0 takes all")
    return tree_map(lambda t: t[index], data)


def _compute(problem: Problem, options: dict[str, Any], about: dict[str, Any], out: Path) -> Spectrum:
    from gradmatch.analysis import spectrum as spectrum_of
    from gradmatch.core._gradient_store import identity
    from gradmatch.core.store import RunFolder

    known = identity(problem)  # parts of a run with other weights, statistics or data must not be taken over
    config = options | about | {"examples": problem.n, "weights": known["model"], "values": known["data"]}
    run = RunFolder(out, {"task": "spectrum"} | config, resume=True)
    _show.say(f"{problem.n:,} examples, {problem.space.size:,} parameters in {len(problem.space)} tensors")
    try:
        with _show.progress_bar("spectrum", at_once=False) as advance:
            return spectrum_of(
                problem, run=run, progress=lambda what, done, of: advance(done, of, {}), **options
            )
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on from its last finished part") from None


def _tell(found: Spectrum, seconds: float) -> None:
    report = found.report()
    rows = [
        ("largest", ", ".join(f"{v:.4g}" for v in found.top[:5].tolist())),
        ("smallest", "none below zero" if report["smallest"] is None else f"{report['smallest']:.4g}"),
        ("largest ratio of neighbours", f"{report['gap_ratio']:.3g}, after {report['gap_after']}"),
    ]
    if report["trace"] is not None:
        error = f" +- {report['trace_error']:.2g}" if report["trace_error"] else ""
        rows.append(("trace", f"{report['trace']:.4g}{error}"))
    if report["share_near_zero"] is not None:
        rows.append(("within 0.001 of the largest around 0", f"{report['share_near_zero']:.2%}"))
    rows.append(("loss", f"{report['loss']:.4g}"))
    rows.append(("how", f"{found.method}, {_show.minutes(seconds)}"))
    _show.table(f"{found.kind} of {found.size:,} parameters", ("", ""), rows, wide=(1,))
