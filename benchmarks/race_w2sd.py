"""The reflection against loops written out by hand, with the same networks and noise.

The public code runs one pipeline of SDXL with adapters on a GPU and an old diffusers, and is not raced. Raced are: the
explicit loop in alphas_cumprod (what the hook must not cost over), and diffusers' own DDIMScheduler and
DDIMInverseScheduler stepped by hand, the inverse called as the present version needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from _timer import figure, main, missing, race
from gradmatch.core.path import VariancePreserving
from gradmatch.core.sampler import Network
from gradmatch.generate import w2sd_sample
from gradmatch.zoo import unet

STEPS, BATCH = 20, 16


def networks() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return tuple(unet(1, 16, 32, levels=2, scale=1.0).eval().requires_grad_(False) for _ in range(2))  # type: ignore[return-value]


def scheduler() -> Any:
    import diffusers

    found = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=0)
    found.set_timesteps(STEPS)
    return found


@torch.no_grad()
def by_hand(strong: Any, weak: Any, x: Tensor, bars: Tensor, times: list[int], stride: int) -> Tensor:
    """The loop that one would write."""

    def move(x: Tensor, e: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return b.sqrt() * (x - (1 - a).sqrt() * e) / a.sqrt() + (1 - b).sqrt() * e

    for k, t in enumerate(times):
        a, b = bars[t], bars[max(t - stride, 0)]
        each = torch.full((len(x),), float(t))
        if k < len(times) - 1:
            y = move(x, strong(x, each), a, b)
            x = move(y, weak(y, each), b, a)
        x = move(x, strong(x, each), a, b)
    return x


@torch.no_grad()
def by_schedulers(strong: Any, weak: Any, x: Tensor, down: Any, up: Any, stride: int) -> Tensor:
    """diffusers' steps; the inverse takes the noisier timestep and computes the cleaner one itself."""
    for k, t in enumerate(down.timesteps.tolist()):
        each = torch.full((len(x),), float(t))
        if k < STEPS - 1:
            y = down.step(strong(x, each), t, x).prev_sample
            x = up.step(weak(y, each), t, y).prev_sample
        x = down.step(strong(x, each), t, x).prev_sample
    return x


def close(a: Tensor, b: Tensor) -> None:
    assert float((a - b).abs().max()) < 1e-3 * max(1.0, float(b.abs().max())), "the samples differ"


def run() -> None:
    try:
        import diffusers
    except ImportError as error:
        missing("diffusers", str(error))
        return
    strong, weak = networks()
    x = torch.randn(BATCH, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    ddim = scheduler()
    stride, bars = 1000 // STEPS, ddim.alphas_cumprod
    path = VariancePreserving(bars, float(bars[0]))
    times = [float(t) for t in ddim.timesteps] + [-1.0]
    models = [Network(net, "noise") for net in (strong, weak)]

    def ours() -> Tensor:
        return w2sd_sample(models[0], models[1], x, path, times=times).x

    name = f"W2SD, {STEPS} steps, lambda {STEPS - 1}, U-Net 32 on {BATCH} images of 16 x 16"
    race(name, ours, lambda: by_hand(strong, weak, x, bars, ddim.timesteps.tolist(), stride), peer="loop by hand",
         rounds=7, check=close, target=0.99)  # fmt: skip
    up = diffusers.DDIMInverseScheduler(clip_sample=False, set_alpha_to_one=False)
    up.set_timesteps(STEPS)
    race(name, ours, lambda: by_schedulers(strong, weak, x, ddim, up, stride), peer="diffusers' schedulers by hand",
         rounds=7, check=close, target=1.0)  # fmt: skip
    calls = int(w2sd_sample(models[0], models[1], x[:1], path, times=times).calls[0])
    figure("network calls", w2sd=calls, plain=STEPS)
    missing(
        "xie-lab-ml/Weak-to-Strong-Diffusion-with-Reflection", "one SDXL pipeline on a GPU, diffusers 0.22.3"
    )


if __name__ == "__main__":
    main(run)
