import pytest
import torch
from torch import nn

from gradmatch.core.checks import InputError
from gradmatch.core.networks import active_dropout, build, first_floats, has_batchnorm, output_width, seeded


def factory():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("network", [factory, factory()], ids=["factory", "module"])
def test_seed_decides_weights_and_the_global_generator_is_left_as_found(network):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert same(build(network, 1), build(network, 1))
    assert not same(build(network, 1), build(network, 2))
    assert torch.equal(torch.rand(3), expected)


def test_a_given_module_is_not_changed():
    module = factory()
    before = module[0].weight.clone()
    assert build(module, 0) is not module
    assert torch.equal(module[0].weight, before)


def test_seeded_restores_after_an_exception():
    state = torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(3):
        raise ZeroDivisionError
    assert torch.equal(torch.random.get_rng_state(), state)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("network", "words"), [(Bare(), "no reset_parameters"), (3, "factory"), (lambda: 3, "made a int")]
)
def test_refusals(network, words):
    with pytest.raises(InputError, match=words):
        build(network, 0)


def test_questions_asked_of_a_network():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 5))
    assert has_batchnorm(net)
    assert not has_batchnorm(factory())
    assert active_dropout(net) == ["2"]
    assert active_dropout(net.eval()) == []
    net.train()
    assert output_width(net, torch.zeros(3, 1, 2, 2)) == 5
    assert net.training
    assert int(net[1].num_batches_tracked) == 0
    with pytest.raises(InputError, match="logits of shape"):
        output_width(nn.Identity(), torch.zeros(3, 1, 2, 2))


def test_the_type_of_a_network_is_that_of_its_first_floats():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2, dtype=torch.long), requires_grad=False)
            self.line = nn.Linear(1, 1).double()

    net = Whole()
    assert first_floats(net) is net.line.weight
    assert first_floats(nn.ReLU()) is None
    assert first_floats(abs) is None
