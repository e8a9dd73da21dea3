"""Latent flow matching against a bare loop, torchcfm and flow_matching: the same network, data and noise.

Training: loss, backward and Adam, on an MLP and on the U-Net of the zoo; the library must be within 3 % of either.
Sampling: Euler on the same times; hooks and counters must cost under 1 % of the raw network calls. flow_matching is
licensed for non-commercial use: it is raced where it is installed and nothing depends on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from _timer import figure, main, missing, race
from gradmatch.core.guidance import ClassifierFreeGuidance, GradientGuide
from gradmatch.core.path import LinearPath
from gradmatch.core.sampler import Hook, Network, Solver
from gradmatch.generate import LatentFlow
from gradmatch.zoo import mlp_velocity, unet

BATCH, STEPS, CALLS = 64, 60, 20
Setting = tuple[str, Callable[[], nn.Module], Tensor]


def settings() -> list[Setting]:
    g = torch.Generator().manual_seed(0)
    return [
        ("MLP 256 x 3 on 16", lambda: mlp_velocity(16), torch.randn(4096, 16, generator=g)),
        ("U-Net 32 on 4 x 7 x 7", lambda: unet(4, 7, 32, levels=1), torch.randn(2048, 4, 7, 7, generator=g)),
    ]


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def ours(make: Callable[[], nn.Module], data: Tensor) -> nn.Module:
    """What LatentFlow.fit does."""
    net = made(make)
    LatentFlow(None, net, scale=1.0).fit(data, steps(data), batch=BATCH, lr=1e-3)
    return net


def bare(make: Callable[[], nn.Module], data: Tensor) -> nn.Module:
    """The loop that one would write."""
    net = made(make)
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    g = torch.Generator()
    for k in range(steps(data)):
        g.manual_seed(k)
        z0 = data[torch.randint(len(data), (BATCH,), generator=g)]
        z1, t = torch.randn(z0.shape, generator=g), torch.rand(BATCH, generator=g)
        wide = t.reshape(-1, *[1] * (z0.ndim - 1))
        loss = (net((1 - wide) * z0 + wide * z1, t) - (z1 - z0)).square().mean()
        loss.item()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return net


def with_torchcfm(make: Callable[[], nn.Module], data: Tensor) -> nn.Module:
    """The loop of torchcfm's examples."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    net, matcher = made(make), ConditionalFlowMatcher(sigma=0.0)
    adam = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(steps(data)):
        x1 = data[torch.randint(len(data), (BATCH,))]
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        loss = (net(xt, t) - ut).square().mean()
        loss.item()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return net


def steps(data: Tensor) -> int:
    return STEPS if data.ndim == 2 else STEPS // 3


def learned(a: nn.Module, b: nn.Module) -> None:
    """Same sizes, both moved by the same order; the draws differ, so weights cannot agree."""
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.shape == q.shape
    assert all(bool(torch.isfinite(p).all()) for n in (a, b) for p in n.parameters())


def training() -> None:
    for name, make, data in settings():
        race(f"training, {name}", lambda m=make, d=data: ours(m, d), lambda m=make, d=data: bare(m, d),
             peer="bare loop", rounds=7, check=learned, target=0.97)  # fmt: skip
        try:
            import torchcfm  # noqa: F401
        except ImportError as error:
            missing("torchcfm", str(error))
            continue
        race(f"training, {name}", lambda m=make, d=data: ours(m, d), lambda m=make, d=data: with_torchcfm(m, d),
             peer="torchcfm", rounds=7, check=learned, target=0.97)  # fmt: skip


@torch.no_grad()
def raw(net: nn.Module, x: Tensor, times: list[float]) -> Tensor:
    """Network calls and one addition a step."""
    for t, t_next in itertools.pairwise(times):
        x = x + (t_next - t) * net(x, torch.full((len(x),), t))
    return x


def with_flow_matching(net: nn.Module, x: Tensor, times: list[float]) -> Tensor:
    from flow_matching.solver import ODESolver
    from flow_matching.utils import ModelWrapper

    class Wrapped(ModelWrapper):
        def forward(self, x: Tensor, t: Tensor, **extras: object) -> Tensor:
            return self.model(x, t.expand(len(x)))

    grid = torch.tensor(times)
    found: Tensor = ODESolver(velocity_model=Wrapped(net)).sample(
        x, step_size=None, method="euler", time_grid=grid
    )
    return found


def close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) < 1e-4, "the samples differ"


def sampling() -> None:
    times = torch.linspace(1, 0, CALLS + 1).tolist()
    hooks = [Hook(), ClassifierFreeGuidance(1.0, None), GradientGuide([lambda z, _: z.sum()], scale=0.0)]
    solver, path = Solver(times), LinearPath()

    def hooked(net: nn.Module, x: Tensor) -> Tensor:
        return solver.run(Network(net, "velocity"), path, x, hooks=hooks).x

    for name, make, data in settings():
        net, x = made(make).eval(), data[:BATCH]
        race(f"{CALLS} Euler steps with hooks and counter, {name}", lambda n=net, x=x: hooked(n, x),
             lambda n=net, x=x: raw(n, x, times), peer="raw calls", rounds=9, check=close, target=0.99)  # fmt: skip
        try:
            import flow_matching  # noqa: F401
        except ImportError as error:
            missing("flow_matching", str(error))
            continue
        race(f"{CALLS} Euler steps, {name}", lambda n=net, x=x: hooked(n, x),
             lambda n=net, x=x: with_flow_matching(n, x, times), peer="flow_matching", rounds=9, check=close,
             target=1.0)  # fmt: skip


def run() -> None:
    torch.manual_seed(0)
    training()
    sampling()
    figure("threads", threads=torch.get_num_threads())


if __name__ == "__main__":
    main(run)
