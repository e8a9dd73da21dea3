"""Transformers models in folders, and text for them: what merging, Fisher and transplanting read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.core.store import read_json

LEAST = 8
"""Fewest tokens in a window of text."""
MASKED = 0.15
"""Share of tokens hidden from a masked language model, as BERT's training has it."""


def require_transformers() -> None:
    """Refuse before the work where the library is missing."""
    checks.require(
        find_spec("transformers") is not None,
        "transformers is not installed; this needs 'pip install gradmatch[language]'.",
    )


def is_pretrained(path: str | Path) -> bool:
    """Whether it is a folder with a transformers configuration."""
    return (Path(path) / "config.json").is_file()


def load_model(path: str | Path, name: str = "MODEL") -> nn.Module:
    """The model of a Hugging Face folder, of the class that its configuration names, in eval mode.

    Raises:
        InputError: no configuration, an unknown class (the folder's own code is not run), or weights that are missing,
            pickled or do not fit.
    """
    require_transformers()
    import transformers

    checks.require(
        is_pretrained(path), f"{name} {str(path)!r} has no config.json; it must be a Hugging Face folder."
    )
    config = read_json(Path(path) / "config.json")
    kinds = config.get("architectures") if isinstance(config, dict) else None
    kind = kinds[0] if isinstance(kinds, list) and kinds else None
    made = getattr(transformers, kind, None) if isinstance(kind, str) else None
    checks.require(
        made is not None and hasattr(made, "from_pretrained"),
        f"{name} {str(path)!r} names the architecture {kind!r}, which transformers does not have.",
    )
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: nn.Module = made.from_pretrained(path, local_files_only=True, use_safetensors=True)  # type: ignore[union-attr]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise checks.InputError(f"{name} {str(path)!r} could not be loaded: {_line(error)}") from error
    return model.eval()


def load_tokenizer(path: str | Path, name: str = "MODEL") -> Any:
    """The tokenizer of a Hugging Face folder."""
    require_transformers()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise checks.InputError(f"{name} {str(path)!r} has no readable tokenizer: {_line(error)}") from error


def texts(path: str | Path) -> Iterator[str]:
    """Lines of a .txt file, the "text" of every line of a .jsonl file, or those of all such files in a folder."""
    source = Path(path)
    if source.is_dir():
        files = sorted(f for f in source.rglob("*") if f.suffix in (".txt", ".jsonl"))
        checks.require(bool(files), f"DATA {str(path)!r} holds no .txt or .jsonl file.")
        for file in files:
            yield from texts(file)
        return
    checks.require(source.is_file(), f"DATA {str(path)!r} does not exist.")
    checks.require(
        source.suffix in (".txt", ".jsonl"), f"DATA is {str(path)!r}; text is read from .txt and .jsonl."
    )
    try:
        with open(source, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield line if source.suffix == ".txt" else _text_of(line, f"{source}, line {number},")
    except UnicodeDecodeError as error:
        raise checks.InputError(f"{source} is not UTF-8 text: {error}.") from error


def _text_of(line: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise checks.InputError(f"{where} is not JSON: {error}.") from error
    checks.require(isinstance(found, dict) and isinstance(found.get("text"), str), f'{where} has no "text".')
    return str(found["text"])


def windows(tokenizer: Any, lines: Iterator[str], length: int, count: int) -> Tensor:
    """Up to ``count`` windows [n, length] of the text's tokens, one after the other.

    Raises:
        InputError: less text than one window.
    """
    ids: list[int] = []
    for line in lines:
        ids += tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= length * count:
            break
    whole = len(ids) // length
    checks.require(whole > 0, f"DATA has {len(ids)} tokens; at least one window of {length} is needed.")
    return torch.tensor(ids[: min(whole, count) * length]).reshape(-1, length)


def masked(ids: Tensor, tokenizer: Any, seed: int) -> dict[str, Tensor]:
    """A batch for a masked language model: hidden tokens count, at least one in each window."""
    checks.require(
        tokenizer.mask_token_id is not None,
        "MODEL is a masked language model whose tokenizer has no mask token.",
    )
    draws = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    hidden = draws < MASKED
    hidden |= draws == draws.amin(1, keepdim=True)
    return {
        "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id),
        "labels": ids.masked_fill(~hidden, -100),
    }


def padded(tokenizer: Any, lines: Iterator[str], length: int, count: int) -> dict[str, Tensor]:
    """Up to ``count`` lines as one padded batch, cut at ``length``."""
    some = [line for _, line in zip(range(count), lines, strict=False)]
    checks.require(bool(some), "DATA has no text.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    checks.require(tokenizer.pad_token is not None, "MODEL has a tokenizer without a padding token.")
    found = tokenizer(some, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return {k: found[k] for k in ("input_ids", "attention_mask")}


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".") + "."
