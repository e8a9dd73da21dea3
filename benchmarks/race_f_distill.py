"""f-distill's weighting and loss against NVlabs/FastGen's, its step against a bare loop, and the weighting's share.

FastGen is read from the clone that GRADMATCH_PEER_FASTGEN names; only its two formulas are run, the rest of it is not
needed.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from _timer import figure, main, missing, race
from gradmatch.core.divergence import RatioWeight, ratio_of
from gradmatch.core.path import LinearPath
from gradmatch.core.regress import gradient_loss
from gradmatch.generate import FDistill
from gradmatch.zoo import unet

PUBLIC = "GRADMATCH_PEER_FASTGEN"
BATCH, PLACES, SHAPE = 256, 64, (3, 32, 32)


def stub(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(names)
    return module


def load_public() -> tuple[ModuleType, ModuleType] | None:
    """Its files of losses and of f-distill, with what they import of the framework stood in for."""
    home = os.environ.get(PUBLIC)
    if not home:
        return None
    methods = Path(home) / "fastgen" / "methods"

    def wide(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, *[1] * (like.ndim - 1))

    sys.modules |= {
        "fastgen": stub("fastgen"),
        "fastgen.networks": stub("fastgen.networks"),
        "fastgen.networks.noise_schedule": stub("noise_schedule", BaseNoiseSchedule=object),
        "fastgen.utils": stub("fastgen.utils", expand_like=wide),
        "fastgen.utils.logging_utils": stub("logging_utils", info=lambda _: None),
        "fastgen.utils.distributed": stub("distributed", world_size=lambda: 1),
        "fastgen.methods": stub("fastgen.methods", DMD2Model=object),
    }
    sys.modules["fastgen.utils"].logging_utils = sys.modules["fastgen.utils.logging_utils"]  # type: ignore[attr-defined]
    found = []
    for name in ("common_loss", "distribution_matching/f_distill"):
        spec = importlib.util.spec_from_file_location(
            f"fastgen.methods.{Path(name).name}", methods / f"{name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        code = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = code
        spec.loader.exec_module(code)
        found.append(code)
    return found[0], found[1]


def micro(losses: ModuleType, method: ModuleType) -> None:
    g = torch.Generator().manual_seed(0)
    logits, t = torch.randn(BATCH, PLACES, generator=g), torch.rand(BATCH, generator=g)
    weigh = RatioWeight("js", (0.0, 1.0))
    options = SimpleNamespace(ratio_lower=0.1, ratio_upper=20.0, ratio_normalization=True, ratio_ema_rate=0.0)
    peer = SimpleNamespace(
        config=SimpleNamespace(f_distill=options), bin_num=10,
        net=SimpleNamespace(noise_scheduler=SimpleNamespace(min_t=0.0, max_t=1.0), bins=torch.ones(10)),
        f_div_weighting_function=method.all_f_div_weighting_function["js"],
    )  # fmt: skip

    def close(a: Any, b: Any) -> None:
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), f"differ by {float((a - b).abs().max()):.2g}"

    race(
        f"weights of {BATCH} x {PLACES} logits", lambda: many(lambda: weigh(ratio_of(logits), t)),
        lambda: many(lambda: method.FdistillModel._get_f_div_weighting_h(peer, logits, t)), peer="FastGen", check=close,
    )  # fmt: skip
    x0, x_p, x_q = (torch.randn(BATCH, *SHAPE, generator=g) for _ in range(3))
    h = weigh(ratio_of(logits), t)

    def ours() -> torch.Tensor:
        x = x0.clone().requires_grad_()
        w = h / ((x.detach() - x_p).abs().flatten(1).mean(1) + 1e-6)
        (found,) = torch.autograd.grad(gradient_loss(x, x_q - x_p, w), x)
        return found

    def theirs() -> torch.Tensor:
        x = x0.clone().requires_grad_()
        loss = losses.variational_score_distillation_loss(x, x_p, x_q, additional_scale=h)
        (found,) = torch.autograd.grad(loss, x)
        return found

    race(f"loss and gradient, {BATCH} x {SHAPE}", ours, theirs, peer="FastGen", check=close, rounds=9)


def many(work: Any, times: int = 200) -> Any:
    for _ in range(times):
        found = work()
    return found


def bare(net: Any, rounds: int, real: torch.Tensor) -> Any:
    """Four denoising steps of the fake net and one step of the student by hand, reverse KL."""
    teacher, student, fake = (copy.deepcopy(net) for _ in range(3))
    steps = [torch.optim.AdamW(m.parameters(), lr=1e-4) for m in (student, fake)]
    one = torch.ones(len(real))

    def x0_of(model: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x - t.view(-1, 1, 1, 1) * model(x, t)

    def once() -> None:
        for k in range(5 * rounds):
            z, noise, t = torch.randn_like(real), torch.randn_like(real), torch.rand(len(real))
            a = t.view(-1, 1, 1, 1)
            if k % 5 < 4:
                with torch.no_grad():
                    x0 = x0_of(student, z, one)
                    x = (1 - a) * x0 + a * noise
                steps[1].zero_grad()
                F.mse_loss(fake(x, t), noise - x0).backward()
                steps[1].step()
                continue
            x0 = x0_of(student, z, one)
            with torch.no_grad():
                x = (1 - a) * x0 + a * noise
                x_p, x_q = x0_of(teacher, x, t), x0_of(fake, x, t)
                target = x0 - (x_q - x_p) / ((x0 - x_p).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
            steps[0].zero_grad()
            (0.5 * F.mse_loss(x0, target)).backward()
            steps[0].step()

    return once


def run() -> None:
    code = load_public()
    if code is None:
        missing("FastGen FdistillModel", f"{PUBLIC} names no clone of it")
    else:
        micro(*code)
    torch.manual_seed(0)
    net, real = unet(3, 32, 32, levels=2), torch.randn(16, *SHAPE)
    distill = FDistill(net, divergence="rkl", schedule=LinearPath(), kind="velocity", lr=1e-4)
    race("five iterations of a U-Net at 32 x 32, reverse KL", lambda: [distill.step(real) for _ in range(5)],
         bare(net, 1, real), peer="the loop by hand", rounds=3)  # fmt: skip
    judged = FDistill(net, discriminator="features", schedule=LinearPath(), kind="velocity", student_every=2)
    judged.step(real)
    began = time.perf_counter()
    judged.step(real)
    whole = time.perf_counter() - began
    logits, t = torch.randn(16, PLACES), torch.rand(16)
    began = time.perf_counter()
    many(lambda: judged.weigh(ratio_of(logits), t))
    part = (time.perf_counter() - began) / 200
    figure(
        "share of a student's step that the weights take", percent=100 * part / whole, target="under 0.1 %"
    )


if __name__ == "__main__":
    main(run)
