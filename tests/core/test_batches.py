"""What counts as a data set of single examples."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from gradmatch.core._batches import OrderedData, examples_of
from gradmatch.core.problem import Problem
from gradmatch.weights._fisher_data import First


class Linear(nn.Linear):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return super().forward(pixels)


@pytest.mark.parametrize("formatted", [False, True])
def test_a_hugging_face_table_is_read_in_batches_of_tensors(formatted: bool) -> None:
    tables = pytest.importorskip("datasets")
    x, y = torch.randn(11, 4, generator=torch.Generator().manual_seed(0)), torch.arange(11) % 3
    table = tables.Dataset.from_dict({"pixels": x.tolist(), "labels": y.tolist()})
    table = table.with_format("torch") if formatted else table
    batches = list(OrderedData(table, 4))
    assert [b.size for b in batches] == [4, 4, 3]
    assert torch.equal(torch.cat([b.inputs["pixels"] for b in batches]), x)
    assert torch.equal(torch.cat([b.target for b in batches]), y)
    net = Linear(4, 3)
    assert Problem(net, "cross_entropy", table).n == 11
    first = list(First(table, 7, 4, whole=False))
    assert torch.equal(torch.cat([inputs["pixels"] for inputs, _ in first]), x[:7])


def test_streams_and_lists_are_no_such_sets() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(2, 3), torch.zeros(2)

    assert examples_of(TensorDataset(torch.zeros(3))) is not None
    assert examples_of(Stream()) is None
    assert examples_of([torch.zeros(3)]) is None
    assert len(list(OrderedData(Stream()))) == 1
