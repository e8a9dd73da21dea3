"""Every check, refusal and pitfall of the deep conjugate direction method, on Poisson systems with known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import LinearOperator, splu
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.core.krylov import as_operator, cg, lanczos
from gradmatch.solve import DirectionSolver, dcdm
from gradmatch.solve._direction_net import DirectionNet
from gradmatch.solve._direction_training import (
    DirectionTraining,
    direction_loss,
    ritz_dataset,
    train_direction_net,
)


def poisson(n: int, solid: np.ndarray | None = None, wall: bool = True) -> sp.csr_matrix:
    """Five-point Laplacian of an n x n box; without ``wall`` rows sum to 0; rows of solid cells are zero."""
    line = sp.diags([-np.ones(n - 1)] * 2, [1, -1])
    A = (sp.kron(line, sp.identity(n)) + sp.kron(sp.identity(n), line)).tolil()
    if solid is not None:
        A[solid.ravel()] = 0
        A[:, solid.ravel()] = 0
    A = A.tocsr()
    A.eliminate_zeros()
    degree = np.full(n * n, 4.0) if wall else -np.asarray(A.sum(1)).ravel()
    if solid is not None:
        degree[solid.ravel()] = 0
    A = (A + sp.diags(degree)).tocsr()
    A.eliminate_zeros()
    return A


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def noise(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return lambda r: torch.randn(r.shape, generator=g, dtype=r.dtype)


A8 = poisson(8)


def run_of(solver: DirectionSolver, b: np.ndarray) -> dcdm._Run:
    rhs = torch.from_numpy(b)[:, None]
    return dcdm._Run(solver, rhs, torch.zeros_like(rhs), rhs.clone(), None)


# --- the method -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [True, False])
def test_the_residual_as_proposal_is_conjugate_gradients(recompute: bool) -> None:
    A, b = poisson(24), normal(576)
    x, info = DirectionSolver(A, "residual", tol=1e-8, max_iter=500, recompute=recompute).solve(b)
    reference = cg(A, b, tol=1e-8)
    assert int(info.iterations) == int(reference.iterations)
    assert np.allclose(x, reference.x.numpy(), rtol=0, atol=1e-10)
    assert torch.allclose(info.residuals, reference.history, rtol=1e-6)


def test_an_exact_inverse_needs_one_iteration() -> None:
    A, b = poisson(12), normal(144, 3)
    inverse = splu(A.tocsc())
    for propose in (
        LinearOperator(A.shape, matvec=inverse.solve, matmat=inverse.solve),
        lambda r: -3 * torch.from_numpy(inverse.solve(r.numpy())),
        torch.from_numpy(np.linalg.inv(A.toarray())),
    ):
        x, info = DirectionSolver(A, propose, tol=1e-10).solve(b)
        assert info.iterations.tolist() == [1, 1, 1]
        assert np.allclose(A @ x, b)


def test_a_multigrid_cycle_of_pyamg_serves_as_proposal() -> None:
    pyamg = pytest.importorskip("pyamg")
    A, b = poisson(32), normal(1024)
    cycle = pyamg.smoothed_aggregation_solver(A).aspreconditioner()
    _, info = DirectionSolver(A, cycle, tol=1e-8).solve(b)
    assert int(info.iterations) < 20


def test_relative_noise_below_a_half_still_wins_over_conjugate_gradients() -> None:
    A, b, g = poisson(32), normal(1024), torch.Generator().manual_seed(0)
    inverse = splu(A.tocsc())

    def propose(r: Tensor) -> Tensor:
        y = torch.from_numpy(inverse.solve(r.numpy()))
        return y + 0.3 * y.norm() / 32 * torch.randn(y.shape, generator=g, dtype=y.dtype)

    _, info = DirectionSolver(A, propose).solve(b)
    _, plain = DirectionSolver(A, "residual").solve(b)
    assert int(info.iterations) < 0.5 * int(plain.iterations)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_directions_are_orthogonal_to_those_kept(keep: int) -> None:
    run = run_of(DirectionSolver(A8, noise(), keep=keep), normal(64))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(12):
        run.step()
        found.append(run.kept[-1])
        assert len(run.kept) == min(keep, len(found))
        for p, image, curve in found[-1 - keep : -1]:
            mine, _, own = found[-1]
            assert abs(float((mine * image).sum())) < 1e-8 * float((curve * own).sqrt())
            assert torch.allclose(
                image, as_operator(A8).matvec(p), atol=1e-9
            )  # images follow without a product


def test_the_energy_of_the_error_never_grows_whatever_is_proposed() -> None:
    b = normal(64)
    exact = np.linalg.solve(A8.toarray(), b)
    run = run_of(DirectionSolver(A8, noise(3)), b)
    energy = [float(exact @ (A8 @ exact))]
    for _ in range(60):
        run.step()
        gap = run.x[:, 0].numpy() - exact
        energy.append(float(gap @ (A8 @ gap)))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(energy))
    assert energy[-1] > 0.01 * energy[0]  # and noise has no rate: only the fallback ends


def test_nothing_kept_is_steepest_descent() -> None:
    b = normal(64)
    run, x = run_of(DirectionSolver(A8, "residual", keep=0), b), np.zeros(64)
    for _ in range(5):
        run.step()
        r = b - A8 @ x
        x = x + r * (r @ r) / (r @ (A8 @ r))
    assert np.allclose(run.x[:, 0].numpy(), x, rtol=1e-12)


def test_keeping_more_directions_helps_a_poor_proposer() -> None:
    A, b = poisson(24), normal(576)
    lower = sp.tril(
        A
    ).tocsr()  # a sweep of Gauss-Seidel is not symmetric, so two directions do not span the past

    def propose(r: Tensor) -> Tensor:
        return torch.from_numpy(sp.linalg.spsolve_triangular(lower, r.numpy()))

    counts = [int(DirectionSolver(A, propose, keep=k, max_iter=400).solve(b)[1].iterations) for k in (2, 20)]
    assert counts[1] < 0.8 * counts[0]


# --- safeguards -----------------------------------------------------------------------------------------------


def test_useless_proposals_are_replaced_by_the_residual() -> None:
    b, plain = normal(64, 2), DirectionSolver(A8, "residual").solve(normal(64, 2))[0]
    for bad in (0.0, float("nan"), float("inf")):
        x, info = DirectionSolver(A8, lambda r, bad=bad: torch.full_like(r, bad)).solve(b)
        assert torch.equal(info.replaced, info.iterations)
        assert np.allclose(x, plain)

    def one_bad(r: Tensor) -> Tensor:
        r = r.clone()
        r[:, 0] = float("nan")
        return r

    one = DirectionSolver(A8, one_bad).solve(b)[1]
    assert int(one.replaced[0]) == int(one.iterations[0])
    assert int(one.replaced[1]) < int(one.iterations[1])


def test_conjugate_gradients_take_over_and_end() -> None:
    b = normal(64, 3)
    x, info = DirectionSolver(A8, noise(), max_iter=4, tol=1e-9).solve(b)
    assert np.allclose(A8 @ x, b, atol=1e-7)
    assert info.iterations.tolist() == [4, 4, 4]
    assert bool((info.fallbacks > 5).all())
    assert bool(info.converged.all())
    assert len(info.residuals) == 1 + 4 + int(info.fallbacks.max())
    assert np.allclose(
        info.residuals[-1].numpy(), np.linalg.norm(b - A8 @ x, axis=0) / np.linalg.norm(b, axis=0), rtol=1e-4
    )
    _, open_end = DirectionSolver(A8, noise(), max_iter=4, tol=1e-9, fallback=None).solve(b)
    assert not bool(open_end.converged.any())
    assert len(open_end.residuals) == 5


def test_every_right_hand_side_ends_on_its_own() -> None:
    A = poisson(16)
    easy = A @ np.ones(256)
    b = np.stack([np.zeros(256), easy, normal(256)], 1)
    inverse = splu(A.tocsc())
    calls = []

    def propose(r: Tensor) -> Tensor:
        calls.append(r.shape[1])
        return 0.3 * r + torch.from_numpy(inverse.solve(r.numpy()))

    x, info = DirectionSolver(A, propose, tol=1e-9).solve(b)
    assert int(info.iterations[0]) == 0
    assert not x[:, 0].any()
    assert calls[0] == 2  # the zero right-hand side asks for nothing
    for j in range(3):
        alone, own = DirectionSolver(A, propose, tol=1e-9).solve(b[:, j])
        assert np.allclose(x[:, j], alone, atol=1e-12)
        assert int(own.iterations) == int(info.iterations[j])


def test_a_start_shortens_the_way_and_tol_is_relative_to_it() -> None:
    b = normal(64)
    exact = np.linalg.solve(A8.toarray(), b)
    x, info = DirectionSolver(A8, "residual").solve(b, x0=exact + 1e-3)
    assert np.linalg.norm(b - A8 @ x) <= 1.01e-4 * np.linalg.norm(b - A8 @ (exact + 1e-3))
    assert float(info.residuals[0]) == 1.0
    _, info = DirectionSolver(A8, "residual").solve(b, x0=exact)  # nothing is left but rounding
    assert int(info.iterations) == 0
    assert bool(info.converged.all())


# --- networks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "layout", "count"), [(3, "64", 97457), (3, "128", 152881), (2, "64", 32657), (2, "128", 51217)]
)
def test_parameter_counts(dims: int, layout: str, count: int) -> None:
    net = DirectionNet(dims, layout)
    assert sum(p.numel() for p in net.parameters()) == count
    shape = (2, 1, *(8, 6, 4)[:dims])
    assert net(torch.zeros(shape)).shape == shape


def test_the_layout_written_out() -> None:
    net, F = DirectionNet(2, seed=3), torch.nn.functional
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    x = torch.from_numpy(normal(2, 1, 8, 8)).float()
    c = iter(convs)
    first = next(c)(x)
    la = F.relu(next(c)(first))
    lb = F.relu(next(c)(la))
    la = F.relu(next(c)(lb)) + la
    lb = F.relu(next(c)(la))
    apa = F.avg_pool2d(lb, 2)
    for _ in range(3):
        apb = F.relu(next(c)(apa))
        apa = F.relu(next(c)(apb)) + apa
    upa = apa.repeat_interleave(2, 2).repeat_interleave(2, 3) + lb
    for _ in range(2):
        upb = F.relu(next(c)(upa))
        upa = F.relu(next(c)(upb)) + upa
    assert torch.allclose(net(x), next(c)(upa), atol=1e-6)
    assert next(c, None) is None


def test_networks_are_seeded_and_the_global_generator_is_left() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (DirectionNet(2, seed=s).mix.weight for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_network_is_called_with_unit_residuals_on_the_grid_and_left_as_found() -> None:
    class Looker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.drop = nn.Dropout(0.9)

        def forward(self, r: Tensor) -> Tensor:
            seen.append(r.clone())
            return self.drop(r * self.weight + 0.1)

    seen: list[Tensor] = []
    net = Looker().train()
    net.drop.eval()
    b = normal(64, 2)
    DirectionSolver(A8, net, grid_shape=(8, 8), max_iter=3).solve(b)
    assert net.training
    assert not net.drop.training
    assert net.weight.grad is None
    assert seen[0].shape == (2, 1, 8, 8)
    assert seen[0].dtype == torch.float32
    assert torch.allclose(
        seen[0][1, 0].flatten().double(), torch.from_numpy(b[:, 1] / np.linalg.norm(b[:, 1])), atol=1e-7
    )
    assert all(torch.allclose(r.flatten(1).norm(dim=1), torch.ones(2), atol=1e-6) for r in seen)
    seen.clear()
    DirectionSolver(A8, net, grid_shape=(8, 8), max_iter=1, normalize=False).solve(b)
    assert torch.allclose(seen[0][0, 0].flatten().double(), torch.from_numpy(b[:, 0]), atol=1e-6)


def test_scaling_the_right_hand_side_scales_the_solution() -> None:
    """Biases make the network no homogeneous function: without unit residuals another course is taken."""
    b, net = normal(64), DirectionNet(2, seed=1)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1:
                p.fill_(0.05)
    exact = DirectionSolver(A8, lambda r: r + 0.1 * r.abs())
    x = exact.solve(b)[0]
    assert np.array_equal(exact.solve(8 * b)[0], 8 * x)
    assert np.allclose(exact.solve(3 * b)[0], 3 * x, rtol=1e-11, atol=1e-13)
    solver = DirectionSolver(A8, net, grid_shape=(8, 8), max_iter=6, fallback=None)
    assert np.allclose(solver.solve(3 * b)[0], 3 * solver.solve(b)[0], rtol=1e-3, atol=1e-5)
    careless = DirectionSolver(A8, net, grid_shape=(8, 8), max_iter=6, fallback=None, normalize=False)
    assert not np.allclose(careless.solve(100 * b)[0], 100 * careless.solve(b)[0], rtol=1e-2, atol=1e-3)


def test_a_network_in_half_precision_leaves_the_solver_in_double() -> None:
    b, net = normal(64), DirectionNet(2, seed=1).bfloat16()
    x, info = DirectionSolver(A8, net, grid_shape=(8, 8), tol=1e-10, max_iter=10).solve(b)
    assert x.dtype == np.float64
    assert np.linalg.norm(b - A8 @ x) < 2e-10 * np.linalg.norm(b)
    assert bool(info.converged.all())


def test_obstacles_and_masks_stay_out_of_the_solution() -> None:
    solid = np.zeros((8, 8), dtype=bool)
    solid[2:5, 3:6] = True
    A, b = poisson(8, solid), normal(64) * ~solid.ravel()
    for propose in (DirectionNet(2), "residual"):
        x, info = DirectionSolver(A, propose, grid_shape=(8, 8), tol=1e-9, max_iter=5).solve(b)
        assert np.isfinite(x).all()
        assert not x[solid.ravel()].any()
        assert np.allclose(A @ x, b, atol=1e-7)
        assert bool(info.converged.all())
    free = ~solid
    masked, _ = DirectionSolver(A8, DirectionNet(2), grid_shape=(8, 8), tol=1e-9, max_iter=5).solve(
        b, mask=free
    )
    inside = free.ravel()
    expected = np.linalg.solve(A8.toarray()[inside][:, inside], b[inside])
    assert np.allclose(masked[inside], expected, atol=1e-6)
    assert not masked[~inside].any()


def test_no_gradient_is_taken_of_what_a_network_did_without_one() -> None:
    weight = torch.ones(64, 1, dtype=torch.float64, requires_grad=True)
    b = torch.ones(64, dtype=torch.float64, requires_grad=True)
    x, _ = DirectionSolver(A8, lambda r: r * weight).solve(b)
    assert not x.requires_grad


def test_a_zero_right_hand_side_returns_at_once() -> None:
    x, info = DirectionSolver(A8, DirectionNet(2), grid_shape=(8, 8)).solve(np.zeros(64))
    assert not x.any()
    assert int(info.iterations) == 0
    assert info.residuals.tolist() == [[0.0]]


# --- singular systems -----------------------------------------------------------------------------------------


def test_a_box_without_walls_is_solved_up_to_a_constant() -> None:
    solid = np.zeros((8, 8), dtype=bool)
    solid[3] = True  # two parts, each with a constant of its own
    A = poisson(8, solid, wall=False)
    b = A @ normal(64)
    solver = DirectionSolver(A, "residual", tol=1e-10)
    assert solver.null_space.basis.shape == (64, 2)
    x, info = solver.solve(b)
    assert np.allclose(A @ x, b, atol=1e-8)
    assert np.allclose(solver.null_space.basis.numpy().T @ x, 0, atol=1e-10)
    assert bool(info.converged.all())
    with pytest.warns(UserWarning, match="of its norm outside the range of the singular A"):
        y, _ = solver.solve(b + 5.0 * ~solid.ravel())
    assert np.allclose(x, y, atol=1e-8)


def test_the_null_space_of_a_function_is_given() -> None:
    A = poisson(6, wall=False)
    dense = torch.from_numpy(A.toarray())
    b = A @ normal(36)
    function = as_operator(lambda v: dense @ v, 36)
    x, _ = DirectionSolver(function, "residual", tol=1e-9, null_space=np.ones(36)).solve(b)
    assert np.allclose(A @ x, b, atol=1e-7)
    with pytest.raises(InputError, match="columns that A does not map to 0"):
        DirectionSolver(function, "residual", null_space=np.arange(36.0))
    with pytest.raises(InputError, match=r"no positive curvature|not positive definite"):
        DirectionSolver(function, "residual", tol=1e-9).solve(np.ones(36))


# --- what users have ------------------------------------------------------------------------------------------


def test_all_kinds_of_matrices_give_one_solution() -> None:
    b = normal(64, 2)
    expected = np.linalg.solve(A8.toarray(), b)
    dense = torch.from_numpy(A8.toarray())
    for A in (
        A8,
        A8.tocoo(),
        A8.toarray(),
        dense,
        dense.to_sparse(),
        dense.to_sparse_csr(),
        A8.astype(np.float32),
    ):
        x, _ = DirectionSolver(A, "residual", tol=1e-12).solve(b)
        assert isinstance(x, np.ndarray)
        assert x.dtype == np.float64
        assert np.allclose(x, expected, atol=1e-9)
    x, _ = DirectionSolver(A8, "residual", tol=1e-12).solve(torch.from_numpy(b[:, 0]))
    assert isinstance(x, Tensor)
    assert np.allclose(x.numpy(), expected[:, 0], atol=1e-9)


def test_single_precision_stalls_where_double_does_not() -> None:
    A, b = poisson(32), normal(1024)
    rough, _ = DirectionSolver(
        A, "residual", tol=1e-9, dtype=torch.float32, max_iter=150, fallback=None
    ).solve(b)
    fine, _ = DirectionSolver(A, "residual", tol=1e-9, max_iter=150).solve(b)
    gaps = [np.linalg.norm(b - A @ x) / np.linalg.norm(b) for x in (rough, fine)]
    assert gaps[0] > 1e-7
    assert gaps[1] <= 1e-9


# --- training -------------------------------------------------------------------------------------------------


def test_the_loss_is_zero_for_the_answer_and_blind_to_scale() -> None:
    r = torch.from_numpy(normal(64, 5))
    r = r / r.norm(dim=0)
    answer = torch.from_numpy(np.linalg.solve(A8.toarray(), r.numpy()))
    f = torch.from_numpy(normal(64, 5, seed=1))
    assert float(direction_loss(A8, r, answer)) < 1e-20
    loss = direction_loss(A8, r, f)
    assert float(loss) > 0.1
    for scale in (-2.0, 1e-3, 1e4):
        assert float(direction_loss(A8, r, scale * f)) == pytest.approx(float(loss), rel=1e-9)
    eye = torch.eye(64, dtype=torch.float64)
    cosine = (r * f).sum(0) / f.norm(dim=0)
    assert float(direction_loss(eye, r, f)) == pytest.approx(float((1 - cosine**2).mean()), rel=1e-9)


def test_the_loss_may_exceed_one_and_is_not_clipped() -> None:
    A = torch.diag(torch.tensor([1.0, 1000.0], dtype=torch.float64))
    r, f = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[1.0], [0.05]]).double()
    alpha = 1 / (1 + 1000 * 0.0025)
    expected = (1 - alpha) ** 2 + (alpha * 50) ** 2
    assert float(direction_loss(A, r, f)) == pytest.approx(expected)
    assert expected > 100


def test_the_gradient_of_the_loss_goes_through_alpha() -> None:
    r = torch.from_numpy(normal(16, 2))
    A = torch.from_numpy(poisson(4).toarray())
    f = torch.from_numpy(normal(16, 2, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: direction_loss(A, r / r.norm(dim=0), f), f)


def test_ritz_vectors_of_a_diagonal_matrix_are_unit_vectors() -> None:
    A = torch.diag(torch.arange(1.0, 13.0, dtype=torch.float64))
    _, vectors, _ = lanczos(A, A @ torch.ones(12, dtype=torch.float64), 12).ritz()
    assert torch.allclose(vectors.abs(), torch.eye(12).double(), atol=1e-8)
    data = ritz_dataset(A, 12, 4000, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(data, ritz_dataset(A, 12, 4000, 2))  # seed 0 is the default
    assert data.shape == (12, 4000)
    assert torch.allclose(data.norm(dim=0), torch.ones(4000).double())
    energy = data.square().mean(1)
    assert torch.allclose(energy[:8], energy[:8].mean().expand(8), rtol=0.1)  # 12 / 2 + theta = 8 are boosted
    assert float(energy[:8].mean() / energy[8:].mean()) > 40  # 81 before normalisation


def test_ritz_vectors_hold_no_copies_and_no_null_vectors() -> None:
    A = poisson(12, wall=False) + 100 * sp.diags(
        np.r_[1.0, np.zeros(143)]
    )  # one far eigenvalue breeds ghosts
    values, vectors, _ = lanczos(A, A @ normal(144), 120).ritz()
    gram = vectors.T @ vectors
    assert torch.allclose(gram, torch.eye(len(values)).double(), atol=1e-8)
    assert int((values > 50).sum()) == 1
    singular = poisson(6, wall=False)
    data = ritz_dataset(singular, 36, 50, 2, generator=torch.Generator().manual_seed(0))
    assert float(data.sum(0).abs().max()) < 1e-6


TINY = {
    "samples": 64,
    "ritz": 40,
    "theta": 2,
    "steps": 16,
    "batch_size": 8,
    "check_every": 8,
    "held_out": 2,
    "lr": 3e-3,
}


def test_training_is_seeded_and_goes_on_after_a_kill(tmp_path) -> None:
    options = {"A": A8, "grid_shape": (8, 8), **TINY}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole = train_direction_net(**options)
    assert torch.equal(torch.get_rng_state(), before)
    assert not whole.net.training

    def killed(step: int, loss: float) -> None:
        if step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_direction_net(**options, out=tmp_path / "run", progress=killed)
    with pytest.raises(InputError, match="already holds a run"):
        train_direction_net(**options, out=tmp_path / "run")
    again = train_direction_net(**options, out=tmp_path / "run", resume=True)
    assert torch.equal(whole.losses, again.losses)
    assert whole.checks == again.checks
    kept = DirectionTraining.load(tmp_path / "run" / "net.safetensors").net
    for p, q, r in zip(whole.net.parameters(), again.net.parameters(), kept.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    other = train_direction_net(**(options | {"steps": 2}), seed=1)
    assert not torch.equal(other.losses, whole.losses[:2])


def test_the_network_is_chosen_by_iterations_on_systems_it_was_not_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solved: list[Tensor] = []
    data: list[Tensor] = []
    scripted = iter([9.0, 4.0, 7.0])
    weights: list[Tensor] = []

    def solve(self: DirectionSolver, b: Tensor) -> tuple[Tensor, dcdm.DirectionInfo]:
        solved.append(b)
        weights.append(net.mix.weight.detach().clone())
        count = torch.tensor([next(scripted)])
        return b, dcdm.DirectionInfo(b, count, count, count, count > 0)

    def dataset(*args, **options) -> Tensor:
        data.append(ritz_dataset(*args, **options))
        return data[-1]

    monkeypatch.setattr(DirectionSolver, "solve", solve)
    monkeypatch.setattr("gradmatch.solve._direction_training.ritz_dataset", dataset)
    net = DirectionNet(2)
    trained = train_direction_net(A8, (8, 8), net=net, **(TINY | {"steps": 24}))
    assert trained.checks == ((8, 9.0), (16, 4.0), (24, 7.0))
    assert torch.equal(trained.net.mix.weight, weights[1])
    systems = solved[0] / solved[0].norm(dim=0)
    assert float((systems.double().T @ data[0]).abs().max()) < 0.9


def test_training_reports_progress_and_round_trips(tmp_path) -> None:
    seen = []
    trained = train_direction_net(
        A8, (8, 8), **(TINY | {"steps": 5}), progress=lambda step, loss: seen.append(step)
    )
    assert seen == [1, 2, 3, 4, 5]
    trained.save(tmp_path / "net.safetensors")
    again = DirectionTraining.load(tmp_path / "net.safetensors")
    x = torch.ones(1, 1, 8, 8)
    assert torch.equal(again.net(x), trained.net(x))
    assert torch.equal(again.losses, trained.losses)
    assert again.checks == trained.checks
    with pytest.raises(InputError, match="net is not a DirectionNet"):
        DirectionTraining(nn.Linear(2, 2), trained.losses, ()).save(tmp_path / "other")


def test_a_trained_network_beats_conjugate_gradients_on_its_own_grid() -> None:
    A = poisson(16)
    options = {"samples": 400, "ritz": 120, "theta": 6, "steps": 120, "check_every": 60, "lr": 5e-3}
    trained = train_direction_net(A, (16, 16), **options)
    b = normal(256, 4, seed=9)
    mine = DirectionSolver(A, trained.net, grid_shape=(16, 16)).solve(b)[1].iterations.double().mean()
    plain = DirectionSolver(A, "residual").solve(b)[1].iterations.double().mean()
    assert mine < 0.7 * plain
    assert float(trained.losses[-10:].mean()) < 0.3 * float(trained.losses[:5].mean())


# --- refusals -------------------------------------------------------------------------------------------------


def flat(r: Tensor) -> Tensor:
    """A direction along which diag(1, 2, -1) is positive."""
    return torch.tensor([[1.0], [1.0], [0.0]]).to(r).expand_as(r)


SKEW = torch.tensor([[2.0, 1.0], [0.0, 2.0]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DirectionSolver(np.ones((3, 2))), r"A has shape \(3, 2\); it must be square"),
        (lambda: DirectionSolver(SKEW), "A is not symmetric: u.Av and v.Au differ"),
        (lambda: DirectionSolver(as_operator(lambda v: SKEW.double() @ v, 2)), "A is not symmetric"),
        (lambda: DirectionSolver(-np.eye(4)).solve(np.ones(4)), "no positive curvature along a residual"),
        (
            lambda: DirectionSolver(np.diag([1.0, 2.0, -1.0]), flat, max_iter=1).solve(np.ones(3)),
            "not positive definite: conjugate gradients met",
        ),
        (lambda: DirectionSolver(A8).solve(np.ones(63)), r"b has shape \(63,\); it must be \(64,\) or \(64, k\)"),
        (lambda: DirectionSolver(A8).solve(np.full(64, np.nan)), "b has 64 NaN"),
        (lambda: DirectionSolver(A8).solve(np.ones(64), x0=np.full(64, np.inf)), "x0 has 64 NaN or infinite"),
        (lambda: DirectionSolver(A8).solve(np.ones((64, 2)), x0=np.ones(64)), "x0 has 1 entries and b has 2"),
        (lambda: DirectionSolver(A8).solve(np.ones(64), mask=np.ones(9)), "mask has 9 cells; A has 64"),
        (lambda: DirectionSolver(A8, DirectionNet(2)), "grid_shape is None"),
        (lambda: DirectionSolver(A8, DirectionNet(2), grid_shape=(8, 9)), "72 cells; A has 64 unknowns"),
        (
            lambda: DirectionSolver(np.eye(21), DirectionNet(2), grid_shape=(7, 3)),
            "every side must be divisible by 2",
        ),
        (lambda: DirectionSolver(A8, DirectionNet(3), grid_shape=(8, 8)), "the network is for 3 dimensions"),
        (lambda: DirectionSolver(A8, "network"), "propose is 'network'"),
        (lambda: DirectionSolver(A8, 3), "propose is a int"),
        (lambda: DirectionSolver(A8, np.eye(3)), r"propose has shape \(3, 3\)"),
        (lambda: DirectionSolver(A8, keep=-1), "keep is -1"),
        (
            lambda: DirectionSolver(A8, lambda r: r[:3]).solve(np.ones(64)),
            r"propose gave \(3, 1\) for residuals of shape \(64, 1\)",
        ),
        (lambda: DirectionSolver(A8, lambda r: r.numpy()).solve(np.ones(64)), "propose gave ndarray"),
        (lambda: DirectionSolver(A8, tol=0), "tol is 0"),
        (lambda: DirectionSolver(A8, fallback="gmres"), "fallback is 'gmres'"),
        (lambda: DirectionSolver(A8, null_space=np.ones(3)), r"null_space has shape \(3, 1\)"),
        (lambda: DirectionNet(4), "dims is 4"),
        (lambda: DirectionNet(2, "32"), "layout is '32'"),
        (lambda: train_direction_net(A8, (8, 9)), "72 cells"),
        (lambda: train_direction_net(A8, (8, 8), samples=4), "samples is 4"),
    ],
)  # fmt: skip
def test_refuses(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
