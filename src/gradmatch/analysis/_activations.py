"""Activations of several networks on the same data, as streaming moments over all units at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from gradmatch.core import checks
from gradmatch.core._batches import OrderedData
from gradmatch.core.networks import first_floats
from gradmatch.core.tap import capture

DEAD = 1e-6
"""A unit is dead if its deviation is below this share of its layer's largest."""
RARE = 0.005
"""It counts as dead, too, if it is zero on all but this share of the samples of one half: what a handful of examples
say of a unit's scale and partners does not hold on others, and such units ruin predictions from all units."""
HALVES = 2
_PANEL = 256  # columns of the products made at once, with all before them: the rest is their mirror image


class Moments:
    """Count, means, centred products (float64) and numbers of values that are not 0, of D numbers.

    Those of disjoint samples merge in any order.
    """

    def __init__(self, d: int) -> None:
        self.count = 0
        self.mean = torch.zeros(d, dtype=torch.float64)
        self.active = torch.zeros(d, dtype=torch.long)
        self._upper = torch.zeros(d, d, dtype=torch.float64)  # only its upper triangle counts

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Moments:
        """The moments of one batch."""
        found = cls(rows.shape[1])
        found.add(rows)
        return found

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """Take in a batch: one product of its rows, centred in double precision before anything is multiplied.

        What lies between the batch's mean and the present one enters as a further row. Sums are float64; products
        within a batch are of the activations' own precision, at least float32.
        """
        n, mean = len(rows), rows.mean(0, dtype=torch.float64)
        gap = mean.cpu() - self.mean
        between = (self.count * n / (self.count + n)) ** 0.5 * gap
        block = torch.cat([rows.double() - mean, between.to(rows.device)[None]])
        block = block.to(torch.promote_types(rows.dtype, torch.float32))
        for end in range(_PANEL, len(mean) + _PANEL, _PANEL):
            panel = slice(end - _PANEL, end)
            self._upper[:end, panel] += (block[:, :end].T @ block[:, panel]).cpu()
        self.active += (rows != 0).sum(0).cpu()
        self.mean += gap * (n / (self.count + n))
        self.count += n

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of samples."""
        if not self.count or not other.count:
            return other if other.count else self
        total = Moments(len(self.mean))
        total.count = self.count + other.count
        total.active = self.active + other.active
        gap = other.mean - self.mean
        total.mean = self.mean + gap * (other.count / total.count)
        weight = self.count * other.count / total.count
        total._upper = (self._upper + other._upper).addr_(gap, gap, alpha=weight)
        return total

    @property
    def products(self) -> Float[Tensor, "d d"]:
        """Sums of products of what is left without the means."""
        upper = self._upper.triu()
        return upper + upper.triu(1).T

    @property
    def deviation(self) -> Float[Tensor, " d"]:
        """Standard deviations, with n in the denominator."""
        return (self._upper.diagonal() / max(self.count, 1)).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Activations:
    """What K networks' units do on the same data, a layer at a time.

    Attributes:
        layers: names.
        units: for each layer the number of units of every network.
        halves: for each layer the moments of all networks' units side by side, of every other example (even, odd).
        samples: for each layer some activations (n, all units), if they were asked for.
    """

    layers: tuple[str, ...]
    units: dict[str, tuple[int, ...]]
    halves: dict[str, tuple[Moments, Moments]]
    samples: dict[str, Tensor]

    @property
    def networks(self) -> int:
        """How many networks."""
        return len(next(iter(self.units.values())))

    def moments(self, layer: str, half: int | None = None) -> Moments:
        """Moments of all examples, or of the even (0) or odd (1) ones."""
        checks.one_of("layer", layer, self.layers)
        both = self.halves[layer]
        return both[0].merge(both[1]) if half is None else both[half]

    def place(self, layer: str, network: int) -> slice:
        """Where a network's units stand among all."""
        checks.one_of("layer", layer, self.layers)
        checks.whole("network", network, 0, self.networks - 1)
        before = sum(self.units[layer][:network])
        return slice(before, before + self.units[layer][network])

    def alive(self, layer: str, network: int) -> Tensor:
        """Units that vary, and on enough samples of both halves; see ``RARE``.

        Raises:
            InputError: none does.
        """
        at = self.place(layer, network)
        deviation = self.moments(layer).deviation[at]
        found = deviation > DEAD * deviation.max()
        for half in self.halves[layer]:
            found &= half.active[at] >= RARE * half.count
        checks.require(bool(found.any()), f"all units of layer {layer!r} of network {network} are dead.")
        return torch.nonzero(found).flatten()

    def correlation(self, layer: str, a: int, b: int) -> Float[Tensor, "a b"]:
        """Correlations of all units of two networks (or of one with itself); 0 for dead ones."""
        moments = self.moments(layer)
        rows, columns = self.place(layer, a), self.place(layer, b)
        deviation = moments.deviation
        scale = deviation[rows][:, None] * deviation[columns] * moments.count
        out = moments.products[rows, columns] / scale.clamp_min(1e-300)
        keep = [torch.zeros(self.units[layer][k], dtype=torch.bool) for k in (a, b)]
        for k, own in zip((a, b), keep, strict=True):
            own[self.alive(layer, k)] = True
        return torch.where(keep[0][:, None] & keep[1], out.clamp(-1, 1), 0)


