"""TrAct against the formula written out in float64, and against what the plain layers do."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradmatch.core.checks import InputError
from gradmatch.optim import apply_tract, remove_tract
from gradmatch.optim.tract import TrActConv1d, TrActConv2d, TrActLinear, tract


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def double(layer: nn.Module, seed: int = 0) -> nn.Module:
    layer = layer.double()
    for k, p in enumerate(layer.parameters()):
        p.data = normal(*p.shape, seed=seed + k)
    return layer


def expected(rows: torch.Tensor, incoming: torch.Tensor, lam: float) -> torch.Tensor:
    """G^T x (x^T x / b + lam I)^-1 by an explicit inverse: rows (b, n), incoming (b, m)."""
    moment = rows.T @ rows / len(rows)
    return incoming.T @ rows @ torch.linalg.inv(moment + lam * torch.eye(len(moment), dtype=rows.dtype))


def backward(layer: nn.Module, x: torch.Tensor, incoming: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad(out, [x, *named.values()], incoming)
    return {"out": out.detach(), "x": grads[0], **dict(zip(named, grads[1:], strict=True))}


CONVS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1)},
    "dilation": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "no bias": {"kernel_size": 3, "bias": False},
}


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_a_convolution_is_the_plain_one_but_for_the_weight(options):
    plain = double(nn.Conv2d(4, 6, **options))
    x = normal(3, 4, 9, 8, seed=9)
    incoming = normal(*plain(x).shape, seed=10)
    a, b = backward(plain, x, incoming), backward(tract(plain, 0.1), x, incoming)
    for name in a.keys() - {"weight"}:
        torch.testing.assert_close(b[name], a[name], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a["weight"], b["weight"])


@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_a_convolution_follows_the_formula_on_unfolded_patches(options, solver):
    plain = double(nn.Conv2d(4, 6, **options))
    x = normal(2, 4, 9, 8, seed=9)
    incoming = normal(*plain(x).shape, seed=10)
    found = backward(tract(plain, 0.1, solver=solver), x, incoming)["weight"]
    mode = options.get("padding_mode", "zeros")
    sides = {"same": (1, 1, 1, 2), "valid": (0, 0, 0, 0)}.get(options.get("padding", 0))
    if sides is None:
        down, across = nn.modules.utils._pair(options.get("padding", 0))
        sides = (across, across, down, down)
    padded = F.pad(x, sides, mode="constant" if mode == "zeros" else mode)
    patches = F.unfold(padded, plain.kernel_size, plain.dilation, 0, plain.stride)
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    into = incoming.flatten(2).transpose(1, 2).reshape(len(rows), -1)
    groups = plain.groups
    parts = [expected(r, g, 0.1) for r, g in zip(rows.chunk(groups, 1), into.chunk(groups, 1), strict=True)]
    torch.testing.assert_close(found, torch.cat(parts).reshape(found.shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("b", [4, 7, 30])
def test_a_linear_layer_follows_the_formula_below_at_and_above_n_rows(b, solver):
    plain, x, incoming = double(nn.Linear(7, 3)), normal(b, 7, seed=5), normal(b, 3, seed=6)
    a, found = backward(plain, x, incoming), backward(tract(plain, 0.05, solver=solver), x, incoming)
    torch.testing.assert_close(found["weight"], expected(x, incoming, 0.05), rtol=1e-10, atol=1e-10)
    for name in ("out", "x", "bias"):
        torch.testing.assert_close(found[name], a[name], rtol=1e-12, atol=1e-12)


def test_auto_takes_the_smaller_system():
    plain = double(nn.Linear(7, 3))
    with torch.no_grad():
        plain.weight.zero_()
    for b in (4, 30):
        x, incoming = normal(b, 7, seed=5), normal(b, 3, seed=6)
        sizes = []
        real = torch.linalg.cholesky_ex

        def spy(matrix, sizes=sizes, real=real):
            sizes.append(matrix.shape[-1])
            return real(matrix)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.linalg, "cholesky_ex", spy)
            backward(tract(plain), x, incoming)
        assert sizes == [min(b, 7)]


def test_tokens_and_a_one_dimensional_convolution_are_rows_too():
    plain, x, incoming = double(nn.Linear(5, 3)), normal(4, 6, 5, seed=5), normal(4, 6, 3, seed=6)
    found = backward(tract(plain), x, incoming)["weight"]
    torch.testing.assert_close(found, expected(x.flatten(0, 1), incoming.flatten(0, 1), 0.1))
    conv = double(nn.Conv1d(2, 3, 4, stride=2, padding=1))
    x = normal(3, 2, 11, seed=7)
    incoming = normal(*conv(x).shape, seed=8)
    rows = F.pad(x, (1, 1)).unfold(2, 4, 2).transpose(1, 2).flatten(2).flatten(0, 1)
    into = incoming.transpose(1, 2).flatten(0, 1)
    found = backward(tract(conv), x, incoming)["weight"]
    torch.testing.assert_close(found, expected(rows, into, 0.1).reshape(found.shape))


def test_a_1x1_convolution_is_a_linear_layer_on_pixels():
    conv, x = double(nn.Conv2d(4, 3, 1)), normal(2, 4, 5, 6, seed=3)
    linear = nn.Linear(4, 3).double()
    linear.weight.data, linear.bias.data = conv.weight.data[:, :, 0, 0], conv.bias.data
    incoming = normal(2, 3, 5, 6, seed=4)
    a = backward(tract(conv), x, incoming)
    b = backward(tract(linear), x.movedim(1, -1), incoming.movedim(1, -1))
    torch.testing.assert_close(a["weight"][:, :, 0, 0], b["weight"])
    torch.testing.assert_close(a["bias"], b["bias"])


@pytest.mark.parametrize("channels", [1, 600])
def test_an_unbatched_image_and_a_wide_input(channels):
    conv, x = double(nn.Conv2d(channels, 2, 1)), normal(channels, 30, 30, seed=3)
    incoming = normal(2, 30, 30, seed=4)
    found = backward(tract(conv), x, incoming)["weight"]
    wanted = expected(x.flatten(1).T, incoming.flatten(1).T, 0.1)
    torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-9, atol=1e-9)


def test_with_a_large_lambda_it_is_the_ordinary_gradient_divided_by_it():
    plain, x, incoming = double(nn.Linear(6, 3)), normal(20, 6, seed=5), normal(20, 3, seed=6)
    found = backward(tract(plain, 1e8), x, incoming)["weight"]
    torch.testing.assert_close(1e8 * found, backward(plain, x, incoming)["weight"], rtol=1e-6, atol=1e-6)


def test_without_damping_one_step_of_one_half_is_least_squares():
    b, n, m = 40, 6, 3
    x, y = normal(b, n, seed=1), normal(b, m, seed=2)
    layer = tract(double(nn.Linear(n, m, bias=False)), 1e-12)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    (layer(x) - y).square().sum(1).mean().backward()
    optimizer.step()
    torch.testing.assert_close(
        layer.weight.detach().T, torch.linalg.lstsq(x, y).solution, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("b", [5, 20])
def test_the_step_minimises_its_objective(b):
    n, m, lam, eta = 8, 3, 0.3, 0.7
    x, incoming = normal(b, n, seed=1), normal(b, m, seed=2)
    found = -eta * backward(tract(double(nn.Linear(n, m)), lam), x, incoming)["weight"]
    # |x dW^T + eta b G|^2 / b + lam |dW|^2 as one stacked least-squares system
    left = torch.cat([x / b**0.5, lam**0.5 * torch.eye(n, dtype=x.dtype)])
    right = torch.cat([-eta * b * incoming / b**0.5, torch.zeros(n, m, dtype=x.dtype)])
    torch.testing.assert_close(found.T, torch.linalg.lstsq(left, right).solution, rtol=1e-9, atol=1e-9)


def test_one_hot_inputs_move_like_an_embedding():
    n, lam = 6, 0.1
    incoming = normal(n, 4, seed=2)
    found = backward(tract(double(nn.Linear(n, 4)), lam), torch.eye(n, dtype=torch.float64), incoming)
    torch.testing.assert_close(found["weight"].T, incoming / (1 / n + lam))


@pytest.mark.parametrize("b", [4, 30])
def test_it_turns_with_the_basis_of_the_inputs(b):
    x, incoming = normal(b, 7, seed=1), normal(b, 3, seed=2)
    turn = torch.linalg.qr(normal(7, 7, seed=3)).Q
    plain = double(nn.Linear(7, 3))
    turned = copy.deepcopy(plain)
    turned.weight.data = plain.weight.data @ turn
    a, z = backward(tract(plain), x, incoming), backward(tract(turned), x @ turn, incoming)
    torch.testing.assert_close(z["weight"], a["weight"] @ turn, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(z["out"], a["out"])


def test_gradients_of_two_uses_add_up_and_the_inputs_gradient_is_left_out():
    layer, x = tract(double(nn.Linear(4, 3))), normal(6, 4, seed=1)
    (layer(x).sum() + layer(2 * x).square().sum()).backward()
    both = layer.weight.grad.clone()
    parts = []
    for loss in (lambda: layer(x).sum(), lambda: layer(2 * x).square().sum()):
        layer.zero_grad()
        loss().backward()
        parts.append(layer.weight.grad.clone())
    torch.testing.assert_close(both, parts[0] + parts[1])
    assert x.grad is None


def test_a_frozen_weight_costs_no_system(monkeypatch):
    layer, x = tract(double(nn.Linear(4, 3))), normal(6, 4, seed=1).requires_grad_()
    layer.weight.requires_grad_(False)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(6, 4))


# --- options -----------------------------------------------------------------------------------------------


def test_random_rows_estimate_the_moment():
    plain, x = double(nn.Conv2d(3, 4, 3)), normal(16, 3, 26, 26, seed=1)
    incoming = normal(16, 4, 24, 24, seed=2)
    whole = backward(tract(plain), x, incoming)["weight"]
    few = backward(tract(plain, max_rows=6000), x, incoming)["weight"]
    assert not torch.equal(few, whole)
    torch.testing.assert_close(few, whole, rtol=0, atol=0.15 * float(whole.abs().max()))
    again = backward(tract(plain, max_rows=6000), x, incoming)["weight"]
    other = backward(tract(plain, max_rows=6000, seed=1), x, incoming)["weight"]
    assert torch.equal(few, again)
    assert not torch.equal(few, other)
    torch.testing.assert_close(backward(tract(plain, max_rows=10**6), x, incoming)["weight"], whole)
    one = double(nn.Conv1d(2, 3, 3))
    line, into = normal(4, 2, 300, seed=1), normal(4, 3, 298, seed=2)
    a, b = (backward(tract(one, max_rows=k), line, into)["weight"] for k in (None, 900))
    torch.testing.assert_close(b, a, rtol=0, atol=0.2 * float(a.abs().max()))


def test_a_running_moment_is_the_mean_over_batches():
    layer = tract(double(nn.Linear(4, 3)), stats="ema", decay=0.75)
    xs, incoming = [normal(10, 4, seed=k) for k in range(2)], normal(10, 3, seed=9)
    for x in xs:
        found = backward(layer, x, incoming)["weight"]
    moments = [x.T @ x / 10 for x in xs]
    mean = 0.75 * moments[0] + 0.25 * moments[1]
    torch.testing.assert_close(layer.moment[0], mean)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found, incoming.T @ xs[1] @ torch.linalg.inv(mean + 0.1 * eye))
    assert set(layer.state_dict()) == {"weight", "bias"}


RANK = """
import sys, torch
from gradmatch.optim.tract import tract
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
layer = tract(torch.nn.Linear(4, 3).double(), sync=True)
x = torch.randn((6, 10)[rank], 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
layer(x).sum().backward()
torch.save(layer.weight.grad, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_sync_sums_the_moment_over_ranks(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(k), str(tmp_path)]) for k in range(2)]
    assert [process.wait(60) for process in ranks] == [0, 0]
    both = torch.cat([normal(n, 4, seed=k) for k, n in enumerate((6, 10))])
    moment = both.T @ both / 16 + 0.1 * torch.eye(4, dtype=torch.float64)
    for k, n in enumerate((6, 10)):
        x = normal(n, 4, seed=k)
        found = torch.load(tmp_path / f"{k}.pt", weights_only=True)
        torch.testing.assert_close(found, torch.ones(3, n, dtype=x.dtype) @ x @ torch.linalg.inv(moment))


