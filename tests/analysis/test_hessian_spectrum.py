"""Every check, refusal and named fault of the spectrum tool; the operators themselves are tested with the core."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.analysis import Spectrum, decompose, hessian_spectrum, segment, spectrum
from gradmatch.core.checks import InputError
from gradmatch.core.krylov import SpectralDensity, smoothed
from gradmatch.core.problem import Problem
from gradmatch.core.store import RunFolder


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def net(width=6, classes=3, dtype=torch.float64):
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, classes)).to(dtype)


def data(n=30, classes=3, dtype=torch.float64):
    return torch.randn(n, 5, dtype=dtype), torch.arange(n) % classes


def dense_hessian(model, x, y):
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    space = Problem(model, "cross_entropy", (x, y)).space

    def loss(v):
        return F.cross_entropy(torch.func.functional_call(model, space.unflatten(v), (x,)), y)

    return torch.autograd.functional.hessian(loss, theta)


def quadratic(values):
    """1/2 w^T A w as a problem whose one output is the loss, and A."""
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))[0]
    a = (q * torch.as_tensor(values, dtype=torch.float64)) @ q.T
    w = {"w": torch.randn(len(values), dtype=torch.float64)}
    model = lambda p, x: 0.5 * p["w"] @ a @ p["w"] + 0 * x[:, 0]  # noqa: E731
    return Problem(model, lambda z, _: z, (torch.zeros(3, 1).double(), torch.zeros(3)), params=w), a


# --- the three routes --------------------------------------------------------------------------------------


def test_a_quadratic_loss_has_the_spectrum_of_its_matrix():
    values = [-2.0, -0.5, 0.0, 0.1, 1.0, 3.0, 8.0]
    problem, _ = quadratic(values)
    for method in ("exact", "lanczos"):
        found = spectrum(problem, method=method, top=3, bottom=2, density=True, steps=7, tol=1e-9)
        assert found.top.tolist() == pytest.approx([8, 3, 1], abs=1e-7)
        assert found.bottom.tolist() == pytest.approx([-0.5, -2], abs=1e-7)
        assert found.residual < 1e-7
        for row in found.density.nodes:
            torch.testing.assert_close(row, torch.tensor(values).double(), atol=1e-8, rtol=0)
        torch.testing.assert_close(found.density.weights.sum(1), torch.ones(4, dtype=torch.float64))
    exact = spectrum(problem)
    assert exact.eigenvalues.tolist() == pytest.approx(values, abs=1e-10)
    assert (exact.trace, exact.trace_error) == (pytest.approx(sum(values)), 0)
    many = spectrum(problem, method="lanczos", top=1, density=True, steps=4, probes=60)
    assert abs(many.trace - sum(values)) < 3 * many.trace_error  # within three standard errors


def test_exact_ends_and_density_of_a_network_agree_with_dense_autograd():
    model, (x, y) = net(), data()
    truth = torch.linalg.eigvalsh(dense_hessian(model, x, y))
    exact = spectrum(model, (x, y))
    assert (exact.method, exact.size, exact.n, exact.classes) == ("exact", 57, 30, 3)
    torch.testing.assert_close(exact.eigenvalues, truth, atol=1e-12, rtol=1e-8)
    assert exact.loss == pytest.approx(F.cross_entropy(model(x), y).item())
    ends = spectrum(model, (x, y), method="lanczos", top=6, bottom=2, tol=1e-9)
    torch.testing.assert_close(ends.top, truth.flip(0)[:6], atol=1e-8, rtol=0)
    torch.testing.assert_close(ends.bottom, truth[[1, 0]], atol=1e-8, rtol=0)
    h = dense_hessian(model, x, y)
    for found in (exact, ends):
        torch.testing.assert_close(
            h @ found.vectors, found.vectors * found.top[: found.vectors.shape[1]], atol=1e-7, rtol=0
        )
    assert ends.eigenvalues is None
    assert math.isnan(ends.trace)
    smooth = spectrum(model, (x, y), density=True, steps=40, probes=30)
    grid, height = smooth.curve()
    gap = (height - smoothed(grid, truth, width=smooth.density.width())).abs().sum() * (grid[1] - grid[0])
    assert float(gap) < 0.25  # thirty probes of 57 eigenvalues; a biased density would be off by more


def test_gram_route_for_sums_of_squares():
    model, (x, y) = net(width=20), data(n=12)
    for kind in ("ggn", "fisher", "empirical_fisher"):
        small, whole = (spectrum(model, (x, y), kind=kind, method=m, top=8) for m in ("gram", "exact"))
        torch.testing.assert_close(small.eigenvalues, whole.eigenvalues, atol=1e-12, rtol=1e-6)
        torch.testing.assert_close(small.top, whole.top, atol=1e-12, rtol=1e-8)
        along = (small.vectors * whole.vectors).sum(0).abs()
        torch.testing.assert_close(along, torch.ones(8, dtype=torch.float64), atol=1e-6, rtol=0)
        assert len(small.bottom) == len(whole.bottom) == 0  # nothing lies below zero
    assert spectrum(model, (x, y), kind="ggn").method == "gram"
    assert spectrum(model, data(n=200), kind="ggn").method == "exact"
    sampled = spectrum(model, (x, y), kind="sampled_fisher", samples=2, seed=1)
    assert sampled.method == "gram"
    assert 12 <= int((sampled.eigenvalues > 1e-10).sum()) <= 24  # a label drawn twice is one direction
    assert (
        sampled.top.tolist() == spectrum(model, (x, y), kind="sampled_fisher", samples=2, seed=1).top.tolist()
    )


def test_auto_takes_whole_matrices_up_to_a_limit(monkeypatch):
    model, (x, y) = net(), data()
    monkeypatch.setattr(hessian_spectrum, "EXACT", 56)
    assert spectrum(model, (x, y), top=3).method == "lanczos"
    assert spectrum(model, data(n=12), kind="ggn", top=3).method == "gram"
    assert spectrum(model, (x, y), method="exact").method == "exact"


def test_batches_of_unequal_size_and_loaders_give_the_same():
    """Averaging the means of unequal batches would not."""
    model, (x, y) = net(), data(n=23)
    one = spectrum(model, (x, y)).eigenvalues
    forms = [
        [(x[:2], y[:2]), (x[2:15], y[2:15]), (x[15:], y[15:])],
        DataLoader(TensorDataset(x, y), batch_size=10),
        TensorDataset(x, y),
    ]
    for form in forms:
        torch.testing.assert_close(
            spectrum(model, form, batch_size=4).eigenvalues, one, atol=1e-13, rtol=1e-8
        )


def test_no_ghosts_and_right_signs_where_power_iteration_errs():
    """Largest |value| is negative; repeated Lanczos steps must not show the outliers twice."""
    values = [-50.0, *torch.linspace(-0.5, 0.5, 60).tolist(), 20.0, 30.0]
    problem, _ = quadratic(values)
    found = spectrum(problem, method="lanczos", top=3, bottom=1, density=True, steps=60, probes=2)
    assert found.top.tolist() == pytest.approx([30, 20, 0.5], abs=0.05)
    assert found.bottom.tolist() == pytest.approx([-50], abs=1e-3)
    for nodes in found.density.nodes:
        assert [int((nodes.round() == v).sum()) for v in (-50, 20, 30)] == [1, 1, 1]


def test_weights_are_squares_of_first_components():
    """Not of whole eigenvector matrices, and of the symmetric eigenproblem: real, of sum 1, exact moments."""
    model, (x, y) = net(), data()
    found = spectrum(model, (x, y), density=True, steps=12, probes=3).density
    h = dense_hessian(model, x, y)
    assert found.nodes.dtype == torch.float64
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(57, 3, generator=generator).double()
    v = v / v.norm(dim=0)
    for power in (1, 2, 5):
        moments = torch.stack([c @ torch.linalg.matrix_power(h, power) @ c for c in v.T])
        torch.testing.assert_close(
            (found.weights * found.nodes**power).sum(1), moments, atol=1e-10, rtol=1e-6
        )


def test_whole_spectra_are_computed_in_double_precision():
    """In float32 the bulk is noise of 1e-6 of the largest; exact zeros must come out as zeros."""
    model = net(dtype=torch.float32)
    with torch.no_grad():
        model[2].weight[:, 2] = 0
        model[0].weight[2] = 0  # tanh(0) = 0: this unit's outgoing weights do nothing, nor do its own
        model[0].bias[2] = 0
    x, y = data(dtype=torch.float32)
    found = spectrum(model, (x, y))
    assert found.eigenvalues.dtype == torch.float64
    zeros = found.eigenvalues.abs() < 1e-12 * found.top[0]
    assert int(zeros.sum()) >= 6
    assert spectrum(model, (x, y), dtype=torch.float32).eigenvalues.dtype == torch.float32
    assert spectrum(model, (x, y), method="lanczos").top.dtype == torch.float64
    assert model[0].weight.dtype == torch.float32


def test_a_model_in_half_precision_is_computed_in_single():
    model, (x, y) = net().bfloat16(), data(dtype=torch.bfloat16)
    found = spectrum(model, (x, y), top=2, method="lanczos", density=True, steps=5, probes=1)
    expected = spectrum(copy.deepcopy(model).float(), (x.float(), y), top=2)
    torch.testing.assert_close(found.top.double(), expected.top, rtol=1e-3, atol=1e-5)
    assert model[0].weight.dtype == torch.bfloat16


def test_weight_decay_shifts_every_eigenvalue():
    model, (x, y) = net(), data()
    plain = spectrum(model, (x, y))
    names = dict(model.named_parameters())

    def decayed(p, inputs):
        norm = sum(t.square().sum() for t in p.values())
        return torch.cat([torch.func.functional_call(model, p, (inputs,)), norm.expand(len(inputs), 1)], 1)

    def loss(z, t):
        return F.cross_entropy(z[:, :3], t, reduction="none") + 0.5 * 0.01 * z[:, 3]

    shifted = spectrum(Problem(decayed, loss, (x, y), params=names))
    torch.testing.assert_close(shifted.eigenvalues, plain.eigenvalues + 0.01, atol=1e-12, rtol=1e-8)


def test_layer_blocks():
    model, (x, y) = net(), data()
    h = dense_hessian(model, x, y)
    first = spectrum(model, (x, y), select="^0")
    torch.testing.assert_close(first.eigenvalues, torch.linalg.eigvalsh(h[:36, :36]), atol=1e-12, rtol=1e-8)


# --- what a spectrum says ----------------------------------------------------------------------------------


def made(values, top=None, classes=3, density=None):
    values = torch.tensor(sorted(values), dtype=torch.float64)
    k = len(values) if top is None else top
    return Spectrum(
        "hessian", "exact", len(values), 100, classes, 0.5, values.flip(0)[:k], values[:1],
        torch.zeros(len(values), k), 0.0, float(values.sum()), 0.0, values, density,
    )  # fmt: skip


def test_summaries():
    values = [100.0, 50.0, 4.0, 2.0, 0.01, 0.009, 0.0, 0.0, -0.02, -1.0]
    found = made(values)
    report = found.report()
    assert found.gap() == (4, 200.0)
    assert report["largest"] == 100
    assert report["smallest"] == -1
    assert report["share_near_zero"] == pytest.approx(0.5)
    assert report["trace_share_of_top_classes"] == pytest.approx(154 / sum(values))
    assert report["bulk_edge"] == 50
    assert report["count_above_10_bulk_edges"] == 0
    assert found.above(1.5) == pytest.approx(4)
    # only positive values, only the first 3C, and none under 1e-12 of the largest
    assert made([8.0, 4.0, 1e-13, -3.0]).gap() == (1, 2.0)
    assert made([16.0, 8.0, 4.0, 2.0, 1.0, 0.001], classes=1).gap() == (1, 2.0)
    assert made([5.0, -1.0]).gap() == (0, 1.0)
    nodes = SpectralDensity(torch.tensor([[0.0, 9.0]]).double(), torch.tensor([[0.75, 0.25]]).double(), 8)
    ends = Spectrum("ggn", "lanczos", 8, 5, None, 1.0, *(torch.tensor([9.0]),) * 2, torch.zeros(8, 1), 0.0, 1.0, 0.1,
                    None, nodes)  # fmt: skip
    assert ends.report()["share_near_zero"] == 0.75
    assert ends.above(1) == 2


def test_files_come_back(tmp_path):
    model, (x, y) = net(), data()
    for method in ("exact", "lanczos"):
        found = spectrum(model, (x, y), method=method, density=method == "lanczos", top=5)
        files = found.save(tmp_path / method)
        assert [f.name for f in files] == ["spectrum.json", "spectrum.safetensors", "spectrum.png"]
        assert files[2].read_bytes()[:4] == b"\x89PNG"
        again = Spectrum.load(tmp_path / method)
        assert again.report() == found.report()
        assert torch.equal(again.vectors, found.vectors)
    plain = spectrum(model, (x, y), method="lanczos", top=4)
    assert plain.picture()[:4] == b"\x89PNG"  # without a density: the ordered values alone
    assert plain.report()["share_near_zero"] is None
    with pytest.raises(InputError, match="density=True"):
        plain.curve()


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path):
    model, (x, y) = net(), data()
    options = {"method": "lanczos", "density": True, "top": 4, "steps": 10, "probes": 3}
    whole = spectrum(model, (x, y), **options)

    class Stop(Exception):
        pass

    def stop(what, done, of):
        if what == "density":
            raise Stop

    folder = RunFolder(tmp_path / "run", {"seed": 0})
    with pytest.raises(Stop):
        spectrum(model, (x, y), **options, run=folder, progress=stop)
    seen = []
    again = spectrum(model, (x, y), **options, run=folder, progress=lambda what, *_: seen.append(what))
    assert "ends" not in seen
    assert again.report() == whole.report()
    assert torch.equal(again.density.nodes, whole.density.nodes)


# --- the two parts -----------------------------------------------------------------------------------------


def test_decomposition_exact_and_estimated(monkeypatch):
    model, (x, y) = net(), data()
    found = decompose(model, (x, y))
    h = dense_hessian(model, x, y)
    assert found.exact
    assert found.hessian == pytest.approx(float(h.norm()))
    assert found.hessian**2 <= (found.ggn + found.residual) ** 2
    assert 0 < found.residual_share < 1.5
    vectors = torch.linalg.eigh(h)[1]
    z = [torch.autograd.grad(model(x)[:, c].mean(), list(model.parameters())) for c in range(3)]
    q = torch.linalg.qr(torch.stack([torch.cat([g.flatten() for g in row]) for row in z], 1))[0]
    assert found.logit_energy == pytest.approx(float((q.T @ vectors[:, -3:]).square().sum() / 3), abs=1e-6)
    monkeypatch.setattr(hessian_spectrum, "EXACT", 10)
    rough = decompose(model, (x, y), probes=400)
    assert not rough.exact
    for a, b in ((rough.hessian, found.hessian), (rough.ggn, found.ggn), (rough.residual, found.residual)):
        assert a == pytest.approx(b, rel=0.1)
    assert rough.logit_energy == pytest.approx(found.logit_energy, abs=1e-2)
    linear = nn.Linear(5, 3).double()
    assert decompose(linear, (x, y)).residual == 0
    assert decompose(linear, (x, torch.randn(30, 3).double()), "mse").residual == 0
    flat = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)).double()
    assert decompose(flat, (x, torch.randn(30).double()), "mse").logit_energy is None


# --- two solutions -----------------------------------------------------------------------------------------


def test_segment_between_a_network_and_its_mirror():
    """Exchanging two hidden units changes no output, and a barrier lies in between."""
    a, (x, y) = net(), data()
    optimizer = torch.optim.Adam(a.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(a(x), y).backward()
        optimizer.step()
    a.zero_grad()
    b = copy.deepcopy(a)
    order = torch.tensor([1, 0, 3, 2, 5, 4])
    with torch.no_grad():
        for p, axis in ((b[0].weight, 0), (b[0].bias, 0), (b[2].weight, 1)):
            p.copy_(p.index_select(axis, order))
    found = segment(a, b, (x, y), split="train")
    assert found.losses[0].item() == pytest.approx(found.losses[-1].item(), abs=1e-9)
    assert found.barrier > 0.05
    assert found.midpoint_gap == pytest.approx(float(found.losses[12] - found.losses[0]))
    assert segment(a, a, (x, y)).barrier == 0
    leading = spectrum(a, (x, y), top=5).vectors
    assert 0 <= found.inside(leading) <= 1
    assert found.inside(torch.eye(57).double()) == pytest.approx(1)


# --- what is refused ---------------------------------------------------------------------------------------


def test_train_mode_is_refused_and_eval_mode_works():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 3))
    x, y = data(dtype=torch.float32)
    with pytest.raises(InputError, match=r"active dropout in 3; call model\.eval\(\)"):
        spectrum(model, (x, y))
    model[3].eval()
    with pytest.raises(InputError, match=r"active batchnorm in 1; call model\.eval\(\)"):
        spectrum(model, (x, y))
    assert spectrum(model, (x, y), allow="batchnorm").size == 47
    with pytest.raises(InputError, match="active batchnorm"):
        segment(model, model, (x, y))
    assert torch.isfinite(spectrum(model.eval(), (x, y), method="lanczos").top).all()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g


class Custom(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_other_refusals(tmp_path):
    model, (x, y) = net(), data()
    shuffled = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)

    class Dropping(list):
        def __iter__(self):
            items = list(super().__iter__())
            self[:] = items[: max(1, len(items) - 1)]
            return iter(items)

    wide = nn.Linear(200, 200)
    pairs = (torch.randn(3, 200), torch.arange(3))
    for call, word in (
        (lambda: spectrum(model, shuffled), "shuffl"),
        (
            lambda: spectrum(model, Dropping([(x[:9], y[:9]), (x[9:20], y[9:20]), (x[20:], y[20:])])),
            "data had 3 batches",
        ),
        (lambda: spectrum(model, (x, y), F.cross_entropy), "one loss for each example"),
        (lambda: spectrum(wide, pairs, method="exact"), r"12\.0 GiB, more than 8 GiB"),
        (lambda: spectrum(nn.Sequential(nn.Linear(5, 3), Custom()).double(), (x, y)), r"'1' \(Custom\)"),
        (lambda: spectrum(model, (x, y), method="power"), "method"),
        (lambda: spectrum(model, (x, y), method="gram"), "sum of squares"),
        (lambda: spectrum(model, (x, y), kind="fish"), "kind"),
        (lambda: spectrum(model), "data is None"),
        (lambda: spectrum(Problem(model, "cross_entropy", (x, y)), (x, y)), "beside a Problem"),
        (lambda: spectrum(model, (x, y), top=0), "top"),
        (lambda: spectrum(model, (x, y), steps=0, density=True), "steps"),
        (lambda: spectrum(model, (x, y), seed=-1), "seed"),
        (lambda: Spectrum.load(tmp_path), "does not exist"),
    ):
        with pytest.raises(InputError, match=word):
            call()


# --- other houses ------------------------------------------------------------------------------------------


def test_top_eigenvalue_is_that_of_curvlinops():
    curvlinops = pytest.importorskip("curvlinops")
    model, (x, y) = net(), data(n=20)
    theirs = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x[:12], y[:12]), (x[12:], y[12:])]
    )
    matrix = theirs @ torch.eye(57, dtype=torch.float64)
    value = float(torch.linalg.eigvalsh(matrix)[-1])
    assert spectrum(model, (x, y), method="lanczos", top=1).top.item() == pytest.approx(value, rel=1e-4)


def test_a_hugging_face_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=9, n_positions=6, n_embd=4, n_layer=1, n_head=2, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().eval()
    batch = {"input_ids": torch.randint(0, 9, (4, 6))}
    found = spectrum(
        model, batch, "next_token", method="lanczos", top=2, bottom=1, density=True, steps=10, probes=1
    )
    exact = spectrum(model, batch, "next_token", top=2)
    torch.testing.assert_close(found.top, exact.top, rtol=1e-3, atol=1e-4)
    assert found.classes is None
