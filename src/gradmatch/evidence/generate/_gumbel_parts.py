"""Networks, data and measures of the experiment with flows on the simplex."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmatch.core.path import Prediction
from gradmatch.core.sampler import Solver
from gradmatch.core.simplex import LinearSimplexPath, dirichlet_noise
from gradmatch.datasets.pydoc import pydoc_text
from gradmatch.evidence.optim._training import seeded
from gradmatch.generate import GumbelSimplexFlow

LETTERS = " abcdefghijklmnopqrstuvwxyz"
VOWELS = torch.tensor([LETTERS.index(c) for c in "aeiou"])


class Mlp(nn.Module):
    """Three hidden layers that see all positions, for short sequences."""

    def __init__(self, k: int, length: int, width: int) -> None:
        super().__init__()
        sizes = [length * k + 1, width, width, width]
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, length * k))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits (B, L, K)."""
        scaled = x.flatten(1) * x.shape[-1] - 1
        out: Tensor = self.net(torch.cat([scaled, t[:, None]], 1))
        return out.reshape(x.shape)


class Convolutions(nn.Module):
    """Four blocks of dilated convolutions over the positions."""

    def __init__(self, k: int, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Conv1d(k + 1, width, 1), nn.Conv1d(width, k, 1)
        self.blocks = nn.ModuleList(nn.Conv1d(width, width, 3, padding=d, dilation=d) for d in (1, 2, 4, 8))
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits (B, L, K)."""
        scaled = (x * x.shape[-1] - 1).mT
        h = self.into(torch.cat([scaled, t[:, None, None].expand(-1, 1, x.shape[1])], 1))
        for block, norm in zip(self.blocks, self.norms, strict=True):
            h = h + block(F.silu(norm(h)))
        out: Tensor = self.out(F.silu(h))
        return out.mT


class LinearFlow(GumbelSimplexFlow):
    """The same with the straight path from Dirichlet(1) noise: what linear flow matching on the simplex does."""

    def __init__(self, denoiser: Any, k: int) -> None:
        super().__init__(denoiser, k)
        self.straight = LinearSimplexPath()

    def loss(
        self, tokens: Tensor, cond: Any = None, mask: Any = None, *, generator: torch.Generator
    ) -> Tensor:
        """Cross-entropy at a random time of the straight path."""
        t = torch.rand(len(tokens), generator=generator)
        noise = dirichlet_noise(*tokens.shape, self.k, generator=generator)
        x = self.straight.sample(F.one_hot(tokens, self.k).to(noise), noise, t)
        return F.cross_entropy(self._logits(x, t, cond).reshape(-1, self.k), tokens.reshape(-1))

    def draw(self, n: int, length: int, steps: int, generator: torch.Generator) -> Tensor:
        """Tokens; at t = 1 the points lie at the last posterior, from which they are drawn."""

        def model(x: Tensor, t: Tensor, cond: Any = None) -> Prediction:
            return Prediction("posterior", self._logits(x, t, cond).softmax(-1))

        start = dirichlet_noise(n, length, self.k, generator=generator)
        found = Solver(torch.linspace(0, 1, steps + 1), "exponential").run(model, self.straight, start).x
        return torch.multinomial(found.reshape(-1, self.k).clamp_min(0), 1, generator=generator).reshape(
            n, length
        )


def make(path: str, net: Any, k: int) -> GumbelSimplexFlow:
    """A flow by the name of its path."""
    return LinearFlow(net, k) if path == "linear" else GumbelSimplexFlow(net, k, path=path)


def trained(
    flow: GumbelSimplexFlow, tokens: Tensor, steps: int, batch: int, seed: int, lr: float = 2e-3
) -> None:
    """Adam on random rows, rates on a cosine."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(flow.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(tokens), (batch,), generator=g)
        optimizer.zero_grad()
        torch.autograd.backward(flow.loss(tokens[rows], generator=g))
        optimizer.step()
        schedule.step()


def new_net(kind: str, k: int, length: int, width: int, seed: int) -> nn.Module:
    """A denoiser initialised from a seed."""
    return seeded(lambda: Mlp(k, length, width) if kind == "mlp" else Convolutions(k, width), seed)


# --- the toy -----------------------------------------------------------------------------------------------


def toy(k: int, length: int, peaked: bool, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities (L, K), Dirichlet(0.5) or the paper's softmax(rand), and ``n`` sequences of independent draws."""
    g = torch.Generator().manual_seed(seed)
    if peaked:
        gamma = torch.distributions.Gamma(torch.tensor(0.5), torch.tensor(1.0))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            p = gamma.sample((length, k)).clamp_min(1e-6)
        p = p / p.sum(1, keepdim=True)
    else:
        p = torch.rand(length, k, generator=g).softmax(1)
    return p.double(), torch.multinomial(p, n, replacement=True, generator=g).T.contiguous()


def position_kl(p: Tensor, tokens: Tensor) -> float:
    """Mean over positions of KL(p || generated), with half a count added to each token."""
    k = p.shape[1]
    counts = torch.stack([torch.bincount(column, minlength=k) for column in tokens.T]).double() + 0.5
    q = counts / counts.sum(1, keepdim=True)
    return float((p * (p / q).log()).sum(1).mean())


def uniform_kl(p: Tensor) -> float:
    """That of a generator that ignores the data."""
    return float((p * (p * p.shape[1]).log()).sum(1).mean())


# --- text --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def windows(length: int, most: int) -> tuple[Tensor, Tensor]:
    """Windows (n, L) of Python's own documentation in 27 symbols, to train on and held out."""
    text = pydoc_text(held=0.1)
    table = {c: i for i, c in enumerate(LETTERS)}

    def cut(paragraphs: tuple[str, ...], limit: int) -> Tensor:
        whole = " ".join(" ".join(paragraphs).lower().split())[: 2 * limit * length]
        plain = " ".join("".join(c if c in table else " " for c in whole).split())
        ids = torch.tensor([table[c] for c in plain])
        count = min(limit, len(ids) // length)
        return ids[: count * length].reshape(count, length)

    return cut(text.train, most), cut(text.held, most // 4)


def gram_kl(held: Tensor, tokens: Tensor, n: int, k: int = len(LETTERS)) -> float:
    """KL(held-out || generated) of n-grams within windows, with half a count added to each."""

    def counts(t: Tensor) -> Tensor:
        code = sum(t[:, i : t.shape[1] - n + 1 + i] * k**i for i in range(n))
        return torch.bincount(torch.as_tensor(code).flatten(), minlength=k**n).double()

    p, q = counts(held), counts(tokens) + 0.5
    p, q = p / p.sum(), q / q.sum()
    seen = p > 0
    return float((p[seen] * (p[seen] / q[seen]).log()).sum())


class VowelJudge(nn.Module):
    """A small network that counts vowels, trained on clean windows alone; it never sees a soft input."""

    def __init__(self, k: int = len(LETTERS), width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(k, width, 3, padding=1), nn.SiLU(), nn.Conv1d(width, 1, 1))

    def forward(self, s: Tensor) -> Tensor:
        """(m, L, K) one-hot -> (m,), an estimate of the vowels."""
        out: Tensor = self.net(s.mT)
        return out.sum((1, 2))


def vowels(tokens: Tensor) -> Tensor:
    """The true count of each window."""
    return torch.isin(tokens, VOWELS).sum(1).double()


def vowel_judge(tokens: Tensor, seed: int, steps: int = 400) -> VowelJudge:
    """Trained by squared error."""
    g = torch.Generator().manual_seed(seed)
    judge = cast(VowelJudge, seeded(VowelJudge, seed))
    optimizer = torch.optim.Adam(judge.parameters(), 3e-3)
    for _ in range(steps):
        own = tokens[torch.randint(len(tokens), (128,), generator=g)]
        optimizer.zero_grad()
        error = judge(F.one_hot(own, len(LETTERS)).float()) - vowels(own).float()
        torch.autograd.backward(error.square().mean())
        optimizer.step()
    return judge.requires_grad_(False)
