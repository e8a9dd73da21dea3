"""``gradmatch transplant``: a language model that speaks another one's tokenizer, without training."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from gradmatch.cli import _show


def register(app: typer.Typer) -> None:
    app.command("transplant")(transplant)


def _complete(incomplete: str) -> list[str]:
    from gradmatch.weights._rebuild import METHODS

    return [m for m in METHODS if m.startswith(incomplete)]


def transplant(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Hugging Face folder of the model.")],
    donor: Annotated[
        str, typer.Argument(metavar="DONOR", help="Hugging Face folder whose tokenizer it gets.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    k: Annotated[
        str, typer.Option("--k", help="Shared tokens in a mix, or auto (asks hidden shared tokens).")
    ] = "64",
    method: Annotated[
        str, typer.Option("--method", help="omp, or a way it is compared with.", autocompletion=_complete)
    ] = "omp",
    by_angle: Annotated[
        bool, typer.Option("--by-angle/--raw", help="Choose tokens by angle, not by inner product.")
    ] = False,
    ridge: Annotated[float, typer.Option("--ridge", help="Shrinks the mixes; 0 to 1 or so.")] = 0.0,
    byte_match: Annotated[
        bool, typer.Option("--byte-match", help="Byte tokens may stand for characters.")
    ] = False,
    prefix_match: Annotated[
        bool, typer.Option("--prefix-match", help="Tokens may be copied from a prefix.")
    ] = False,
    drop_undertrained: Annotated[
        bool, typer.Option("--drop-undertrained", help="Leave out tokens that training hardly touched.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of random ways and hidden tokens.")] = 0,
) -> None:
    """Give a language model another model's tokenizer.

    Tokens that both have are copied, the others rebuilt as mixes of those. The folder loads with transformers; its
    transplant.json says what became of every token.

    Example: `gradmatch transplant llama/ qwen/ --k 64 --out llama-qwen`
    """
    from gradmatch.cli._merge import any_in
    from gradmatch.cli._pretrained import is_pretrained, load_tokenizer, require_transformers
    from gradmatch.core import checks
    from gradmatch.weights import transplant_folder

    require_transformers()
    for name, folder in (("BASE", base), ("DONOR", donor)):
        checks.require(is_pretrained(folder), f"{name} is {folder!r}; it must be a Hugging Face folder.")
        load_tokenizer(folder, name)
    checks.require(not any_in(out), f"--out {str(out)!r} is there already; name another.")
    count = k if k == "auto" else checks.whole("--k", k)
    began = time.perf_counter()
    with (
        warnings.catch_warnings(record=True) as notes,
        _show.progress_bar("writing", at_once=False) as advance,
    ):
        warnings.simplefilter("always", UserWarning)
        report = transplant_folder(
            base,
            donor,
            out,
            k=count,
            method=method,
            normalize_atoms=by_angle,
            ridge=ridge,
            byte_match=byte_match,
            prefix_match=prefix_match,
            drop_undertrained=drop_undertrained,
            seed=seed,
            progress=lambda done, total: advance(done, total, {}),
        )
    for note in notes:
        if issubclass(note.category, UserWarning):
            _show.say(f"note: {note.message}")
    rows = [
        ("copied", report.copied),
        (f"rebuilt by {report.method}", report.approximated),
        ("zero", report.zeroed),
    ]
    table = [(name, f"{len(tokens):,}", " ".join(repr(t) for t in tokens[-6:])) for name, tokens in rows]
    _show.table(
        f"{sum(len(t) for _, t in rows):,} tokens of the donor",
        ("tokens", "count", "such as"),
        table,
        wide=(2,),
    )
    words = f"k {report.k}, from {report.shared:,} shared tokens"
    if report.donor_error is not None and report.norm_ratio is not None:
        words += f"; relative error of the mixes in the donor {report.donor_error:.3f}"
        words += f", norm ratio {report.norm_ratio:.2f}"
    typer.echo(f"{words}; in {_show.minutes(time.perf_counter() - began)}")
    typer.echo(f"written: {out}")
