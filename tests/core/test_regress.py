from __future__ import annotations

import pytest
import torch

from gradmatch.core.checks import InputError
from gradmatch.core.regress import PairStore, gradient_loss, pseudo_target_loss


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradient_of_the_output_is_that_of_the_squares_and_the_target_gets_none() -> None:
    x, y = randn(4, 3, 2).requires_grad_(), randn(4, 3, 2, seed=1).requires_grad_()
    w = torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64).requires_grad_()
    loss = pseudo_target_loss(x, y, w)
    wanted = 0.5 * (w[:, None, None] * (x - y).square()).mean()
    assert torch.allclose(loss, wanted)
    loss.backward()
    assert torch.allclose(x.grad, (w[:, None, None] * (x - y)).detach() / 24)
    assert y.grad is None
    assert w.grad is None


def test_a_chosen_gradient_arrives() -> None:
    x, g = randn(4, 3).requires_grad_(), randn(4, 3, seed=1)
    gradient_loss(x, g).backward()
    assert torch.allclose(x.grad, g / 12, rtol=1e-14, atol=1e-16)
    assert gradient_loss(x, g).item() == pytest.approx(float(0.5 * g.square().mean()))
    w = torch.tensor([1.0, 2.0, 0.0, 0.5], dtype=torch.float64)
    x.grad = None
    loss = gradient_loss(
        x, g, w
    )  # 1/2 mean (x - sg[x - w g])^2, as published: the weight is squared in the value
    assert loss.item() == pytest.approx(float(0.5 * (w[:, None] * g).square().mean()))
    loss.backward()
    assert torch.allclose(x.grad, w[:, None] * g / 12, rtol=1e-14, atol=1e-15)


def test_pairs_stay_together_and_are_held_out_once(tmp_path) -> None:
    store = PairStore({"x": torch.arange(20.0), "y": torch.arange(20.0)[:, None] * 2})
    rest, held = store.split(0.1, seed=3)
    assert (len(rest), len(held)) == (18, 2)
    assert sorted(torch.cat([rest.tensors["x"], held.tensors["x"]]).tolist()) == list(range(20))
    rows = rest.batch(50, torch.Generator().manual_seed(0))
    assert bool((rows["y"][:, 0] == 2 * rows["x"]).all())
    assert not set(rows["x"].tolist()) & set(held.tensors["x"].tolist())
    again = PairStore.joined([store.rows(torch.arange(5)), store.rows(torch.arange(5, 20))])
    assert torch.equal(again.tensors["y"], store.tensors["y"])
    back = PairStore.load(store.save(tmp_path / "pairs.safetensors"))
    assert torch.equal(back.tensors["x"], store.tensors["x"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PairStore({}), "tensors is empty"),
        (lambda: PairStore({"a": torch.zeros(2), "b": torch.zeros(3)}), "all must have equally many"),
        (lambda: PairStore({"a": torch.tensor([0.0, torch.nan])}), "a has 1 NaN"),
        (lambda: PairStore({"a": torch.zeros(1)}).split(0.5), "at least two"),
        (lambda: PairStore({"a": torch.zeros(4)}).split(1.0), "share is 1.0"),
        (lambda: PairStore.joined([]), "parts is empty"),
        (lambda: pseudo_target_loss(torch.zeros(2, 3), torch.zeros(3, 2)), "they must be equal"),
        (
            lambda: pseudo_target_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3)),
            "one for each example",
        ),
    ],
)
def test_refusals(make, says) -> None:
    with pytest.raises(InputError, match=says):
        make()
