"""State dicts read lazily and written in a stream; files from outside that lie are refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradmatch.core import _safetensors, state_dicts
from gradmatch.core.checks import InputError
from gradmatch.core.state_dicts import Spec, companions, open_state_dict, write_state_dict

TYPES = {k: v for k, v in _safetensors.DTYPES.items() if k != "C64"}


def mixed() -> dict[str, Tensor]:
    """A tensor of every type, some of odd length, one without dimensions and one empty."""
    found = {name: torch.arange(7).to(dtype) for name, dtype in TYPES.items()}
    return found | {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "table": torch.randn(5, 3)}


def write(path: Path, tensors: dict[str, Tensor], **options) -> Path:
    source = open_state_dict(tensors)
    return write_state_dict(path, source.specs, lambda name: [source.read(name)], **options)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bytes_of(a[k]) == bytes_of(b[k]) for k in a
    )


def bytes_of(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list, offsets: list, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# --- reading and writing -----------------------------------------------------------------------------------


def test_files_agree_with_the_library_both_ways(tmp_path) -> None:
    tensors = mixed()
    ours = write(tmp_path / "ours.safetensors", tensors)
    assert same(load_file(ours), tensors)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert same(open_state_dict(tmp_path / "theirs.safetensors").tensors(), tensors)
    header, metadata = _safetensors.read_header(ours)
    assert metadata == {"format": "pt"}
    assert all(
        s.start % s.spec.dtype.itemsize == 0 for s in header.values()
    )  # every type at its own alignment


def test_pieces_make_up_the_tensor_and_are_read_where_they_lie(tmp_path) -> None:
    table = torch.randn(37, 11).bfloat16()
    path = write(tmp_path / "m.safetensors", {"first": torch.arange(5), "table": table})
    for source in (open_state_dict(path), open_state_dict({"table": table})):
        parts = [p.clone() for p in source.pieces("table", 100)]
        assert [len(p) for p in parts] == [100, 100, 100, 100, 7]
        assert torch.equal(torch.cat(parts), table.flatten())
        assert source.spec("table") == Spec(torch.bfloat16, (37, 11))


def test_a_folder_is_sharded_by_size_and_indexed(tmp_path) -> None:
    tensors = {f"layer.{k}": torch.randn(10, 10) for k in range(5)} | {"big": torch.randn(50, 50)}
    seen: list[tuple[int, int]] = []
    out = write(
        tmp_path / "out", tensors, shard_bytes=1000, progress=lambda done, total: seen.append((done, total))
    )
    files = sorted(f.name for f in out.iterdir())
    assert files[-1] == "model.safetensors.index.json"
    assert files[:-1] == [
        f"model-0000{k}-of-00004.safetensors" for k in range(1, 5)
    ]  # 2 + 2 + 1 small ones, the big
    index = json.loads((out / files[-1]).read_text())
    assert (
        index["metadata"]["total_size"]
        == sum(4 * t.numel() for t in tensors.values())
        == seen[-1][0]
        == seen[-1][1]
    )
    assert same(open_state_dict(out).tensors(), tensors)
    assert list(open_state_dict(out).specs) == list(tensors)


def test_one_file_of_another_name_is_found_and_several_are_not(tmp_path) -> None:
    write(tmp_path / "diffusion_pytorch_model.safetensors", {"w": torch.ones(2)})
    assert list(open_state_dict(tmp_path).specs) == ["w"]
    write(tmp_path / "second.safetensors", {"w": torch.ones(2)})
    with pytest.raises(InputError, match="not exactly one other"):
        open_state_dict(tmp_path)
    write(tmp_path / "model.safetensors", {"x": torch.ones(2)})
    assert list(open_state_dict(tmp_path).specs) == ["x"]


def test_modules_give_tied_weights_once_and_name_their_buffers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = (
                nn.Embedding(6, 4),
                nn.BatchNorm1d(4),
                nn.Linear(4, 6, bias=False),
            )
            self.head.weight = self.embed.weight

    model = Tied()
    source = open_state_dict(model)
    assert source.tied == {"head.weight": "embed.weight"}
    assert "head.weight" not in source.specs
    assert source.buffers == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert torch.equal(source.read("head.weight"), model.embed.weight)
    whole = source.tensors()
    assert whole.keys() == model.state_dict().keys()
    assert whole["head.weight"].data_ptr() == whole["embed.weight"].data_ptr()


def test_equal_values_and_views_of_one_memory_are_not_tied() -> None:
    base = torch.zeros(4, 4)
    source = open_state_dict({"a": base, "row": base[0], "transposed": base.T, "other": torch.zeros(4, 4)})
    assert list(source.specs) == ["a", "row", "transposed", "other"]
    assert source.tied == {}


def test_companions_are_configuration_and_tokenizer_not_weights(tmp_path) -> None:
    folder = write(tmp_path / "m", {"w": torch.ones(3), "v": torch.ones(3)}, shard_bytes=12)
    for name in (
        "config.json",
        "tokenizer.json",
        "vocab.txt",
        "README.md",
        "pytorch_model.bin",
        "optimizer.pt",
    ):
        (folder / name).write_text("{}")
    (folder / "sub.json").mkdir()
    source = open_state_dict(folder)
    assert [f.name for f in companions(source)] == ["config.json", "tokenizer.json", "vocab.txt"]
    out = write_state_dict(tmp_path / "copy", source.specs, lambda n: [source.read(n)], like=source)
    assert sorted(f.name for f in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vocab.txt",
    ]
    assert companions(open_state_dict({"w": torch.ones(1)})) == []


def test_memory_of_reading_pieces_is_a_piece(tmp_path, monkeypatch) -> None:
    """The library's reader maps the file, and touched pages count as the process's memory."""
    path = write(tmp_path / "m.safetensors", {"w": torch.zeros(1000)})
    taken: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(state_dicts.torch, "empty", lambda n, **k: (taken.append(n), empty(n, **k))[1])
    list(open_state_dict(path).pieces("w", 64))
    assert taken == [256]


# --- whole or not at all -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["m.safetensors", "folder"])
def test_a_failure_leaves_nothing_behind(tmp_path, place) -> None:
    def pieces(name: str) -> list[Tensor]:
        if name == "b":
            raise RuntimeError("killed")
        return [torch.ones(2)]

    specs = {"a": Spec(torch.float32, (2,)), "b": Spec(torch.float32, (2,))}
    with pytest.raises(RuntimeError, match="killed"):
        write_state_dict(tmp_path / place, specs, pieces, shard_bytes=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("piece", "word"),
    [
        (torch.ones(3), "comes with 12"),
        (torch.ones(1), "comes with 4"),
        (torch.ones(2).half(), "comes as torch.float16"),
    ],
)
def test_a_piece_of_another_length_or_type_is_refused(tmp_path, piece, word) -> None:
    with pytest.raises(InputError, match=word):
        write_state_dict(tmp_path / "m.safetensors", {"a": Spec(torch.float32, (2,))}, lambda _: [piece])


def test_a_taken_folder_and_an_unknown_type_are_refused(tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        write(tmp_path / "full", {"w": torch.ones(1)})
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty", {"w": torch.ones(1)}).is_dir()
    with pytest.raises(InputError, match="does not know"):
        write(tmp_path / "m.safetensors", {"w": torch.ones(1, dtype=torch.complex128)})


# --- hostile files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "data", "word"),
    [
        ({"w": entry([2], [0, 8])}, b"1234", "cut short or padded"),
        ({"w": entry([2], [0, 8])}, b"12345678more", "cut short or padded"),
        ({"w": entry([2, 3], [0, 8])}, b"12345678", "needs 24 bytes and has 8"),
        ({"w": entry([2], [0, 8], "F16")}, b"12345678", "needs 4 bytes and has 8"),
        ({"w": entry([2], [0, 8], "Q4")}, b"12345678", "unknown type 'Q4'"),
        ({"w": entry([2], [0, 8], ["F32"])}, b"12345678", "unknown type"),
        ({"w": entry([-2, -1], [0, 8])}, b"12345678", "no sound shape"),
        ({"w": entry([2.0], [0, 8])}, b"12345678", "no sound shape"),
        ({"w": entry([True, 2], [0, 8])}, b"12345678", "no sound shape"),
        ({"w": entry([2], [0, 8, 9])}, b"12345678", "no sound shape"),
        ({"w": entry([2], [8, 16])}, b"0" * 16, "overlapping or missing"),
        ({"w": entry([1], [0, 4]), "v": entry([1], [0, 4])}, b"0123", "overlapping or missing"),
        ({"w": entry([2**62, 4], [0, 8])}, b"12345678", "needs"),
        ({"w": entry([2], [8, 0])}, b"12345678", "needs 8 bytes and has -8"),
        ({"w": 3}, b"", "no sound shape"),
        ([1, 2], b"", "no object"),
        (b'{"w": 1, "w": 2}', b"", "'w' stands there twice"),
        (b"{" * 100_000, b"", "no readable safetensors header"),
        (b"\xff\xfe{}", b"", "no readable safetensors header"),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path, header, data, word) -> None:
    with pytest.raises(InputError, match=word):
        open_state_dict(raw(tmp_path / "m.safetensors", header, data))


@pytest.mark.parametrize("length", [2**63, 10**6, 3])
def test_a_header_longer_or_shorter_than_it_says_is_refused(tmp_path, length) -> None:
    with pytest.raises(InputError):
        open_state_dict(raw(tmp_path / "m.safetensors", {"w": entry([1], [0, 4])}, b"0123", length))


def sharded(tmp_path: Path, weight_map: object) -> Path:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(2)}, folder / "two.safetensors")
    save_file({"secret": torch.ones(2)}, tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "word"),
    [
        (
            {"a": "one.safetensors", "secret": "../outside.safetensors"},
            "only name .safetensors files beside it",
        ),
        ({"a": "one.safetensors", "b": "/etc/passwd"}, "only name .safetensors files beside it"),
        ({"a": "one.safetensors", "b": "..\\two.safetensors"}, "only name .safetensors files beside it"),
        ({"a": "one.safetensors", "b": 3}, "only name .safetensors files beside it"),
        ({"a": "one.safetensors", "b": "two.bin"}, "only name .safetensors files beside it"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "cannot be read"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "does not hold it"),
        ({"a": "one.safetensors"}, None),
        ({"b": "one.safetensors", "a": "two.safetensors"}, "which the index puts into"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, weight_map, word) -> None:
    folder = sharded(tmp_path, weight_map)
    if word is None:
        assert list(open_state_dict(folder).specs) == ["a"]
        return
    with pytest.raises(InputError, match=word):
        open_state_dict(folder)


def test_a_name_in_two_shards_is_refused(tmp_path) -> None:
    folder = sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"b": torch.ones(2), "a": torch.zeros(2)}, folder / "two.safetensors")
    with pytest.raises(InputError, match="holds 'a', which the index puts into 'one"):
        open_state_dict(folder)


def test_pickles_and_other_sources_are_refused(tmp_path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(InputError, match="pickle"):
            open_state_dict(source)
    with pytest.raises(InputError, match="does not exist"):
        open_state_dict(tmp_path / "nothing")
    with pytest.raises(InputError, match="must be a module, a state dict or a path"):
        open_state_dict(3)
    with pytest.raises(InputError, match="must be a tensor"):
        open_state_dict({"w": 3})
    with pytest.raises(InputError, match="holds no tensor"):
        open_state_dict({})
    with pytest.raises(InputError, match="no tensor 'x'"):
        open_state_dict({"w": torch.ones(1)}).read("x")


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path) -> None:
    path = write(tmp_path / "m.safetensors", {"w": torch.ones(1000)})
    source = open_state_dict(path)
    with open(path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(InputError, match="must not change"):
        source.read("w")