def collect(
    models: Sequence[nn.Module],
    data: Any,
    layers: Sequence[str] | None = None,
    *,
    positions: str | int = "all",
    post_activation: bool = True,
    samples: int = 0,
    allow_train: bool = False,
    batch_size: int = 500,
    seed: int = 0,
) -> Activations:
    """Run several networks over the same data once and keep the moments of every layer.

    A unit is a channel of a map, a feature of a token, or an entry of a vector; positions and tokens count as further
    examples (they are not independent ones, and padding at borders correlates them).

    Args:
        models: networks, of one architecture or several.
        data: inputs (one tensor, or a loader of them), or what has targets beside them, which are not looked at.
        layers: names of modules whose outputs are read, the same in all networks; default all nonlinearities
            (``post_activation``) or all linear and convolution layers but the last.
        positions: "all", or how many of a map are drawn for each batch, the same for all networks.
        post_activation: which layers are the default.
        samples: how many positions' activations to keep, drawn evenly, for mutual information.
        allow_train: accept active dropout and batch-norm in train mode.
        batch_size: of data without batches.
        seed: of positions and samples.

    Raises:
        InputError: networks in train mode, layers that do not exist or differ in their number of samples, activations
            that are not finite.
    """
    checks.require(len(models) > 0, "models is empty; at least one network is needed.")
    names = _layers(models[0], layers, post_activation)
    if positions != "all":
        checks.whole("positions", positions)
    kept = checks.whole("samples", samples, 0)
    for k, model in enumerate(models):
        active = [
            n for n, m in model.named_modules() if m.training and isinstance(m, _BatchNorm | _DropoutNd)
        ]
        checks.require(
            allow_train or not active,
            f"models[{k}] has {checks.listing(active)} in train mode; call eval(), or accept it by allow_train=True.",
        )
    generator = torch.Generator().manual_seed(checks.whole("seed", seed, 0))
    halves: dict[str, list[Moments]] = {}
    reservoir = {name: _Reservoir(kept, generator) for name in names}
    units: dict[str, tuple[int, ...]] = {}
    for batch in OrderedData(_with_targets(data), batch_size, check_order=False):
        odd = (torch.arange(batch.size) + batch.start) % HALVES == 1
        for name, per_net in _outputs(models, names, batch.inputs, positions, generator).items():
            rows = torch.cat(per_net, -1)
            checks.finite(f"activations of {name!r}", rows)
            units[name] = tuple(r.shape[-1] for r in per_net)
            own = halves.setdefault(name, [Moments(rows.shape[-1]) for _ in range(HALVES)])
            for h, which in enumerate((~odd, odd)):
                if bool(which.any()):
                    own[h].add(rows[which].flatten(0, 1))
            reservoir[name].add(rows.flatten(0, 1))
    return Activations(
        tuple(names),
        units,
        {k: (a, b) for k, (a, b) in halves.items()},
        {k: r.rows for k, r in reservoir.items() if kept},
    )


