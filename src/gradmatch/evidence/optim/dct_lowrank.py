"""Columns of a cosine basis against singular vectors, a random basis and a fixed random subspace.

1. Errors of projection at one rank: Gaussian matrices, rows that are smooth along the projected axis, rank-4 matrices
   in random directions with noise; and gradients of MLPs on Fashion-MNIST after 50 steps of Adam, with pixels or with
   hidden units on the projected side.
2. Text: a transformer of two blocks on characters of Python's documentation, rank a sixteenth of the width inside the
   blocks and full elsewhere, 150 steps; every method at the best of three rates by held-out training text.
3. Images: an MLP on Fashion-MNIST at rank 8, 80 steps, likewise.
4. Bytes of state, and the time to find a projection.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.core.cpu import threads
from gradmatch.core.examples import Examples
from gradmatch.datasets import fashion_mnist
from gradmatch.datasets.pydoc import pydoc_text
from gradmatch.evidence._common import (
    Result,
    Row,
    Settings,
    gain,
    hold_out,
    kept,
    parallel,
    per_class,
    verdict_of,
)
from gradmatch.evidence.optim._training import seeded
from gradmatch.optim import LowRankAdamW, optimizer_state_bytes
from gradmatch.optim._projectors import Columns, Fixed, Singular

SLUG = "dct-lowrank"
TITLE = "DCT low-rank AdamW: columns of a fixed basis in place of singular vectors"
CLAIM = (
    "Choosing r columns of one fixed cosine basis by the gradient keeps almost the energy of its leading singular "
    "vectors, without decomposing anything and with r whole numbers of state, and trains as well as low-rank AdamW by "
    "singular vectors."
)
RULE = (
    "Mean relative squared errors of projection over seeds: the cosine basis is within 1.5 times the singular "
    "vectors' (1) on rows that are smooth along the projected axis, (2) on rank-4 matrices in random directions with "
    "noise. On gradients it is at least 5 % below a random basis with the same choice of columns (3) with pixels on "
    "the projected side, (4) with hidden units there, for both layers. Losses, each method at its best of three rates "
    "by held-out training data, where a difference counts if it exceeds two standard errors paired by seed. Text: (5) "
    "cosines within 1 % of singular vectors at every step, or below; (6) with error feedback likewise; (7) cosines "
    "below the random basis and below the fixed random subspace; (8) error feedback lowers the loss; (9) rotation "
    "does; (10) cosines with error feedback within 1 % of full AdamW. Images: (11) cosines with error feedback below "
    "singular vectors every 40 steps; (12) cosines below the fixed random subspace. (13) State is exactly 2 n r "
    "floats and r whole numbers a matrix, less than with singular vectors. (14) Finding the columns takes less time "
    "than the singular vectors at 512 and 1,024. 'holds' if all are met, 'holds in part' if some are, 'does not hold' "
    "if none is."
)

ADAMW, SVD, SLOW, DCT, FEEDBACK = "AdamW", "SVD", "SVD, long gap", "DCT", "DCT, error feedback"
STILL, RANDOM, FIXED = "DCT, not rotated", "random basis", "fixed random"
METHODS: dict[str, dict[str, Any]] = {
    ADAMW: {"rank": 0},
    SVD: {"projector": "svd", "rotate": False},
    SLOW: {"projector": "svd", "rotate": False, "update_gap": 50},
    DCT: {},
    FEEDBACK: {"residual": "error_feedback"},
    STILL: {"rotate": False},
    RANDOM: {"basis": "random"},
    FIXED: {"projector": "random"},
}
TEXT, IMAGES = "text", "images"
RATES = {TEXT: (3e-3, 1e-2, 3e-2), IMAGES: (1e-3, 3e-3, 1e-2)}
STEPS, RANK = {TEXT: 150, IMAGES: 80}, {TEXT: 4, IMAGES: 8}
GAP = {TEXT: 50, IMAGES: 40}
WARMUP, WIDTH, CONTEXT, BATCH = 20, 64, 64, {TEXT: 8, IMAGES: 32}
SYMBOLS = 97
KINDS = ("Gaussian", "smooth rows", "random directions")
GRADIENTS = ("1024 x 784, pixels", "256 x 784, hidden units", "256 x 1024, hidden units")
PROJECTORS: dict[str, Callable[[int, int], Any]] = {
    SVD: lambda r, d: Singular(r),
    DCT: lambda r, d: Columns(r, d),
    RANDOM: lambda r, d: Columns(r, d, kind="random"),
    FIXED: lambda r, d: Fixed(r, d),
}


# --- 1. errors of projection ----------------------------------------------------------------------------------


def error(name: str, g: Tensor, rank: int) -> float:
    """|G - P(G)|^2 / |G|^2, columns projected."""
    projector, state = PROJECTORS[name](rank, g.shape[1]), {"step": 1}
    return float((g - projector.up(projector.down(g, state), state)).square().sum() / g.square().sum())


def matrix(kind: str, seed: int, n: int = 128, d: int = 64) -> Tensor:
    """A matrix [n, d] of one of ``KINDS``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind == "Gaussian":
        return draw(n, d)
    if kind == "smooth rows":
        place = torch.arange(d, dtype=torch.float64)
        covariance = torch.exp(-(place[:, None] - place).abs() / 10)
        smooth: Tensor = draw(n, d) @ torch.linalg.cholesky(covariance).T
        return smooth
    return draw(n, 4) @ draw(4, d) + 0.05 * draw(n, d)


