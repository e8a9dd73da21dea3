"""Curvature operators against dense autograd in float64."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core.checks import InputError
from gradmatch.core.curvature import KINDS, Curvature
from gradmatch.core.gradients import per_example_gradients
from gradmatch.core.krylov import LinearOperator, dense, eigenpairs, hutchinson_diagonal
from gradmatch.core.problem import Problem, mse, twice_differentiable


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def tanh_net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Softplus(),
        nn.GroupNorm(1, 2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()


class PixelNet(nn.Module):
    """Class scores for every pixel: several positions an example."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 3, 1), nn.Conv1d(3, 4, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class OneOutput(nn.Module):
    """Outputs of shape [m]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        return self.net(x)[:, 0]


def problem_of(name, n=7, **options):
    if name == "classes":
        return Problem(
            tanh_net(), "cross_entropy", (torch.randn(n, 4).double(), torch.arange(n) % 3), **options
        )
    if name == "soft":
        soft = torch.softmax(torch.randn(n, 3), 1).double()
        return Problem(tanh_net(), "cross_entropy", (torch.randn(n, 4).double(), soft), **options)
    if name == "regression":
        return Problem(tanh_net(), "mse", (torch.randn(n, 4).double(), torch.randn(n, 3).double()), **options)
    if name == "scalar":
        return Problem(
            OneOutput().double(), "mse", (torch.randn(n, 4).double(), torch.randn(n).double()), **options
        )
    if name == "conv":
        return Problem(
            conv_net(), "cross_entropy", (torch.randn(n, 1, 4, 4).double(), torch.arange(n) % 3), **options
        )
    x, y = torch.randn(n, 2, 4).double(), torch.randint(0, 4, (n, 3))
    return Problem(PixelNet().double(), "cross_entropy", (x, y), **options)


NAMES = ("classes", "soft", "regression", "scalar", "conv", "pixels")


class Reference:
    """Every matrix of a problem by dense autograd, one example at a time."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        space = problem.space
        theta = space.flatten(problem.resolve()).detach()
        p, n = space.size, problem.n
        with twice_differentiable():
            self._fill(theta, p, n)

    def _fill(self, theta: Tensor, p: int, n: int) -> None:
        problem, space = self.problem, self.problem.space
        self.hessian, self.ggn, self.empirical = (torch.zeros(p, p, dtype=torch.float64) for _ in range(3))
        for batch in problem.batches():
            for i in range(batch.size):
                one = batch.take(slice(i, i + 1))

                def f(v, one=one):
                    return problem.outputs(space.unflatten(v), one.inputs)

                def loss(z, one=one):
                    return problem.losses(z, one.target, 1).sum()

                z = f(theta)
                j = torch.autograd.functional.jacobian(f, theta).reshape(-1, p)
                b = torch.autograd.functional.hessian(loss, z).reshape(len(j), len(j))
                g = torch.autograd.functional.jacobian(lambda v: loss(f(v)), theta)
                self.hessian += torch.autograd.functional.hessian(lambda v: loss(f(v)), theta) / n
                self.ggn += j.T @ b @ j / n
                self.empirical += torch.outer(g, g) / n

    def __getitem__(self, kind: str) -> Tensor:
        return {
            "hessian": self.hessian,
            "ggn": self.ggn,
            "fisher": self.ggn,
            "residual": self.hessian - self.ggn,
            "empirical_fisher": self.empirical,
        }[kind]


