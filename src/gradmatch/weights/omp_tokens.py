"""Tokenizer transplants without training, by orthogonal matching pursuit (Goddard, Fernandes Neto; 2025,
arXiv 2506.06607).

A base model is to speak a donor's tokenizer. Rows of tokens that both vocabularies have are copied. Any other
token's row x in the donor's embedding is written as a sparse mix of the donor's rows of shared tokens (the
anchors),

    x ~ sum_s c_s a_{j_s}, chosen greedily, c by least squares,    and becomes    sum_s c_s b_{j_s}

with the same tokens' rows in the base. Input embedding and head are done apart, each with its own matrices.
Readings: the paper does not say whether atoms are normalised; the released tool takes them raw, so raw is the
default. k = 64 is its
default, made for widths near 1,000: it overfits narrow donors, where k="auto" asks hidden anchors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.state_dicts import Spec, StateDict, open_state_dict, write_state_dict
from gradmatch.core.store import read_json, write_json
from gradmatch.weights._rebuild import METHODS
from gradmatch.weights._transplanting import Matrices, Options, TransplantReport, rebuilt
from gradmatch.weights._vocabulary import ROLES

__all__ = ["METHODS", "TransplantReport", "transplant", "transplant_folder"]


def transplant(
    base_model: nn.Module,
    base_tokenizer: Any,
    donor: Any,
    donor_tokenizer: Any,
    *,
    k: int | str = 64,
    method: str = "omp",
    normalize_atoms: bool = False,
    ridge: float = 0.0,
    byte_match: bool = False,
    prefix_match: bool = False,
    drop_undertrained: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> tuple[nn.Module, Any, TransplantReport]:
    """Give a language model another model's tokenizer.

    Args:
        base_model: a transformers model; it stays as it is, a copy is changed.
        base_tokenizer: its tokenizer.
        donor: a transformers model, its input embedding (V, d), or (input embedding, head).
        donor_tokenizer: the tokenizer to be had.
        k: atoms for each token (64 as published), or neighbours for the knn ways; "auto" takes the k with
            which hidden shared tokens are best rebuilt.
        method: "omp", or one of the ways it is compared with (``METHODS``).
        normalize_atoms: choose atoms by angle; as published by inner product, which favours long ones.
        ridge: shrinks coefficients; relative to an atom's mean squared length.
        byte_match: byte tokens ("<0x41>") and single characters ("A") may be copied from each other.
        prefix_match: a token may be copied from its longest strict prefix.
        drop_undertrained: tokens that training hardly touched are no anchors, and become zero rows if both
            models have them so.
        seed: of the random ways, and of hidden anchors.
        device: where rows are rebuilt; default where the base is.

    Returns:
        The new model, the donor's tokenizer, and a report. Rows of ids that no token uses are zero; the
        configuration takes vocabulary size and special ids from the donor.

    Raises:
        InputError: one tokenizer given twice, no shared tokens, k above their number or the donor's width,
            embeddings that are quantised or not finite.
    """
    options = Options(
        k, method, normalize_atoms, ridge, byte_match, prefix_match, drop_undertrained, seed, device
    )
    checks.require(
        base_tokenizer is not donor_tokenizer,
        "donor_tokenizer is base_tokenizer; there is nothing to transplant.",
    )
    base, tied = matrices_of(base_model, "base_model")
    given = matrices_of(donor, "donor")[0] if isinstance(donor, nn.Module) else _pair(donor)
    made, report = rebuilt(base, base_tokenizer, given, donor_tokenizer, tied, options)
    model = copy.deepcopy(base_model)
    model.resize_token_embeddings(len(made.embed), mean_resizing=False)  # type: ignore[operator]
    embed, head, _ = _layers(model, "base_model")
    with torch.no_grad():
        embed.weight.copy_(made.embed)
        if made.head is not None:
            head.weight.copy_(made.head)
        if made.bias is not None:
            head.bias.copy_(made.bias)
    _adopt(model, donor_tokenizer)
    return model, donor_tokenizer, report


def _pair(donor: Any) -> Matrices:
    both = tuple(donor) if isinstance(donor, tuple | list) else (donor, None)
    checks.require(
        len(both) == 2 and all(isinstance(m, Tensor) or (i and m is None) for i, m in enumerate(both)),
        f"donor is {type(donor).__name__}; it must be a model, an embedding, or (embedding, head).",
    )
    return Matrices(*both)


def _layers(model: nn.Module, name: str) -> tuple[Any, Any, bool]:
    """Input embedding, output layer (None without one), and whether they share their weight."""
    checks.require(
        hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings"),
        f"{name} is {type(model).__name__}; it must be a transformers model.",
    )
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    return embed, head, head is not None and head.weight is embed.weight


def matrices_of(model: nn.Module, name: str) -> tuple[Matrices, bool]:
    """Input embedding, head and its bias of a transformers model, and whether the first two are tied."""
    embed, head, tied = _layers(model, name)
    bias = None if head is None or getattr(head, "bias", None) is None else head.bias.detach()
    return Matrices(embed.weight.detach(), None if tied or head is None else head.weight.detach(), bias), tied


def _adopt(model: nn.Module, tokenizer: Any) -> None:
    """Special ids of the donor, wherever the model keeps them; the padding row too."""
    for holder in (model.config, getattr(model, "generation_config", None)):
        for role in ROLES:
            if holder is not None and hasattr(holder, f"{role}_token_id"):
                setattr(holder, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id", None))
    embed = model.get_input_embeddings()  # type: ignore[operator]
    if getattr(embed, "padding_idx", None) is not None:
        embed.padding_idx = getattr(tokenizer, "pad_token_id", None)


# --- folders -----------------------------------------------------------------------------------------------


def transplant_folder(
    base: str | Path,
    donor: str | Path,
    out: str | Path,
    *,
    k: int | str = 64,
    method: str = "omp",
    normalize_atoms: bool = False,
    ridge: float = 0.0,
    byte_match: bool = False,
    prefix_match: bool = False,
    drop_undertrained: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> TransplantReport:
    """:func:`transplant` from Hugging Face folder to folder: of both models only the embeddings are held in
    memory.

    ``out`` loads with transformers; its ``transplant.json`` is the report.
    """
    from transformers import AutoTokenizer

    options = Options(
        k, method, normalize_atoms, ridge, byte_match, prefix_match, drop_undertrained, seed, device
    )
    folders = [Path(base), Path(donor)]
    tokenizers = [AutoTokenizer.from_pretrained(f, local_files_only=True) for f in folders]
    states = [open_state_dict(f) for f in folders]
    found = [embedding_names(f, s) for f, s in zip(folders, states, strict=True)]
    names = [own for own, _ in found]
    ours, theirs = (
        Matrices(s.read(embed), *(None if n is None else s.read(n) for n in rest))
        for s, (embed, *rest) in zip(states, names, strict=True)
    )
    tied = names[0][1] is None
    made, report = rebuilt(ours, tokenizers[0], theirs, tokenizers[1], tied, options)
    new = {
        name: rows for name, rows in zip(names[0], made, strict=True) if name is not None and rows is not None
    }
    specs = {n: Spec(s.dtype, tuple(new[n].shape)) if n in new else s for n, s in states[0].specs.items()}
    specs = {n: s for n, s in specs.items() if n not in found[0][1]}

    def finish(folder: Path) -> None:
        for file in folder.iterdir():
            if file.name.startswith(
                ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece")
            ):
                file.unlink()
        tokenizers[1].save_pretrained(folder)
        for name in ("config.json", "generation_config.json"):
            if (folder / name).is_file():
                write_json(folder / name, _with_ids(read_json(folder / name), tokenizers[1], len(made.embed)))
        report.save(folder / "transplant.json")

    write_state_dict(
        out, specs, lambda name: [new[name]] if name in new else states[0].pieces(name),
        like=states[0], also=finish, progress=progress,
    )  # fmt: skip
    return report


def _with_ids(config: dict[str, Any], tokenizer: Any, rows: int) -> dict[str, Any]:
    """A configuration with the donor's special ids and number of rows, in nested parts too."""
    changed = {k: _with_ids(v, tokenizer, rows) if isinstance(v, dict) else v for k, v in config.items()}
    if "vocab_size" in changed:
        changed["vocab_size"] = rows
    for role in ROLES:
        name = f"{role}_token_id"
        if name in changed:
            changed[name] = getattr(tokenizer, name, None)
    return changed


