import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gradmatch.core.checks import InputError
from gradmatch.core.examples import Examples
from gradmatch.core.problem import ParamSpace, Problem, cross_entropy, mse, next_token


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def data(n=7):
    return torch.randn(n, 5), torch.arange(n) % 3


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


# --- parameter spaces --------------------------------------------------------------------------------------


SIZES = st.integers(1, 3)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(SIZES, max_size=3), min_size=1, max_size=5), st.lists(SIZES, max_size=2))
def test_flatten_and_unflatten_are_inverse(shapes, batch):
    space = ParamSpace.of({f"p{i}": torch.zeros(s) for i, s in enumerate(shapes)})
    vector = torch.arange(torch.Size(batch).numel() * space.size, dtype=torch.float32).reshape(
        *batch, space.size
    )
    blocks = space.unflatten(vector)
    assert [tuple(b.shape) for b in blocks.values()] == [(*batch, *s) for s in shapes]
    assert torch.equal(space.flatten(blocks, batch_dims=len(batch)), vector)
    assert torch.equal(space.flatten(list(blocks.values()), batch_dims=len(batch)), vector)
    for name, part in space.slices.items():
        assert torch.equal(vector[..., part], blocks[name].reshape(*batch, -1))


def test_flatten_keeps_the_graph_and_the_order_of_the_module():
    model = net()
    space = ParamSpace.of(model)
    assert space.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert (space.size, space.dtype) == (39, torch.float32)
    flat = space.flatten(dict(reversed(list(model.named_parameters()))))
    assert torch.equal(flat, nn.utils.parameters_to_vector(model.parameters()))
    assert torch.autograd.grad(flat.sum(), model[0].bias)[0].tolist() == [1.0] * 4


def test_select_and_frozen_and_mixed_types():
    model = net()
    model[2].bias.requires_grad_(False)
    model[0].double()
    space = ParamSpace.of(model)
    assert space.names == ("0.weight", "0.bias", "2.weight")
    assert space.dtype == torch.float64
    kinds = {b.dtype for b in space.unflatten(torch.zeros(space.size).double()).values()}
    assert kinds == {torch.float32, torch.float64}
    assert space.select("weight$").names == ("0.weight", "2.weight")
    assert space.select(["2.weight", "0.bias"]).names == ("0.bias", "2.weight")


def test_space_refuses_what_does_not_fit():
    space = ParamSpace.of(net())
    for call, word in [
        (lambda: space.select("nothing"), "select"),
        (lambda: space.select(["0.weight", "nothing"]), "nothing"),
        (lambda: space.unflatten(torch.zeros(38)), "39"),
        (lambda: space.flatten([torch.zeros(4, 5)]), "1 tensors"),
        (lambda: space.flatten({"0.weight": torch.zeros(4, 5)}), "lack"),
        (lambda: space.named([torch.zeros(s) for s in ((5, 4), (4,), (3, 4), (3,))]), "shape"),
        (lambda: ParamSpace.of(nn.ReLU()), "trainable"),
        (lambda: ParamSpace.of({}), "empty"),
    ]:
        with pytest.raises(InputError, match=word):
            call()


# --- losses ------------------------------------------------------------------------------------------------


def test_losses_against_torch():
    z, y = torch.randn(6, 4), torch.tensor([0, 3, 1, 2, 0, 1])
    torch.testing.assert_close(cross_entropy(z, y).mean(), F.cross_entropy(z, y))
    soft = torch.softmax(torch.randn(6, 4), 1)
    torch.testing.assert_close(cross_entropy(z, soft), -(soft * torch.log_softmax(z, 1)).sum(1))
    torch.testing.assert_close(cross_entropy(z, F.one_hot(y, 4).float()), cross_entropy(z, y))
    pixels, ids = torch.randn(6, 4, 2, 3), torch.randint(0, 4, (6, 2, 3))
    torch.testing.assert_close(cross_entropy(pixels, ids).mean(), F.cross_entropy(pixels, ids))
    assert cross_entropy(pixels, ids).shape == (6,)
    torch.testing.assert_close(mse(pixels, 2 * pixels).mean(), F.mse_loss(pixels, 2 * pixels))
    with pytest.raises(InputError, match="shape"):
        mse(torch.zeros(6, 1), torch.zeros(6))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.tensor([0, 1, 3]), "target has class ids from 0 to 3; the model's outputs are for 0..2"),
        (torch.tensor([0, -1, 2]), "target has class ids from -1 to 2"),
        (
            torch.tensor([0.0, 1.0, 2.0]),
            r"target is torch.float32 of shape \(3,\); cross_entropy needs class ids",
        ),
    ],
)
def test_labels_that_do_not_fit_the_outputs_are_refused_in_a_sentence(target, words):
    problem = Problem(nn.Linear(2, 3), "cross_entropy", (torch.randn(3, 2), target))
    with pytest.raises(InputError, match=words):
        problem.example_losses()