def test_half_precision_solves_in_float32():
    plain = nn.Conv2d(3, 4, 3)
    x = normal(4, 3, 12, 12, seed=1).float() * 3000  # squares overflow float16
    layer = tract(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).float().sum().backward()
    assert plain.weight.grad.dtype == torch.float32
    rows = F.unfold(x, 3).transpose(1, 2).flatten(0, 1).double()
    wanted = expected(rows, torch.ones(len(rows), 4, dtype=torch.float64), 0.1).reshape(plain.weight.shape)
    torch.testing.assert_close(
        plain.weight.grad.double(), wanted, rtol=0.02, atol=1e-3 * float(wanted.abs().max())
    )
    low = tract(nn.Linear(5, 2).bfloat16())
    low(torch.ones(3, 5, dtype=torch.bfloat16)).sum().backward()
    assert low.weight.grad.dtype == torch.bfloat16


def test_an_empty_batch_gives_no_gradient():
    layer = tract(nn.Linear(3, 2))
    layer(torch.zeros(0, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(2, 3))


# --- models ------------------------------------------------------------------------------------------------


def test_parameters_hooks_and_state_are_the_layers_own():
    plain = nn.Conv2d(3, 4, 3, bias=False)
    calls = []
    plain.register_forward_hook(lambda *_: calls.append(1))
    layer = tract(plain)
    assert layer.weight is plain.weight
    assert layer.bias is None
    layer(torch.zeros(1, 3, 5, 5))
    assert calls == [1]
    fresh = nn.Conv2d(3, 4, 3, bias=False)
    fresh.load_state_dict(layer.state_dict())
    layer.load_state_dict(fresh.state_dict())
    assert torch.equal(fresh.weight, plain.weight)
    back = layer.plain()
    assert type(back) is nn.Conv2d
    assert back.weight is plain.weight
    assert repr(back) == repr(plain)
    assert set(vars(back)) == set(vars(plain))


def test_an_optimizer_built_before_still_trains_the_layer():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    assert apply_tract(model) is model
    model(torch.randn(5, 4, generator=generator())).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_the_first_weight_layer_is_found_behind_norms_and_can_be_named():
    model = apply_tract(
        nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 2, 3))
    )
    assert [type(m) for m in (model[0], model[1][0], model[2])] == [nn.BatchNorm2d, TrActConv2d, nn.Conv2d]
    remove_tract(model)
    assert type(model[1][0]) is nn.Conv2d
    apply_tract(model, layer="2")
    assert type(model[2]) is TrActConv2d
    assert type(apply_tract(nn.Linear(2, 1))) is TrActLinear
    assert type(apply_tract(nn.Conv1d(2, 1, 1))) is TrActConv1d
    assert type(remove_tract(tract(nn.Linear(2, 1)))) is nn.Linear