def gradients(seed: int) -> dict[str, Tensor]:
    """Weight gradients [n, d] of MLPs after 50 steps of Adam, the projected side last."""
    own = _images(False)[0]
    found = {}
    for widths in ((784, 1024, 256, 10), (784, 256, 10)):
        net = seeded(partial(mlp, widths), seed)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for rows in _orders(len(own.x), 50, 128, seed):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(net(own.x[rows]), own.y[rows]))
            optimizer.step()
        slopes = [p.grad for p in net.parameters() if p.grad is not None and p.ndim == 2]
        if len(widths) == 4:
            found[GRADIENTS[0]], found[GRADIENTS[2]] = slopes[0], slopes[1].T.contiguous()
        else:
            found[GRADIENTS[1]] = slopes[0].T.contiguous()
    return found


def _errors(settings: Settings, seed: int) -> dict[str, dict[str, float]]:
    """By matrix and projector."""

    def run() -> dict[str, dict[str, float]]:
        own = {kind: (matrix(kind, seed), 16) for kind in KINDS}
        own |= {name: (g, g.shape[1] // 8) for name, g in gradients(seed).items()}
        return {name: {p: error(p, g, r) for p in PROJECTORS} for name, (g, r) in own.items()}

    return dict(kept(settings, SLUG, f"errors-{seed}", {"version": 1}, run))


# --- 2. and 3. training ---------------------------------------------------------------------------------------


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Characters(nn.Module):
    """A causal transformer of two pre-norm blocks."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, width), nn.Embedding(CONTEXT, width)
        block = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS)
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Symbols (b, t) to logits (b, t, symbols)."""
        x = self.symbols(ids) + self.places.weight
        logits: Tensor = self.head(self.norm(self.blocks(x, mask=self.mask, is_causal=True)))
        return logits


def _codes(paragraphs: Sequence[str], most: int) -> Tensor:
    """Printable ASCII and line ends as 0 .. 96."""
    text = "\n\n".join(paragraphs)[:most]
    codes = torch.tensor([ord(c) for c in text])
    return torch.where(codes == 10, 95, torch.where((codes >= 32) & (codes < 127), codes - 32, 96))


@lru_cache(maxsize=1)
def _text() -> tuple[Tensor, Tensor, Tensor]:
    """Training, held-out and test characters."""
    found = pydoc_text()
    cut = len(found.train) // 20
    return _codes(found.train[cut:], 400_000), _codes(found.train[:cut], 40_000), _codes(found.held, 40_000)


@lru_cache(maxsize=2)
def _images(full: bool) -> tuple[Examples, Examples, Examples]:
    found = fashion_mnist()
    rest, held = hold_out(found.train, 100, 0)
    if full:
        return rest, held, found.test
    return per_class(rest, 600, 0), held, per_class(found.test, 200, 0)


def _orders(n: int, steps: int, batch: int, seed: int) -> Tensor:
    return torch.randint(n, (steps, batch), generator=torch.Generator().manual_seed(seed))


def _next(net: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
    rows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return F.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def optimizer_of(task: str, method: str, net: nn.Module, lr: float) -> LowRankAdamW:
    """Low rank for matrices inside the blocks of the transformer, or for the first two layers of the MLP."""
    inner = net.blocks if isinstance(net, Characters) else net[:4]  # type: ignore[index]
    low = [p for p in inner.parameters() if p.ndim == 2]
    held = set(map(id, low))
    groups = [{"params": low}, {"params": [p for p in net.parameters() if id(p) not in held], "rank": 0}]
    options = {"rank": RANK[task], **METHODS[method]}
    if method == SLOW:
        options["update_gap"] = GAP[task]
    return LowRankAdamW(groups, lr, **options)


def _one(settings: Settings, task: str, method: str, rate: float, seed: int) -> tuple[float, float]:
    """Losses on held-out and on test data, in nats."""

    def run() -> list[float]:
        steps = STEPS[task] * (10 if settings.full else 1)
        net = seeded(Characters if task == TEXT else lambda: mlp((784, 1024, 256, 10)), seed)
        optimizer = optimizer_of(task, method, net, rate)
        loss, judged = _task(task, settings.full)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - WARMUP)
        ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, cosine], [WARMUP])
        for rows in _orders(_length(task, settings.full), steps, BATCH[task], seed):
            optimizer.zero_grad()
            torch.autograd.backward(loss(net, rows))
            optimizer.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            return [float(x) for x in judged(net)]

    held, test = kept(
        settings,
        SLUG,
        f"{task}-{method}-{rate:g}-{seed}".replace(" ", "-"),
        {"version": 1, "budget": settings.budget},
        run,
    )
    return held, test


