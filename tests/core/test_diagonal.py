"""Sums of squared pull-backs against one backward pass for every example and column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradmatch.core import diagonal
from gradmatch.core.checks import InputError
from gradmatch.core.diagonal import softmax_factor, squared_pullbacks
from gradmatch.core.problem import Problem


class Block(nn.Module):
    """A residual block with batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU())
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(x + self.inner(x)).mean((2, 3)))


class Odd(nn.Module):
    """Parameters of its own, used twice, beside a layer that is known."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.scale, self.first, self.second = nn.Parameter(torch.ones(5)), nn.Linear(5, 5), nn.Linear(5, 3)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(torch.tanh(self.first(x * self.scale))))
        if self.branch and float(x.detach().sum()) > 1e9:
            x = -x
        return self.second(x * self.scale)


class Recurrent(nn.Module):
    """The kernel of an LSTM fails under vmap in words of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0][:, -1])


class Own(nn.Module):
    """No layer of a known kind at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight).sum(1)


class Language(nn.Module):
    """Tokens in, logits over tokens out; the embedding is tied to the read-out."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.place, self.mix = nn.Embedding(7, 4), nn.Embedding(5, 4), nn.Linear(4, 4)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))[None]
        return self.out(self.norm(x + torch.relu(self.mix(x)).cumsum(1)))


def case(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(0, 7, (6, 5))
    made = {
        "mlp": lambda: (
            nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)),
            torch.randn(6, 3, 4),
        ),
        "conv": lambda: (Block(), torch.randn(6, 1, 9, 9)),
        "odd": lambda: (Odd(), torch.randn(6, 5)),
        "branching": lambda: (Odd(branch=True), torch.randn(6, 5)),
        "tied": lambda: (Language(), ids),
        "untied": lambda: (Language(False), ids),
        "sequence": lambda: (
            nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)),
            torch.randn(6, 5, 4),
        ),
        "conv1d": lambda: (
            nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(24, 3)),
            torch.randn(6, 3, 8),
        ),
        "lstm": lambda: (Recurrent(), torch.randn(6, 2, 3)),
        "own": lambda: (Own(), torch.randn(6, 4, 3)),
    }
    model, x = made[name]()
    model = model.double().eval()
    return model, x if x.dtype == torch.long else x.double()


def looped(model: nn.Module, x: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """Sums of squares, one backward for each example and column."""
    total = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    for i in range(len(x)):
        for vector in vectors[:, i]:
            grads = torch.autograd.grad(
                (model(x[i : i + 1])[0] * vector).sum(), list(model.parameters()), allow_unused=True
            )
            for k, g in zip(total, grads, strict=True):
                total[k] += 0 if g is None else g.square()
    return total


CASES = ["mlp", "conv", "odd", "branching", "tied", "untied", "sequence", "conv1d", "lstm", "own"]


@pytest.mark.parametrize("tier", ["auto", "vmap"])
@pytest.mark.parametrize("name", CASES)
def test_every_tier_equals_a_backward_for_each_example_and_column(name, tier) -> None:
    model, x = case(name)
    outputs = model(x).detach()
    vectors = torch.randn(3, *outputs.shape, dtype=torch.double)
    problem = Problem(model, "mse", (x, torch.arange(6)), batch_size=4)
    found = squared_pullbacks(
        problem, lambda _, b: vectors[:, b.start : b.start + b.size], chunk=3, tier=tier
    )
    for k, value in looped(model, x, vectors).items():
        torch.testing.assert_close(found[k], value, rtol=1e-9, atol=1e-12, msg=f"{name} {k}")


@pytest.mark.parametrize("name", ["mlp", "conv", "sequence", "tied"])
def test_chunks_do_not_change_the_sums(name, monkeypatch) -> None:
    model, x = case(name)
    vectors = torch.randn(2, *model(x).shape, dtype=torch.double)
    problem = Problem(model, "mse", (x, torch.arange(6)))

    def sums(chunk: int | None) -> dict[str, Tensor]:
        return squared_pullbacks(problem, lambda _, b: vectors[:, b.start : b.start + b.size], chunk=chunk)

    whole = sums(None)
    monkeypatch.setattr(diagonal._squares, "_BUDGET", 1)
    monkeypatch.setattr(diagonal, "_BUDGET", 1)
    for chunk in (1, 4, None):
        for k, value in sums(chunk).items():
            torch.testing.assert_close(value, whole[k], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("m", "steps"), [(5, 5), (5, 2), (1, 1), (1, 3)])
def test_a_layer_whose_first_axis_is_time_is_noticed(m, steps) -> None:
    """With as many steps as examples, in the first look or later, shapes cannot tell."""

    class TimeMajor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))

    torch.manual_seed(0)
    model, x = TimeMajor().double(), torch.randn(m, steps, 3).double()
    vectors = torch.randn(2, m, 2).double()
    found = squared_pullbacks(
        Problem(model, "mse", (x, torch.arange(m))),
        lambda _, b: vectors[:, b.start : b.start + b.size],
        chunk=5,
    )
    for k, value in looped(model, x, vectors).items():
        torch.testing.assert_close(found[k], value, rtol=1e-9, atol=1e-12)


