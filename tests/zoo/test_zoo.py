import pytest
import torch

from gradmatch.core.checks import InputError
from gradmatch.zoo import convnet, mlp


@pytest.mark.parametrize(("channels", "size", "parameters"), [(1, 28, 317_706), (3, 32, 320_010)])
def test_parameter_counts_are_those_of_the_published_convnet(channels, size, parameters):
    net = convnet(channels=channels, size=size)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.embed(torch.zeros(2, channels, size, size)).shape == (2, 2048)


@pytest.mark.parametrize("norm", ["instance", "group", "batch", "layer", "none"])
@pytest.mark.parametrize("pooling", ["avg", "max", "none"])
def test_every_norm_and_pooling_runs(norm, pooling):
    net = convnet(channels=2, size=8, classes=3, width=8, depth=2, norm=norm, pooling=pooling)
    assert net(torch.randn(4, 2, 8, 8)).shape == (4, 3)


def test_instance_norm_forgets_contrast_of_an_image():
    net = convnet(width=4, depth=1).double()
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    conv, norm = net.features[0], net.features[1]
    assert torch.allclose(norm(conv(x) * 7), norm(conv(x)), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "weird"}, "norm"),
        ({"activation": "?"}, "activation"),
        ({"pooling": "x"}, "pooling"),
        ({"depth": 6}, "allow 5 poolings"),
        ({"width": 0}, "width"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(InputError, match=words):
        convnet(**options)


def test_mlp_shapes():
    net = mlp(12, (5, 4), 3, activation="tanh")
    assert net(torch.zeros(2, 3, 2, 2)).shape == (2, 3)
    assert sum(p.numel() for p in net.parameters()) == 12 * 5 + 5 + 5 * 4 + 4 + 4 * 3 + 3
