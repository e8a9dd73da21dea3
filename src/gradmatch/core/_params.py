"""Named parameter blocks and the flat vector that strings them together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor, nn

from gradmatch.core.checks import InputError, listing, require

__all__ = ["ParamSpace", "ParamValues"]

ParamValues = Mapping[str, Tensor] | Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class ParamSpace:
    """The space the parameters live in: ordered named blocks, and P numbers when strung together.

    ``dtype`` is the common type of the blocks (the promoted one where they differ).

    >>> space = ParamSpace.of(nn.Linear(3, 2))
    >>> space.names, space.size, space.slices["bias"]
    (('weight', 'bias'), 8, slice(6, 8, None))
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @classmethod
    def of(
        cls, source: nn.Module | Mapping[str, Tensor], select: str | Sequence[str] | None = None
    ) -> ParamSpace:
        """The space of a module's trainable parameters or of a dict of tensors; ``select`` as in :meth:`select`."""
        if isinstance(source, nn.Module):
            blocks: dict[str, Tensor] = {k: p for k, p in source.named_parameters() if p.requires_grad}
            require(bool(blocks), "model has no trainable parameter; at least one must require grad.")
        else:
            blocks = {k: source[k] for k in source}
            require(bool(blocks), "params is empty; it needs at least one named tensor.")
        devices = {p.device for p in blocks.values()}
        require(
            len(devices) == 1,
            f"params lie on {listing(sorted(map(str, devices)))}; they must share one device.",
        )
        whole = cls(
            tuple(blocks),
            tuple(p.shape for p in blocks.values()),
            tuple(p.dtype for p in blocks.values()),
            devices.pop(),
        )
        return whole if select is None else whole.select(select)

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Numbers in each block."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """P, the numbers in all blocks."""
        return sum(self.numels)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the flat vector."""
        return reduce(torch.promote_types, self.dtypes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each block lies in the flat vector."""
        ends = torch.tensor(self.numels).cumsum(0).tolist()
        return {k: slice(e - m, e) for k, e, m in zip(self.names, ends, self.numels, strict=True)}

    def __len__(self) -> int:
        return len(self.names)

    def select(self, pattern: str | Sequence[str]) -> ParamSpace:
        """The blocks whose name matches a regular expression (``re.search``), or is in a list of names."""
        if isinstance(pattern, str):
            keep = [i for i, name in enumerate(self.names) if re.search(pattern, name)]
        else:
            unknown = sorted(set(pattern) - set(self.names))
            require(not unknown, f"select names {listing(unknown)}, not among the parameters.")
            keep = [i for i, name in enumerate(self.names) if name in set(pattern)]
        if not keep:
            raise InputError(f"select is {pattern!r} and matches none of {listing(self.names)}.")
        return ParamSpace(
            tuple(self.names[i] for i in keep),
            tuple(self.shapes[i] for i in keep),
            tuple(self.dtypes[i] for i in keep),
            self.device,
        )

    def flatten(self, blocks: Mapping[str, Tensor] | Sequence[Tensor], batch_dims: int = 0) -> Tensor:
        """Flat vector [*batch, P] of blocks shaped [*batch, *shape]; keeps the graph."""
        values = list(self.named(blocks, batch_dims).values())
        parts = [v.reshape((*v.shape[:batch_dims], -1)).to(self.dtype) for v in values]
        return torch.cat(parts, dim=-1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Named blocks [*batch, *shape] of a flat vector [*batch, P], as views where the type allows."""
        require(
            vector.ndim >= 1 and vector.shape[-1] == self.size,
            f"vector has shape {tuple(vector.shape)}; its last dimension must be P = {self.size}.",
        )
        parts = vector.split(list(self.numels), dim=-1)
        return {
            name: part.reshape((*vector.shape[:-1], *shape)).to(dtype)
            for name, part, shape, dtype in zip(self.names, parts, self.shapes, self.dtypes, strict=True)
        }

    def named(self, values: ParamValues, batch_dims: int = 0) -> dict[str, Tensor]:
        """Blocks by name, in this order, of a dict, a list in this order, or a flat vector; shapes checked."""
        if isinstance(values, Tensor):
            return self.unflatten(values)
        if isinstance(values, Mapping):
            missing = [k for k in self.names if k not in values]
            require(not missing, f"params lack {listing(missing)}; every block of the space is needed.")
            blocks = {k: values[k] for k in self.names}
        else:
            values = list(values)
            require(
                len(values) == len(self),
                f"params has {len(values)} tensors; it needs {len(self)}, one for each block of the space.",
            )
            blocks = dict(zip(self.names, values, strict=True))
        for (name, value), shape in zip(blocks.items(), self.shapes, strict=True):
            require(
                value.shape[batch_dims:] == shape,
                f"params[{name!r}] has shape {tuple(value.shape[batch_dims:])}; it must be {tuple(shape)}.",
            )
        return blocks