def test_labels_of_any_whole_type_are_class_ids():
    z = torch.randn(4, 2)
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.bool):
        y = torch.tensor([0, 1, 1, 0])
        assert torch.equal(cross_entropy(z, y.to(dtype)), cross_entropy(z, y))


def test_next_token_counts_each_example_on_its_own():
    logits, ids = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    expected = [
        F.cross_entropy(logits[i, : k - 1], ids[i, 1:k]) if k > 1 else torch.zeros(())
        for i, k in enumerate((5, 3, 1))
    ]
    torch.testing.assert_close(
        next_token(logits, {"input_ids": ids, "attention_mask": mask}), torch.stack(expected)
    )
    torch.testing.assert_close(next_token(logits, ids.masked_fill(mask == 0, -100)), torch.stack(expected))


# --- data --------------------------------------------------------------------------------------------------


class Hidden(Dataset):
    def __init__(self, x, y):
        self.x_, self.y_ = x, y

    def __len__(self):
        return len(self.x_)

    def __getitem__(self, i):
        return self.x_[i], int(self.y_[i])


def test_every_form_of_data_is_the_same_data():
    x, y = data()
    model = net()
    expected = F.cross_entropy(model(x), y, reduction="none").detach()
    forms = [
        (x, y),
        [x, y],
        (x.numpy(), y.numpy()),
        Examples(x, y, 3),
        TensorDataset(x, y),
        Hidden(x, y),
        DataLoader(TensorDataset(x, y), batch_size=3),
        [(x[:4], y[:4]), (x[4:], y[4:])],
    ]
    for form in forms:
        problem = Problem(model, "cross_entropy", form, batch_size=2)
        assert problem.n == 7
        torch.testing.assert_close(problem.example_losses(), expected)
        assert [b.start for b in problem.batches()] == torch.tensor([0, *problem.data.sizes]).cumsum(0)[
            :-1
        ].tolist()


def test_tuple_and_dict_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 3))

        def forward(self, a, b):
            return (a + b) @ self.w

    x, y = data()
    model = Two()
    expected = F.cross_entropy((3 * x) @ model.w, y, reduction="none").detach()
    torch.testing.assert_close(Problem(model, "cross_entropy", ((x, 2 * x), y)).example_losses(), expected)
    batch = {"a": x, "b": 2 * x, "labels": y}
    torch.testing.assert_close(
        Problem(model, "cross_entropy", batch, batch_size=3).example_losses(), expected
    )
    torch.testing.assert_close(Problem(model, "cross_entropy", [batch]).example_losses(), expected)
    own = Problem(model, lambda z, whole: z.sum(1) * whole["a"][:, 0], {"a": x, "b": x})
    torch.testing.assert_close(own.example_losses(), ((2 * x) @ model.w).sum(1).detach() * x[:, 0])


def test_groups():
    x, y = data()
    model = net()
    assert Problem(model, "cross_entropy", (x, y), groups="class").groups.tolist() == y.tolist()
    by_batch = Problem(model, "cross_entropy", (x, y), groups="batch", batch_size=3)
    assert by_batch.groups.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert Problem(model, "cross_entropy", (x, y), groups="example").groups.tolist() == list(range(7))
    problem = Problem(model, "cross_entropy", (x, y), groups=y.flip(0), batch_size=3)
    assert torch.cat([b.groups for b in problem.batches()]).tolist() == y.flip(0).tolist()
    for wrong in (y[:3], y.float(), y - 1, "domain"):
        with pytest.raises(InputError, match="groups"):
            Problem(model, "cross_entropy", (x, y), groups=wrong)
    with pytest.raises(InputError, match="target"):
        Problem(model, "mse", (x, torch.randn(7, 3)), groups="class")


