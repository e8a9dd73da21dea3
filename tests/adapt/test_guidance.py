"""Guidance against plain arithmetic, what it leaves alone, and every refusal."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradmatch.adapt import Guidance, calibrate_batch_norm, noise_input, uniform_map
from gradmatch.core.checks import InputError
from gradmatch.core.distance import linear_cka, rsa


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def step(guidance: Guidance, x: Tensor) -> Tensor:
    with guidance.capture():
        guidance.target(x)
        return guidance.loss(x)


# --- the similarity ------------------------------------------------------------------------------------------


def test_cka_has_the_properties_of_its_definition() -> None:
    x, y = randn(30, 6).double(), randn(30, 9, seed=1).double()
    q = torch.linalg.qr(randn(6, 6, seed=2).double())[0]
    for debiased in (False, True):
        assert float(linear_cka(x, x, debiased=debiased)) == pytest.approx(1)
        assert torch.allclose(linear_cka(x, y, debiased=debiased), linear_cka(y, x, debiased=debiased))
        assert torch.allclose(
            linear_cka(3 * x @ q + 5, y, debiased=debiased), linear_cka(x, y, debiased=debiased)
        )
        assert not torch.allclose(
            linear_cka(x * torch.arange(1.0, 7), y, debiased=debiased), linear_cka(x, y, debiased=debiased)
        )
    assert 0 <= float(linear_cka(x, y)) <= 1
    centre = torch.eye(30).double() - 1 / 30
    k, l_ = (centre @ (t @ t.T) @ centre for t in (x, y))
    assert float(linear_cka(x, y)) == pytest.approx(float((k * l_).sum() / (k.norm() * l_.norm())), abs=1e-9)


def test_gradient_vanishes_where_layers_agree() -> None:
    y = randn(20, 5).double()
    q = torch.linalg.qr(randn(5, 5, seed=1).double())[0]
    x = (2 * y @ q).requires_grad_()
    (slope,) = torch.autograd.grad(1 - linear_cka(x, y), x)
    assert float(slope.abs().max()) < 1e-9


def test_debiased_is_zero_for_unrelated_features_where_biased_saturates() -> None:
    g = torch.Generator().manual_seed(0)
    found = [
        linear_cka(torch.randn(64, 512, generator=g), torch.randn(64, 512, generator=g), debiased=True)
        for _ in range(200)
    ]
    assert abs(float(torch.stack(found).mean())) < 0.02
    assert float(linear_cka(torch.randn(64, 4096, generator=g), torch.randn(64, 4096, generator=g))) > 0.97


@pytest.mark.parametrize("distance", ["cka", "cka_debiased", "rsa"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_is_the_sum_over_pairs(distance: str, reduction: str) -> None:
    target, guide = mlp(6, 8, 8, 8, 8, 3), mlp(6, 20, 12, 3, seed=1).eval()
    x = randn(16, 6)
    guidance = Guidance(target, guide, distance=distance, alpha=0.5, reduction=reduction)
    loss = step(guidance, x)
    similarity = {
        "cka": linear_cka,
        "cka_debiased": lambda a, b: linear_cka(a, b, debiased=True),
        "rsa": rsa,
    }[distance]
    own = [target[0](x)]
    for k in range(2, 8, 2):
        own.append(target[k](torch.relu(own[-1])))
    other = [guide[0](x)]
    other.append(guide[2](torch.relu(other[0])))
    terms = [1 - similarity(own[j], other[i]) for i, j in enumerate(uniform_map(2, 4))]
    wanted = 0.5 * (sum(terms) if reduction == "sum" else sum(terms) / 2)
    assert torch.allclose(loss, wanted, atol=1e-5)
    assert list(guidance.similarities) == [("0", "0"), ("2", "6")]
    torch.autograd.backward(loss)
    expected = torch.autograd.grad(wanted, target[0].weight)[0]
    assert torch.allclose(target[0].weight.grad, expected, atol=1e-5)


def test_uniform_map() -> None:
    assert uniform_map(1, 7) == [0]
    assert uniform_map(5, 5) == [0, 1, 2, 3, 4]
    assert uniform_map(4, 1) == [0, 0, 0, 0]
    assert uniform_map(3, 10) == [0, 4, 9]  # 4.5 to the even one
    for m in range(2, 9):
        assert (uniform_map(m, 20)[0], uniform_map(m, 20)[-1]) == (0, 19)


def test_several_guide_layers_on_one_target_layer() -> None:
    target, guide, x = mlp(6, 8, 8, 3), mlp(6, 9, 9, 9, 9, 9, 3, seed=1).eval(), randn(12, 6)
    every, last = (Guidance(target, guide, official=o) for o in (False, True))
    total = step(every, x)
    pairs = [(str(2 * i), str(2 * j)) for i, j in enumerate(uniform_map(5, 2))]
    assert list(every.similarities) == pairs
    assert float(total.detach()) == pytest.approx(sum(1 - s for s in every.similarities.values()), abs=1e-5)
    kept = {b: s for (_, b), s in every.similarities.items()}
    assert float(step(last, x).detach()) == pytest.approx(sum(1 - s for s in kept.values()), abs=1e-5)


def test_layers_of_a_convnet_in_order_without_norms_and_logits() -> None:
    torch.manual_seed(0)
    guide = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).eval()
    flat = nn.Sequential(nn.Flatten(), *mlp(64, 10, 10, 3))
    guidance = Guidance(flat, guide)
    step(guidance, randn(9, 1, 8, 8))
    assert [a for a, _ in guidance.similarities] == ["0", "3", "4"]
    pooled = Guidance(flat, guide, pool=2)
    assert pooled._guide_features(randn(9, 1, 8, 8))["0"].shape == (9, 4, 2, 2)
    last = Guidance(flat, guide, layer_map="last")
    step(last, randn(9, 1, 8, 8))
    assert list(last.similarities) == [("4", "3")]
    named = Guidance(flat, guide, layer_map=[("1", "2"), ("6", "5")])
    step(named, randn(9, 1, 8, 8))
    assert list(named.similarities) == [("1", "2"), ("6", "5")]


class Sequence_(nn.Module):
    """A recurrent net whose layers give tuples."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rnn, self.out = (
            nn.Embedding(9, 5),
            nn.LSTM(5, 6, batch_first=batch_first),
            nn.Linear(6, 9),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.rnn(self.embed(ids))[0])


