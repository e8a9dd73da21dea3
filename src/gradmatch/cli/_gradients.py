"""``gradmatch gradients``: per-example gradient features of a model and data, on disk for whoever reads them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradmatch.cli import _show
from gradmatch.cli._app import Stopped
from gradmatch.cli._distill import DATA_HELP, checked_device, complete_data, describe, load_data

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradmatch.core.problem import Problem
    from gradmatch.core.store import GradientStore

MODEL_HELP = "module:factory, convnet, mlp, or a Hugging Face folder."
TEXT_HELP = (
    " For a language model: a .txt or .jsonl file, a folder of them, or a saved Hugging Face data set."
)
POSITIONS = 256
"""Tokens of one example, unless the model reads fewer or --length says otherwise."""


def register(app: typer.Typer) -> None:
    app.command("gradients")(gradients)
    app.command("merge-gradients")(merge)


def gradients(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    source: Annotated[
        str, typer.Argument(metavar="DATA", help=DATA_HELP + TEXT_HELP, autocompletion=complete_data)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the store.")],
    weights: Annotated[
        Path | None, typer.Option("--weights", help="safetensors file with the state dict of MODEL.")
    ] = None,
    project: Annotated[
        int, typer.Option("--project", help="Numbers kept of each gradient, a multiple of 4; 0: all.")
    ] = 2048,
    params: Annotated[
        str | None,
        typer.Option("--params", metavar="REGEX", help="Parameters whose name matches; default all."),
    ] = None,
    part: Annotated[str, typer.Option("--split", help="train or test.")] = "train",
    limit: Annotated[int | None, typer.Option("--limit", help="Only so many examples, the first.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Examples at once; default 256, for language models 8.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", help=f"Tokens of one example; default {POSITIONS}, or what the model reads."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="A Hugging Face folder, or bytes; default that of MODEL."),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, float16, bfloat16 or float64 on disk.")
    ] = "float32",
    seed: Annotated[
        int, typer.Option("--seed", help="Of the projection, and of a network without --weights.")
    ] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes; default as many as cores where it pays.")
    ] = None,
    shard: Annotated[
        str, typer.Option("--shard", metavar="I/M", help="Only the I-th of M shares, for several machines.")
    ] = "1/1",
    size: Annotated[
        int | None, typer.Option("--size", help="Side to which a folder's images are brought.")
    ] = None,
) -> None:
    """Compute the gradient of every example's loss, projected, and keep it on disk.

    The same command goes on where a stopped one ended, and the bytes are the same. Inner products of the rows estimate
    those of the gradients. In Python: `GradientStore("DIR")[10:20]`.

    Examples: `gradmatch gradients mynet:make fashion-mnist --weights net.safetensors --out grads`,
    `gradmatch gradients gpt2-folder/ text.txt --params 'mlp' --out grads`,
    `gradmatch gradients mynet:make photos/ --size 32 --shard 1/2 --out half`
    """
    from gradmatch.core import checks
    from gradmatch.core.store import GradientStore

    share = _share(shard)
    for name, value in (("--limit", limit), ("--batch", batch), ("--length", length), ("--workers", workers)):
        if value is not None:
            checks.whole(name, value)
    checks.whole("--project", project, least=0)
    checks.one_of("--split", part, ("train", "test"))
    checked_device(device)
    network, loss, data = _problem(model, source, weights, part, length, tokenizer, seed, size)
    data = _first(data, limit)
    network = network.eval() if device is None else network.eval().to(device)
    problem = _made(network, loss, data, params, batch or (8 if loss == "next_token" else 256))
    _show.say(_how(problem, _made(network, loss, _first(data, 2), params, 2)))
    began = time.perf_counter()
    try:
        with _show.progress_bar("gradients") as advance:
            store = GradientStore.build(
                problem,
                out,
                project=project or None,
                seed=seed,
                dtype=dtype,
                part_rows=64 if loss == "next_token" else 512,  # a stopped run loses one part at most
                shard=share,
                workers=workers,
                progress=lambda done, of: advance(done, of, {}),
            )
    except KeyboardInterrupt:
        raise Stopped("stopped; the same command goes on from here") from None
    _report(store, time.perf_counter() - began)


def merge(
    shards: Annotated[list[Path], typer.Argument(metavar="SHARDS", help="Folders written with --shard.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the whole store.")],
) -> None:
    """Put the shards of one store together; the result equals the store of a run without shards.

    Example: `gradmatch merge-gradients half other --out grads`
    """
    from gradmatch.core.store import GradientStore

    _report(GradientStore.merge(out, *shards))


def _report(store: GradientStore, seconds: float | None = None) -> None:
    rows, width = store.shape
    there, parts = len(store.present()), len(store.manifest["parts"])
    took = "" if seconds is None else f" in {_show.minutes(seconds)}"
    typer.echo(f"{rows:,} x {width:,} gradients of {store.space.size:,} parameters in {store.path}{took}")
    if there < parts:
        typer.echo(f"{there} of {parts} parts; 'gradmatch merge-gradients' puts shards together")


def _share(text: str) -> tuple[int, int]:
    from gradmatch.core import checks

    number, _, of = text.partition("/")
    checks.require(
        number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of),
        f"--shard is {text!r}; it must be I/M with I from 1 to M, such as 1/2.",
    )
    return int(number) - 1, int(of)


def _problem(
    model: str,
    source: str,
    weights: Path | None,
    part: str,
    length: int | None,
    tokenizer: str | None,
    seed: int,
    size: int | None,
) -> tuple[nn.Module, str, Any]:
    """Model, loss and data."""
    from gradmatch.cli import _pretrained
    from gradmatch.core import checks

    pretrained = _pretrained.is_pretrained(model)
    checks.require(
        not pretrained or weights is None,
        "--weights is given, but MODEL is a Hugging Face folder with its own.",
    )
    network = _pretrained.load_model(model) if pretrained else None
    if network is not None and network.__class__.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return network, "next_token", _text(network, model, source, length, tokenizer)
    checks.require(
        network is None or network.__class__.__name__.endswith("ForImageClassification"),
        f"MODEL is a {type(network).__name__}; a Hugging Face folder must hold a causal language model or an image "
        "classifier, or pass module:factory.",
    )
    checks.require(
        length is None and tokenizer is None,
        "--length and --tokenizer are for language models in Hugging Face folders.",
    )
    split = load_data(source, size)
    _show.say(describe(split))
    examples = split.train if part == "train" else split.test
    if network is not None:
        return network, "cross_entropy", {"pixel_values": examples.x, "labels": examples.y}
    from gradmatch.cli._network import network_for, weighted
    from gradmatch.core.networks import build

    made = build(network_for(model, split.train), seed)
    if weights is None:
        _show.say(f"no --weights: the network is as {model} makes it with seed {seed}")
    return made if weights is None else weighted(made, weights), "cross_entropy", (examples.x, examples.y)


def _text(
    network: Any, model: str, source: str, length: int | None, tokenizer: str | None
) -> dict[str, Tensor]:
    """Token ids [n, T], and a mask where examples differ in length."""
    from gradmatch.cli import _pretrained
    from gradmatch.core import checks

    reads = getattr(network.config, "max_position_embeddings", None)
    positions = length or min(POSITIONS, reads or POSITIONS)
    checks.require(
        positions >= 2 and (reads is None or positions <= reads),
        f"--length is {positions}; it must be at least 2 and at most {reads}, which the model reads.",
    )
    rows = _saved_rows(source)
    if rows is not None and "input_ids" in rows.column_names:
        found = _padded([row[:positions] for row in rows["input_ids"]])
    else:
        encode = _encoder(tokenizer or model)
        if rows is not None:
            checks.require(
                "text" in rows.column_names,
                f"DATA has columns {rows.column_names}; it needs input_ids or text.",
            )
            found = _padded([encode(t)["input_ids"][:positions] for t in rows["text"]])
        else:
            found = {"input_ids": _pretrained.windows(encode, _pretrained.texts(source), positions, 2**40)}
    highest, known = int(found["input_ids"].max()), int(network.config.vocab_size)
    checks.require(highest < known, f"DATA has token {highest}; MODEL knows 0..{known - 1}.")
    return found


def _saved_rows(source: str) -> Any:
    """The rows of a data set saved by Hugging Face's ``save_to_disk`` (its training part), or None."""
    from gradmatch.core import checks

    folder = Path(source)
    if not any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return None
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise checks.InputError(f"DATA {source!r} needs 'pip install datasets'.") from error
    try:
        found: Any = load_from_disk(source)
    except Exception as error:  # the library raises many kinds; all mean that it cannot be read
        raise checks.InputError(f"DATA {source!r} is no readable data set: {error}.") from error
    return found.get("train", next(iter(found.values()))) if isinstance(found, dict) else found


