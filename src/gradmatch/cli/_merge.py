"""``gradmatch merge`` and ``gradmatch fisher``: several models on disk become one, without training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradmatch.cli import _show
from gradmatch.cli._app import Stopped

if TYPE_CHECKING:
    from torch import nn

METHODS = ("average", "fisher", "permute")
FISHER = "fisher.safetensors"


def register(app: typer.Typer) -> None:
    app.command("merge")(merge)
    app.command("fisher")(fisher)


def merge(
    models: Annotated[
        list[str],
        typer.Argument(metavar="A B [C ...]", help="Hugging Face folders or .safetensors; A is the target."),
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder, or a .safetensors file.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="average, fisher (needs --fisher), or permute (units of the others matched to A's, then averaged).",
            autocompletion=lambda incomplete: [m for m in METHODS if m.startswith(incomplete)],
        ),
    ] = "average",
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="0.5,0.5", help="One for each; default equal.")
    ] = None,
    fishers: Annotated[
        str | None,
        typer.Option("--fisher", metavar="DIR,DIR", help="Of `gradmatch fisher`, one for each model."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep", metavar="REGEX", help="Parameters that stay A's (heads), such as '^classifier'."
        ),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize/--raw", help="Divide each weight by the norm of its Fisher.")
    ] = True,
    floor: Annotated[float, typer.Option("--floor", help="Least Fisher value of A.")] = 1e-6,
    buffers: Annotated[
        str, typer.Option("--buffers", help="Batch-norm statistics: target (A's) or average.")
    ] = "target",
    shard_gb: Annotated[float, typer.Option("--shard-gb", help="Most gigabytes in a file.")] = 5.0,
) -> None:
    """Merge models of one architecture that come from one initialisation (or are permuted to one).

    Files are read and written piece by piece, so that memory does not grow with the models. The folder gets A's
    configuration and tokenizer, and loads with transformers.

    Examples: `gradmatch merge rte/ mnli/ --keep '^classifier' --weights 0.7,0.3 --out merged`,
    `gradmatch merge rte/ mnli/ --method fisher --fisher rte-fisher,mnli-fisher --out merged`
    """
    from gradmatch.core import checks
    from gradmatch.core.state_dicts import open_state_dict
    from gradmatch.weights import merge as merged

    checks.one_of("--method", method, METHODS)
    checks.require(len(models) > 1, f"merge is given {len(models)} model; it needs at least two.")
    checks.require(
        (method == "fisher") == (fishers is not None),
        f"--method is {method} and --fisher is {'given' if fishers is not None else 'not'}; they belong together.",
    )
    lambdas = None if weights is None else [checks.number("--weights", w) for w in weights.split(",")]
    checks.require(not out.exists() or not any_in(out), f"--out {str(out)!r} is there already; name another.")
    checks.positive("--shard-gb", shard_gb)
    sources: list[Any] = [open_state_dict(m) for m in models]
    began = time.perf_counter()
    if method == "permute":
        from gradmatch.cli._permute import permuted

        sources = permuted(models, sources)
    with _show.progress_bar("merging", at_once=False) as advance:
        merged(
            sources,
            None if fishers is None else fishers.split(","),
            lambdas,
            normalize=normalize,
            floor=floor,
            mergeable=kept_out(keep),
            buffers=buffers,
            out=out,
            shard_bytes=shard_gb * 1e9,
            progress=lambda done, total: advance(done, total, {}),
        )
    size = sum(s.nbytes for s in sources[0].specs.values())
    say = f"merged {len(models)} models of {len(sources[0])} tensors, {size / 1e9:.3g} GB, by {method}"
    typer.echo(f"{say}, in {_show.minutes(time.perf_counter() - began)}")
    typer.echo(f"written: {out}")


def any_in(path: Path) -> bool:
    """Whether a file is there, or a folder that is not empty."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def kept_out(keep: str | None) -> Any:
    """The filter of what is merged: all but the names in which the expression is found."""
    if keep is None:
        return None
    from gradmatch.weights._merging import chosen

    of_target = chosen(keep)
    return lambda name: not of_target(name)


