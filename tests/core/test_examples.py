import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core.checks import InputError
from gradmatch.core.examples import Examples, as_examples

X = torch.arange(24.0).reshape(6, 1, 2, 2)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    "source",
    [
        (X, Y),
        (X.numpy(), Y.numpy()),
        [X, Y],
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=4),
        [(X[i], int(Y[i])) for i in range(6)],
        ((X[i : i + 2], Y[i : i + 2]) for i in (0, 2, 4)),
        Examples(X, Y, 3),
    ],
    ids=["tensors", "arrays", "list-pair", "dataset", "loader", "rows", "generator", "examples"],
)
def test_every_source_gives_the_same_examples(source):
    got = as_examples(source)
    assert torch.equal(got.x, X)
    assert torch.equal(got.y, Y)
    assert got.classes == 3


def test_hugging_face_rows_with_pictures():
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    pictures = [Image.fromarray(np.full((3, 4, 3), 50 * k, dtype=np.uint8)) for k in range(4)]
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1, 0, 1]})
    got = as_examples(rows)
    assert got.x.shape == (4, 3, 3, 4)
    assert got.x[1].unique().tolist() == pytest.approx([50 / 255])


def test_bytes_become_unit_interval_and_subsets_keep_classes():
    got = as_examples((torch.full((2, 1, 1, 1), 255, dtype=torch.uint8), torch.tensor([0, 1])))
    assert got.x.max() == 1.0
    assert got.take(torch.tensor([1])).classes == 2
    assert got.of_class(1).tolist() == [1]


def test_reading_a_loader_leaves_the_global_generator_as_found():
    before = torch.random.get_rng_state()
    as_examples(DataLoader(TensorDataset(X, Y), batch_size=2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_shuffling_loader_warns_and_is_read_once():
    with pytest.warns(UserWarning, match="one pass of it is read"):
        as_examples(DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True))


def test_lists_of_numbers_have_the_usual_precision():
    assert as_examples([([0.5, 1.0], 0), ([2.0, 3.0], 1)]).x.dtype == torch.float32
    assert as_examples((np.zeros((2, 2)), [0, 1])).x.dtype == torch.float64


def test_colours_of_a_palette_are_read_not_their_numbers():
    Image = pytest.importorskip("PIL.Image")
    plain = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    found = as_examples([(plain.quantize(16), 0), (plain.quantize(16), 1)])
    assert found.x.shape == (2, 3, 4, 4)
    assert float((found.x[0] * 255 - torch.from_numpy(np.array(plain)).permute(2, 0, 1)).abs().max()) < 20


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ((X, Y[:5]), "6 entries and dataset labels has 5"),
        ((X / 0, Y), "NaN or infinite"),
        ((X, torch.tensor([0, 2, 2, 0, 2, 2])), "no sample of class 1"),
        ((X, Y.float()), "whole numbers"),
        (TensorDataset(X[:0], Y[:0]), "empty"),
        (3, "dataset is a int"),
        ([{"picture": 1}], "needs an image column"),
        ([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 3, 3), 1)], "one shape"),
        ((X.numpy(), np.array(["shoe", "bag"] * 3)), "labels holds str_ values; it must hold numbers"),
        ([(X[0], None), (X[1], None)], "labels holds NoneType values"),
        ([([0.0, [1.0]], 0), ([2.0, 3.0], 1)], "inputs cannot be made an array"),
    ],
)
def test_refusals(source, words):
    with pytest.raises(InputError, match=words):
        as_examples(source)
