"""A small convolutional variational autoencoder with the interface of diffusers' ``AutoencoderKL``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradmatch.core import checks
from gradmatch.core.store import RunFolder
from gradmatch.core.training import Progress, Trained, train

KL_WEIGHT = 1e-4


def autoencoder(channels: int = 1, latent: int = 4, widths: Sequence[int] = (16, 32, 32)) -> Any:
    """``diffusers.AutoencoderKL``: images are halved once for each width but the first.

    Args:
        channels: of the images.
        latent: channels of the latents.
        widths: channels of each resolution, multiples of 8; the default takes 28 x 28 to 7 x 7.

    >>> autoencoder(widths=(8, 8)).encode(torch.zeros(2, 1, 8, 8)).latent_dist.mean.shape
    torch.Size([2, 4, 4, 4])
    """
    import diffusers

    checks.require(
        len(widths) > 0 and all(w % 8 == 0 for w in widths),
        f"widths is {widths}; each must be a multiple of 8.",
    )
    make: Any = diffusers.AutoencoderKL
    return make(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        latent_channels=checks.whole("latent", latent),
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def fit_autoencoder(
    vae: Any,
    images: Tensor,
    steps: int,
    *,
    lr: float = 2e-3,
    batch: int = 64,
    kl: float = KL_WEIGHT,
    seed: int = 0,
    progress: Progress | None = None,
    run: RunFolder | None = None,
    save_every: float = 30.0,
) -> Trained:
    """Train ``vae``: mean squared error of reconstructions from posterior samples, plus a divergence from N(0, 1).

    Args:
        vae: of :func:`autoencoder`, trained in place.
        images: (n, c, h, w), on the device of ``vae``.
        steps, lr, batch, seed, progress, run, save_every: as in
            :func:`gradmatch.core.training.train`; the rate falls by a cosine.
        kl: weight of the divergence of an image, both terms divided by its pixels; 1e-4.
    """
    checks.finite("images", images)

    def loss(generator: torch.Generator) -> Tensor:
        x = images[torch.randint(len(images), (batch,), generator=generator, device=generator.device)]
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=generator.device)
        z = posterior.mean + posterior.std * noise
        error = (vae.decode(z).sample - x).square().flatten(1).sum(1)
        total: Tensor = ((error + kl * posterior.kl()) / x[0].numel()).mean()
        return total

    return train(
        vae,
        loss,
        steps,
        lr=lr,
        schedule="cosine",
        seed=seed,
        progress=progress,
        run=run,
        save_every=save_every,
    )