# --- parameters -> outputs -> loss -------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "soft"])
def test_primitives_against_dense_matrices(loss):
    x, y = data(4)
    target = {
        "cross_entropy": y,
        "mse": torch.randn(4, 3).double(),
        "soft": torch.softmax(torch.randn(4, 3), 1).double(),
    }[loss]
    model = net().double()
    problem = Problem(model, "mse" if loss == "mse" else "cross_entropy", (x.double(), target))
    batch, space = next(problem.batches()), problem.space
    theta = space.flatten(problem.resolve()).detach()

    def outputs(v):
        return functional_call(model, space.unflatten(v), (x.double(),))

    jacobian = torch.autograd.functional.jacobian(outputs, theta).reshape(12, -1)
    z = outputs(theta)
    hessian = torch.autograd.functional.hessian(lambda z: problem.losses(z, target).sum(), z).reshape(12, 12)
    v, u = torch.randn(space.size).double(), torch.randn(4, 3).double()
    out, product = problem.jvp(v, batch)
    torch.testing.assert_close(out, z)
    torch.testing.assert_close(product.flatten(), jacobian @ v)
    out, pull = problem.vjp(batch)
    torch.testing.assert_close(out, z)
    for scale in (1.0, 2.0):
        torch.testing.assert_close(pull(scale * u), jacobian.T @ (scale * u).flatten())
    torch.testing.assert_close(problem.loss_hessian(z, target, u).flatten(), hessian @ u.flatten())
    dense = torch.autograd.functional.hessian(lambda v: problem.losses(outputs(v), target).sum(), theta)
    ggn = pull(problem.loss_hessian(z, target, problem.jvp(v, batch)[1]))
    torch.testing.assert_close(ggn, jacobian.T @ hessian @ jacobian @ v)
    assert not torch.allclose(ggn, dense @ v)  # tanh has a residual, so the two are different matrices


def test_primitives_at_other_parameters_and_for_a_selection():
    x, y = data()
    model = net()
    problem = Problem(model, "cross_entropy", (x, y), select="^2")
    blocks = {k: p.detach() + 1 for k, p in model.named_parameters() if k.startswith("2")}
    batch = next(problem.batches())
    hidden = torch.tanh(model[0](x)).detach()
    expected = hidden @ blocks["2.weight"].T + blocks["2.bias"]
    v = torch.randn(problem.space.size)
    out, product = problem.jvp(v, batch, blocks)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(product, hidden @ v[:12].reshape(3, 4).T + v[12:])
    torch.testing.assert_close(problem.vjp(batch, blocks)[1](torch.ones(7, 3))[12:], torch.full((3,), 7.0))


def test_the_same_problem_in_another_type():
    x, y = data()
    model = net()
    soft = torch.softmax(torch.randn(7, 3), 1)
    for target in (y, soft):
        problem = Problem(model, "cross_entropy", (x, target), select="^2", batch_size=3)
        double = problem.astype(torch.float64)
        expected = F.cross_entropy(
            copy.deepcopy(model).double()(x.double()),
            target.double() if target is soft else y,
            reduction="none",
        )
        torch.testing.assert_close(double.example_losses(), expected.detach())
        assert double.space.dtype == torch.float64
        assert double.space.names == problem.space.names == ("2.weight", "2.bias")
        assert problem.space.dtype == model[0].weight.dtype == torch.float32
        assert next(problem.batches()).inputs.dtype == torch.float32
    own = Problem(lambda p, x: x @ p["w"], "cross_entropy", (x, y), params={"w": torch.randn(5, 3)})
    assert own.astype(torch.float64).example_losses().dtype == torch.float64


# --- what is refused ---------------------------------------------------------------------------------------


def drop(where):
    if where == "module":
        return nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.1))
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.LSTM(5, 3, num_layers=2, dropout=0.2, batch_first=True))