def test_a_vision_transformer_of_transformers_and_a_deep_copy():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    model = ViTForImageClassification(config)
    x = torch.randn(6, 3, 8, 8, generator=generator())
    y = torch.arange(6) % 3
    model(pixel_values=x, labels=y).loss.backward()
    plain = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    apply_tract(model)
    model = copy.deepcopy(model)
    model(pixel_values=x, labels=y).loss.backward()
    changed = [k for k, p in model.named_parameters() if k in plain and not torch.allclose(p.grad, plain[k])]
    assert len(changed) == 1
    assert changed[0].endswith("projection.weight")


def test_an_ill_conditioned_input_is_learned_in_fewer_steps():
    """Inputs of variances 1 to 1e-3 in random directions, targets that need all of them."""
    z = normal(256, 20, seed=1)
    turn = torch.linalg.qr(normal(20, 20, seed=2)).Q
    x = (z * torch.logspace(0, -1.5, 20, dtype=z.dtype) @ turn).float()
    y = torch.tanh(z @ normal(20, 3, seed=3) / 20**0.5).float()
    errors = []
    for change in (lambda m: m, lambda m: apply_tract(m, 0.01)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = change(nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        for _ in range(200):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        errors.append(float((model(x) - y).square().mean().detach()))
    assert errors[1] < 0.4 * errors[0]


# --- refusals ----------------------------------------------------------------------------------------------


class Own(nn.Linear):
    pass


def patched() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Linear(2, 2), {"lam": 0}, "lam is 0; it must be above 0"),
        (nn.Linear(2, 2), {"lam": float("nan")}, "lam is nan"),
        (nn.ConvTranspose2d(2, 2, 2), {}, "layer is ConvTranspose2d; TrAct takes exactly nn.Linear"),
        (nn.Conv3d(2, 2, 2), {}, "layer is Conv3d"),
        (nn.LazyLinear(2), {}, "layer is LazyLinear"),
        (nn.Embedding(2, 2), {}, "layer is Embedding"),
        (Own(2, 2), {}, "layer is Own"),
        (patched(), {}, "layer has a forward of its own"),
        (nn.Linear(2, 2), {"solver": "qr"}, "solver is 'qr'"),
        (nn.Linear(2, 2), {"stats": "none"}, "stats is 'none'"),
        (nn.Linear(2, 2), {"decay": 1.0}, "decay is 1.0"),
        (nn.Linear(2, 2), {"max_rows": 0}, "max_rows is 0"),
        (nn.Linear(2, 2), {"solver": "dual", "stats": "ema"}, 'solver is "dual", which has no'),
        (nn.Linear(2, 2), {"solver": "dual", "max_rows": 3}, 'solver is "dual", which has no'),
        (nn.Linear(2, 2), {"solver": "dual", "sync": True}, 'solver is "dual", which has no'),
    ],
)
def test_a_wrong_layer_or_option_is_refused(layer, options, message):
    with pytest.raises(InputError, match=message):
        tract(layer, **options)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), {}, "layer '0': layer is Embedding"),
        (nn.Sequential(nn.ReLU()), {}, "model has no layer with weights"),
        (nn.Sequential(nn.Linear(2, 2)), {"layer": "1"}, "layer is '1', which is no module"),
        (apply_tract(nn.Sequential(nn.Linear(2, 2))), {}, "has TrAct already"),
    ],
)
def test_a_model_without_a_fitting_first_layer_is_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        apply_tract(model, **options)


