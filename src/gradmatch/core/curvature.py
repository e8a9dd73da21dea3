r"""Curvature of a Problem as a linear operator: the Hessian, its two parts, and three Fisher matrices.

With L = (1/n) sum_i l_i, outputs f_i, J_i = df_i / dtheta and B_i = d^2 l_i / df_i^2,

    H = G + R,    G = (1/n) sum_i J_i^T B_i J_i,    R = (1/n) sum_i sum_c (dl_i / df_ic) d^2 f_ic / dtheta^2,

=================  =========================================================================================
"hessian"          H
"ggn"              G, the generalised Gauss-Newton matrix; positive semi-definite if the loss is convex in f
"residual"         R = H - G, computed as such and not as a difference
"fisher"           (1/n) sum_i E[g g^T] with g the gradient at a target drawn from the model; equal to G for the
                   losses here that are likelihoods, and refused for others
"sampled_fisher"   the same with ``samples`` drawn targets in place of the expectation
"empirical_fisher" (1/n) sum_i g_i g_i^T with the targets of the data: the second moment of the gradients
=================  =========================================================================================

How l and f are split is a choice: with logits and cross-entropy B = diag(p) - p p^T. "mse" is read as the likelihood
of a Gaussian of variance D/2 in each of D entries. Where an example has several positions (pixels, tokens), each is a
draw of its own, weighted as in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import copy
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gradmatch.core import _metrics, _second
from gradmatch.core._batches import Batch
from gradmatch.core._operators import dense
from gradmatch.core._per_example import Engine, refuse_coupled
from gradmatch.core.checks import InputError, finite, one_of, require, whole
from gradmatch.core.diagonal import squared_pullbacks
from gradmatch.core.problem import ParamValues, Problem

__all__ = ["KINDS", "Curvature", "Kind"]

Kind = Literal["hessian", "ggn", "residual", "fisher", "sampled_fisher", "empirical_fisher"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_KEEP = 2**30  # bytes of graphs kept from one product to the next
_AT_ONCE = 2**27  # bytes of intermediate values that vectors multiplied together may take
_CACHED = 2**24  # the same on a CPU; where under 8 vectors stay below, each by itself is faster
_MOST = 2**33  # bytes of the largest matrix built
_BLOCK = 2**25  # numbers of a block of per-example rows


class Curvature:
    """A curvature matrix of the mean loss over all examples, known by its products (a ``LinearOperator``).

    Taken at the parameters' values when made: a copy is kept. Products with several vectors are batched, and the
    graphs they are read from are kept between calls as far as memory allows. Batches of any sizes give the same.
    Weight decay is not part of the loss: add its coefficient to every eigenvalue. At kinks of ReLU the second
    derivative is taken as 0, as it is almost everywhere.

    Args:
        problem: model, loss and data; ``select`` there chooses the parameters, so layer blocks are problems.
        kind: which matrix, see the module.
        params: where to take it (dict, list or flat vector); default: the model's own parameters.
        samples: targets drawn for each example, for "sampled_fisher".
        generator: of those draws; the same targets are used in every product.
        chunk: vectors multiplied at once, at most 64 by default: on a CPU as many as keep their intermediate values
            in 16 MiB, or one where that is under 8; elsewhere what fits 128 MiB.
        keep: bytes of graphs kept from one product to the next; beyond, they are built anew each time.

    Attributes:
        shape, dtype, device, symmetric: as every operator.
        n: number of examples.

    Raises:
        InputError: active dropout or batch norm, a Fisher of a loss that is no likelihood of ours, a model that
            cannot be differentiated twice (its module is named), products that are not finite.

    >>> from torch import nn
    >>> problem = Problem(nn.Linear(3, 2), "cross_entropy", (torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])))
    >>> curvature = Curvature(problem, "ggn")
    >>> curvature.shape, curvature.matvec(torch.randn(8, 4)).shape, curvature.gram().shape
    ((8, 8), torch.Size([8, 4]), torch.Size([5, 5]))
    """

    symmetric = True

    def __init__(
        self,
        problem: Problem,
        kind: Kind = "hessian",
        params: ParamValues | None = None,
        *,
        samples: int = 1,
        generator: torch.Generator | None = None,
        chunk: int | None = None,
        keep: int = _KEEP,
    ) -> None:
        self.problem, self.kind = problem, one_of("kind", kind, KINDS)
        self.samples = whole("samples", samples)
        self.chunk = None if chunk is None else whole("chunk", chunk)
        self._keep = whole("keep", keep, least=0)
        problem.check_mode()
        if kind in ("fisher", "sampled_fisher"):
            require(
                _metrics.is_likelihood(problem),
                f"kind is {kind!r} and loss is {problem.loss_name!r}; a Fisher matrix needs a likelihood, one of "
                f'{", ".join(_metrics.LIKELIHOODS)} (kind="ggn" and "empirical_fisher" take any loss).',
            )
        if kind in ("sampled_fisher", "empirical_fisher"):
            refuse_coupled(problem)
        if kind == "sampled_fisher" and generator is None:
            raise InputError('generator is None; kind="sampled_fisher" draws targets and needs one.')
        self._seed = 0
        if generator is not None:
            self._seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        self._leaves = {k: p.clone().requires_grad_() for k, p in problem.resolve(params).items()}
        for name, leaf in self._leaves.items():
            finite(f"parameter {name}", leaf.detach())
        self.n, p = problem.n, problem.space.size
        self.shape, self.dtype, self.device = (p, p), problem.space.dtype, problem.space.device
        self._pull = _second.Pull()
        self._kept: dict[int, _second.Product] = {}
        self._kept_bytes, self._batch_bytes = 0, 0

    # --- products ------------------------------------------------------------------------------------------

    def matvec(self, vectors: Tensor) -> Tensor:
        """The matrix times V [P] or [P, b]."""
        require(
            vectors.ndim in (1, 2) and len(vectors) == self.shape[0],
            f"vectors has shape {tuple(vectors.shape)}; it must be ({self.shape[0]},) or ({self.shape[0]}, b).",
        )
        rows = (vectors[None] if vectors.ndim == 1 else vectors.T).to(dtype=self.dtype, device=self.device)
        total = torch.zeros(rows.shape, dtype=self.dtype, device=self.device)
        try:
            for product in self._products():
                self._add(product, rows, total)
        except RuntimeError as error:
            _second.refuse_once_differentiable(self.problem, error)
            raise
        finite(f"a product with the {self.kind} matrix", total.div_(self.n))
        return total[0] if vectors.ndim == 1 else total.T

    def _add(self, product: _second.Product, rows: Tensor, total: Tensor) -> None:
        """Add one batch's product to ``total``, so many vectors at once as its intermediate values have room for."""
        width = self.chunk or self._width()
        space = self.problem.space
        for into, part in zip(total.split(width), rows.split(width), strict=True):
            blocks = [block.contiguous() for block in space.unflatten(part).values()]
            into += space.flatten(product(blocks), batch_dims=1)

    def _width(self) -> int:
        on_cpu = self.device.type == "cpu"
        found = min(64, (_CACHED if on_cpu else _AT_ONCE) // max(1, self._batch_bytes))
        return max(1, found if found >= 8 or not on_cpu else 1)

    def _products(self) -> Iterator[_second.Product]:
        """The summed product of every batch, from its graph."""
        if len(self._kept) == len(self.problem.data.sizes):  # nothing of the data is needed again
            yield from self._kept.values()
            return
        for batch in self.problem.batches():
            found = self._kept.get(batch.start)
            yield self._build(batch) if found is None else found

    def _build(self, batch: Batch) -> _second.Product:
        """The graph of one batch, kept if there is room."""
        saved: dict[int, int] = {}  # bytes by address: the same values are saved by several operations

        def count(t: Tensor) -> Tensor:
            saved[t.data_ptr()] = max(t.numel() * t.element_size(), saved.get(t.data_ptr(), 0))
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            product = self._graph(batch)
        size = sum(saved.values())
        fixed = [t.data_ptr() for t in (*tree_leaves((batch.inputs, batch.target)), *self._leaves.values())]
        self._batch_bytes = max(self._batch_bytes, size - sum(saved.get(at, 0) for at in set(fixed)))
        if self._kept_bytes + size <= self._keep and "order" not in self.problem.allow:
            self._kept[batch.start] = product
            self._kept_bytes += size
        return product

    def _graph(self, batch: Batch) -> _second.Product:
        if self.kind == "hessian":
            return _second.hessian_product(self.problem, self._leaves, batch, self._pull)
        if self.kind == "residual":
            return _second.residual_product(self.problem, self._leaves, batch, self._pull)
        return _second.metric_product(self.problem, self._leaves, batch, self._pull, self._metric)

    # --- the middle of J^T M J -----------------------------------------------------------------------------

    def _metric(self, outputs: Tensor, batch: Batch) -> _second.Metric:
        if self.kind in ("ggn", "fisher"):
            return _metrics.loss_metric(self.problem, outputs, batch, self._pull)
        return _metrics.outer_metric(*self._slopes(outputs, batch))

    def _slopes(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, tuple[int, ...]]:
        """Slopes r [S, m, ...] with M = mean_s r_s r_s^T, and the axes that one r spans."""
        if self.kind == "empirical_fisher":
            slope = _metrics.loss_slope(self.problem, outputs, batch)[1].detach()
            return slope[None], tuple(range(1, outputs.ndim))
        slopes = _metrics.sampled_slopes(self.problem, outputs, batch, self.samples, self._seed)
        return slopes, _metrics.class_axes(self.problem, outputs)

    def _factors(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Columns s [m, ...] of a root of M, one of each example at a time: M = sum s s^T."""
        if self.kind in ("ggn", "fisher"):
            yield from _metrics.loss_roots(
                _metrics.loss_metric(self.problem, outputs, batch, self._pull), outputs
            )
            return
        slopes, axes = self._slopes(outputs, batch)
        slopes = slopes / len(slopes) ** 0.5
        rest = [a + 1 for a in range(1, outputs.ndim) if a not in axes]
        for slope in slopes:
            if not rest:
                yield slope
                continue
            count = math.prod(slopes.shape[a] for a in rest)
            places = torch.eye(count, device=slope.device, dtype=slope.dtype)
            shape = [slopes.shape[a] if a in rest else 1 for a in range(1, slopes.ndim)]
            for place in places:
                yield slope * place.reshape(shape)

    # --- whole matrices and their diagonals ----------------------------------------------------------------

    def rows(self) -> Iterator[Float[Tensor, "m P"]]:
        """Pieces of X [N, P] with matrix = X^T X / n, a row for each example and column of a root of M.

        Raises:
            InputError: "hessian" or "residual", a loss that is not convex in the outputs, or outputs so many that
                their loss Hessian is not factored.
        """
        require(
            self.kind not in ("hessian", "residual"),
            f'kind is "{self.kind}", which is no sum of squares; rows and gram need "ggn" or a Fisher.',
        )
        refuse_coupled(self.problem)
        linear = copy(self.problem)
        linear.loss = lambda outputs, s: (outputs * s).flatten(1).sum(1) if outputs.ndim > 1 else outputs * s
        engine = Engine(linear, {k: p.detach() for k, p in self._leaves.items()}, False, "auto")
        size = max(1, _BLOCK // self.shape[0])
        for batch in self.problem.batches():
            with torch.no_grad():
                outputs = self.problem.outputs(engine.blocks, batch.inputs)
            for s in self._factors(outputs, batch):
                for part in Batch(batch.inputs, s, batch.start).split(size):
                    block = torch.empty(part.size, self.shape[0], dtype=self.dtype, device=self.device)
                    engine.rows(part, {k: block[:, at] for k, at in self.problem.space.slices.items()})
                    yield finite(f"rows of the {self.kind} matrix", block)

    def gram(self) -> Float[Tensor, "N N"]:
        """K = X X^T / n of the rows X: its non-zero eigenvalues are those of the matrix, of size N instead of P.

        For "ggn" with C outputs N = n (C - 1) with softmax and n C otherwise; for "empirical_fisher" N = n.
        """
        parts, numbers = [], 0
        for block in self.rows():
            parts.append(block)
            numbers += block.numel()
            refuse_large(f"the rows of the {self.kind} matrix", numbers, self.dtype)
        x = torch.cat(parts)
        refuse_large("the gram matrix", len(x) ** 2, self.dtype)
        return x @ x.T / self.n

    def dense(self, progress: Callable[[int, int], object] | None = None) -> Float[Tensor, "P P"]:
        """The whole matrix, symmetrised; by P products, of which ``progress`` is told (done, in all)."""
        refuse_large(f"the {self.kind} matrix of {self.shape[0]} parameters", self.shape[0] ** 2, self.dtype)
        matrix = dense(self, progress=progress)
        return (matrix + matrix.T) / 2

    def diag(self) -> Float[Tensor, " P"]:
        """The diagonal [P]: from the rows of sums of squares, by P products for "hessian" and "residual".

        For large P and those kinds, :func:`gradmatch.core.krylov.hutchinson_diagonal` estimates it.
        """
        if self.kind in ("hessian", "residual"):
            return self._diag_by_products()
        refuse_coupled(self.problem)
        if not self._one_number():
            blocks = {k: p.detach() for k, p in self._leaves.items()}
            sums = squared_pullbacks(
                self.problem, lambda z, batch: torch.stack(list(self._factors(z, batch))), blocks
            )
            return self.problem.space.flatten(sums) / self.n
        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        for block in self.rows():
            total += block.square().sum(0, dtype=torch.float64)
        return (total / self.n).to(self.dtype)

    def _one_number(self) -> bool:
        """Whether the model's output for an example is a bare number, of shape [m] for a batch."""
        one = next(self.problem.batches()).take(slice(0, 1))
        with torch.no_grad():
            return self.problem.outputs(self._leaves, one.inputs).ndim == 1

    def _diag_by_products(self) -> Tensor:
        total = torch.empty(self.shape[0], dtype=self.dtype, device=self.device)
        for start in range(0, self.shape[0], 64):
            width = min(64, self.shape[0] - start)
            unit = torch.zeros(self.shape[0], width, dtype=self.dtype, device=self.device)
            unit[start : start + width].fill_diagonal_(1)
            total[start : start + width] = self.matvec(unit)[start : start + width].diagonal()
        return total

    def trace(self) -> float:
        """The trace, as the sum of :meth:`diag`; :func:`gradmatch.core.krylov.hutchinson` estimates it."""
        return float(self.diag().sum(dtype=torch.float64))


def refuse_large(what: str, numbers: int, dtype: torch.dtype) -> None:
    """Refuse a matrix of more than 8 GiB."""
    size = numbers * torch.finfo(dtype).bits // 8
    require(
        size <= _MOST,
        f"{what} would take {size / 2**30:.1f} GiB, more than {_MOST // 2**30} GiB; use products "
        "(core.krylov: eigenpairs, spectral_density, hutchinson).",
    )
