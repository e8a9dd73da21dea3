"""Batched OMP against scikit-learn and public batched ones: 2,000 targets, 20,000 atoms of 1,024, k = 64.

Peers: mergekit's batch_omp (what the paper's tool runs; LGPL, used only as an external comparison),
orthogonal-matching-pursuit-gpu from PyPI, and scikit-learn's orthogonal_mp_gram, which takes one target at a time: it
is timed on a few targets with the Gram matrix made beforehand, and its time given for all.

"Equal support" is a set for each target. Everyone computes in single precision, where a pick between atoms whose
correlations agree to 1e-6 may fall either way and the rest of that target's picks with it, so at least 99.5 % of the
targets must have the same support.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from _timer import figure, main, missing, race
from gradmatch.core.pick import batch_omp

T, N, D, K = 2000, 20000, 1024, 64
SKLEARN_TARGETS = 3
Pair = tuple[Tensor, Tensor]


def data() -> Pair:
    g = torch.Generator().manual_seed(0)
    atoms = torch.randn(N, D, generator=g)
    return torch.randn(T, D, generator=g), atoms / atoms.norm(dim=1, keepdim=True)


def same(ours: Pair, theirs: Pair) -> None:
    a, b = (t[0].long().sort(1).values for t in (ours, theirs))
    equal = (a == b).all(1)
    share = float(equal.double().mean())
    print(f"  same support: {share:.2%} of the targets", flush=True)
    assert share >= 0.995, f"only {share:.2%} of the supports agree"
    full = [torch.zeros(T, N).scatter_(1, i.long(), c.float())[equal] for i, c in (ours, theirs)]
    error = float((full[0] - full[1]).abs().max())
    assert error < 1e-3, f"coefficients differ by {error:.1e}"


def from_mergekit() -> Callable[[Tensor, Tensor], Pair] | None:
    try:
        from mergekit.tokensurgeon.omp import batch_omp as theirs
    except ImportError as error:
        missing("mergekit batch_omp", str(error))
        return None

    def run(x: Tensor, atoms: Tensor) -> Pair:
        parts = [theirs(part, atoms, K) for part in x.split(512)]  # its script's batch size
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    return run


def from_pypi() -> Callable[[Tensor, Tensor], Pair] | None:
    """Its Gram-based algorithm, which keeps (targets, k, atoms) numbers: 100 targets at once are 0.5 GB."""
    try:
        from orthogonal_matching_pursuit_gpu.omp import omp_v0
    except ImportError as error:
        missing("orthogonal-matching-pursuit-gpu", str(error))
        return None

    def run(x: Tensor, atoms: Tensor) -> Pair:
        gram = atoms @ atoms.T
        parts = [omp_v0(atoms.T, part, gram, K)[:2] for part in x.split(100)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1][:, :, 0] for p in parts])

    return run


def sklearn(x: Tensor, atoms: Tensor, ours_s: float) -> None:
    from sklearn.linear_model import orthogonal_mp_gram

    few = x[:SKLEARN_TARGETS].double()
    gram = (atoms @ atoms.T).double().numpy()
    began = time.perf_counter()
    found = torch.as_tensor(orthogonal_mp_gram(gram, (atoms.double() @ few.T).numpy(), n_nonzero_coefs=K)).T
    each = (time.perf_counter() - began) / len(few)
    indices, coefficients = batch_omp(few.float(), atoms, K)
    mine = torch.zeros(len(few), N, dtype=torch.double).scatter(1, indices, coefficients.double())
    assert torch.equal(mine != 0, found != 0)
    assert torch.allclose(mine, found, atol=1e-4)
    ratio = each * T / ours_s
    figure("orthogonal_mp_gram (Gram matrix made beforehand, not timed)", ours_s=ours_s, peer="scikit-learn",
           theirs_s_for_all=each * T, timed_targets=len(few), ratio=ratio, target=10.0, met=ratio >= 10)  # fmt: skip


def run() -> None:
    x, atoms = data()
    figures: dict[str, Any] | None = None
    for name, make in (("mergekit batch_omp", from_mergekit), ("orthogonal-matching-pursuit-gpu", from_pypi)):
        peer = make()
        if peer is not None:
            figures = race(f"{T} targets, {N} atoms of {D}, k = {K}", lambda: batch_omp(x, atoms, K),
                           lambda peer=peer: peer(x, atoms), peer=name, rounds=1, warmup=0, unit="s", target=1.5,
                           check=same)  # fmt: skip
    began = time.perf_counter()
    batch_omp(x, atoms, K)
    sklearn(x, atoms, time.perf_counter() - began if figures is None else figures["ours_ms"] / 1e3)


if __name__ == "__main__":
    main(run)
