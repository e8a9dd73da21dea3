"""Weights kept as indices into small codebooks: packed bits, and layers that hold them.

A matrix W (out, in) with its rows in G groups, one after the other, is W[o, i] = s_g C_b[I[o, i]], where g is the
group of row o (known from its place), b = g (a codebook for each group) or 0 (one for all), and s = 1 where there
are no scales. Indices take ``bits`` bits each in one stream, low bits first.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradmatch.core.tap import submodule

PARTS = ("indices", "codes", "scales", "ends")


def pack(indices: Tensor, bits: int) -> Int[Tensor, " bytes"]:
    """Whole numbers below 2^bits as a stream of bits in uint8.

    >>> pack(torch.tensor([1, 2, 3, 0, 1]), 2).tolist()
    [57, 1]
    """
    flat = indices.reshape(-1)
    count = (len(flat) * bits + 7) // 8
    if bits == 8:
        return flat.to(torch.uint8)
    eights = torch.zeros(-(-len(flat) // 8), 8, dtype=torch.int64, device=flat.device)
    eights.view(-1)[: len(flat)] = flat.long()
    words = (eights << (bits * torch.arange(8, device=flat.device))).sum(1)
    return (
        ((words[:, None] >> (8 * torch.arange(bits, device=flat.device))) & 255)
        .to(torch.uint8)
        .flatten()[:count]
    )


def unpack(stream: Int[Tensor, " bytes"], bits: int, count: int) -> Int[Tensor, " count"]:
    """The first ``count`` numbers of a stream, int64.

    >>> unpack(torch.tensor([57, 1], dtype=torch.uint8), 2, 5).tolist()
    [1, 2, 3, 0, 1]
    """
    if bits == 8:
        return stream[:count].long()
    whole = torch.zeros(-(-count // 8), bits, dtype=torch.uint8, device=stream.device)
    whole.view(-1)[: len(stream)] = stream
    words: Tensor = (whole.long() << (8 * torch.arange(bits, device=stream.device))).sum(1)
    shifts = bits * torch.arange(8, device=stream.device)
    found: Tensor = (words[:, None] >> shifts) & (2**bits - 1)
    return found.flatten()[:count]


@dataclass(frozen=True)
class Coded:
    """A matrix as indices and codebooks.

    Attributes:
        indices: (out, in), whole numbers below 2^bits.
        codes: (G, K) or (1, K), in the type they are stored in.
        scales: (G,) or None.
        ends: the row after the last of each group, int32 (G,).
        bits: of an index.
    """

    indices: Int[Tensor, "out in"]
    codes: Float[Tensor, "b K"]
    scales: Float[Tensor, " G"] | None
    ends: Int[Tensor, " G"]
    bits: int

    @property
    def table(self) -> Float[Tensor, "G K"]:
        """The values that weights of each group can take, float32."""
        return value_table(self.codes, self.scales, len(self.ends))

    def dense(self) -> Float[Tensor, "out in"]:
        """The matrix, float32."""
        return looked_up(self.indices, self.table, self.ends)

    @property
    def nbytes(self) -> int:
        """Bytes stored: |W| bits / 8, 2 for each code and scale (4 if they need float32), 4 for each boundary."""
        numbers = self.codes.numel() + (0 if self.scales is None else self.scales.numel())
        return (
            -(-self.indices.numel() * self.bits // 8)
            + self.codes.element_size() * numbers
            + 4 * len(self.ends)
        )


def value_table(codes: Tensor, scales: Tensor | None, groups: int) -> Float[Tensor, "G K"]:
    """Codes times scales for each group, float32."""
    table = codes.float().expand(groups, -1)
    return table if scales is None else table * scales.float()[:, None]


def looked_up(indices: Tensor, table: Tensor, ends: Tensor) -> Float[Tensor, "out in"]:
    """table[group of row o, indices[o, i]]."""
    at = indices.long() + (group_of_rows(ends) * table.shape[1])[:, None]
    return table.flatten().index_select(0, at.view(-1)).view_as(at)


def group_of_rows(ends: Int[Tensor, " G"]) -> Int[Tensor, " out"]:
    """The group of every row, int64."""
    sizes = torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
    return torch.repeat_interleave(torch.arange(len(ends), device=ends.device), sizes)


# --- layers ------------------------------------------------------------------------------------------------


def as_matrix(layer: nn.Module, weight: Tensor) -> Float[Tensor, "out in"]:
    """A layer's weight with a row for each output neuron."""
    return weight.T if is_transposed(layer) else weight.flatten(1)


