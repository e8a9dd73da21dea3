"""Copy-paste: a recurrent net reads symbols and repeats them, alone or guided by an untrained Transformer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.adapt import Guidance
from gradmatch.core.networks import build

SYMBOLS, SHORTEST, LONGEST = 10, 5, 10
AGAIN, NOTHING = SYMBOLS, SYMBOLS + 1
SETS = {"train": 8000, "held": 1000, "test": 2000}
BATCH, UNITS, GUIDE_WIDTH = 128, 128, 64


@lru_cache(maxsize=1)
def sequences() -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs (n, 20) and what follows each; -100 where no answer counts, which is all but the copied part."""
    g, total = torch.Generator().manual_seed(0), sum(SETS.values())
    symbols = torch.randint(SYMBOLS, (total, LONGEST), generator=g)
    length = torch.randint(SHORTEST, LONGEST + 1, (total, 1), generator=g)
    at, place = torch.arange(2 * LONGEST + 1).expand(total, -1), torch.arange(LONGEST)
    row = torch.full_like(at, NOTHING)
    for start in (torch.zeros_like(length), length + 1):
        used = place < length
        row[used.nonzero()[:, 0], (start + place)[used]] = symbols[used]
    row.scatter_(1, length, AGAIN)
    copied = (at > length) & (at <= 2 * length)
    x, y = row[:, :-1], row.masked_fill(~copied, -100)[:, 1:]
    ends = torch.tensor([0, *SETS.values()]).cumsum(0).tolist()
    return {k: (x[a:b], y[a:b]) for k, a, b in zip(SETS, ends, ends[1:], strict=False)}


class Recurrent(nn.Module):
    """Two recurrent layers of tanh units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 2, 32)
        self.first, self.second = nn.RNN(32, UNITS, batch_first=True), nn.RNN(UNITS, UNITS, batch_first=True)
        self.head = nn.Linear(UNITS, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, time, symbols)."""
        out: Tensor = self.head(self.second(self.first(self.embed(x))[0])[0])
        return out


class Causal(nn.Module):
    """A Transformer of two layers that sees the past alone, with sines for places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS + 2, GUIDE_WIDTH)
        layer = nn.TransformerEncoderLayer(GUIDE_WIDTH, 4, 2 * GUIDE_WIDTH, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        rate = 1e4 ** -torch.linspace(0, 1, GUIDE_WIDTH // 2)
        angle = torch.arange(2 * LONGEST)[:, None] * rate
        self.register_buffer("places", torch.cat([angle.sin(), angle.cos()], 1))

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, time, width)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        out: Tensor = self.body(self.embed(x) + self.places, mask=mask, is_causal=True)
        return out


PAIRS = [("body.layers.0", "first"), ("body.layers.1", "second")]


def trained(arm: dict[str, Any], lr: float, seed: int, epochs: int, count: int) -> nn.Module:
    """The recurrent net, by AdamW on the first sequences."""
    x, y = (part[:count] for part in sequences()["train"])
    net, guidance = build(Recurrent, seed), None
    if arm.get("guide"):
        other = build(Causal, seed + 77).eval()
        guidance = Guidance(net, other, layer_map=PAIRS, distance=arm.get("distance", "cka"))
        guidance.remember(x)
    optimizer, g = torch.optim.AdamW(net.parameters(), lr), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.split(torch.randperm(len(x), generator=g), BATCH):
            optimizer.zero_grad()
            at = index[torch.randperm(len(index), generator=g)] if arm.get("shuffle") else index
            if guidance is None:
                loss = _loss(net(x[index]), y[index])
            else:
                with guidance.capture():
                    loss = _loss(net(x[index]), y[index]) + guidance.loss(x[index], at)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    return net


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@torch.no_grad()
def right(net: nn.Module, split: str, count: int | None = None) -> float:
    """Share of copied symbols that are right, each told what came before."""
    x, y = (part[:count] for part in sequences()[split])
    counted = y >= 0
    return float((net.eval()(x).argmax(-1) == y)[counted].double().mean())
