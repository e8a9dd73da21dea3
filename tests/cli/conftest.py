"""Tiny data of every kind that the command line reads, and a way to run it in this process."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from gradmatch.cli import app

QUICK = ("--steps", "2", "--epochs", "1", "--eval-networks", "1", "--set", "pool=2")
"""Options that make ``distill --method auto`` a matter of milliseconds."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty present folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here):
    """Run a command line; the result has exit_code, stdout and stderr."""
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words], prog_name="gradmatch")


@pytest.fixture
def refused(run):
    """Run a command line that must be refused; gives the one sentence on stderr."""

    def check(*words):
        result = run(*words)
        lines = result.stderr.strip().splitlines()
        assert result.exit_code == 2, (result.stderr, result.exception)
        assert len(lines) == 1, lines
        assert lines[0].startswith("gradmatch: ")
        assert lines[0][-1] in ".?"
        assert not result.stdout.strip()
        return lines[0]

    return check


def images(n, size=8, classes=2, seed=0):
    """(n, size, size) uint8 and labels (n,): noise on a bright half that depends on the class."""
    draw = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = draw.integers(0, 120, (n, size, size))
    for k, label in enumerate(y):
        x[k, :, label * size // classes : (label + 1) * size // classes] += 120
    return x.astype(np.uint8), y


@pytest.fixture
def photos(here):
    """A folder of class folders with 8 x 8 PNGs."""
    x, y = images(20)
    for k, (image, label) in enumerate(zip(x, y, strict=True)):
        file = here / "photos" / ("left", "right")[label] / f"{k:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return here / "photos"


@pytest.fixture
def npz(here):
    """An .npz of 8 x 8 images with a test set."""
    (x, y), (x_test, y_test) = images(24), images(10, seed=1)
    np.savez(here / "data.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return here / "data.npz"


RESNET = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )

    def forward(self, x):
        return torch.relu(x + self.body(x))


class ResNet(nn.Module):
    def __init__(self, in_channels, num_classes, width=4):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
"""


@pytest.fixture
def resnet(here, request):
    """A user's file in the present folder; gives its module's name."""
    name = f"mine_{abs(hash(request.node.name)) % 10**8}"
    (here / f"{name}.py").write_text(RESNET)
    return name