@pytest.mark.parametrize("where", ["module", "attribute"])
def test_active_dropout(where):
    model = drop(where)
    with pytest.raises(InputError, match="dropout in 1"):
        Problem(model, "cross_entropy", data())
    Problem(model, "cross_entropy", data(), allow="dropout")
    problem = Problem(model.eval(), "cross_entropy", data())
    model.train()
    with pytest.raises(InputError, match="dropout"):
        next(problem.batches())
    Problem(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.0)), "cross_entropy", data())


def test_active_batch_norm():
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    with pytest.raises(InputError, match="batchnorm in 1"):
        Problem(model, "cross_entropy", data())
    Problem(model, "cross_entropy", data(), allow=["batchnorm"])
    Problem(model.eval(), "cross_entropy", data())
    untracked = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(InputError, match="batchnorm"):
        Problem(untracked, "cross_entropy", data())


def test_shuffling_and_changing_data():
    x, y = data()
    shuffled = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    with pytest.raises(InputError, match="order"):
        Problem(net(), "cross_entropy", shuffled)
    assert Problem(net(), "cross_entropy", shuffled, allow="order").example_losses().shape == (7,)

    class Jitter(Hidden):
        def __getitem__(self, i):
            return self.x_[i] + torch.rand(()), int(self.y_[i])

    problem = Problem(net(), "cross_entropy", Jitter(x, y))
    with pytest.raises(InputError, match="changed between passes"):
        problem.example_losses()
    Problem(net(), "cross_entropy", Jitter(x, y), allow="order").example_losses()

    for change in (lambda b: b.pop(), lambda b: b.append(b[0]), lambda b: b.reverse()):
        batches = [(x[:3], y[:3]), (x[3:], y[3:])]
        problem = Problem(net(), "cross_entropy", batches)
        change(batches)
        with pytest.raises(InputError, match="data"):
            problem.example_losses()
    with pytest.raises(InputError, match="groups"):
        Problem(net(), "cross_entropy", (x, y), groups="class", allow="order")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_data(bad):
    x, y = data()
    x[3, 2] = bad
    for form in ((x, y), [(x, y)], TensorDataset(x, y)):
        with pytest.raises(InputError, match="data has 1 NaN"):
            Problem(net(), "cross_entropy", form)


def test_other_refusals():
    x, y = data()
    for call, word in [
        (lambda: Problem(net(), "hinge", (x, y)), "loss"),
        (
            lambda: Problem(net(), lambda z, y: F.cross_entropy(z, y), (x, y)).example_losses(),
            "one loss for each",
        ),
        (lambda: Problem(net(), "cross_entropy", (x, y[:5])), r"\[5, 7\]"),
        (lambda: Problem(net(), "cross_entropy", (x[:0], y[:0])), "at least one"),
        (lambda: Problem(net(), "cross_entropy", []), "empty"),
        (lambda: Problem(net(), "cross_entropy", iter([(x, y)])), "again and again"),
        (lambda: Problem(net(), "cross_entropy", [(x, y, y)]), "pair"),
        (lambda: Problem(net(), "cross_entropy", (x, y), batch_size=0), "batch_size"),
        (lambda: Problem(net(), "cross_entropy", (x, y), allow="everything"), "allow"),
        (lambda: Problem(net(), "cross_entropy", (x, y), params={}), "params"),
        (lambda: Problem(lambda p, x: x, "cross_entropy", (x, y)), "params"),
        (lambda: Problem("net", "cross_entropy", (x, y)), "model"),
    ]:
        with pytest.raises(InputError, match=word):
            call()


def test_arrays_of_double_precision_are_brought_to_the_parameters_type():
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    net = nn.Linear(3, 2)
    wanted = Problem(net, "mse", (x.float(), y.float())).example_losses()
    for data in ((x, y), (x.numpy(), y.numpy()), [(x[:4], y[:4]), (x[4:], y[4:])]):
        found = Problem(net, "mse", data).example_losses()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted)
    double = Problem(nn.Linear(3, 2).double(), "mse", (x, y))
    assert double.example_losses().dtype == torch.float64
    assert Problem(net, "mse", (x, y)).astype(torch.float64).example_losses().dtype == torch.float64