def test_the_softmax_factor_is_one_column_short_and_still_exact() -> None:
    for scale in (0.1, 3.0, 40.0):
        logits = scale * torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()
        s, p = softmax_factor(logits), torch.softmax(logits, 1)
        assert s.shape == (4, 6, 5)
        covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        torch.testing.assert_close(torch.einsum("rmc,rmd->mcd", s, s), covariance, rtol=0, atol=1e-12)


def test_a_run_goes_on_from_its_last_batch() -> None:
    model, x = case("mlp")
    vectors = torch.randn(2, 6, 3, dtype=torch.double)
    problem = Problem(model, "mse", (x, torch.arange(6)), batch_size=2)
    kept: list[tuple[int, dict[str, Tensor]]] = []

    def factor(_: Tensor, batch) -> Tensor:
        return vectors[:, batch.start : batch.start + batch.size]

    whole = squared_pullbacks(
        problem, factor, after=lambda n, t: kept.append((n, {k: v.clone() for k, v in t.items()}))
    )
    assert [n for n, _ in kept] == [2, 4, 6]
    again = squared_pullbacks(problem, factor, start=kept[1])
    assert all(torch.equal(again[k], whole[k]) for k in whole)


def test_half_precision_is_squared_in_single() -> None:
    """A gradient of 1e-5 has a square that half precision rounds to nothing."""
    model = nn.Linear(3, 2).bfloat16()
    x = torch.full((4, 3), 1e-3).bfloat16()
    vectors = torch.full((1, 4, 2), 1e-2).bfloat16()
    found = squared_pullbacks(Problem(model, "mse", (x, torch.arange(4))), lambda _, b: vectors[:, : b.size])
    assert found["weight"].dtype == torch.float32
    torch.testing.assert_close(found["weight"], torch.full((2, 3), 4e-10), rtol=0.02, atol=0)
    half = nn.Linear(3, 2).half()
    found = squared_pullbacks(
        Problem(half, "mse", (x.half(), torch.arange(4))), lambda _, b: vectors[:, : b.size].half()
    )
    torch.testing.assert_close(found["weight"], torch.full((2, 3), 4e-10), rtol=0.02, atol=0)


def test_nothing_is_left_behind_and_bad_outputs_are_refused() -> None:
    model, x = case("conv")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    problem = Problem(model, "mse", (x, torch.arange(6)))
    squared_pullbacks(problem, lambda out, _: softmax_factor(out))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())

    class Two(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    with pytest.raises(InputError, match="model returns tuple"):
        squared_pullbacks(
            Problem(Two(3, 2), "mse", (torch.ones(4, 3), torch.arange(4))), lambda out, _: out[None]
        )
    flat = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    with pytest.raises(InputError, match="must return logits for each"):
        squared_pullbacks(Problem(flat, "mse", (torch.ones(4, 3), torch.arange(4))), lambda out, _: out[None])
    broken = nn.Linear(3, 2)
    nn.init.constant_(broken.bias, float("nan"))
    with pytest.raises(InputError, match="model outputs"):
        squared_pullbacks(
            Problem(broken, "mse", (torch.ones(4, 3), torch.arange(4))), lambda out, _: out[None]
        )
