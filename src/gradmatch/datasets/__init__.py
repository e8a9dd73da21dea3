"""Real data and exactly specified generators, each as training and test examples in memory."""

from __future__ import annotations

from gradmatch.datasets._load import Split, arrays, folder, hub, load, split
from gradmatch.datasets.digits import digits
from gradmatch.datasets.fashion_mnist import fashion_mnist, find_fashion_mnist
from gradmatch.datasets.pydoc import pydoc_text

__all__ = [
    "Split",
    "arrays",
    "digits",
    "fashion_mnist",
    "find_fashion_mnist",
    "folder",
    "hub",
    "load",
    "pydoc_text",
    "split",
]