def test_sequences_flattened_or_by_token() -> None:
    ids = torch.randint(0, 9, (10, 7), generator=torch.Generator().manual_seed(0))
    target, guide = Sequence_(), Sequence_().eval()
    guide.rnn, guide.out = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 9)
    flat = Guidance(target, guide, layer_map="last")
    a, b = target.rnn(target.embed(ids))[0], guide.rnn(guide.embed(ids))[0]
    assert torch.allclose(step(flat, ids), 1 - linear_cka(a.flatten(1), b.flatten(1)), atol=1e-5)
    each = Guidance(target, guide, layer_map="last", tokens="each")
    wanted = sum(linear_cka(a[:, t], b[:, t]) for t in range(7))
    assert torch.allclose(step(each, ids), 1 - wanted, atol=1e-4)
    time_first = Sequence_(batch_first=False)
    turned = Guidance(time_first, guide, layer_map="last", batch_axis=(1, 0))
    with turned.capture():
        time_first(ids.T)
        assert torch.isfinite(turned.loss(ids))
    wrong = Guidance(time_first, guide, layer_map="last")
    with wrong.capture():
        time_first(ids.T)
        with pytest.raises(InputError, match="is the batch on another axis"):
            wrong.loss(ids)


def test_a_transformers_model_guides_a_recurrent_one() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    guide = GPT2LMHeadModel(
        GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0)
    ).eval()
    target, ids = Sequence_(), torch.randint(0, 9, (6, 8), generator=torch.Generator().manual_seed(1))
    pairs = [("transformer.h.0.mlp", "rnn"), ("transformer.h.1", "rnn")]
    guidance = Guidance(
        target, guide, layer_map=pairs, select=lambda name, out: out[0] if isinstance(out, tuple) else out
    )
    torch.autograd.backward(step(guidance, ids))
    assert set(guidance.similarities) == set(pairs)
    assert bool(target.rnn.weight_hh_l0.grad.any())
    assert all(p.grad is None for p in guide.parameters())


# --- what it leaves alone ------------------------------------------------------------------------------------


def trained(guidance, target: nn.Module, x: Tensor, y: Tensor, steps: int = 5) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(target.parameters(), 1e-2)
    torch.manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        if guidance is None:
            loss = F.cross_entropy(target(x), y)
        else:
            with guidance.capture():
                loss = F.cross_entropy(target(x), y)
                loss = loss + guidance.loss(x)
        torch.autograd.backward(loss)
        optimizer.step()
    return target.state_dict()