def fisher(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face folder, or module:factory with --weights.")
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data", help="Text (.txt, .jsonl, folder of them), or labelled images as for `distill`."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the result.")],
    weights: Annotated[
        Path | None, typer.Option("--weights", help="A .safetensors file for module:factory.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", help="exact, sample or empirical; default exact, for language models sample."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", help="Labels drawn for each example, with sample.")
    ] = 1,
    examples: Annotated[
        int, typer.Option("--examples", help="Most examples, windows of text or images.")
    ] = 4096,
    length: Annotated[int, typer.Option("--length", help="Tokens in a window of text.")] = 128,
    params: Annotated[
        str | None, typer.Option("--params", metavar="REGEX", help="Only these parameters.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Examples at once.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Decides labels and masks drawn.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
) -> None:
    """How much a model's predictions depend on each parameter: the diagonal of its Fisher information.

    Writes fisher.safetensors, which `gradmatch merge --method fisher` reads.

    Examples: `gradmatch fisher rte/ --data rte.jsonl --out rte-fisher`,
    `gradmatch fisher mynet:make --weights net.safetensors --data photos/ --out net-fisher`
    """
    from gradmatch.cli._distill import checked_device
    from gradmatch.core import checks
    from gradmatch.core.store import RunFolder, save_tensors
    from gradmatch.weights import fisher_diagonal

    for name, value in (
        ("--samples", samples),
        ("--examples", examples),
        ("--length", length),
        ("--batch", batch),
    ):
        checks.whole(name, value)
    if labels is not None:
        checks.one_of("--labels", labels, ("exact", "sample", "empirical"))
    device = checked_device(device)
    network, batches, language = read(model, weights, data, examples, length, seed)
    kind = labels or ("sample" if language else "exact")
    settings = {
        "model": model, "weights": str(weights), "data": data, "labels": kind, "samples": samples, "examples": examples,
        "length": length, "params": params, "batch": batch, "seed": seed,
    }  # fmt: skip
    run = RunFolder(out, settings, resume)
    began = time.perf_counter()
    try:
        with _show.progress_bar("examples", at_once=False) as advance:
            found = fisher_diagonal(
                network.to(device) if device else network,
                batches,
                n_examples=examples,
                labels=kind,
                n_samples=samples,
                params=params,
                seed=seed,
                batch_size=batch,
                run=run,
                progress=lambda done, total: advance(done, total, {}),
            )
    except KeyboardInterrupt as stop:
        raise Stopped("stopped by Ctrl-C; the same command with --resume goes on") from stop
    run.finish(lambda folder: save_tensors(folder / FISHER, found))
    count = sum(t.numel() for t in found.values())
    typer.echo(
        f"Fisher diagonal ({kind} labels) of {count:,} parameters in {_show.minutes(time.perf_counter() - began)}"
    )
    typer.echo(f"written: {out / FISHER}")


def read(
    model: str, weights: Path | None, data: str, examples: int, length: int, seed: int
) -> tuple[nn.Module, Any, bool]:
    """The network, its data, and whether it predicts tokens."""
    from gradmatch.cli import _pretrained
    from gradmatch.core import checks

    if not _pretrained.is_pretrained(model):
        network, examples_ = own_network(model, weights, data)
        return network, (examples_.x, examples_.y), False
    checks.require(weights is None, "--weights is given, but MODEL is a folder that has its own.")
    network = _pretrained.load_model(model)
    kind = type(network).__name__
    if kind.endswith("ForImageClassification"):
        from gradmatch.cli._distill import load_data

        train = load_data(data, None).train
        return network, {"pixel_values": train.x, "labels": train.y}, False
    tokenizer = _pretrained.load_tokenizer(model)
    most = getattr(network.config, "max_position_embeddings", None)
    length = min(length, most) if isinstance(most, int) and most > 0 else length
    if kind.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        ids = _pretrained.windows(tokenizer, _pretrained.texts(data), length, examples)
        batch = (
            _pretrained.masked(ids, tokenizer, seed) if kind.endswith("ForMaskedLM") else {"input_ids": ids}
        )
        return network, batch, True
    checks.require(
        kind.endswith("ForSequenceClassification"),
        f"MODEL is a {kind}; Fisher is taken of language models and of classifiers of texts or images.",
    )
    return network, _pretrained.padded(tokenizer, _pretrained.texts(data), length, examples), False


def own_network(model: str, weights: Path | None, data: str) -> tuple[nn.Module, Any]:
    """A user's network with its weights, and the training examples."""
    from gradmatch.cli._distill import load_data
    from gradmatch.cli._network import network_for
    from gradmatch.core import checks
    from gradmatch.core.networks import build
    from gradmatch.core.state_dicts import open_state_dict

    checks.require(":" in model, f"MODEL is {model!r}; it must be a Hugging Face folder or module:factory.")
    checks.require(weights is not None, f"MODEL is {model!r}, which has no weights; give them by --weights.")
    train = load_data(data, None).train
    network = build(network_for(model, train), 0)
    try:
        network.load_state_dict(open_state_dict(weights, "--weights").tensors())
    except RuntimeError as error:
        raise checks.InputError(
            f"--weights {str(weights)!r} do not fit MODEL: {' '.join(str(error).split())[:200]}."
        ) from error
    return network, train