def _encoder(name: str) -> Any:
    """What turns a text into {"input_ids": [...]}."""
    from gradmatch.cli import _pretrained
    from gradmatch.core import checks

    if name == "bytes":
        return lambda text, **_: {"input_ids": list(text.encode())}
    found = _pretrained.load_tokenizer(name, "--tokenizer")
    checks.require(  # transformers makes an empty one where a folder has no files for it
        found.get_vocab().keys() > set(found.all_special_tokens),
        f"{name!r} has no readable tokenizer; name a folder that has with --tokenizer, or pass --tokenizer bytes.",
    )
    return found


def _padded(rows: list[list[int]]) -> dict[str, Tensor]:
    import torch

    from gradmatch.core import checks

    short = [k for k, row in enumerate(rows) if len(row) < 2]
    checks.require(
        bool(rows) and not short,
        f"DATA has rows of fewer than 2 tokens: {checks.listing(short)}." if short else "DATA has no rows.",
    )
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row)
        mask[k, : len(row)] = 1
    return {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask}


def _first(data: Any, limit: int | None) -> Any:
    from torch.utils._pytree import tree_map

    return data if limit is None else tree_map(lambda t: t[:limit], data)


def _made(network: nn.Module, loss: str, data: Any, params: str | None, batch: int) -> Problem:
    import re

    from gradmatch.core import checks
    from gradmatch.core.problem import Problem

    try:
        re.compile(params or "")
    except re.error as error:
        raise checks.InputError(
            f"--params is {params!r}, which is no regular expression: {error}."
        ) from error
    return Problem(network, loss, data, select=params, batch_size=batch)


def _how(problem: Problem, few: Problem) -> str:
    """One line: how many parameters, and how many tensors a few examples' gradients were not read off one pass for."""
    from gradmatch.core.gradients import gradient_norms

    found = gradient_norms(few, return_tier=True)
    rest = f", {len(found.direct)} of them one by one" if found.direct else ""
    return f"{problem.n:,} examples, {problem.space.size:,} parameters in {len(problem.space)} tensors{rest}"