def test_integer_inputs_second_derivatives_and_broken_inputs_are_refused():
    layer = tract(nn.Linear(2, 1))
    with pytest.raises(InputError, match=r"the input is torch.int64"):
        layer(torch.ones(3, 2, dtype=torch.long))
    out = layer(torch.ones(3, 2)).square().sum()
    (gradient,) = torch.autograd.grad(out, layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
    with pytest.raises(InputError, match="not positive definite"):
        layer(torch.full((3, 2), float("inf"))).sum().backward()


def test_the_published_cholesky_inverse_would_fail_here():
    """The public code hands the matrix itself to ``cholesky_inverse``; the formula's answer is another one."""
    plain, x, incoming = double(nn.Linear(5, 3)), normal(20, 5, seed=1), normal(20, 3, seed=2)
    moment = x.T @ x / 20 + 0.1 * torch.eye(5, dtype=x.dtype)
    wrong = incoming.T @ x @ torch.cholesky_inverse(moment)
    found = backward(tract(plain), x, incoming)["weight"]
    assert not torch.allclose(found, wrong, rtol=0.1)
    torch.testing.assert_close(found @ moment, incoming.T @ x, rtol=1e-10, atol=1e-10)


def test_the_generator_of_torch_is_left_as_found():
    layer = nn.Linear(6, 2)
    before = torch.get_rng_state()
    tract(layer, max_rows=4)(torch.ones(9, 6)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