def with_dropout() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def test_a_tokenizers_batch_goes_to_the_guide_by_name() -> None:
    from transformers import BatchEncoding, BertConfig, BertModel

    def bert(width: int) -> BertModel:
        torch.manual_seed(width)
        config = BertConfig(
            vocab_size=20, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
            attn_implementation="eager",
        )  # fmt: skip
        return BertModel(config, add_pooling_layer=False).eval()

    target, guide = bert(8), bert(12)
    ids = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(0))
    batch = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    batch["attention_mask"][:, 4] = 0
    guidance = Guidance(target, guide)
    guidance.remember(batch, batch_size=4)
    for options in ({}, {"index": torch.arange(6)}):
        with guidance.capture():
            target(**batch)
            found = guidance.loss(batch, **options)
        by_hand = Guidance(target, guide, guide_input=lambda x: (x["input_ids"], x["attention_mask"]))
        with by_hand.capture():
            target(**batch)
            assert float(found.detach()) == pytest.approx(float(by_hand.loss(batch).detach()), rel=1e-5)


def test_guide_is_bit_identical_and_hooks_are_gone() -> None:
    target, guide = with_dropout(), with_dropout().eval()
    state = {k: v.clone() for k, v in guide.state_dict().items()}
    trained(Guidance(target, guide), target, randn(16, 6), torch.arange(16) % 3)
    assert all(torch.equal(v, state[k]) for k, v in guide.state_dict().items())
    assert all(p.grad is None for p in guide.parameters())
    assert not any(m._forward_hooks for net in (target, guide) for m in net.modules())
    guidance = Guidance(target, guide)
    with pytest.raises(RuntimeError, match="inside"), guidance.capture():
        raise RuntimeError("inside")
    assert not any(m._forward_hooks for m in target.modules())


@pytest.mark.parametrize("options", [{"alpha": 0}, {"stop_after": 0}])
def test_a_guide_without_weight_changes_no_bit(options) -> None:
    x, y = randn(16, 6), torch.arange(16) % 3
    plain = trained(None, with_dropout(), x, y)
    target = with_dropout()
    guided = trained(Guidance(target, with_dropout().eval(), **options), target, x, y)
    assert all(torch.equal(v, plain[k]) for k, v in guided.items())


def test_dropout_of_the_target_is_not_disturbed_by_a_noisy_guide() -> None:
    x, y = randn(16, 6), torch.arange(16) % 3
    plain = with_dropout()
    trained(None, plain, x, y, steps=1)
    after_plain = torch.random.get_rng_state()
    target = with_dropout()
    trained(
        Guidance(target, with_dropout().eval(), guide_input=lambda x: torch.randn_like(x)),
        target,
        x,
        y,
        steps=1,
    )
    assert torch.equal(torch.random.get_rng_state(), after_plain)


def test_stop_after_lets_go_and_counts_steps_with_gradients() -> None:
    target, guide, x = mlp(6, 8, 3), mlp(6, 9, 3).eval(), randn(8, 6)
    guidance = Guidance(target, guide, stop_after=2)
    with torch.no_grad():
        step(guidance, x)
    assert guidance.steps == 0
    losses = [float(step(guidance, x).detach()) for _ in range(4)]
    assert losses[0] > 0
    assert losses[1] > 0
    assert losses[2:] == [0.0, 0.0]
    assert not guidance.active


def test_one_forward_serves_task_and_guide() -> None:
    """The public code runs the target twice; with dropout the second run has other activations."""
    target, guide, x = with_dropout(), mlp(6, 9, 3).eval(), randn(12, 6)
    calls = []
    target.register_forward_hook(lambda *_: calls.append(1))
    step(Guidance(target, guide), x)
    assert len(calls) == 1


def test_remembered_features_are_those_of_a_run() -> None:
    target, guide, x = mlp(6, 8, 8, 3), mlp(6, 9, 9, 3, seed=2).eval(), randn(40, 6)
    guidance = Guidance(target, guide)
    guidance.remember(x, batch_size=7)
    index = torch.tensor([3, 39, 0, 11, 12])
    with guidance.capture():
        target(x[index])
        kept, fresh = guidance.loss(x[index], index=index), guidance.loss(x[index])
    assert torch.allclose(kept, fresh, atol=1e-6)


def test_guide_may_see_something_else() -> None:
    target = mlp(16, 8, 3)
    torch.manual_seed(0)
    guide = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 3)).eval()
    x = randn(8, 16)
    guidance = Guidance(target, guide, guide_input=lambda x: x.reshape(-1, 1, 4, 4))
    assert torch.allclose(
        step(guidance, x), 1 - linear_cka(target[0](x), guide[0](x.reshape(-1, 1, 4, 4))), atol=1e-5
    )
    noise = noise_input(4)
    before = torch.random.get_rng_state()
    a, b = noise(x), noise(x)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert a.shape == x.shape
    assert not torch.equal(a, b)
    assert torch.equal(noise_input(4)(x), a)


