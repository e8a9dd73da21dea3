"""TrAct: a first layer whose steps move its pre-activations (Petersen et al., NeurIPS 2024, arXiv 2410.23970).

The gradient of a first layer's weights is (gradient at the pre-activation) x (pixel values), so bright, contrasty
inputs dominate it. TrAct asks which weights best realise a gradient step on the pre-activations z = x W^T instead: with
b rows x [b, n] and G = dL/dz [b, m], the minimiser of |x dW^T + eta b G|^2 / b + lam |dW|^2 is -eta times

    grad_W = G^T x (x^T x / b + lam I)^-1,

which takes the place of the gradient G^T x; any optimizer goes on from there. The forward pass and the gradients of
bias and input stay as they are. For a convolution the rows are its patches. With fewer rows than n, the same matrix is
G^T (x x^T / b + lam I)^-1 x, a system of size b.

What to know: ``lam`` is absolute, in units of the input's variance, so standardise inputs. The inverse belongs to one
backward pass, so accumulating micro-batches is not the gradient of the large batch, and ranks differ unless ``sync``.
The layer's gradient norm changes by up to 1 / lam, and thresholds of gradient clipping with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from gradmatch.core.checks import InputError, fraction, one_of, positive, require, whole

__all__ = ["TrActConv1d", "TrActConv2d", "TrActLayer", "TrActLinear", "apply_tract", "remove_tract", "tract"]

_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_BLOCK = 2**18  # patch numbers at once: 1 MiB in float32, which stays in cache between copy and product


@dataclass(frozen=True)
class Settings:
    """Options of a layer; see :func:`tract`."""

    lam: float = 0.1
    solver: Literal["auto", "primal", "dual"] = "auto"
    stats: Literal["batch", "ema"] = "batch"
    decay: float = 0.9
    max_rows: int | None = None
    sync: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        positive("lam", self.lam)
        one_of("solver", self.solver, ("auto", "primal", "dual"))
        one_of("stats", self.stats, ("batch", "ema"))
        fraction("decay", self.decay, zero=True, one=False)
        if self.max_rows is not None:
            whole("max_rows", self.max_rows)
        require(
            self.solver != "dual" or not self.needs_moment,
            'solver is "dual", which has no x^T x; stats="ema", max_rows and sync need "primal" or "auto".',
        )

    @property
    def needs_moment(self) -> bool:
        """Whether an option can only be kept with x^T x."""
        return self.stats == "ema" or self.max_rows is not None or self.sync


class TrActLayer(nn.Module):
    """What the three layers share: settings, and the statistics of their inputs; made by :func:`tract`."""

    tract: Settings
    moment: Tensor | None
    """Running mean of x^T x / b (groups, n, n) with ``stats="ema"``; not part of the state dict."""

    def _begin(self, settings: Settings) -> None:
        self.tract, self.moment = settings, None
        self.generator = torch.Generator().manual_seed(settings.seed)

    def plain(self) -> nn.Module:
        """The ordinary layer, with the same parameters."""
        base = next(kind for kind, ours in _LAYERS.items() if ours is type(self))
        layer = _same(self, base)
        for name in ("tract", "moment", "generator"):
            del layer.__dict__[name]
        return layer

    def _call(self, x: Tensor, padding: Any) -> Tensor:
        require(x.is_floating_point(), f"the input is {x.dtype}; TrAct needs floating-point inputs.")
        return cast(Tensor, _Corrected.apply(x, self.weight, self.bias, self, padding))  # type: ignore[no-untyped-call]


class TrActLinear(TrActLayer, nn.Linear):
    """``nn.Linear`` whose weight gradient is corrected: (..., n) -> (..., m)."""

    def forward(self, input: Tensor) -> Tensor:
        return self._call(input, None)


class _Convolution(TrActLayer):
    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        if layer.padding_mode == "zeros":
            return self._call(input, layer.padding)
        # padded here, so that the input's gradient passes through the padding as in the plain layer
        sides = layer._reversed_padding_repeated_twice
        return self._call(F.pad(input, sides, mode=layer.padding_mode), (0,) * (len(sides) // 2))


class TrActConv1d(_Convolution, nn.Conv1d):
    """``nn.Conv1d`` whose weight gradient is corrected."""


class TrActConv2d(_Convolution, nn.Conv2d):
    """``nn.Conv2d`` whose weight gradient is corrected."""


_LAYERS: dict[type[nn.Module], type[TrActLayer]] = {
    nn.Linear: TrActLinear,
    nn.Conv1d: TrActConv1d,
    nn.Conv2d: TrActConv2d,
}


# --- putting it in and taking it out -----------------------------------------------------------------------


def tract(layer: nn.Module, lam: float = 0.1, **options: Any) -> TrActLayer:
    """The same layer with the corrected weight gradient: same parameters, buffers, hooks and state-dict keys.

    Args:
        layer: an ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d`` (any stride, padding, dilation, groups) whose inputs
            are data, not learned features.
        lam: damping, in units of the input's variance; 0.1 in all of the paper's experiments.
        solver: "primal" (size n), "dual" (size b), or the smaller ("auto", the default).
        stats: "batch", as published, or "ema": a running mean of x^T x / b with factor ``decay`` (0.9).
        max_rows: take x^T x from this many random rows (patches) of a batch; None: all. ``seed`` (0) draws them.
        sync: sum x^T x over the ranks of torch.distributed.

    Raises:
        InputError: another kind of layer, ``lam`` not above 0, options that exclude each other.

    >>> layer = tract(nn.Linear(3, 2))
    >>> layer(torch.randn(5, 3)).square().mean().backward()
    >>> layer.weight.grad.shape
    torch.Size([2, 3])
    """
    settings = Settings(lam=lam, **options)
    ours = _LAYERS.get(type(layer))
    if ours is None:
        kinds = ", ".join(f"nn.{k.__name__}" for k in _LAYERS)
        raise InputError(f"layer is {type(layer).__name__}; TrAct takes exactly {kinds}.")
    require("forward" not in layer.__dict__, "layer has a forward of its own, which TrAct would not call.")
    made = _same(layer, ours)
    assert isinstance(made, TrActLayer)
    made._begin(settings)
    return made


def apply_tract(model: nn.Module, lam: float = 0.1, layer: str | None = None, **options: Any) -> nn.Module:
    """Put TrAct into a model's first layer with weights, in place; optimizers built before stay valid.

    Args:
        model: any module; norm layers before the first layer are passed over.
        lam, options: as :func:`tract`.
        layer: name of the layer (as in ``model.named_modules()``) where the first registered is not the first used.

    Returns:
        the model (a new layer where the model is the layer itself).

    >>> net = apply_tract(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> type(net[1]).__name__, type(net[3]).__name__
    ('TrActLinear', 'Linear')
    """
    modules = dict(model.named_modules())
    if layer is None:
        owners = (k for k, m in modules.items() if m._parameters.get("weight") is not None)
        layer = next((k for k in owners if not isinstance(modules[k], _NORMS)), None)
        if layer is None:
            raise InputError("model has no layer with weights; name one with layer=.")
    require(layer in modules, f"layer is {layer!r}, which is no module of the model.")
    found = modules[layer]
    require(not isinstance(found, TrActLayer), f"layer {layer!r} has TrAct already; remove_tract first.")
    try:
        return _replaced(model, layer, tract(found, lam, **options))
    except InputError as error:
        raise InputError(f"layer {layer!r}: {error}") from error


def remove_tract(model: nn.Module) -> nn.Module:
    """Make every TrAct layer of a model plain again, in place; returns the model."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, TrActLayer)]
    for name, module in found:
        model = _replaced(model, name, module.plain())
    return model


def _replaced(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    return model


def _same(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A module of another class with all that ``layer`` holds, by reference."""
    made = kind.__new__(kind)
    made.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in layer.__dict__.items()})
    return made


# --- the gradient ------------------------------------------------------------------------------------------


class _Corrected(torch.autograd.Function):
    """The framework's own linear map or convolution with the corrected weight gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, layer: TrActLayer, padding: Any) -> Tensor:
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        convolve: Any = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        out: Tensor = convolve(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.layer, ctx.padding = inputs
        ctx.biased = bias is not None
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wants = ctx.needs_input_grad
        kind = _LinearRows if isinstance(ctx.layer, nn.Linear) else _PatchRows
        with torch.autocast(x.device.type, enabled=False):
            rows = kind(ctx.layer, x, weight, grad, ctx.padding)
            dual = wants[1] and _is_dual(ctx.layer.tract, rows)
            to_input, to_weight, to_bias = rows.gradients(
                wants[0], wants[1] and not dual, ctx.biased and wants[2]
            )
            if wants[1] and rows.count > 0:
                to_weight = _dual(ctx.layer, rows) if dual else _primal(ctx.layer, rows, to_weight)
        kinds = (x.dtype, weight.dtype, weight.dtype)
        found = (to_input, to_weight, to_bias)
        return *(g if g is None else g.to(kind) for g, kind in zip(found, kinds, strict=True)), None, None


def _is_dual(settings: Settings, rows: _Rows) -> bool:
    if settings.solver != "auto" or not rows.count:
        return settings.solver == "dual" and rows.count > 0
    return rows.count < rows.width and not settings.needs_moment


def _primal(layer: TrActLayer, rows: _Rows, ordinary: Any) -> Tensor:
    """(G^T x) (x^T x / b + lam I)^-1 of the ordinary gradient G^T x, shaped as the weight."""
    wide = ordinary.reshape(len(rows), -1, rows.width)  # (groups, m / groups, n)
    return _damped_solve(_moment(layer, rows), layer.tract.lam, wide.mT).mT.reshape(ordinary.shape)


def _dual(layer: TrActLayer, rows: _Rows) -> Tensor:
    """G^T (x x^T / b + lam I)^-1 x: the ordinary gradient of other incoming gradients."""
    x = rows.matrix()  # (groups, b, n)
    return rows.weight_gradient(_damped_solve(x @ x.mT / rows.count, layer.tract.lam, rows.incoming()))


def _damped_solve(matrix: Tensor, lam: float, right: Tensor) -> Tensor:
    """(matrix + lam I)^-1 right for symmetric positive semidefinite matrices (groups, k, k)."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(lam)
    factor, info = torch.linalg.cholesky_ex(matrix)
    require(
        not bool(info.any()),
        "the second moment of the inputs plus lam is not positive definite; the inputs are not finite, or lam is "
        "far too small for their scale.",
    )
    return torch.cholesky_solve(right, factor)


def _moment(layer: TrActLayer, rows: _Rows) -> Tensor:
    """x^T x / b (groups, n, n), averaged over ranks and time as the settings say; the caller may write on it."""
    settings = layer.tract
    total, count = rows.second_moment(settings.max_rows, layer.generator)
    if settings.sync and torch.distributed.is_available() and torch.distributed.is_initialized():
        counted = torch.tensor(float(count), device=total.device)
        torch.distributed.all_reduce(total)
        torch.distributed.all_reduce(counted)
        total = total / counted
    else:
        total = total / count
    if settings.stats == "ema":
        old = layer.moment
        layer.moment = total if old is None else torch.lerp(total, old.to(total), settings.decay)
        return layer.moment.clone()
    return total


class _Rows:
    """The rows x [groups, b, n] a layer multiplies, and its ordinary gradients, in at least float32."""

    def __init__(self, layer: TrActLayer, x: Tensor, weight: Tensor, grad: Tensor, padding: Any) -> None:
        kind = torch.promote_types(x.dtype, torch.float32)
        self.layer, self.padding = layer, padding
        self.x, self.weight, self.grad = x.to(kind), weight.to(kind), grad.to(kind)

    count: int
    """b, the number of rows."""
    width: int
    """n, the numbers in a row."""

    def __len__(self) -> int:
        """Number of groups, each with rows and weights of its own."""
        return 1

    def matrix(self) -> Tensor:
        """All rows (groups, b, n)."""
        raise NotImplementedError

    def second_moment(self, most: int | None, generator: torch.Generator) -> tuple[Tensor, int]:
        """x^T x (groups, n, n) of all rows or of ``most`` random ones, and how many they were."""
        raise NotImplementedError

    def incoming(self) -> Tensor:
        """Gradients that arrive at the outputs (groups, b, m / groups)."""
        raise NotImplementedError

    def gradients(
        self, x: bool, weight: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The ordinary gradients of input, weight and bias, those that are wanted."""
        raise NotImplementedError

    def weight_gradient(self, incoming: Tensor) -> Tensor:
        """The ordinary gradient of the weight had ``incoming`` (groups, b, m / groups) arrived."""
        raise NotImplementedError


class _LinearRows(_Rows):
    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.rows, self.into = self.x.reshape(-1, self.x.shape[-1]), self.grad.reshape(-1, len(self.weight))
        self.count, self.width = self.rows.shape

    def matrix(self) -> Tensor:
        return self.rows[None]

    def second_moment(self, most: int | None, generator: torch.Generator) -> tuple[Tensor, int]:
        rows = self.rows[_some(self.count, most, generator, self.rows.device)]
        return _gram(rows.mT)[None], len(rows)

    def incoming(self) -> Tensor:
        return self.into[None]

    def gradients(
        self, x: bool, weight: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return (
            (self.into @ self.weight).reshape(self.x.shape) if x else None,
            self.into.mT @ self.rows if weight else None,
            self.into.sum(0) if bias else None,
        )

    def weight_gradient(self, incoming: Tensor) -> Tensor:
        return incoming[0].mT @ self.rows


class _PatchRows(_Rows):
    """Convolutions; 1d ones as 2d ones of height 1. Rows are ordered (example, output place)."""

    def __init__(self, layer: Any, x: Tensor, weight: Tensor, grad: Tensor, padding: Any) -> None:
        super().__init__(layer, x, weight, grad, padding)
        self.dims = weight.ndim - 2
        self.unbatched = x.ndim == self.dims + 1
        if self.unbatched:
            self.x, self.grad = self.x[None], self.grad[None]
        self.sides = _sides(layer, padding)
        self.places = self.grad.shape[2:].numel()
        self.count, self.width = len(self.x) * self.places, weight[0].numel()

    def __len__(self) -> int:
        return int(self.layer.groups)  # type: ignore[arg-type]

    def _windows(self, x: Tensor) -> Tensor:
        """Patches as a view (B, C, *places, *kernel)."""
        view = F.pad(x, self.sides)
        layer: Any = self.layer
        for d in range(self.dims):
            reach = (layer.kernel_size[d] - 1) * layer.dilation[d] + 1
            view = view.unfold(2 + d, reach, layer.stride[d])[..., :: layer.dilation[d]]
        return view

    def _columns(self, x: Tensor) -> Tensor:
        """Patches as columns (groups, n, B * places), copied."""
        view = self._windows(x)
        d = self.dims
        order = (1, *range(2 + d, 2 + 2 * d), 0, *range(2, 2 + d))
        return view.permute(order).reshape(len(self), self.width, -1)

    def matrix(self) -> Tensor:
        return self._columns(self.x).mT

    def second_moment(self, most: int | None, generator: torch.Generator) -> tuple[Tensor, int]:
        if most is not None and most < self.count:
            index = _some(self.count, most, generator, self.x.device)
            view = self._windows(self.x)
            places = torch.unravel_index(index % self.places, view.shape[2 : 2 + self.dims])
            rows = view[(index // self.places, slice(None), *places)]  # (most, C, *kernel)
            rows = rows.reshape(most, len(self), self.width).transpose(0, 1)
            return rows.mT @ rows, most
        step = max(1, _BLOCK // (self.places * self.width * len(self)))
        total = self.x.new_zeros(len(self), self.width, self.width)
        for part in torch.split(self.x, step):
            columns = self._columns(part)
            total += torch.stack([_gram(c) for c in columns]) if len(columns) > 1 else _gram(columns[0])
        return total, self.count

    def incoming(self) -> Tensor:
        return self.grad.flatten(2).movedim(1, 2).reshape(self.count, len(self), -1).transpose(0, 1)

    def gradients(
        self, x: bool, weight: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        to_x, to_weight, to_bias = self._backward(self.grad, (x, weight, bias))
        return (to_x[0] if to_x is not None and self.unbatched else to_x), to_weight, to_bias

    def weight_gradient(self, incoming: Tensor) -> Tensor:
        grad = incoming.transpose(0, 1).reshape(len(self.x), self.places, -1).movedim(1, 2)
        return cast(Tensor, self._backward(grad.reshape(self.grad.shape), (False, True, False))[1])

    def _backward(self, grad: Tensor, wants: tuple[bool, bool, bool]) -> Any:
        """The framework's own kernel; it takes equal sides only, so for others x is padded before."""
        layer: Any = self.layer
        left, right = self.sides[0::2][::-1], self.sides[1::2][::-1]
        x, padding = (self.x, left) if left == right else (F.pad(self.x, self.sides), (0,) * self.dims)
        to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
            *(grad, x, self.weight, self.weight.shape[:1], layer.stride, padding, layer.dilation),
            *(False, (0,) * self.dims, layer.groups, wants),
        )
        if to_x is not None and left != right:
            to_x = F.pad(to_x, [-s for s in self.sides])
        return to_x, to_weight, to_bias


def _sides(layer: Any, padding: Any) -> tuple[int, ...]:
    """Zeros at the two ends of each dimension, the last dimension first, as ``F.pad`` takes them."""
    if padding == "valid":
        return (0,) * (2 * len(layer.kernel_size))
    if padding == "same":
        return tuple(layer._reversed_padding_repeated_twice)
    return tuple(p for side in reversed(padding) for p in (side, side))


def _some(count: int, most: int | None, generator: torch.Generator, device: torch.device) -> Any:
    if most is None or most >= count:
        return slice(None)
    return torch.randint(count, (most,), generator=generator).to(device)


def _gram(x: Tensor, block: int = 256) -> Tensor:
    """x x^T (n, n) of x (n, b); from 512 rows on, the blocks above the diagonal are mirrored, not computed."""
    n = len(x)
    if n < 2 * block:
        return x @ x.mT
    out = x.new_empty(n, n)
    for start in range(0, n, block):
        here = slice(start, start + block)
        out[start:, here] = x[start:] @ x[here].mT
        out[here, start + block :] = out[start + block :, here].mT
    return out
