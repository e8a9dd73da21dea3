"""``gradmatch compress``: a trained network at a few bits a weight."""

from __future__ import annotations

import shutil
import time
import warnings
from pathlib import Path
from typing import Annotated

import typer

from gradmatch.cli import _show
from gradmatch.cli._app import Stopped

FILE = "compressed.safetensors"


def register(app: typer.Typer) -> None:
    app.command("compress")(compress)


def compress(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face folder, or module:factory with --weights.")
    ],
    data: Annotated[
        str, typer.Option("--data", help="A few hundred inputs: text, or images as for `distill`.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder for the result.")],
    bits: Annotated[int, typer.Option("--bits", help="Of a weight, 1 to 8.")] = 3,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="A .safetensors file for module:factory.")
    ] = None,
    groups: Annotated[int, typer.Option("--groups", help="Of neurons in a layer.")] = 4,
    variant: Annotated[
        str, typer.Option("--variant", help="codebooks or scales: what a group has.")
    ] = "codebooks",
    steps: Annotated[int, typer.Option("--steps", help="Of learning in a layer; 0: k-means alone.")] = 1000,
    examples: Annotated[int, typer.Option("--examples", help="Most inputs taken from the data.")] = 1024,
    length: Annotated[int, typer.Option("--length", help="Tokens in a window of text.")] = 128,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="The first and the last layer too, which else keep 16 bits.")
    ] = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="Also write OUT/dense, of full size, for transformers and others.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Decides groups and batches.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
) -> None:
    """Compress Linear and convolution layers to a few bits a weight, with codebooks learned on your data.

    OUT/compressed.safetensors loads with gradmatch.weights.CompressedModel.load; other libraries cannot read it, and
    get a plain copy of the same values by --dense.

    Examples: `gradmatch compress gpt2/ --bits 3 --data some.txt --out small --dense`,
    `gradmatch compress mynet:make --weights net.safetensors --bits 2 --data photos/ --out small`
    """
    from gradmatch.cli._distill import checked_device
    from gradmatch.cli._merge import any_in, read
    from gradmatch.cli._pretrained import is_pretrained
    from gradmatch.core import checks
    from gradmatch.core.state_dicts import companions, open_state_dict, write_state_dict
    from gradmatch.core.store import new_folder, write_json
    from gradmatch.weights import compress as compressed

    checks.whole("--bits", bits, 1, 8)
    for name, value in (("--groups", groups), ("--examples", examples), ("--length", length)):
        checks.whole(name, value)
    checks.require(not any_in(out), f"--out {str(out)!r} is there already; name another.")
    place = checked_device(device)
    network, inputs, _ = read(model, weights, data, examples, length, seed)
    began = time.perf_counter()
    try:
        with (
            _show.progress_bar("steps", at_once=False) as advance,
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.simplefilter("always")
            small, figures = compressed(
                network,
                inputs,
                bits=bits,
                groups=groups,
                variant=variant,
                steps=steps,
                examples=examples,
                keep_first_last=not all_layers,
                seed=seed,
                device=place,
                progress=lambda done, total: advance(done, total, {}),
            )
    except KeyboardInterrupt as stop:
        raise Stopped("stopped by Ctrl-C; nothing was written") from stop
    for note in dict.fromkeys(str(w.message) for w in said):
        _show.say(note)
    source = open_state_dict(model) if is_pretrained(model) else None
    with new_folder(out) as folder:
        size = small.cpu().save(folder / FILE).stat().st_size
        write_json(folder / "report.json", figures.to_json())
        for file in companions(source):
            shutil.copyfile(file, folder / file.name)
        if dense:
            state = open_state_dict(small.to_dense())
            target = folder / "dense" if source else folder / "dense.safetensors"
            write_state_dict(target, state.specs, lambda name: [state.read(name)], like=source)
    rows = [
        [
            r.name,
            " x ".join(map(str, r.shape)),
            str(r.groups),
            f"{r.error_kmeans:.3g}",
            f"{r.error:.3g}",
            f"{r.moved:.1%}",
        ]
        for r in figures.layers
    ]
    head = ["layer", "weights", "groups", "error, k-means", "error", "moved"]
    _show.table(f"{bits} bits a weight; errors are of the layer's outputs on DATA, relative", head, rows)
    spent = _show.minutes(time.perf_counter() - began)
    typer.echo(
        f"{size:,} bytes on disk (predicted {figures.bytes:,}), {figures.ratio:.1f} times smaller, in {spent}"
    )
    typer.echo(f"written: {out / FILE} (load it with gradmatch.weights.CompressedModel.load)")