def _with_targets(data: Any) -> Any:
    """Targets of nothing beside bare inputs: a tensor, or a loader or list of them."""
    if isinstance(data, Tensor):
        return data, torch.zeros(len(data))
    if isinstance(data, DataLoader) or (isinstance(data, list) and data and isinstance(data[0], Tensor)):
        return _Targeted(data)
    return data


class _Targeted:
    """A loader whose bare batches, tensors or singles in a list, come with targets of nothing."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for item in self.loader:
            bare = item[0] if isinstance(item, tuple | list) and len(item) == 1 else item
            yield (bare, torch.zeros(len(bare))) if isinstance(bare, Tensor) else item


def _layers(model: nn.Module, layers: Sequence[str] | None, post_activation: bool) -> list[str]:
    if layers is not None:
        return list(layers)
    modules = [(n, m) for n, m in model.named_modules() if n]
    linear = [n for n, m in modules if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)][:-1]
    smooth = [
        n
        for n, m in modules
        if type(m).__module__ == "torch.nn.modules.activation"
        and not isinstance(m, nn.MultiheadAttention | nn.Softmax | nn.LogSoftmax)
    ]
    found = smooth if post_activation and smooth else linear
    checks.require(bool(found), "models[0] has no layer to read; name some by layers=.")
    return found


@torch.no_grad()
def _outputs(
    models: Sequence[nn.Module],
    names: Sequence[str],
    inputs: Any,
    positions: str | int,
    generator: torch.Generator,
) -> Mapping[str, list[Tensor]]:
    """Each layer's outputs (examples, positions, units) of every network."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with ExitStack() as stack:
        taps = [stack.enter_context(capture(m, *names)) for m in models]
        for model, seen in zip(models, taps, strict=True):
            given = tree_map(_placer(model), inputs)
            if isinstance(given, Mapping):
                model(**given)
            else:
                model(*(given if isinstance(given, tuple) else (given,)))
            for name in names:
                checks.require(name in seen, f"models[{len(found[name])}] does not run its module {name!r}.")
                found[name].append(_rows(seen[name], _on_lines(model, name)))
    for name, per_net in found.items():
        counts = {r.shape[1] for r in per_net}
        checks.require(
            len(counts) == 1,
            f"layer {name!r} has {sorted(counts)} positions in the networks; they must give equally many samples.",
        )
        count = counts.pop()
        if positions != "all" and count > int(positions):
            at = torch.randperm(count, generator=generator)[: int(positions)].to(per_net[0].device)
            found[name] = [r[:, at] for r in per_net]
    return found


def _placer(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Brings inputs to where a model is, and arrays of float64 to its type."""
    own = first_floats(model)

    def place(t: Tensor) -> Tensor:
        if own is None:
            return t
        return t.to(own.device, own.dtype if t.dtype == torch.float64 else None)

    return place


def _rows(output: Tensor, lines: bool) -> Tensor:
    """(examples, positions, units): channels of maps come second, features of tokens and vectors last."""
    if output.ndim > 3 or (lines and output.ndim == 3):
        return output.flatten(2).transpose(1, 2)
    return output[:, None] if output.ndim == 2 else output


def _on_lines(model: nn.Module, name: str) -> bool:
    """Whether a module stands behind a one-dimensional convolution, so that (n, a, b) is channels and places.

    Behind a layer of features it is tokens and features; shapes do not tell.
    """
    found = reached = False
    for at, part in model.named_modules():
        inside = at == name or at.startswith(f"{name}.")
        if reached and not inside:
            break
        reached |= inside
        if isinstance(part, nn.Conv1d | nn.ConvTranspose1d | nn.BatchNorm1d):
            found = True
        elif isinstance(part, nn.Linear | nn.Embedding | nn.LayerNorm | nn.MultiheadAttention):
            found = False
    return found


class _Reservoir:
    """A uniform draw of ``size`` rows from all that pass."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator
        self.rows, self.keys = torch.empty(0), torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Let rows pass."""
        if not self.size:
            return
        keys = torch.cat([self.keys, torch.rand(len(rows), generator=self.generator)])
        every = rows.cpu() if not len(self.rows) else torch.cat([self.rows, rows.cpu()])
        best = keys.argsort()[: self.size].sort().values
        self.rows, self.keys = every[best], keys[best]
