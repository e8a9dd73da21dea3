"""Codes and indices of one layer, first by k-means, then learned together by the gradient of the layer's error.

With g = dL/dW^ at the looked-up weights and s the neuron's scale, codes take the exact gradient, the sum of g s over
the weights that use them. Indices are argmax of logits M over candidate codes, whose gradient is a surrogate:

- "default": that of a soft mixture at the hard point, g s p_j (C_j - sum_k p_k C_k), p = softmax(M). It grows with
  the distance of code j, so far codes are tried first;
- "proximal": g s sign(C_j - C_I) h(|C_j - C_I| / range C) with h(t) = 1 / (t + 0.1): whether moving to code j lowers
  the loss to first order, with near codes first. [reading: the paper asks for a decreasing function.]
  "proximal-exp" has h(t) = exp(-t / 0.1), and "sign" h = 1.

Adam divides every logit's gradient by its own size, which cancels h; so its second moment is a mean over the codes of
a weight ("shared").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.kmeans import kmeans_1d
from gradmatch.weights._coded import Coded, group_of_rows, looked_up, value_table

GRADS = ("proximal", "proximal-exp", "sign", "default")
MAP_OPTS = ("shared", "adam", "sgd")
MAP_INITS = ("onehot", "distance")
EPS, TAU = 0.1, 0.1
ONEHOT = 0.1
"""Logit of the nearest code at the start."""
LOOK = 50
"""Steps between looks at the error of all calibration data."""
BETAS, ADAM_EPS = (0.9, 0.999), 1e-8

Error = Callable[[Tensor], float]
"""Error of a matrix (out, in) on all calibration data."""
Slope = Callable[[Tensor], Tensor]
"""dL/dW of a matrix (out, in) on the next batch."""


def started(matrix: Float[Tensor, "out in"], ends: Tensor, bits: int, variant: str) -> Coded:
    """The best codes for a matrix by exact k-means, and the nearest code of every weight.

    Args:
        matrix: with rows in order of their groups.
        ends: of the groups.
        variant: "codebooks" (one for each group) or "scales" (one for all, and for each group the ratio of its standard
            deviation to the matrix's).
    """
    matrix = matrix.float()
    rows, k = group_of_rows(ends).to(matrix.device), 2**bits
    sizes = torch.diff(ends.long(), prepend=torch.zeros(1, dtype=torch.long)).tolist()
    blocks = torch.split(matrix, sizes)
    if variant == "codebooks":
        found, scales = [kmeans_1d(b, k).codes for b in blocks], None
    else:
        scales = torch.stack([b.std(correction=0) for b in blocks]) / matrix.std(correction=0).clamp_min(
            1e-30
        )
        scales = stored_type(torch.where(scales > 0, scales, 1))
        s = scales.float()[rows][:, None].expand_as(matrix)
        found = [kmeans_1d(matrix / s, k, s.square() if len(scales) > 1 else None).codes]
    codes = stored_type(torch.stack(found).float().to(matrix.device))
    nearest = nearest_codes(matrix, value_table(codes, scales, len(ends)), ends)
    return Coded(nearest, codes, scales, ends, bits)


def stored_type(values: Tensor) -> Tensor:
    """In half precision where that keeps them to three digits of the largest, else float32."""
    half = values.half()
    off = (half.float() - values).abs().max()
    return half if bool(off <= 1e-3 * values.abs().max()) else values.float()


def nearest_codes(matrix: Tensor, table: Tensor, ends: Tensor) -> Int[Tensor, "out in"]:
    """The nearest value of its group's sorted table for every weight, int64."""
    out = torch.empty_like(matrix, dtype=torch.long)
    first = 0
    for values, end in zip(table, ends.tolist(), strict=True):
        values, order = values.sort()
        out[first:end] = order[
            torch.bucketize(matrix[first:end].contiguous(), (values[1:] + values[:-1]) / 2)
        ]
        first = end
    return out


def code_gradient(
    slope: Tensor, indices: Tensor, books: Tensor, shape: tuple[int, int]
) -> Float[Tensor, "b K"]:
    """dL/dC: ``slope`` (dL/dW^ times scales) summed over the weights of each code.

    Args:
        books: codebook of each row.
        shape: of the codes.
    """
    flat = (indices + (books * shape[1])[:, None]).flatten()
    return slope.new_zeros(shape[0] * shape[1]).scatter_add_(0, flat, slope.flatten()).reshape(shape)


def moves(codes: Float[Tensor, "b K"], grad: str) -> Float[Tensor, "b K K"]:
    """For codes i (now) and j the factor sign(C_j - C_i) h(|C_j - C_i| / range) of the surrogate; 0 for i = j."""
    away = codes[:, None, :] - codes[:, :, None]
    spread = (codes.amax(1) - codes.amin(1)).clamp_min(1e-30)[:, None, None]
    t = away.abs() / spread
    h = {
        "proximal": lambda: 1 / (t + EPS),
        "proximal-exp": lambda: torch.exp(-t / TAU),
        "sign": lambda: torch.ones_like(t),
    }[grad]()
    return away.sign() * h


@dataclass
class Learned:
    """Codes and indices with the least error seen, and how the indices moved.

    Attributes:
        coded: the layer.
        error_before, error_after: mean squared error of the outputs on all calibration data.
        moved: share of weights whose code is not the one of the start.
        jump: mean length of the changes of index in the run, in units of the codes' range; 0 without any.
    """

    coded: Coded
    error_before: float
    error_after: float
    moved: float = 0.0
    jump: float = 0.0


@dataclass(frozen=True)
class Learning:
    """How codes and indices are learned.

    Attributes:
        steps, batch_size: of Adam.
        lr_codes: in units of the mean size of a code.
        lr_map: of the logits.
        grad: one of ``GRADS``; None leaves the indices as they are.
        map_init: "onehot" (0.1 at the nearest code, 0 elsewhere) or "distance" (minus the distance of every code in
            units of the range, which is proximal by itself).
        map_opt: "shared", "adam" or "sgd".
        candidates: codes that a weight may take: the so many around the nearest one.
    """

    steps: int = 1000
    batch_size: int = 64
    lr_codes: float = 1e-2
    lr_map: float = 1e-3
    grad: str | None = "proximal"
    map_init: str = "onehot"
    map_opt: str = "shared"
    candidates: int = 8

    def __post_init__(self) -> None:
        checks.whole("steps", self.steps, 0)
        checks.whole("batch_size", self.batch_size)
        checks.nonnegative("lr_codes", self.lr_codes)
        checks.nonnegative("lr_map", self.lr_map)
        checks.one_of("grad", GRADS[0] if self.grad is None else self.grad, GRADS)
        checks.one_of("map_init", self.map_init, MAP_INITS)
        checks.one_of("map_opt", self.map_opt, MAP_OPTS)


@dataclass
class Learner:
    """Learns codes and indices of one layer.

    Args:
        start: where to begin.
        matrix: the weights that ``start`` stands for (out, in).
        options: how.
    """

    start: Coded
    matrix: Tensor
    options: Learning
    flips: float = field(default=0.0, init=False)
    length: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        start = self.start
        groups = group_of_rows(start.ends).to(self.matrix.device)
        self.books = groups if len(start.codes) > 1 else torch.zeros_like(groups)
        self.scales = None if start.scales is None else start.scales.float()[groups][:, None]
        self.codes, self.indices = start.codes.float().clone(), start.indices.clone().contiguous()
        k = self.codes.shape[1]
        c = self.width = min(self.options.candidates, k)
        self.low = (self.indices - c // 2).clamp(0, k - c)
        if self.options.grad is not None:
            self.logits = self._first_logits()
            self.first = torch.zeros_like(self.logits)
            self.second = torch.zeros_like(self.logits if self.options.map_opt == "adam" else self.matrix)
        self.code_state = torch.zeros_like(self.codes), torch.zeros_like(self.codes)
        self.rate = self.options.lr_codes * float(self.codes.abs().mean())
        self.step = 0

    def _first_logits(self) -> Float[Tensor, "c out in"]:
        if self.options.map_init == "distance":
            spread = (self.codes.amax(1) - self.codes.amin(1)).clamp_min(1e-30)[self.books][:, None]
            w = self.matrix if self.scales is None else self.matrix / self.scales
            return torch.stack([-(w - self._code(j)).abs() / spread for j in range(self.width)])
        logits = torch.zeros(self.width, *self.matrix.shape, device=self.matrix.device)
        return logits.scatter_(0, (self.indices - self.low)[None], ONEHOT)

    def _code(self, j: int) -> Tensor:
        """The j-th candidate of every weight."""
        at = self.low + j + (self.books * self.codes.shape[1])[:, None]
        return self.codes.flatten().index_select(0, at.view(-1)).view_as(at)

    def coded(self) -> Coded:
        """The present state, with codes as they would be stored."""
        s = self.start
        return Coded(self.indices.clone(), self.codes.to(s.codes.dtype), s.scales, s.ends, s.bits)

    def run(self, slope: Slope, error: Error, progress: Callable[[], object] | None = None) -> Learned:
        """Learn; the state of least error on all data is kept, the start among those looked at."""
        steps, best, before = self.options.steps, self.start, error(self.start.dense())
        checks.require(before < float("inf"), "the error of the calibration data is not finite.")
        least = before
        for step in range(1, steps + 1):
            table = value_table(self.codes, self.start.scales, len(self.start.ends))
            self.update(slope(looked_up(self.indices, table, self.start.ends)))
            if step % LOOK == 0 or step == steps:
                now = self.coded()
                found = error(now.dense())
                if found < least:
                    least, best = found, now
                self._reseed()
            if progress is not None:
                progress()
        moved = float((best.indices != self.start.indices).double().mean())
        return Learned(best, before, least, moved, self.length / max(self.flips, 1))

    def update(self, slope: Tensor) -> None:
        """One step from dL/dW^ (out, in)."""
        self.step += 1
        slope = slope if self.scales is None else slope * self.scales
        gradient = code_gradient(slope, self.indices, self.books, self.codes.shape)  # type: ignore[arg-type]
        if self.options.grad is not None:
            self._move(slope)
        m, v = self.code_state
        m.lerp_(gradient, 1 - BETAS[0])
        v.lerp_(gradient.square(), 1 - BETAS[1])
        fast, slow = (1 - b**self.step for b in BETAS)
        self.codes.addcdiv_(m, (v / slow).sqrt_().add_(ADAM_EPS), value=-self.rate / fast)

    def _move(self, slope: Tensor) -> None:
        """One step of the logits, and the indices that follow from it."""
        squares = torch.zeros_like(slope)
        for j, gradient in enumerate(self.map_gradients(slope)):
            if self.options.map_opt == "sgd":
                self.logits[j].sub_(gradient, alpha=self.options.lr_map)
                continue
            self.first[j].lerp_(gradient, 1 - BETAS[0])
            if self.options.map_opt == "adam":
                self.second[j].lerp_(gradient.square(), 1 - BETAS[1])
            else:
                squares.addcmul_(gradient, gradient, value=1 / self.width)
        if self.options.map_opt != "sgd":
            if self.options.map_opt == "shared":
                self.second.lerp_(squares, 1 - BETAS[1])
            fast, slow = (1 - b**self.step for b in BETAS)
            divisor = (self.second / slow).sqrt_().add_(ADAM_EPS)
            self.logits.addcdiv_(self.first, divisor, value=-self.options.lr_map / fast)
        self._follow()

    def _follow(self) -> None:
        """Indices that the logits now ask for; most weights keep theirs, and only the others are looked at."""
        width = self.matrix.shape[1]
        own = self.logits.gather(0, (self.indices - self.low)[None])[0]
        changed = torch.nonzero((self.logits.amax(0) > own).flatten()).flatten()
        if not len(changed):
            return
        book = self.books[changed // width]
        spread = (self.codes.amax(1) - self.codes.amin(1)).clamp_min(1e-30)[book]
        indices = self.indices.view(-1)
        before = self.codes[book, indices[changed]]
        new = self.low.view(-1)[changed] + self.logits.view(self.width, -1)[:, changed].argmax(0)
        indices[changed] = new
        self.length += float(((self.codes[book, new] - before).abs() / spread).sum())
        self.flips += len(changed)

    def map_gradients(self, slope: Tensor):  # type: ignore[no-untyped-def]
        """Surrogate dL/dM of each candidate (out, in), from dL/dW^ times scales."""
        if self.options.grad == "default":
            p = torch.softmax(self.logits, 0)
            values = [self._code(j) for j in range(self.width)]
            mean = sum(p[j] * v for j, v in enumerate(values))
            for j, value in enumerate(values):
                yield slope * p[j] * (value - mean)
            return
        k = self.codes.shape[1]
        factors = moves(self.codes, str(self.options.grad)).flatten()
        at = (self.indices + (self.books * k)[:, None]) * k + self.low
        for j in range(self.width):
            yield factors.index_select(0, (at if j == 0 else at.add_(1)).view(-1)).view_as(slope).mul_(slope)

    def _reseed(self) -> None:
        """A code that no weight uses takes the weight with the largest error among those that may use it."""
        k = self.codes.shape[1]
        flat = (self.indices + (self.books * k)[:, None]).flatten()
        dead = torch.nonzero(torch.bincount(flat, minlength=self.codes.numel()) == 0).flatten().tolist()
        if not dead or self.options.grad is None:
            return
        w = self.matrix if self.scales is None else self.matrix / self.scales
        off = (w - self.codes.flatten()[flat].reshape(w.shape)).abs()
        for code in dead:
            book, place = divmod(code, k)
            near = (self.books == book)[:, None] & (self.low <= place) & (place < self.low + self.width)
            worst = int(off.masked_fill(~near, -1).argmax())
            row, column = divmod(worst, w.shape[1])
            if float(off[row, column]) <= 0 or not bool(near[row, column]):
                continue
            self.codes[book, place], off[row, column] = w[row, column], 0
            logits = self.logits[:, row, column]
            logits[place - int(self.low[row, column])] = logits.max() + ONEHOT
            self.indices[row, column] = place
