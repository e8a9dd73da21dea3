"""What the image experiments of this family share: data, one small autoencoder, training for so many seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gradmatch.core.examples import Examples
from gradmatch.core.networks import seeded
from gradmatch.core.store import load_tensors, save_tensors
from gradmatch.core.training import Trained, train
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import Settings, hold_out
from gradmatch.generate._batches import encoded
from gradmatch.generate._latents import Codec, Moments
from gradmatch.zoo import autoencoder, fit_autoencoder

HELD = 100
"""Training images a class that no arm trains on; settings are chosen on them."""
VAE: dict[str, Any] = {"widths": [8, 16, 16], "steps": 1000, "batch": 32, "lr": 4e-3, "seed": 0}


@lru_cache(maxsize=1)
def fashion() -> tuple[Examples, Examples, Examples]:
    """(training, held-out training, test) images in [-1, 1]."""
    data = fashion_mnist()
    train_part, held = hold_out(data.train, HELD, 0)
    return tuple(Examples(e.x * 2 - 1, e.y, e.classes) for e in (train_part, held, data.test))  # type: ignore[return-value]


def as_pixels(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], where the judge looks."""
    return ((images + 1) / 2).clamp(0, 1)


def small_vae(settings: Settings, slug: str) -> Any:
    """The autoencoder of all seeds, trained once and kept in the runs folder; 28 x 28 -> 4 x 7 x 7."""
    facts = VAE
    with seeded(facts["seed"]):
        vae = autoencoder(1, 4, facts["widths"])
    file = settings.runs / slug / "autoencoder.safetensors"
    if file.exists():
        tensors, found = load_tensors(file)
        if found == facts:
            vae.load_state_dict(tensors)
            return vae.eval()
    fit_autoencoder(
        vae, fashion()[0].x, facts["steps"], lr=facts["lr"], batch=facts["batch"], seed=facts["seed"]
    )
    save_tensors(file, vae.state_dict(), facts)
    return vae.eval()


def small_latents(settings: Settings, slug: str) -> Moments:
    """The posterior of every training image of :func:`fashion` by :func:`small_vae`, encoded once."""
    vae = small_vae(settings, slug)
    file = settings.runs / slug / "latents.safetensors"
    if file.exists():
        tensors, found = load_tensors(file)
        if found == VAE:
            return Moments(**tensors)
    moments = encoded(Codec(vae, 1.0), fashion()[0].x)
    assert moments.std is not None
    save_tensors(file, {"mean": moments.mean, "std": moments.std}, VAE)
    return moments


def train_for(
    seconds: float, module: nn.Module, loss: Callable[[torch.Generator], Tensor], **options: Any
) -> tuple[Trained, float]:
    """Train for about so many seconds of the processor, by the time that a few steps take; and what it took."""
    generator = torch.Generator().manual_seed(0)

    def once() -> None:
        torch.autograd.backward(loss(generator))
        module.zero_grad(set_to_none=True)

    once()
    began = time.process_time()
    count = 0
    while count < 3 or (time.process_time() - began < 0.05 * seconds and count < 100):
        once()
        count += 1
    each = (time.process_time() - began) / count
    began = time.process_time()
    found = train(module, loss, max(4, round(seconds / each)), **options)
    return found, time.process_time() - began
