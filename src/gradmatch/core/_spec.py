"""Which axes of a network's parameters and buffers are permuted together: :class:`PermutationSpec`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from gradmatch.core import checks
from gradmatch.core._axes import Axis, Leaf, Order, Path, from_json, index, leaves, parse, to_json
from gradmatch.core._axis_nodes import Node, freeze
from gradmatch.core._axis_trace import AxisTrace
from gradmatch.core.tap import evaluating

Weights = nn.Module | Mapping[str, Tensor]
"""A network, or its state dict."""
AGREEMENT = 1e-4
"""Largest difference of outputs, relative to the largest output, that a permuted network may show (float32)."""


@dataclass(frozen=True)
class Occurrence:
    """One place of a group: the leaf at ``path`` of axis ``dim`` of a tensor."""

    tensor: str
    dim: int
    path: Path


@dataclass(frozen=True)
class Reading:
    """Where a group's activations can be read: the first input of a module, on its axis ``dim``."""

    module: str
    dim: int
    axis: Axis
    path: Path


@dataclass(frozen=True)
class PermutationSpec:
    """The axes of every stored tensor, as groups of units that are permuted together.

    Made by :meth:`from_module` (read off a run of the network) or :meth:`from_axes` (given by hand).

    Attributes:
        axes: for each tensor of the state dict, its axes.
        sizes: units of each group.
        buffers: names of tensors that are no parameters (running statistics); permuted, never matched on.
        readings: for each group, where its activations can be read; empty for specifications by hand.
    """

    axes: dict[str, tuple[Axis, ...]]
    sizes: dict[str, int]
    buffers: frozenset[str] = frozenset()
    readings: dict[str, tuple[Reading, ...]] = field(default_factory=dict)

    @classmethod
    def from_module(cls, module: nn.Module, example: Any, *, verify: bool = True) -> PermutationSpec:
        """The specification of any network that runs on ``example``.

        Linear and convolution layers (also grouped and transposed), batch, layer, group and instance norms with
        their statistics, embeddings, residual streams, attention heads and fused projections, in modules or in
        functional code, are understood; axes whose entries have a place, and those that pass an operation not known
        to the trace, stay fixed. Where one stream is split into heads, whole heads and places within all heads are
        groups of their own.

        Args:
            module: the network; left as found, run in eval mode without gradients.
            example: one input: a tensor, a tuple of positional or a dict of keyword arguments.
            verify: permute at random, with all biases and statistics disturbed, and compare the outputs.

        Raises:
            InputError: the network does not run on the example, or its outputs change under the permutation found
                (a branch that depends on the values of hidden units).

        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> PermutationSpec.from_module(net, torch.zeros(1, 3)).sizes
        {'0': 8}
        """
        checks.require(
            isinstance(module, nn.Module),
            f"module is a {type(module).__name__}; it must be an nn.Module.",
        )
        stored = module.state_dict(keep_vars=True)
        trace = AxisTrace(stored)
        seen: dict[int, tuple[str, tuple[Node, ...]]] = {}

        def note(name: str, args: tuple[Any, ...]) -> None:
            known = trace.known(args[0]) if args and isinstance(args[0], Tensor) else None
            if known is not None:
                seen.setdefault(id(args[0]), (name, known))

        with ExitStack() as stack, evaluating(module), torch.no_grad(), _decomposed(module):
            for name, part in module.named_modules():
                hook = part.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
                stack.callback(hook.remove)
            inputs = [t for t in tree_leaves(example) if isinstance(t, Tensor)]
            for tensor in inputs:
                trace.set(tensor, [Node(s, fixed=True) for s in tensor.shape])
            with trace:
                outputs = _outputs(call(module, example))
            for tensor in outputs:
                for node in trace.of(tensor):
                    freeze(node)
        axes, names = trace.axes()
        sizes = {leaf.name: leaf.size for a in axes.values() for x in a for _, leaf in leaves(x) if leaf.name}
        parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        spec = cls(axes, sizes, frozenset(stored) - parameters, _readings(seen, trace, names, axes, sizes))
        _warn_unreached(trace, parameters, sizes)
        if verify and sizes:
            _verify(spec, module, example)
        return spec

    @classmethod
    def from_axes(
        cls, axes: Mapping[str, Any], like: Weights, *, buffers: frozenset[str] | None = None
    ) -> PermutationSpec:
        """A specification given by hand.

        Args:
            axes: for each tensor a tuple with one entry for each axis: a group's name, None where nothing moves, a
                tuple of entries for a product such as ``("channels", 49)`` (channels x pixels of a flattened map),
                or a list of entries for stretches one after the other such as ``["q", "k", "v"]``. A tensor whose
                axes are all fixed may be left out if it has no axis of a size that a group has.
            like: a network or state dict of the shapes.
            buffers: tensors to permute but not match on; default those named ``running_*``.

        Raises:
            InputError: tensors that do not exist, sizes that do not fit, or a tensor left out that may belong.

        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> axes = {"0.weight": ("P", None), "0.bias": ("P",), "2.weight": (None, "P")}
        >>> PermutationSpec.from_axes(axes, net).sizes
        {'P': 8}
        """
        state, found = state_of(like), {}
        sizes: dict[str, int] = {}
        for plain in (True, False):  # sizes of groups that fill an axis help to cut the others
            for name, entries in axes.items():
                checks.require(name in state, f"axes names {name!r}, which the weights do not have.")
                shape = tuple(state[name].shape)
                checks.require(
                    isinstance(entries, tuple) and len(entries) == len(shape),
                    f"axes[{name!r}] is {entries!r}; it must be a tuple of {len(shape)} entries, one for each axis.",
                )
                if not plain:
                    found[name] = tuple(
                        parse(e, n, sizes, f"axis {d} of {name!r}")
                        for d, (e, n) in enumerate(zip(entries, shape, strict=True))
                    )
                for d, (entry, n) in enumerate(zip(entries, shape, strict=True)):
                    if plain and isinstance(entry, str):
                        parse(entry, n, sizes, f"axis {d} of {name!r}")
        for name, tensor in state.items():
            if name not in found:
                own = [n for n in tensor.shape if n in sizes.values()]
                checks.require(
                    not own, f"axes says nothing of {name!r} of shape {tuple(tensor.shape)}; it must."
                )
                found[name] = tuple(Leaf(n) for n in tensor.shape)
        kept = frozenset(n for n in state if ".running_" in f".{n}") if buffers is None else buffers
        return cls({name: found[name] for name in state}, sizes, kept)

    def occurrences(self, group: str) -> list[Occurrence]:
        """Every place of a group."""
        return [
            Occurrence(name, d, path)
            for name, axes in self.axes.items()
            for d, axis in enumerate(axes)
            for path, leaf in leaves(axis)
            if leaf.name == group
        ]

    def check(self, weights: Weights, name: str = "weights") -> dict[str, Tensor]:
        """The state dict of ``weights``, if it has the tensors and shapes of this specification.

        Raises:
            InputError: naming the first tensor that is missing, not in the specification, of another shape or not
                finite.
        """
        state = state_of(weights)
        missing = [k for k in self.axes if k not in state]
        checks.require(
            not missing, f"{name} has no {checks.listing(missing)}; the specification is of another network."
        )
        extra = [k for k in state if k not in self.axes]
        checks.require(
            not extra, f"{name} has {checks.listing(extra)}, of whose axes the specification says nothing."
        )
        for key, axes in self.axes.items():
            shape = tuple(a.size for a in axes)
            checks.require(
                tuple(state[key].shape) == shape,
                f"{name}[{key!r}] has the shape {tuple(state[key].shape)}; the specification has {shape}.",
            )
            checks.finite(f"{name}[{key!r}]", state[key])
        return state

    def permuted(self, key: str, tensor: Tensor, order: Order, skip: Occurrence | None = None) -> Tensor:
        """One tensor with its axes permuted, except for one place of a group."""
        for d, axis in enumerate(self.axes[key]):
            path = skip.path if skip is not None and skip.dim == d else None
            found = index(axis, order, path)
            if found is not None:
                tensor = tensor.index_select(d, found.to(tensor.device))
        return tensor

    def to_json(self) -> dict[str, Any]:
        """This specification as JSON values, without the readings."""
        axes = {k: [to_json(a) for a in axes] for k, axes in self.axes.items()}
        return {"axes": axes, "sizes": self.sizes, "buffers": sorted(self.buffers)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PermutationSpec:
        """What :meth:`to_json` wrote."""
        axes = {k: tuple(from_json(a) for a in axes) for k, axes in value["axes"].items()}
        return cls(axes, {k: int(n) for k, n in value["sizes"].items()}, frozenset(value["buffers"]))


def state_of(weights: Weights) -> dict[str, Tensor]:
    """The state dict of a network, or the mapping itself, cut from its graph."""
    if isinstance(weights, nn.Module):
        return {k: t.detach() for k, t in weights.state_dict().items()}
    checks.require(
        isinstance(weights, Mapping) and all(isinstance(t, Tensor) for t in weights.values()),
        f"weights is a {type(weights).__name__}; it must be an nn.Module or a state dict of tensors.",
    )
    return {k: t.detach() for k, t in weights.items()}


def call(module: nn.Module, example: Any) -> Any:
    """``module`` on one example: a tensor, positional arguments or keyword arguments."""
    try:
        if isinstance(example, Mapping):
            return module(**example)
        return module(*example) if isinstance(example, tuple | list) else module(example)
    except (RuntimeError, TypeError, ValueError) as error:
        raise checks.InputError(
            f"module does not run on the example: {type(error).__name__}: {error}"
        ) from error


def _outputs(value: Any) -> list[Tensor]:
    """The tensors of a network's output; of one with logits these alone, since caches may be permuted."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(value, name, None), Tensor):
            return [getattr(value, name)]
    found = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    checks.require(bool(found), f"module gives a {type(value).__name__} without a tensor in it.")
    return found


@contextmanager
def _decomposed(module: nn.Module) -> Iterator[None]:
    """Within the block attention, transformer layers and recurrent layers run as their plain products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(m, nn.RNNBase) for m in module.modules())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack, warnings.catch_warnings():
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if recurrent:  # the flags warn of settings of other devices that they touch in passing
                warnings.simplefilter("ignore")
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _readings(
    seen: Mapping[int, tuple[str, tuple[Node, ...]]],
    trace: AxisTrace,
    names: Mapping[int, str],
    axes: Mapping[str, tuple[Axis, ...]],
    sizes: Mapping[str, int],
) -> dict[str, tuple[Reading, ...]]:
    """Inputs of modules on which a group shows; those of modules that hold a matrix with it, where there are any."""
    holds: dict[str, set[str]] = {}
    for key, own in axes.items():
        if len(own) > 1:
            held = {leaf.name for axis in own for _, leaf in leaves(axis) if leaf.name}
            holds.setdefault(key.rpartition(".")[0], set()).update(held)
    found: dict[str, list[Reading]] = {g: [] for g in sizes}
    for module, nodes in seen.values():
        for d, node in enumerate(nodes):
            axis = trace.layout(node, names)
            for path, leaf in leaves(axis):
                if leaf.name is not None:
                    found[leaf.name].append(Reading(module, d, axis, path))
    return {
        g: tuple(r for r in every if g in holds.get(r.module, ())) or tuple(every)
        for g, every in found.items()
    }