def matrix_of(network: nn.Module, name: str) -> Float[Tensor, "out in"]:
    """The weight of the layer called ``name``, a row for each output neuron, without its graph."""
    layer = submodule(network, name)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return as_matrix(layer, weight.detach()).contiguous()


def as_weight(layer: nn.Module, matrix: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """:func:`as_matrix` undone."""
    return matrix.T if is_transposed(layer) else matrix.reshape(shape)


def is_transposed(layer: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, a linear layer with its weight as (in, out)."""
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(layer).__mro__
    )


def is_compressible(layer: nn.Module) -> bool:
    """Linear and convolution layers (not transposed ones), also transformers' ``Conv1D``, coded ones not again."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return (isinstance(layer, kinds) or is_transposed(layer)) and not isinstance(layer, CodedLayer)


class CodedLayer(nn.Module):
    """Mixed into the class of a layer whose ``weight`` is looked up in its codebooks at each use."""

    weight_bits: int
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype

    @property
    def coded(self) -> Coded:
        """Indices and codebooks, unpacked."""
        shape = self.weight_shape[::-1] if is_transposed(self) else self.weight_shape
        count = torch.Size(shape).numel()
        indices = unpack(self._buffers["weight_indices"], self.weight_bits, count).reshape(shape[0], -1)  # type: ignore[arg-type]
        codes, scales, ends = (self._buffers.get(f"weight_{k}") for k in PARTS[1:])
        assert codes is not None
        assert ends is not None
        return Coded(indices, codes, scales, ends, self.weight_bits)

    @property
    def weight(self) -> Tensor:
        """The weight of the layer's own shape and type."""
        return as_weight(self, self.coded.dense(), self.weight_shape).to(self.weight_dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and sent to other processes by the class of the plain layer; that of this one is made on the way."""
        return _blank, (type(self).__mro__[2],), self.__dict__

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Codes keep their stored type when the model's is changed; the weight takes the new one."""
        stored = {
            k: self._buffers[f"weight_{k}"] for k in PARTS if self._buffers.get(f"weight_{k}") is not None
        }
        probe = fn(torch.empty(0, dtype=self.weight_dtype, device=stored["indices"].device))  # type: ignore[union-attr]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in stored.items():
            self._buffers[f"weight_{name}"] = tensor.to(probe.device)  # type: ignore[union-attr]
        self.weight_dtype = probe.dtype
        return self


@lru_cache(maxsize=256)
def _class(kind: type) -> type:
    return type(f"Coded{kind.__name__}", (CodedLayer, kind), {"__module__": __name__})


def _blank(kind: type) -> Any:
    return object.__new__(_class(kind))


def coded_layer(layer: nn.Module, coded: Coded) -> nn.Module:
    """A copy of ``layer`` with its weight replaced by indices and codebooks; of the layer's class still."""
    made = copy.deepcopy(layer)
    weight = made._parameters.pop("weight")
    assert weight is not None
    made.__class__ = _class(type(layer))  # type: ignore[arg-type]
    assert isinstance(made, CodedLayer)
    made.weight_bits, made.weight_shape, made.weight_dtype = coded.bits, tuple(weight.shape), weight.dtype
    made.register_buffer("weight_indices", pack(coded.indices, coded.bits))
    for name in PARTS[1:]:
        value = getattr(coded, name)
        if value is not None:
            made.register_buffer(f"weight_{name}", value.detach().clone())
    return made


def dense_layer(layer: CodedLayer) -> nn.Module:
    """A plain layer with the looked-up weight as its parameter."""
    weight = layer.weight
    made = copy.deepcopy(layer)
    for name in PARTS:
        made._buffers.pop(f"weight_{name}", None)
    made.__class__ = type(layer).__mro__[2]
    for name in ("weight_bits", "weight_shape", "weight_dtype"):
        delattr(made, name)
    made.register_parameter("weight", nn.Parameter(weight.clone(memory_format=torch.contiguous_format)))
    return made


def replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` where the part called ``name`` is."""
    owner, _, own = name.rpartition(".")
    setattr(submodule(network, owner), own, layer)
