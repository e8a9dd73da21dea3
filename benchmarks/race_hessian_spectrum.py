"""Race of spectra: density, products and whole matrices against PyHessian and curvlinops (PyPI).

The model is an MLP 784-256-10 on 2,000 images. PyHessian 0.1 calls ``torch.eig``, which torch has no longer; it gets
the symmetric eigensolver in its place, which is what it needs there. The products are also raced against the loop that
everyone writes, one vector after the other with a fresh graph.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from _timer import main, missing, race
from gradmatch.core.cpu import keep_freed_memory
from gradmatch.core.curvature import Curvature
from gradmatch.core.krylov import SpectralDensity, spectral_density
from gradmatch.core.problem import Problem
from gradmatch.datasets import fashion_mnist

IMAGES, STEPS = 2000, 100


def task(n: int = IMAGES, width: int = 256) -> tuple[nn.Module, Tensor, Tensor]:
    """A network a few epochs into its training, and its images."""
    train = fashion_mnist().train
    x, y = train.x[:n].flatten(1), train.y[:n]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for part in torch.arange(n).repeat(3).split(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, x, y


def ours(model: nn.Module, x: Tensor, y: Tensor, probes: int = 1) -> SpectralDensity:
    problem = Problem(model, "cross_entropy", (x, y), batch_size=len(x))
    return spectral_density(
        Curvature(problem), STEPS, probes, generator=torch.Generator().manual_seed(0), kind="rademacher"
    )


def pyhessian(model: nn.Module, x: Tensor, y: Tensor) -> SpectralDensity:
    from pyhessian import hessian

    torch.manual_seed(1)
    found = hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    nodes, weights = found.density(iter=STEPS, n_v=1)
    model.zero_grad(set_to_none=True)
    return SpectralDensity(torch.tensor(nodes).double(), torch.tensor(weights).double(), 0)


def symmetric_eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
    """What ``torch.eig`` gave for a symmetric matrix: values with imaginary parts 0, and vectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], 1), vectors


def theirs_curvlinops(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Density of curvlinops on its own grid."""
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
    )
    grid, density = lanczos_approximate_spectrum(operator, STEPS)
    return torch.as_tensor(grid).double(), torch.as_tensor(density).double()


def same_ends(a: SpectralDensity, b: SpectralDensity) -> None:
    """The converged ends agree, and so does the smoothed mass of the bulk up to the noise of one probe."""
    gap = (a.nodes.max() - b.nodes.max()).abs() / a.nodes.max()
    assert gap < 1e-3, f"largest nodes differ by {gap:.1e}"
    low = (a.nodes.min() - b.nodes.min()).abs() / a.nodes.max()
    assert low < 1e-2, f"smallest nodes differ by {low:.1e}"
    near = [float(d.weights[d.nodes.abs() < 0.01 * a.nodes.max()].sum() / len(d.nodes)) for d in (a, b)]
    assert abs(near[0] - near[1]) < 0.02, f"shares near zero are {near}"


def same_density(a: SpectralDensity, found: tuple[Tensor, Tensor]) -> None:
    grid, density = found
    step = grid[1] - grid[0]
    mine = a.evaluate(grid)[0]
    gap = float((mine - density / (density.sum() * step)).abs().sum() * step)
    assert gap < 0.2, f"densities differ by {gap:.2f} of their mass"


def loop(model: nn.Module, x: Tensor, y: Tensor, vectors: Tensor) -> Tensor:
    """One vector after the other, each with a graph of its own."""
    params = list(model.parameters())
    rows = []
    for v in vectors.T:
        loss = nn.functional.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        parts = [p.view_as(g) for p, g in zip(v.split([g.numel() for g in grads]), grads, strict=True)]
        rows.append(torch.cat([h.flatten() for h in torch.autograd.grad(grads, params, parts)]))
    return torch.stack(rows, 1)


def close(tolerance: float) -> Callable[[Any, Any], None]:
    def check(a: Tensor, b: Tensor) -> None:
        gap = float((a - b).norm() / b.norm())
        assert gap < tolerance, f"relative difference {gap:.1e}"

    return check


def there(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        missing(name, "not installed")
        return False
    return True


def run() -> None:
    keep_freed_memory()
    warnings.simplefilter("ignore")
    model, x, y = task()
    vectors = torch.randn(sum(p.numel() for p in model.parameters()), 32)
    operator = Curvature(Problem(model, "cross_entropy", (x, y), batch_size=len(x)))
    race(
        f"Hessian times 32 vectors, {len(vectors):,} parameters, {IMAGES} images",
        lambda: operator.matvec(vectors),
        lambda: loop(model, x, y, vectors),
        peer="loop",
        rounds=3,
        check=close(1e-4),
        target=2.0,
    )
    small, xs, ys = task(1000, 16)
    few = Problem(small, "cross_entropy", (xs, ys), batch_size=1000)
    several = torch.randn(few.space.size, 32)
    race(
        f"the same, {few.space.size:,} parameters, 1000 images",
        lambda: Curvature(few).matvec(several),
        lambda: loop(small, xs, ys, several),
        peer="loop",
        check=close(1e-4),
        target=2.0,
    )
    if there("pyhessian"):
        torch.eig = symmetric_eig  # type: ignore[attr-defined]
        race(
            f"density, {STEPS} steps, one probe",
            lambda: ours(model, x, y),
            lambda: pyhessian(model, x, y),
            peer="PyHessian",
            rounds=3,
            check=same_ends,
            target=2.0,
            unit="s",
        )
    if there("curvlinops"):
        _race_curvlinops(model, x, y, operator, vectors)


def _race_curvlinops(model: nn.Module, x: Tensor, y: Tensor, operator: Curvature, vectors: Tensor) -> None:
    from curvlinops import HessianLinearOperator

    theirs = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)], check_deterministic=False
    )
    race(
        "Hessian times 32 vectors",
        lambda: operator.matvec(vectors),
        lambda: theirs @ vectors,
        peer="curvlinops",
        rounds=3,
        check=close(1e-4),
    )
    race(
        f"density, {STEPS} steps, one probe",
        lambda: ours(model, x, y),
        lambda: theirs_curvlinops(model, x, y),
        peer="curvlinops",
        rounds=3,
        check=same_density,
        target=2.0,
        unit="s",
    )
    small = nn.Sequential(nn.Linear(784, 2), nn.Tanh(), nn.Linear(2, 10))
    problem = Problem(small, "cross_entropy", (x, y), batch_size=len(x))
    whole = HessianLinearOperator(
        small, nn.CrossEntropyLoss(), list(small.parameters()), [(x, y)], check_deterministic=False
    )
    race(
        f"the whole matrix, {problem.space.size:,} parameters",
        lambda: Curvature(problem).dense(),
        lambda: whole @ torch.eye(problem.space.size),
        peer="curvlinops",
        rounds=3,
        check=close(1e-4),
        target=2.0,
        unit="s",
    )


if __name__ == "__main__":
    main(run)
