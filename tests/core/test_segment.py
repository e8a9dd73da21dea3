"""The loss on a segment against direct evaluation."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradmatch.core.checks import InputError
from gradmatch.core.problem import Problem
from gradmatch.core.segment import segment


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def net():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    for _ in range(4):
        model(torch.randn(9, 4) * 2 + 1)
    return model.eval()


def test_losses_accuracy_barrier_and_distance_against_direct_evaluation():
    a, b = net(), net()
    x, y = torch.randn(11, 4), torch.arange(11) % 3
    before = {k: v.clone() for k, v in a.state_dict().items()}
    problem = Problem(a, "cross_entropy", (x, y), batch_size=4)
    found = segment(problem, a, b, points=5, split="test")
    losses, accuracies = [], []
    for t in (0, 0.25, 0.5, 0.75, 1):
        middle = copy.deepcopy(a)
        sa, sb = a.state_dict(), b.state_dict()
        middle.load_state_dict(
            {k: (1 - t) * sa[k] + t * sb[k] if sa[k].is_floating_point() else sa[k] for k in sa}
        )
        losses.append(F.cross_entropy(middle(x), y).item())
        accuracies.append(float((middle(x).argmax(1) == y).double().mean()))
    assert found.losses.tolist() == pytest.approx(losses, rel=1e-5)
    assert found.accuracies.tolist() == pytest.approx(accuracies)
    line = [losses[0] + t * (losses[-1] - losses[0]) for t in found.t.tolist()]
    gaps = [v - w for v, w in zip(losses, line, strict=True)]
    assert found.barrier == pytest.approx(max(0, *gaps), abs=1e-6)
    assert found.midpoint_gap == pytest.approx(gaps[2], abs=1e-6)
    step = nn.utils.parameters_to_vector(b.parameters()) - nn.utils.parameters_to_vector(a.parameters())
    torch.testing.assert_close(found.step, step.detach())
    assert found.distance == pytest.approx(float(step.norm()))
    assert found.split == "test"
    assert all(torch.equal(v, before[k]) for k, v in a.state_dict().items())
    # running statistics move too: with those of a alone the far end would not be b
    assert losses[-1] == pytest.approx(F.cross_entropy(b(x), y).item(), rel=1e-6)
    assert segment(problem, a.state_dict(), b.state_dict(), points=5).losses.tolist() == found.losses.tolist()


def test_a_better_middle_is_no_barrier_and_shows_in_the_signed_gap():
    x = torch.tensor([[1.0]])
    weights = {"w": torch.zeros(1)}
    problem = Problem(lambda p, x: x * p["w"], "mse", (x, torch.zeros(1, 1)), params=weights)
    found = segment(problem, {"w": torch.tensor([-1.0])}, {"w": torch.tensor([2.0])}, points=3)
    assert found.losses.tolist() == pytest.approx([1, 0.25, 4])
    assert found.barrier == 0
    assert found.midpoint_gap == pytest.approx(0.25 - 2.5)
    assert found.accuracies is None
    hill = Problem(lambda p, x: x * p["w"], lambda z, t: -z.square().sum(1), (x, x), params=weights)
    assert segment(hill, {"w": torch.tensor([-1.0])}, {"w": torch.tensor([1.0])}).barrier == pytest.approx(1)


def test_share_inside_a_subspace():
    w = {"w": torch.zeros(3)}
    problem = Problem(lambda p, x: x @ p["w"][:, None], "mse", (torch.ones(1, 3), torch.ones(1, 1)), params=w)
    found = segment(problem, w, {"w": torch.tensor([3.0, 4.0, 0.0])}, points=3)
    assert found.inside(torch.tensor([[2.0], [0.0], [0.0]])) == pytest.approx(9 / 25)
    assert found.inside(torch.eye(3)) == pytest.approx(1)


def test_refusals():
    a = net()
    problem = Problem(a, "cross_entropy", (torch.randn(6, 4), torch.arange(6) % 3))
    other = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).eval()
    broken = copy.deepcopy(a)
    with torch.no_grad():
        broken[0].bias[0] = float("nan")
    for call, word in (
        (lambda: segment(problem, a, other), r"b\['0.weight'\] has shape \(6, 4\)"),
        (lambda: segment(problem, {"0.weight": a[0].weight}, a), "a lacks"),
        (lambda: segment(problem, a, broken), r"b\['0.bias'\] has 1 NaN"),
        (lambda: segment(problem, a, a, points=4), "odd"),
        (lambda: segment(problem, a, a, points=1), "points"),
    ):
        with pytest.raises(InputError, match=word):
            call()
    a.train()
    with pytest.raises(InputError, match="batchnorm"):
        segment(problem, a, a)


def test_states_between_the_ends_can_be_prepared():
    x = torch.tensor([[1.0]])
    weights = {"w": torch.zeros(1)}
    problem = Problem(lambda p, x: x * p["w"], "mse", (x, torch.zeros(1, 1)), params=weights)
    ends = {"w": torch.tensor([2.0])}, {"w": torch.tensor([4.0])}
    found = segment(problem, *ends, points=3, prepare=lambda state: {"w": 0 * state["w"]})
    assert found.losses.tolist() == [4, 0, 16]  # the ends stay as they are
