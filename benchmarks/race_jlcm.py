"""Codebooks against scikit-learn's k-means and hqq: codes of 1-D values, and a 4,096 x 4,096 layer at 3 bits.

hqq keeps a scale and a zero for each group of weights; with a group a row its bytes are within 1 % of ours, and the
bytes and squared errors of both are printed. Ours is the k-means start of ``compress`` (4 codebooks); neither is given
data. sklearn's k-means on 16.8 million values takes minutes, so it is raced on one in 64 of them, where both costs are
compared: the exact one is never above.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from _timer import figure, main, missing, race
from gradmatch.core.kmeans import Codes, kmeans_1d
from gradmatch.weights._coded import Coded
from gradmatch.weights._mapping import started

SIDE, BITS, GROUPS = 4096, 3, 4


def layer() -> torch.Tensor:
    """Normal weights with rows of different sizes and a few outliers."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(SIDE, SIDE, generator=g) * 0.02 * (0.5 + torch.rand(SIDE, 1, generator=g))
    return w + 0.2 * torch.randn(SIDE, SIDE, generator=g) * (torch.rand(SIDE, SIDE, generator=g) < 1e-4)


def not_worse(ours: Codes, theirs: float) -> None:
    print(f"  cost: ours {ours.cost:.8g}, sklearn {theirs:.8g}")
    assert ours.gap == 0, "not proven to be the optimum"
    assert ours.cost <= theirs * (1 + 1e-6), "sklearn found a lower cost"


def run() -> None:
    w = layer()
    some = w.flatten()[::64].contiguous()
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        missing("scikit-learn KMeans", str(error))
    else:
        rows = some[:, None].numpy().astype(np.float64)
        race(
            f"{2**BITS} codes of {len(some):,} values",
            lambda: kmeans_1d(some, 2**BITS),
            lambda: float(KMeans(2**BITS, n_init=1, random_state=0).fit(rows).inertia_),
            peer="scikit-learn KMeans, one start",
            rounds=3,
            check=not_worse,
            unit="s",
        )
    ends = torch.tensor([(k + 1) * SIDE // GROUPS for k in range(GROUPS)], dtype=torch.int32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from hqq.core.quantize import Quantizer
    except Exception as error:
        missing("hqq", str(error))
        return

    def theirs() -> tuple[torch.Tensor, dict]:
        return Quantizer.quantize(
            w, nbits=BITS, channel_wise=True, group_size=SIDE, optimize=True, axis=1, bitpack=False,
            compute_dtype=torch.float32, device="cpu",
        )  # fmt: skip

    def compared(mine: Coded, other: tuple[torch.Tensor, dict]) -> None:
        packed, meta = other
        back = ((packed.float() - meta["zero"]) * meta["scale"]).reshape(w.shape)
        size = w.numel() * BITS // 8 + 2 * (meta["zero"].numel() + meta["scale"].numel())
        errors = [float((m - w).square().mean() / w.square().mean()) for m in (mine.dense(), back)]
        figure("bytes at 3 bits", ours=mine.nbytes, hqq=size)
        figure("relative squared error at 3 bits", ours=errors[0], hqq=errors[1])
        assert abs(mine.nbytes / size - 1) < 0.01, "bytes differ by more than 1 %"

    race(
        f"{SIDE} x {SIDE} at {BITS} bits",
        lambda: started(w, ends, BITS, "codebooks"),
        theirs,
        peer="hqq",
        rounds=2,
        warmup=0,
        check=compared,
        unit="s",
    )


if __name__ == "__main__":
    main(run)
