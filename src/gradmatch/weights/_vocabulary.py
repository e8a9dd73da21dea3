"""Which tokens of two vocabularies are the same.

Every tokenizer writes tokens in its own way: "Ġthe" in byte-level BPE, "▁the" in SentencePiece, "the" beside
"##ing" in
WordPiece all begin a word. Here a token is a key: a special role, a byte, or (begins a word, its bytes). How
a tokenizer writes is read off its own decoder and pre-tokenizer, not off its class. Comparing bytes also
matches text beyond ASCII, which byte-level vocabularies spell in an alphabet of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks

ROLES = ("eos", "bos", "pad", "unk", "mask", "sep", "cls")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_RESERVED = re.compile(r"unused|reserved_special_token")
Key = tuple[Any, ...]


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for: printable ones for themselves, others from
    U+0100 on.

    >>> byte_alphabet()["Ġ"], byte_alphabet()["A"]
    (32, 65)
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = byte_alphabet()


def style(tokenizer: Any) -> str:
    """How a tokenizer writes its tokens: "bytes", "metaspace", "wordpiece" or "plain".

    Read off its decoder and pre-tokenizer; of one without them (pure Python) off the tokens that it has.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tokens = list(tokenizer.get_vocab())
        counts = {"bytes": sum("Ġ" in t for t in tokens), "metaspace": sum("▁" in t for t in tokens),
                  "wordpiece": sum(t.startswith("##") for t in tokens)}  # fmt: skip
        best = max(counts, key=lambda s: counts[s])
        return best if counts[best] else "plain"
    found = json.loads(backend.to_str())
    parts = json.dumps(
        [found.get("decoder"), found.get("pre_tokenizer"), found.get("normalizer")], ensure_ascii=False
    )
    if '"ByteLevel"' in parts:
        return "bytes"
    if '"Metaspace"' in parts or "▁" in parts:
        return "metaspace"
    return "wordpiece" if '"WordPiece"' in parts else "plain"


def key_of(token: str, way: str) -> Key:
    """The key of an ordinary token.

    >>> key_of("Ġthe", "bytes") == key_of("▁the", "metaspace") == key_of("the", "wordpiece") == (True, b"the")
    True
    """
    if way == "bytes" and all(c in _ALPHABET for c in token):
        raw = bytes(_ALPHABET[c] for c in token)
        return (True, raw[1:]) if raw.startswith(b" ") else (False, raw)
    byte = _BYTE.fullmatch(token)
    if byte is not None and way == "metaspace":
        return ("byte", int(byte[1], 16))
    if way == "wordpiece":
        return (False, token[2:].encode()) if token.startswith("##") else (True, token.encode())
    marker = "▁" if way == "metaspace" else " "
    text = token.replace("▁", " ") if way == "metaspace" else token
    return (True, text[1:].encode()) if token.startswith(marker) else (False, text.encode())


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens by id, the key of each, and the id of each special role."""

    tokens: dict[int, str]
    keys: dict[int, Key]
    roles: dict[str, int]
    reserved: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Read a transformers tokenizer."""
        vocab = tokenizer.get_vocab()
        checks.require(bool(vocab), "tokenizer has no tokens.")
        way = style(tokenizer)
        tokens = {i: t for t, i in sorted(vocab.items(), key=lambda item: item[1])}
        added = {i: str(t) for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items()}
        special = set(tokenizer.all_special_ids) | {
            i
            for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items()
            if getattr(t, "special", False)
        }
        keys: dict[int, Key] = {}
        for i, token in tokens.items():
            if i in special:
                keys[i] = ("special", token)
            else:
                keys[i] = key_of(added[i], "plain") if i in added else key_of(token, way)
        roles = {r: getattr(tokenizer, f"{r}_token_id", None) for r in ROLES}
        found = {r: i for r, i in roles.items() if isinstance(i, int)}
        return cls(tokens, keys, found, frozenset(i for i, t in tokens.items() if _RESERVED.search(t)))

    @property
    def size(self) -> int:
        """Rows that an embedding needs."""
        return max(len(self.tokens), max(self.tokens) + 1)


def shared(
    base: Vocabulary, donor: Vocabulary, *, byte_match: bool = False, prefix_match: bool = False
) -> tuple[dict[int, int], dict[int, int]]:
    """Base id of every donor token that both have, by donor id; and of those matched by the two loose rules.

    Special tokens match by role (the first of eos, bos, pad, unk, mask, sep, cls that both have), else by
    their text.

    Args:
        byte_match: a byte token ("<0x41>") stands for that single byte ("A"), either way.
        prefix_match: a token takes its longest strict prefix that the base has.
    """
    first: dict[Key, int] = {}
    for i, key in base.keys.items():
        first.setdefault(key, i)
    exact, loose = {}, {}
    for i, key in donor.keys.items():
        role = next((r for r in ROLES if donor.roles.get(r) == i and r in base.roles), None)
        if role is not None:
            exact[i] = base.roles[role]
        elif key in first:
            exact[i] = first[key]
        else:
            other = _loosely(key, first, byte_match, prefix_match)
            if other is not None:
                loose[i] = other
    return exact, loose


def _loosely(key: Key, first: Mapping[Key, int], byte_match: bool, prefix_match: bool) -> int | None:
    if byte_match and key[0] == "byte":
        return first.get((False, bytes([key[1]])))
    if byte_match and key[0] is False and len(key[1]) == 1 and ("byte", key[1][0]) in first:
        return first[("byte", key[1][0])]
    if prefix_match and isinstance(key[0], bool):
        for end in range(len(key[1]) - 1, 0, -1):
            if (key[0], key[1][:end]) in first:
                return first[(key[0], key[1][:end])]
    return None


def undertrained(
    vocabulary: Vocabulary, embedding: Tensor, head: Tensor | None, share: float = 0.01
) -> Tensor:
    """Rows [n] of tokens that training hardly touched (the "magikarp" filter; Land, Bartolo 2024, as the tool
    uses it).

    The 1 % of least input norm, rows that no token uses, and rows whose cosine to the mean of those is above
    0.5 and the 99th percentile, in the input embedding or the head."""
    rows = len(embedding)
    used = torch.zeros(rows, dtype=torch.bool)
    used[[i for i in vocabulary.tokens if i < rows and i not in vocabulary.reserved]] = True
    norms = embedding.norm(dim=1)
    bad: Tensor = ~used | (norms < torch.quantile(norms[used], share))
    for matrix in (embedding, head):
        if matrix is not None and not bool(used.all()):
            cosine = torch.cosine_similarity(matrix, matrix[~used].mean(0)[None])
            bad |= cosine > max(0.5, float(torch.quantile(cosine, 1 - share)))
    return bad
