"""Pictures: bytes of a PNG of the size asked for, and nothing of the session's pyplot is touched."""

import io

import matplotlib
from matplotlib import pyplot as plt
from PIL import Image

from gradmatch.core.picture import blank, png, subplots


def test_a_picture_has_the_size_asked_for():
    figure, (left, right) = subplots(1, 2, figsize=(4, 2), width_ratios=(1, 2))
    left.plot([0, 1])
    right.set_title("two")
    assert Image.open(io.BytesIO(png(figure, dpi=50))).size == (200, 100)


def test_the_backend_and_open_figures_stay():
    backend = matplotlib.get_backend()
    try:
        matplotlib.use("svg")
        plt.figure(77)
        png(blank(figsize=(1, 1)))
        assert matplotlib.get_backend() == "svg"
        assert plt.get_fignums() == [77]
    finally:
        plt.close(77)
        matplotlib.use(backend)
