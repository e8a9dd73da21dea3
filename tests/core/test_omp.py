"""Batched orthogonal matching pursuit against scikit-learn, least squares and what is known of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradmatch.core import _omp
from gradmatch.core.checks import InputError
from gradmatch.core.pick import batch_omp


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def rebuilt(indices: Tensor, coefficients: Tensor, atoms: Tensor) -> Tensor:
    return torch.einsum("bk,bkd->bd", coefficients, atoms[indices].to(coefficients.dtype))


@pytest.fixture(params=[True, False], ids=["screened", "plain"])
def screen(request, monkeypatch) -> bool:
    """Both ways of finding the best atom, whatever this machine multiplies fast."""
    monkeypatch.setattr(_omp, "halves_are_fast", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_equals_scikit_learn_on_unit_atoms(screen, dtype) -> None:
    from sklearn.linear_model import orthogonal_mp

    targets, atoms = randn(30, 24, dtype=dtype), unit(randn(200, 24, seed=1, dtype=dtype))
    indices, coefficients = batch_omp(targets, atoms, 7)
    theirs = torch.as_tensor(
        orthogonal_mp(atoms.T.double().numpy(), targets.T.double().numpy(), n_nonzero_coefs=7)
    ).T
    mine = torch.zeros(30, 200, dtype=torch.double).scatter(1, indices, coefficients.double())
    assert torch.equal(mine != 0, theirs != 0)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("normalize", [True, False])
def test_screening_changes_no_pick(monkeypatch, normalize) -> None:
    """Long and short atoms, near ties and duplicates, in double precision where the plain way is beyond doubt."""
    atoms = randn(400, 16, seed=1, dtype=torch.double) * randn(400, 1, seed=2, dtype=torch.double).exp()
    atoms[200:300] = atoms[:100] * (1 + 1e-3 * randn(100, 16, seed=3, dtype=torch.double))
    targets = randn(50, 16, dtype=torch.double)
    found = []
    for fast in (True, False):
        monkeypatch.setattr(_omp, "halves_are_fast", lambda device, fast=fast: fast)
        found.append(batch_omp(targets, atoms, 9, normalize_atoms=normalize))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_many_candidates_fall_back_to_the_full_product(screen) -> None:
    atoms = 1 + 1e-4 * randn(300, 8, dtype=torch.double)  # all alike: screening cannot tell them apart
    indices, coefficients = batch_omp(randn(5, 8, seed=1, dtype=torch.double), atoms, 3)
    for row, x in zip(indices, randn(5, 8, seed=1, dtype=torch.double), strict=True):
        assert int(row[0]) == int((atoms @ x).abs().argmax())
    assert bool(torch.isfinite(coefficients).all())


def test_a_target_that_is_an_anchor_is_found_at_once_when_normalised(screen) -> None:
    atoms = randn(100, 12) * torch.linspace(0.1, 10, 100)[:, None]
    targets = atoms[torch.tensor([3, 97, 40])]
    indices, coefficients = batch_omp(targets, atoms, 4, normalize_atoms=True)
    assert indices[:, 0].tolist() == [3, 97, 40]
    torch.testing.assert_close(coefficients[:, 0], torch.ones(3))
    left = (targets - rebuilt(indices, coefficients, atoms)).norm(dim=1) / targets.norm(dim=1)
    assert float(left.max()) < 1e-6


def test_raw_atoms_favour_the_long_ones(screen) -> None:
    """The published default gives no guarantee that an anchor finds itself."""
    atoms = torch.cat([torch.eye(4), 5 * torch.ones(1, 4)])
    assert batch_omp(atoms[:1], atoms, 1)[0].tolist() == [[4]]
    indices, coefficients = batch_omp(atoms[:1], atoms, 1, normalize_atoms=True)
    assert (indices.tolist(), coefficients.tolist()) == ([[0]], [[1.0]])


def test_a_sparse_mix_of_orthonormal_anchors_is_recovered(screen) -> None:
    atoms = torch.linalg.qr(randn(30, 30))[0]
    support = torch.stack(
        [torch.randperm(30, generator=torch.Generator().manual_seed(s))[:5] for s in range(6)]
    )
    weights = randn(6, 5, seed=4) + 3
    indices, coefficients = batch_omp(rebuilt(support, weights, atoms), atoms, 5)
    for row in range(6):
        assert sorted(indices[row].tolist()) == sorted(support[row].tolist())
    full = torch.zeros(6, 30).scatter(1, indices, coefficients)
    torch.testing.assert_close(full, torch.zeros(6, 30).scatter(1, support, weights), rtol=0, atol=1e-5)


def test_residuals_fall_and_are_orthogonal_and_coefficients_are_least_squares(screen) -> None:
    atoms, targets = randn(60, 20) * 3, randn(8, 20, seed=1)
    before = targets.norm(dim=1)
    for k in (1, 2, 5, 12, 20):
        indices, coefficients = batch_omp(targets, atoms, k)
        assert all(len(set(row)) == k for row in indices.tolist())
        residual = targets - rebuilt(indices, coefficients, atoms)
        assert bool((residual.norm(dim=1) <= before + 1e-5).all())
        before = residual.norm(dim=1)
        inner = torch.einsum("bkd,bd->bk", unit(atoms)[indices], residual) / targets.norm(dim=1, keepdim=True)
        assert float(inner.abs().max()) < 1e-5
        exact = torch.linalg.lstsq(atoms[indices].mT.double(), targets.double()[:, :, None]).solution[:, :, 0]
        if k < 20:
            torch.testing.assert_close(coefficients.double(), exact, rtol=1e-3, atol=1e-4)


def test_dependent_atoms_and_spent_targets_stop_early(screen) -> None:
    """Upstream divides by a clamp of 1e-10 or so there, and coefficients explode."""
    atoms = torch.stack([torch.eye(3)[0], torch.eye(3)[0] * (1 + 1e-7), torch.eye(3)[1], torch.eye(3)[0]])
    indices, coefficients = batch_omp(torch.tensor([[2.0, 1, 5], [0, 0, 0], [3, 0, 0]]), atoms, 4)
    assert float(coefficients.abs().max()) < 4
    assert coefficients[1].tolist() == [0, 0, 0, 0]
    assert indices[1].tolist() == [0, 0, 0, 0]
    assert (coefficients[0] != 0).sum() == 2
    assert (coefficients[2] != 0).sum() == 1
    torch.testing.assert_close(rebuilt(indices, coefficients, atoms)[0], torch.tensor([2.0, 1, 0]))
    more = batch_omp(randn(4, 5), randn(30, 5, seed=1), 12)  # more atoms than dimensions
    assert int((more[1] != 0).sum(1).max()) <= 5
    torch.testing.assert_close(rebuilt(*more, randn(30, 5, seed=1)), randn(4, 5), rtol=0, atol=1e-4)


def test_a_tolerance_stops_a_target(screen) -> None:
    atoms, targets = randn(60, 20), randn(8, 20, seed=1)
    indices, coefficients = batch_omp(targets, atoms, 20, tol=0.3)
    share = (targets - rebuilt(indices, coefficients, atoms)).norm(dim=1) / targets.norm(dim=1)
    counts = (coefficients != 0).sum(1)
    assert bool((share <= 0.3).all())
    for row, count in enumerate(counts.tolist()):
        shorter = batch_omp(targets[row : row + 1], atoms, count - 1)
        left = targets[row] - rebuilt(*shorter, atoms)[0]
        assert float(left.norm() / targets[row].norm()) > 0.3
        assert coefficients[row, count:].tolist() == [0] * (20 - count)


def test_chunks_do_not_matter(screen) -> None:
    atoms, targets = randn(80, 16), randn(23, 16, seed=1)
    whole = batch_omp(targets, atoms, 6)
    for chunk in (1, 5, 23):
        indices, coefficients = batch_omp(targets, atoms, 6, chunk=chunk)
        assert torch.equal(indices, whole[0])
        torch.testing.assert_close(coefficients, whole[1])


def test_half_precision_is_computed_in_single(screen) -> None:
    atoms, targets = randn(80, 16).bfloat16(), randn(9, 16, seed=1).bfloat16()
    indices, coefficients = batch_omp(targets, atoms, 6)
    same = batch_omp(targets.float(), atoms.float(), 6)
    assert coefficients.dtype == torch.float32
    assert torch.equal(indices, same[0])
    assert torch.equal(coefficients, same[1])


def test_huge_and_tiny_numbers_do_not_overflow_the_screen(screen) -> None:
    atoms, targets = randn(80, 16), randn(9, 16, seed=1)
    base = batch_omp(targets, atoms, 4)
    for a, b in ((1e15, 1e15), (1e-15, 1e-15), (1e15, 1e-15)):
        indices, coefficients = batch_omp(targets * a, atoms * b, 4)
        assert torch.equal(indices, base[0])
        torch.testing.assert_close(coefficients * (b / a), base[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "atoms", "options", "word"),
    [
        (randn(3, 4), randn(5, 6), {"k": 2}, "targets have width 4 and atoms 6"),
        (randn(3, 4), randn(5, 4), {"k": 6}, "k is 6"),
        (randn(3, 4), randn(5, 4), {"k": 0}, "k is 0"),
        (randn(3, 4), randn(5, 4), {"k": 2, "tol": -1.0}, "tol is -1.0"),
        (randn(3, 4), randn(5, 4), {"k": 2, "chunk": 0}, "chunk is 0"),
        (randn(4), randn(5, 4), {"k": 2}, "targets is of shape (4,)"),
        (randn(3, 4), randn(0, 4), {"k": 2}, "atoms is of shape (0, 4)"),
        (randn(3, 4) * float("nan"), randn(5, 4), {"k": 2}, "targets has 12 NaN"),
        (randn(3, 4), randn(5, 4) * float("inf"), {"k": 2}, "atoms has"),
    ],
)
def test_what_cannot_be_pursued_is_refused(targets, atoms, options, word) -> None:
    with pytest.raises(InputError) as error:
        batch_omp(targets, atoms, **options)
    assert word in str(error.value)