def _length(task: str, full: bool) -> int:
    return len(_text()[0]) - CONTEXT - 1 if task == TEXT else len(_images(full)[0].x)


def _task(
    task: str, full: bool
) -> tuple[Callable[[nn.Module, Tensor], Tensor], Callable[[nn.Module], list[Tensor]]]:
    """The loss of a batch by its rows, and the losses on held-out and test data."""
    if task == TEXT:
        train, *others = _text()
        return (
            lambda net, rows: _next(net, train, rows),
            lambda net: [_next(net, t, torch.arange(0, len(t) - CONTEXT - 1, CONTEXT)) for t in others],
        )
    own, *rest = _images(full)
    return (
        lambda net, rows: F.cross_entropy(net(own.x[rows]), own.y[rows]),
        lambda net: [F.cross_entropy(net(e.x), e.y) for e in rest],
    )


# --- 4. state and time ----------------------------------------------------------------------------------------


def _bytes() -> dict[str, int]:
    """State of one 1024 x 784 matrix at rank 98."""
    found = {}
    for method in (ADAMW, SVD, DCT, FEEDBACK):
        w = nn.Parameter(torch.zeros(1024, 784))
        optimizer = LowRankAdamW([w], 1e-3, **{"rank": 98, **METHODS[method]})
        w.grad = torch.ones_like(w)
        if method == SVD:
            w.grad = torch.eye(1024, 784)
        optimizer.step()
        found[method] = optimizer_state_bytes(optimizer)
    return found