def test_layers_that_do_not_vary_count_as_zero() -> None:
    target, guide, x = mlp(6, 8, 3), mlp(6, 9, 3).eval(), randn(8, 6)
    with torch.no_grad():
        target[0].weight.zero_()
    for distance in ("cka", "cka_debiased"):
        guidance = Guidance(target, guide, distance=distance)
        with pytest.warns(UserWarning, match="does not vary"):
            loss = step(guidance, x)
        assert float(loss.detach()) == 1
        torch.autograd.backward(loss)
        assert torch.isfinite(target[0].weight.grad).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(guidance, x)
        assert guidance.flat == 2


def test_half_precision_is_compared_in_float32() -> None:
    target, guide, x = mlp(6, 8, 3).bfloat16(), mlp(6, 9, 3).eval(), randn(8, 6)
    guidance = Guidance(target, guide, guide_input=lambda x: x.float())
    loss = step(guidance, x.bfloat16())
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_calibrated_guides_are_normalised() -> None:
    torch.manual_seed(0)
    guide = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    weights = copy.deepcopy(guide[0].weight)
    x = 5 * randn(60, 6) + 3
    before = torch.random.get_rng_state()
    made = calibrate_batch_norm(guide, torch.split(x, 20))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert made is guide
    assert not any(m.training for m in guide.modules())
    out = guide[1](guide[0](x))
    assert float(out.mean(0).abs().max()) < 0.05
    assert float((out.std(0) - 1).abs().max()) < 0.1
    assert torch.equal(guide[0].weight, weights)
    assert math.isclose(guide[1].momentum, 0.1)


# --- refusals ------------------------------------------------------------------------------------------------


def test_refuses() -> None:
    target, guide, x = mlp(6, 8, 3), mlp(6, 9, 3).eval(), randn(8, 6)
    for call, words in (
        (lambda: Guidance(target, target), "guide is target"),
        (lambda: Guidance(target, mlp(6, 9, 3)), "guide is in train mode"),
        (lambda: Guidance(target, guide, layer_map=[("9", "0")]), "no module '9'; it has 0, 1, 2"),
        (lambda: Guidance(target, guide, layer_map=[("0", "nine")]), "no module 'nine'"),
        (lambda: Guidance(target, guide, layer_map=[]), "layer_map is empty"),
        (lambda: Guidance(target, guide, layer_map="first"), "layer_map is 'first'"),
        (lambda: Guidance(target, guide, distance="cosine"), "distance is 'cosine'"),
        (lambda: Guidance(target, guide, reduction="max"), "reduction is 'max'"),
        (lambda: Guidance(target, guide, tokens="all"), "tokens is 'all'"),
        (lambda: Guidance(target, guide, alpha=-1), "alpha is -1"),
        (lambda: Guidance(target, guide).loss(x), r"called outside capture\(\)"),
        (lambda: step(Guidance(target, guide), x[:1]), "has 1 examples; cka needs at least 2"),
        (lambda: step(Guidance(target, guide, distance="cka_debiased"), x[:3]), "needs at least 4"),
        (lambda: step(Guidance(target, guide, distance="rsa"), x[:2]), "needs at least 3"),
        (lambda: step(Guidance(nn.Sequential(nn.Linear(6, 3)), guide), x), "target has 1 layer to compare"),
        (lambda: step(Guidance(target, guide, tokens="each"), x), r"needs sequences \(n, time, d\)"),
        (lambda: step(Guidance(target, guide), x * float("nan")), "NaN or infinite"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    guidance = Guidance(target, guide)
    with guidance.capture():
        with pytest.raises(InputError, match="was not called inside"):
            guidance.loss(x)
        target(x)
        with pytest.raises(InputError, match="nothing is remembered"):
            guidance.loss(x, index=torch.arange(8))
    rnn = Sequence_()
    odd = Guidance(rnn, Sequence_().eval(), layer_map=[("rnn", "rnn")], select=lambda name, out: out)
    with pytest.raises(InputError, match="is a tuple; name its tensor by select"):
        step(odd, torch.randint(0, 9, (5, 4)))
    guide.train()
    with pytest.raises(InputError, match="guide is in train mode"):
        step(guidance, x)