# --- products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_against_dense_autograd(name):
    problem = problem_of(name, batch_size=3)
    truth = Reference(problem)
    p = problem.space.size
    v = torch.randn(p, 5).double()
    for kind in ("hessian", "ggn", "residual", "fisher", "empirical_fisher"):
        curvature = Curvature(problem, kind)
        expected = truth[kind]
        assert isinstance(curvature, LinearOperator)
        assert (curvature.shape, curvature.dtype, curvature.symmetric) == ((p, p), torch.float64, True)
        for _ in range(2):  # from fresh graphs, and from kept ones
            torch.testing.assert_close(curvature.matvec(v), expected @ v, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(curvature.matvec(v[:, 0]), expected @ v[:, 0], atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(curvature.dense(), expected, atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(curvature.diag(), expected.diagonal(), atol=1e-10, rtol=1e-8)
        assert curvature.trace() == pytest.approx(float(expected.trace()), abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gram_has_the_eigenvalues_that_are_not_zero(name):
    problem = problem_of(name, n=3, batch_size=2)
    truth = Reference(problem)
    for kind in ("ggn", "fisher", "empirical_fisher"):
        curvature = Curvature(problem, kind)
        gram = curvature.gram()
        wanted = torch.linalg.eigvalsh(truth[kind]).flip(0)
        found = torch.linalg.eigvalsh(gram).flip(0)
        k = min(len(wanted), len(found))
        torch.testing.assert_close(found[:k], wanted[:k], atol=1e-10, rtol=1e-7)
        x = torch.cat(list(curvature.rows()))
        torch.testing.assert_close(x.T @ x / problem.n, truth[kind], atol=1e-10, rtol=1e-8)
    size = {"classes": 6, "soft": 6, "regression": 9, "scalar": 3, "conv": 6, "pixels": 27}[name]
    assert Curvature(problem, "ggn").gram().shape == (
        size,
        size,
    )  # softmax: one column less for each position
    assert Curvature(problem, "empirical_fisher").gram().shape == (3, 3)


def test_the_empirical_fisher_is_the_second_moment_of_the_gradients():
    problem = problem_of("classes", batch_size=4)
    rows = per_example_gradients(problem)
    curvature = Curvature(problem, "empirical_fisher")
    torch.testing.assert_close(curvature.dense(), rows.T @ rows / problem.n)
    assert not torch.allclose(curvature.dense(), Curvature(problem, "fisher").dense(), rtol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_sampled_fisher_is_an_unbiased_sum_of_squares(name):
    problem = problem_of(name, n=4, batch_size=3)
    truth = Reference(problem)["fisher"]
    few = Curvature(problem, "sampled_fisher", samples=2, generator=draw())
    matrix = few.dense()
    x = torch.cat(list(few.rows()))
    torch.testing.assert_close(x.T @ x / problem.n, matrix, atol=1e-12, rtol=1e-8)
    torch.testing.assert_close(few.diag(), matrix.diagonal(), atol=1e-12, rtol=1e-8)
    torch.testing.assert_close(few.dense(), matrix)  # the same targets in every product
    again = Curvature(problem, "sampled_fisher", samples=2, generator=draw(), keep=0)
    torch.testing.assert_close(again.dense(), matrix)
    other = Curvature(problem, "sampled_fisher", samples=2, generator=draw(1))
    assert not torch.allclose(other.dense(), matrix)
    many = torch.stack(
        [Curvature(problem, "sampled_fisher", samples=40, generator=draw(s)).dense() for s in range(25)]
    )
    error = many.std(0) / 5
    gaps = (many.mean(0) - truth)[error > 1e-9] / error[error > 1e-9]
    assert float(gaps.square().mean()) < 2  # 1 for an unbiased estimate; entries are far from independent
    assert float((many.mean(0) - truth).norm() / truth.norm()) < 0.15


def test_a_sampled_gradient_is_the_gradient_at_a_drawn_label():
    problem = problem_of("classes", n=6)
    rows = torch.cat(list(Curvature(problem, "sampled_fisher", generator=draw()).rows()))
    x = next(problem.batches()).inputs
    by_label = torch.stack(
        [
            per_example_gradients(Problem(problem.module, "cross_entropy", (x, torch.full((6,), c))))
            for c in range(3)
        ]
    )
    gaps = (by_label - rows).norm(dim=2).amin(0)
    assert float(gaps.max()) < 1e-12


# --- identities of the mathematics ---------------------------------------------------------


def test_sum_of_ggn_and_residual_and_where_it_vanishes():
    problem = problem_of("classes")
    h, g, r = (Curvature(problem, k).dense() for k in ("hessian", "ggn", "residual"))
    torch.testing.assert_close(h, g + r, atol=1e-12, rtol=1e-8)
    assert float(r.norm()) > 1e-2 * float(h.norm())
    assert float(torch.linalg.eigvalsh(g).min()) >= -1e-12
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    for loss, target in (("cross_entropy", y), ("mse", torch.randn(6, 3).double())):
        linear = Problem(nn.Linear(4, 3).double(), loss, (x, target))
        assert float(Curvature(linear, "residual").dense().abs().max()) == 0
        torch.testing.assert_close(Curvature(linear).dense(), Curvature(linear, "ggn").dense())


def test_batches_of_unequal_size_give_the_same_as_one():
    x, y = torch.randn(11, 4).double(), torch.arange(11) % 3
    model = tanh_net()
    one = Problem(model, "cross_entropy", (x, y))
    cuts = [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    v = torch.randn(one.space.size, 3).double()
    for kind in KINDS:
        expected = Curvature(one, kind, generator=draw()).matvec(v)
        for data in (cuts, loader):
            for keep in (2**30, 0, 20_000):  # all graphs kept, none, some
                found = Curvature(Problem(model, "cross_entropy", data), kind, keep=keep, generator=draw())
                for _ in range(2):
                    torch.testing.assert_close(found.matvec(v), expected, atol=1e-12, rtol=1e-8)


def test_keep_bounds_the_graphs_that_are_held():
    problem = problem_of("classes", n=30, batch_size=5)
    all_, none = Curvature(problem), Curvature(problem, keep=0)
    some = Curvature(problem, keep=6000)
    for c in (all_, none, some):
        c.matvec(torch.randn(problem.space.size).double())
    assert (len(all_._kept), len(none._kept)) == (6, 0)
    assert 0 < len(some._kept) < 6
    assert some._kept_bytes <= 6000


def test_products_are_symmetric_and_match_finite_differences():
    problem = problem_of("classes")
    curvature = Curvature(problem)
    u, v = torch.randn(2, problem.space.size).double()
    torch.testing.assert_close(u @ curvature.matvec(v), v @ curvature.matvec(u))
    theta, eps = problem.space.flatten(problem.resolve()).detach(), 1e-5

    def slope(at):
        return per_example_gradients(problem, at).mean(0)

    numeric = (slope(theta + eps * v) - slope(theta - eps * v)) / (2 * eps)
    torch.testing.assert_close(curvature.matvec(v), numeric, atol=1e-7, rtol=1e-5)


def test_chunks_and_widths_do_not_matter():
    problem = problem_of("conv", n=3)
    v = torch.randn(problem.space.size, 9).double()
    expected = Curvature(problem).matvec(v)
    for chunk in (1, 2, 4, 64):
        torch.testing.assert_close(Curvature(problem, chunk=chunk).matvec(v), expected)
    torch.testing.assert_close(
        dense(Curvature(problem), chunk=5), dense(Curvature(problem)), atol=1e-14, rtol=1e-9
    )


def test_at_other_parameters_for_a_selection_and_as_a_snapshot():
    problem = problem_of("classes", select="^2")
    assert problem.space.size == 18
    whole = problem_of("classes")
    whole = Problem(problem.module, "cross_entropy", (problem.data._whole[0], problem.data._whole[1]))
    truth = Reference(whole).hessian[-18:, -18:]
    curvature = Curvature(problem)
    torch.testing.assert_close(curvature.dense(), truth, atol=1e-12, rtol=1e-8)
    moved = {k: p.detach() + 0.3 for k, p in problem.resolve().items()}
    there = Curvature(problem, params=moved).dense()
    with torch.no_grad():
        for name, p in problem.module.named_parameters():
            if name in moved:
                p.add_(0.3)
    torch.testing.assert_close(Curvature(problem).dense(), there)
    torch.testing.assert_close(curvature.dense(), truth, atol=1e-12, rtol=1e-8)  # taken when it was made


def test_a_dead_unit_adds_exact_zero_rows():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].bias[1] = -100
    problem = Problem(model, "cross_entropy", (torch.rand(8, 4).double(), torch.arange(8) % 2))
    space = problem.space
    index = torch.arange(space.size)
    blocks = space.unflatten(index.double())
    dead = torch.cat([blocks["0.weight"][1], blocks["0.bias"][1:2], blocks["2.weight"][:, 1]]).long()
    for kind in ("hessian", "ggn", "residual", "empirical_fisher"):
        matrix = Curvature(problem, kind).dense()
        assert float(matrix[dead].abs().max()) == 0
        assert int((matrix.abs().sum(1) == 0).sum()) >= len(dead)


def test_linear_softmax_null_directions():
    """Adding one vector to every class row changes nothing: d null directions, one more with a bias."""
    x, y = torch.randn(200, 49).double(), torch.arange(200) % 5
    for bias, nulls in ((False, 49), (True, 50)):
        problem = Problem(nn.Linear(49, 5, bias=bias).double(), "cross_entropy", (x, y))
        values = torch.linalg.eigvalsh(Curvature(problem, "ggn").dense())
        assert int((values.abs() < 1e-10 * values.max()).sum()) == nulls


# --- models of the field -----------------------------------------------------------------------------------


def test_tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 7, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    problem = Problem(
        model, "next_token", {"input_ids": ids, "attention_mask": mask}, select="mlp|lm_head|wte"
    )
    truth = Reference(problem)
    v = torch.randn(problem.space.size, 3).double()
    for kind in ("hessian", "ggn", "residual", "empirical_fisher"):
        torch.testing.assert_close(Curvature(problem, kind).matvec(v), truth[kind] @ v, atol=1e-11, rtol=1e-7)
    torch.testing.assert_close(
        Curvature(problem, "fisher").diag(), truth["ggn"].diagonal(), atol=1e-11, rtol=1e-7
    )
    many = Curvature(problem, "sampled_fisher", samples=400, generator=draw()).dense()
    assert float((many - truth["ggn"]).norm() / truth["ggn"].norm()) < 0.25


def test_batch_norm_in_eval_mode_and_allowed():
    model = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 3)
    ).double()
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    for _ in range(3):
        model(x)
    with pytest.raises(InputError, match="dropout"):
        Curvature(Problem(model, "cross_entropy", (x, y), allow="batchnorm"))
    with pytest.raises(InputError, match="batchnorm"):
        Curvature(Problem(model, "cross_entropy", (x, y), allow="dropout"))
    model.eval()
    problem = Problem(model, "cross_entropy", (x, y))
    truth = Reference(problem)
    torch.testing.assert_close(Curvature(problem).dense(), truth.hessian, atol=1e-11, rtol=1e-8)
    curvature = Curvature(problem, keep=0)
    model.train()
    with pytest.raises(InputError, match="active dropout"):
        curvature.matvec(torch.ones(problem.space.size))
    model[3].eval()
    before = [b.clone() for b in model.buffers()]
    allowed = Problem(model, "cross_entropy", (x, y), allow="batchnorm")
    theta = allowed.space.flatten(allowed.resolve()).detach()
    expected = torch.autograd.functional.hessian(
        lambda v: F.cross_entropy(functional_call(model, allowed.space.unflatten(v), (x,)), y), theta
    )
    for b, old in zip(model.buffers(), before, strict=True):
        b.copy_(old)
    torch.testing.assert_close(Curvature(allowed).dense(), expected, atol=1e-11, rtol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    with pytest.raises(InputError, match="no gradient of its own"):
        Curvature(allowed, "empirical_fisher")
    with pytest.raises(InputError, match="no gradient of its own"):
        next(Curvature(allowed, "ggn").rows())


def test_a_functional_model_and_a_loss_of_ones_own():
    w = {"a": torch.randn(4, 3).double(), "b": torch.randn(3).double()}
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    own = Problem(
        lambda p, x: torch.sin(x @ p["a"]) * p["b"], lambda z, t: (z - t).pow(4).sum(1), (x, y), params=w
    )
    truth = Reference(own)
    for kind in ("hessian", "ggn", "residual", "empirical_fisher"):
        torch.testing.assert_close(Curvature(own, kind).dense(), truth[kind], atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(Curvature(own, "ggn").diag(), truth["ggn"].diagonal(), atol=1e-9, rtol=1e-8)


def test_frozen_and_unused_parameters():
    model = tanh_net()
    model[0].weight.requires_grad_(False)
    model.register_parameter("idle", nn.Parameter(torch.ones(3).double()))
    x, y = torch.randn(5, 4).double(), torch.arange(5) % 3
    problem = Problem(model, "cross_entropy", (x, y))
    for kind in ("hessian", "ggn", "residual", "empirical_fisher"):
        matrix = Curvature(problem, kind).dense()
        idle = problem.space.slices["idle"]
        assert float(matrix[idle].abs().max()) == 0
        assert matrix.shape == (26, 26)
        torch.testing.assert_close(matrix, Reference(problem)[kind], atol=1e-12, rtol=1e-8)


# --- what is left as found, and what is refused ------------------------------------------------------------


def test_nothing_of_the_model_is_touched_and_nothing_leaks():
    problem = problem_of("classes")
    model = problem.module
    state = torch.get_rng_state()
    before = [p.detach().clone() for p in model.parameters()]
    curvature = Curvature(problem)
    with torch.no_grad():  # a caller's no_grad is no obstacle
        curvature.matvec(torch.randn(problem.space.size, generator=draw()).double())
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    leaf = weakref.ref(next(iter(curvature._leaves.values())))
    gc.disable()
    try:
        del curvature
        assert leaf() is None  # the graphs hold no cycle, so they go with the operator
    finally:
        gc.enable()


def test_tiny_vectors_are_not_biased():
    """A norm with 1e-6 added would shrink them."""
    problem = problem_of("classes")
    curvature = Curvature(problem)
    v = torch.randn(problem.space.size).double()
    torch.testing.assert_close(curvature.matvec(1e-12 * v), 1e-12 * curvature.matvec(v), atol=0, rtol=1e-9)


def test_signs_of_extreme_eigenvalues():
    """Power iteration finds the largest |value| and mixes up signs; a negative end must come out as such."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(9, 3).double(), torch.randint(0, 2, (9,))
    problem = Problem(model, lambda z, t: -F.cross_entropy(z, t, reduction="none"), (x, y))
    exact = torch.linalg.eigvalsh(Reference(problem).hessian)
    found = eigenpairs(Curvature(problem), 1, 1, generator=draw(), tol=1e-10)
    torch.testing.assert_close(found.values, exact[[-1, 0]], atol=1e-9, rtol=0)
    assert float(found.values[1].abs()) > float(found.values[0])


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


class OnceModule(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_a_module_without_a_second_derivative_is_named():
    model = nn.Sequential(nn.Linear(4, 3), OnceModule(), nn.Linear(3, 2))
    problem = Problem(model, "cross_entropy", (torch.randn(5, 4), torch.arange(5) % 2))
    for kind in ("hessian", "ggn", "residual"):
        with pytest.raises(InputError, match=r"'1' \(OnceModule\), which cannot be differentiated twice"):
            Curvature(problem, kind).matvec(torch.ones(problem.space.size))


def test_a_large_matrix_is_refused_before_work():
    problem = Problem(nn.Linear(300, 300), "mse", (torch.randn(2, 300), torch.randn(2, 300)))
    with pytest.raises(InputError, match=r"30.* GiB, more than 8 GiB"):
        Curvature(problem).dense()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda p: Curvature(p, "gauss"), "kind"),
        (lambda p: Curvature(p, "sampled_fisher"), "generator is None"),
        (lambda p: Curvature(p).matvec(torch.ones(3)), "must be \\(37,\\)"),
        (lambda p: Curvature(p).matvec(torch.ones(38, 2, 2)), "must be \\(37,\\)"),
        (lambda p: Curvature(p, chunk=0), "chunk"),
        (lambda p: Curvature(p, samples=0), "samples"),
        (lambda p: Curvature(p).gram(), "no sum of squares"),
        (lambda p: Curvature(p, "residual").gram(), "no sum of squares"),
        (lambda p: Curvature(p).matvec(torch.full((37,), 1e308, dtype=torch.float64)), "hessian matrix has"),
    ],
)
def test_refusals(call, word):
    problem = Problem(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten(0, 0)).double(),
        "mse",
        (torch.randn(5, 4).double(), torch.randn(5, 2).double()),
    )
    assert problem.space.size == 37
    with pytest.raises(InputError, match=word):
        call(problem)


def test_fishers_need_a_likelihood():
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()

    def cross_entropy(z, t):
        return mse(z, t)

    for loss in (lambda z, t: mse(z, t), cross_entropy):  # whatever it is called
        problem = Problem(tanh_net(), loss, (x, y))
        for kind in ("fisher", "sampled_fisher"):
            with pytest.raises(InputError, match="needs a likelihood"):
                Curvature(problem, kind, generator=draw())
    concave = Problem(tanh_net(), lambda z, t: -mse(z, t), (x, y))
    with pytest.raises(InputError, match="not convex"):
        Curvature(concave, "ggn").gram()
    torch.testing.assert_close(Curvature(concave, "ggn").dense(), Reference(concave).ggn)
    nan = tanh_net()
    with torch.no_grad():
        nan[0].bias[0] = float("nan")
    with pytest.raises(InputError, match=r"parameter 0\.bias has 1 NaN"):
        Curvature(Problem(nan, "mse", (x, y)))
    wide = Problem(nn.Linear(4, 3000), "mse", (torch.randn(2, 4), torch.randn(2, 3000)))
    with pytest.raises(InputError, match="at most 2048"):
        Curvature(wide, "ggn").diag()


def test_diagonal_estimates_agree():
    problem = problem_of("classes")
    curvature = Curvature(problem)
    mean, error = hutchinson_diagonal(curvature, 600, generator=draw())
    gaps = (mean - curvature.diag()) / error.clamp_min(1e-12)
    assert float(gaps.abs().max()) < 4.5


class _SharedBatches(TorchDispatchMode):
    """Counts batched products one of whose factors is the same for the whole batch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.count += any(t.stride(0) == 0 for t in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_several_vectors_meet_the_data_in_one_product_of_matrices(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    problem = Problem(model, "cross_entropy", (torch.randn(11, 7, dtype=torch.double), torch.arange(11) % 3))
    curvature = Curvature(problem, kind)
    vectors = torch.randn(curvature.shape[0], 4, dtype=torch.double)
    with _SharedBatches() as seen:
        together = curvature.matvec(vectors)
    assert seen.count == 0
    single = torch.stack([curvature.matvec(v) for v in vectors.T], 1)
    torch.testing.assert_close(together, single, rtol=1e-12, atol=1e-14)