def _times(rounds: int = 3, sizes: Sequence[int] = (512, 1024)) -> dict[str, dict[int, float]]:
    """Milliseconds to find a projection of a square matrix to an eighth of its side, one thread."""
    found: dict[str, dict[int, float]] = {"SVD": {}, "DCT by products": {}, "DCT by FFT": {}}
    with threads(1):
        for d in sizes:
            g = torch.randn(d, d, generator=torch.Generator().manual_seed(0))
            arms: tuple[Any, ...] = (
                Singular(d // 8),
                *(Columns(d // 8, d, transform=t) for t in ("matmul", "fft")),
            )
            for name, arm in zip(found, arms, strict=True):
                taken = []
                for _ in range(rounds + 1):
                    began = time.perf_counter()
                    arm.down(g, {"step": 1})
                    taken.append(1e3 * (time.perf_counter() - began))
                found[name][d] = statistics.median(taken[1:])
    return found


# --- the experiment -------------------------------------------------------------------------------------------


def _methods(task: str) -> tuple[str, ...]:
    return tuple(METHODS) if task == TEXT else (ADAMW, SLOW, DCT, FEEDBACK, RANDOM, FIXED)


def run(settings: Settings) -> Result:
    """Project, train every method, measure, judge by ``RULE``."""
    seeds = settings.seed_list(3)
    tasks = [
        (settings, task, method, rate, seed)
        for task in RATES
        for method in _methods(task)
        for rate in RATES[task]
        for seed in seeds
    ]
    scores = dict(zip([t[1:] for t in tasks], parallel(_one, tasks, settings, label="training"), strict=True))
    found = {
        (task, method): {rate: [scores[task, method, rate, s] for s in seeds] for rate in RATES[task]}
        for task in RATES
        for method in _methods(task)
    }
    errors = parallel(_errors, [(settings, s) for s in seeds], settings, label="projecting")
    from gradmatch.evidence.optim._dct_lowrank_picture import picture

    result = _judged(found, errors, _bytes(), _times())
    return replace(result, pictures=((f"{SLUG}.png", picture(result, found)),))


Found = dict[tuple[str, str], dict[float, list[tuple[float, float]]]]


def _judged(
    found: Found,
    errors: Sequence[dict[str, dict[str, float]]],
    held_bytes: dict[str, int],
    times: dict[str, dict[int, float]],
) -> Result:
    best: dict[tuple[str, str], Row] = {}
    for (task, method), by_rate in found.items():
        chosen = min(by_rate, key=lambda rate, own=by_rate: sum(h for h, _ in own[rate]))  # type: ignore[misc]
        edge = " (an end of the grid)" if chosen in (min(by_rate), max(by_rate)) else ""
        values = tuple(t for _, t in by_rate[chosen])
        best[task, method] = Row(f"{method}, {task}", values, f"rate {chosen:g}{edge}")
    share = {
        (name, p): Row(f"{p}, error on {name}", tuple(e[name][p] for e in errors), "relative squared error")
        for name in (*KINDS, *GRADIENTS)
        for p in PROJECTORS
    }

    def below(task: str, a: str, b: str) -> bool:
        return gain(best[task, a], best[task, b]).below()

    def within(task: str, a: str, b: str) -> bool:
        return best[task, a].mean <= 1.01 * best[task, b].mean

    def nearer(name: str) -> bool:
        return share[name, DCT].mean <= 0.95 * share[name, RANDOM].mean

    n, d, r = 1024, 784, 98
    met = [
        share[KINDS[1], DCT].mean <= 1.5 * share[KINDS[1], SVD].mean,
        share[KINDS[2], DCT].mean <= 1.5 * share[KINDS[2], SVD].mean,
        nearer(GRADIENTS[0]),
        nearer(GRADIENTS[1]) and nearer(GRADIENTS[2]),
        within(TEXT, DCT, SVD),
        within(TEXT, FEEDBACK, SVD),
        below(TEXT, DCT, RANDOM) and below(TEXT, DCT, FIXED),
        below(TEXT, FEEDBACK, DCT),
        below(TEXT, DCT, STILL),
        within(TEXT, FEEDBACK, ADAMW),
        below(IMAGES, FEEDBACK, SLOW),
        below(IMAGES, DCT, FIXED),
        held_bytes[DCT] == 4 * (2 * n * r + r)
        and held_bytes[DCT] < held_bytes[SVD] == 4 * (2 * n * r + d * r),
        all(min(times["DCT by products"][k], times["DCT by FFT"][k]) < t for k, t in times["SVD"].items()),
    ]
    losses = "; ".join(
        f"{task}: " + ", ".join(f"{m} {best[task, m].mean:.3f}" for m in _methods(task)) for task in RATES
    )
    left = "; ".join(
        f"{name}: " + ", ".join(f"{p} {share[name, p].mean:.3f}" for p in PROJECTORS)
        for name in (*KINDS, *GRADIENTS)
    )
    spent = "; ".join(
        f"{k}: " + ", ".join(f"{name} {t[k]:.3g}" for name, t in times.items()) for k in times["SVD"]
    )
    reason = (
        f"{sum(met)} of {len(met)} conditions met ({', '.join(str(i) for i, m in enumerate(met, 1) if m)}). Losses, "
        f"{losses}. Errors of projection, {left}. Bytes of state for 1024 x 784 at rank 98: "
        + ", ".join(f"{m} {b:,}" for m, b in held_bytes.items())
        + f". Milliseconds to find a projection, {spent}."
    )
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        reason,
        "test loss (nats); relative squared error where a row says so",
        (*best.values(), *share.values()),
        higher_is_better=False,
        links={
            "paper": "https://arxiv.org/abs/2505.17967",
            "code": "https://github.com/IST-DASLab/ISTA-DASLab-Optimizers",
        },
    )