def _warn_unreached(trace: AxisTrace, parameters: set[str], sizes: Mapping[str, int]) -> None:
    idle = [k for k, t in trace.stored.items() if k in parameters and t.ndim and id(t) not in trace.used]
    if idle and sizes:
        warnings.warn(
            f"the example does not reach {checks.listing(idle)}; these stay fixed, so a branch of the network that "
            "uses them with permuted units would change.",
            stacklevel=3,
        )


@torch.no_grad()
def _verify(spec: PermutationSpec, module: nn.Module, example: Any) -> None:
    """Compare outputs before and after a random permutation, with vectors disturbed so that none is symmetric."""
    g = torch.Generator().manual_seed(0)
    clone = copy.deepcopy(module).eval()
    state = clone.state_dict()
    for tensor in state.values():
        if tensor.is_floating_point() and tensor.ndim <= 1:
            tensor += 0.1 * torch.rand(tensor.shape, generator=g).to(tensor)
    before = _outputs(call(clone, example))
    order = {name: torch.randperm(n, generator=g) for name, n in spec.sizes.items()}
    clone.load_state_dict({k: spec.permuted(k, t, order) for k, t in state.items()})
    after = _outputs(call(clone, example))
    for x, y in zip(before, after, strict=True):
        if x.is_floating_point() and x.numel():
            gap, scale = float((x - y).abs().max()), float(x.abs().max())
            checks.require(
                gap <= max(AGREEMENT, 20 * torch.finfo(x.dtype).eps) * max(scale, 1e-30),
                f"module's outputs change by {gap:.2g} of {scale:.2g} under the permutation read off its run; it "
                "depends on hidden units by their place, so give the specification by hand (from_axes).",
            )