def embedding_names(
    folder: Path, state: StateDict
) -> tuple[tuple[str, str | None, str | None], frozenset[str]]:
    """Names in a folder's files of the input embedding, of the head (None where tied or missing) and of its bias.

    Also further names of a tied embedding, which some files hold although models do not read them. The model is built
    without memory for its weights, to ask it.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    checks.require(
        kind is not None,
        f"{folder} names the architectures {config.architectures}, which transformers lacks.",
    )
    with torch.device("meta"):
        model = kind(config)  # type: ignore[misc]
    embed, head, tied = _layers(model, str(folder))
    names = {id(p): n for n, p in model.named_parameters()}
    bias = None if head is None else getattr(head, "bias", None)
    own = (
        _stored(names[id(embed.weight)], state),
        None if head is None or tied else _stored(names[id(head.weight)], state),
        None if bias is None else _stored(names[id(bias)], state),
    )
    every = {n for n, p in model.named_parameters(remove_duplicate=False) if p is embed.weight}
    return own, frozenset(every - {own[0]})


def _stored(name: str, state: StateDict) -> str:
    """The name as the files have it: with or without the prefix of the body."""
    if name in state:
        return name
    near = [n for n in state.specs if n.endswith("." + name) or name.endswith("." + n)]
    checks.require(
        len(near) == 1, f"{state.name} has no tensor {name!r}; it has {checks.listing(list(state.specs))}."
    )
    return near[0]
