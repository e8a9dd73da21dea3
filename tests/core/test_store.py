import os

import pytest
import torch

from gradmatch.core import store
from gradmatch.core.checks import InputError
from gradmatch.core.store import RunFolder


def test_tensors_and_metadata_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.arange(4)}
    file = store.save_tensors(tmp_path / "deep" / "t.safetensors", tensors, {"n": 1, "s": "é"})
    back, header = store.load_tensors(file)
    assert header == {"n": 1, "s": "é"}
    assert all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in tensors)


@pytest.mark.parametrize("step", [1, 10, 100, 1000])
def test_tensors_read_lie_in_memory_as_fresh_ones_do(tmp_path, step):
    """Kernels round by where a tensor starts, and in a file that moves with the digits of the step."""
    tensors = {"a": torch.randn(3), "b": torch.randn(5, 7), "c": torch.arange(3, dtype=torch.uint8)}
    run = RunFolder(tmp_path / "run", {})
    run.save(step, tensors)
    _, back, _ = run.load()
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)
    assert [t.data_ptr() % 64 for t in back.values()] == [0, 0, 0]


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    store.write_json(file, {"old": 1})

    def broken(source, target):
        raise OSError("disk went away")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk went away"):
        store.write_json(file, {"new": 2})
    assert store.read_json(file) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_shared_memory_and_views_are_written_apart(tmp_path):
    base = torch.arange(6.0)
    store.save_tensors(tmp_path / "v.safetensors", {"a": base[::2], "b": base})
    assert store.load_tensors(tmp_path / "v.safetensors")[0]["a"].tolist() == [0, 2, 4]


def test_broken_files_are_refused_in_a_sentence(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"not tensors")
    (tmp_path / "bad.json").write_text("{")
    for call in (
        lambda: store.load_tensors(tmp_path / "bad.safetensors"),
        lambda: store.load_tensors(tmp_path / "none.safetensors"),
        lambda: store.read_json(tmp_path / "bad.json"),
        lambda: store.read_json(tmp_path / "none.json"),
        lambda: store.write_json(tmp_path / "nan.json", {"x": float("nan")}),
    ):
        with pytest.raises(InputError):
            call()


def test_run_folder_resumes_only_the_same_run(tmp_path):
    run = RunFolder(tmp_path / "run", {"seed": 0, "betas": (0.9, 0.99)})
    assert run.load() is None
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    run.save(7, {"x": torch.ones(2), "g": store.generator_state(generator)}, {"loss": 0.5})
    with pytest.raises(InputError, match="already holds a run"):
        RunFolder(tmp_path / "run", {"seed": 0})
    with pytest.raises(InputError, match="seed=0, and this one has seed=1"):
        RunFolder(tmp_path / "run", {"seed": 1, "betas": (0.9, 0.99)}, resume=True)
    step, tensors, info = RunFolder(tmp_path / "run", {"seed": 0, "betas": (0.9, 0.99)}, resume=True).load()
    assert (step, info) == (7, {"loss": 0.5})
    again = store.restored_generator(tensors["g"])
    assert torch.equal(torch.rand(4, generator=again), torch.rand(4, generator=generator))
    run.finish(lambda path: store.write_json(path / "done.json", 1))
    assert run.load() is None
    assert (run.path / "done.json").exists()


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="must be a folder"):
        RunFolder(tmp_path / "f", {})
