"""Sampling by the exact simplex step: tokens a second at K = 20 and 512 against a linear-flow loop written out.

The Dirichlet flow's published velocity needs tables of incomplete beta functions from its repository and no package
brings it: it is reported as missing. The denoiser is the same cheap layer for both, so that the path's work shows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from _timer import figure, main, missing, race
from gradmatch.generate import GumbelSimplexFlow

N, LENGTH, STEPS = 64, 128, 20


def race_at(k: int) -> None:
    weight = torch.randn(k, k, generator=torch.Generator().manual_seed(0)) / k**0.5
    flow = GumbelSimplexFlow(lambda x, t: x @ weight, k)

    def ours() -> Tensor:
        g = torch.Generator().manual_seed(0)
        return flow.sample(N, LENGTH, steps=STEPS, generator=g).tokens

    @torch.no_grad()
    def linear() -> Tensor:
        g = torch.Generator().manual_seed(0)
        noise = -torch.log(torch.rand(N, LENGTH, k, generator=g).clamp_min(1e-12))
        x = noise / noise.sum(-1, keepdim=True)
        for s in range(STEPS):
            t = s / STEPS
            p = (x @ weight).softmax(-1)
            x = x + (p - x) / (1 - t) / STEPS
        return torch.multinomial(x.clamp_min(0).reshape(-1, k), 1, generator=g)

    found = race(f"{STEPS} steps, K {k}", ours, linear, peer="linear flow loop", rounds=5)
    figure(
        f"tokens a second, K {k}",
        ours=1e3 * N * LENGTH / found["ours_ms"],
        linear=1e3 * N * LENGTH / found["theirs_ms"],
    )


def run() -> None:
    missing("Dirichlet flow", "its c-factor tables come from its repository alone")
    for k in (20, 512):
        race_at(k)


if __name__ == "__main__":
    main(run)
