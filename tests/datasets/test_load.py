import gzip
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from gradmatch.core.checks import InputError
from gradmatch.core.store import save_tensors
from gradmatch.datasets import digits, fashion_mnist, find_fashion_mnist, load, split
from gradmatch.datasets._load import from_rows
from gradmatch.datasets.fashion_mnist import FILES


def picture(path, size=(4, 4), value=100, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_digits_are_split_by_class_without_overlap():
    data = digits()
    assert len(data.train) + len(data.test) == 1797
    assert data.shape == (1, 8, 8)
    assert 0 <= data.train.x.min() <= data.train.x.max() <= 1
    everything = torch.cat([data.train.x, data.test.x]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # no digit occurs twice, so none is on both sides
    for c in range(10):
        share = len(data.test.of_class(c)) / (len(data.test.of_class(c)) + len(data.train.of_class(c)))
        assert share == pytest.approx(0.25, abs=0.01)
    assert torch.equal(digits(seed=1).test.y, digits(seed=1).test.y)


def test_folder_of_class_folders(tmp_path):
    for k in range(5):
        picture(tmp_path / "cat" / f"{k}.png", value=10 * k)
        picture(tmp_path / "dog" / f"{k}.png", value=(200, 0, 0), mode="RGB")
    data = load(tmp_path)
    assert data.names == ("cat", "dog")
    assert data.shape == (3, 4, 4)
    assert (len(data.train), len(data.test)) == (8, 2)
    red = data.train.x[data.train.y == 1][0]
    assert red[:, 0, 0].tolist() == pytest.approx([200 / 255, 0, 0])


def test_folder_with_its_own_test_set(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for name in ("a", "b"):
            for k in range(count):
                picture(tmp_path / part / name / f"{k}.png")
    data = load(tmp_path)
    assert (len(data.train), len(data.test), data.names) == (6, 4, ("a", "b"))


def test_sizes_are_brought_to_one_only_when_asked(tmp_path):
    for name, size in (("a", (4, 4)), ("b", (6, 5))):
        for k in range(2):
            picture(tmp_path / name / f"{k}.png", size)
    with pytest.raises(InputError, match="give --size"):
        load(tmp_path)
    assert load(tmp_path, size=8).shape == (1, 8, 8)


def test_deep_pictures_are_scaled_and_not_cut_off(tmp_path):
    levels = np.array([[0, 255], [256, 65535]], dtype=np.uint16)
    for name, array, ending in (("a", levels, "png"), ("b", (levels / 65535).astype(np.float32), "tif")):
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.fromarray(array).save(tmp_path / name / f"{k}.{ending}")
    wanted = torch.from_numpy(levels / 65535).float()
    for x in load(tmp_path).train.x:
        assert torch.allclose(x[0], wanted, atol=1e-7)
    assert load(tmp_path, size=3).train.x.max() <= 1
    Image.fromarray(np.full((2, 2), 300.0, dtype=np.float32)).save(tmp_path / "b" / "0.tif")
    with pytest.raises(InputError, match="levels outside"):
        load(tmp_path)


def test_hostile_and_missing_files_are_refused(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / "set" / name / "0.png")
    (tmp_path / "set" / "a" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "object.npz", x=np.array([{"a": 1}], dtype=object), y=np.array([0]))
    np.savez(tmp_path / "names.npz", pictures=np.zeros(3))
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04torn")
    for source, words in (
        (tmp_path / "set", "1.png is not a readable image"),
        (tmp_path / "empty", "0 class folders"),
        (tmp_path / "object.npz", "plain arrays"),
        (tmp_path / "names.npz", "it needs one named x"),
        (tmp_path / "torn.npz", "not a readable .npz"),
        (tmp_path / "none.npz", "does not exist"),
        (tmp_path / "nothing" / "here", "DATA is"),
    ):
        with pytest.raises(InputError, match=words):
            load(source)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_arrays(tmp_path, ending):
    x = torch.randint(0, 256, (20, 6, 6), dtype=torch.uint8)
    y = torch.arange(20) % 2
    file = tmp_path / f"d.{ending}"
    if ending == "npz":
        np.savez(file, x=x.numpy(), y=y.numpy())
    else:
        save_tensors(file, {"x": x, "y": y})
    data = load(file)
    assert data.shape == (1, 6, 6)
    assert (len(data.train), len(data.test), data.classes) == (16, 4, 2)


def test_arrays_with_a_test_set(tmp_path):
    np.savez(
        tmp_path / "d.npz",
        x_train=np.zeros((4, 1, 2, 2), np.float32),
        y_train=np.array([0, 1, 0, 1]),
        x_test=np.ones((2, 1, 2, 2), np.float32),
        y_test=np.array([0, 1]),
    )
    data = load(tmp_path / "d.npz")
    assert (len(data.train), len(data.test)) == (4, 2)
    assert data.test.x.unique().tolist() == [1]


def test_rows_of_a_hugging_face_set_keep_their_class_names():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    pictures = [Image.new("L", (3, 3), 40 * k) for k in range(10)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 5}, features=features)
    data = from_rows(datasets.DatasetDict({"train": rows}), "mine")
    assert data.names == ("no", "yes")
    assert (len(data.train), len(data.test)) == (8, 2)


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + b"".join(d.to_bytes(4, "big") for d in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_a_name_that_the_hub_does_not_have_is_one_sentence(monkeypatch, caplog):
    datasets, notes = pytest.importorskip("datasets"), logging.getLogger("huggingface_hub")
    caplog.set_level(logging.WARNING, "huggingface_hub")

    def unreachable(name):
        notes.warning("retrying")
        raise ConnectionError(f"no {name}\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"'photos' is no file or folder here and .* hub: no photos$"):
        load("photos")
    assert not caplog.records
    assert notes.level == logging.WARNING


def test_fashion_mnist_is_read_from_the_folder_named_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADMATCH_DATA", str(tmp_path))
    images = np.arange(20 * 28 * 28).reshape(20, 28, 28) % 256
    for file in FILES:
        write_idx(tmp_path / file, images if "images" in file else np.arange(20) % 10)
    assert find_fashion_mnist() == tmp_path
    data = fashion_mnist()
    assert data.shape == (1, 28, 28)
    assert data.train.x[0, 0, 0, 5] == pytest.approx(5 / 255)
    (tmp_path / FILES[0]).write_bytes(gzip.compress(b"\0\0\x08\x03" + (99).to_bytes(4, "big") * 3))
    with pytest.raises(InputError, match="its header says"):
        fashion_mnist()


def test_split_refuses_what_it_cannot_hold_out():
    data = digits().train
    with pytest.raises(InputError, match="test is 1"):
        split(data, 1.0)
    with pytest.raises(InputError, match="at least 2"):
        split(data.take(torch.cat([data.of_class(c)[:1] for c in range(10)])), 0.5)
