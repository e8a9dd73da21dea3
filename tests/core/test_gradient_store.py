"""Gradient features on disk: what they are, and that no interruption, shard or worker changes a byte."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core import _gradient_store, _per_example, _projection
from gradmatch.core._params import ParamSpace
from gradmatch.core._projection import SparseProjection
from gradmatch.core.checks import InputError
from gradmatch.core.gradients import per_example_gradients
from gradmatch.core.problem import Problem
from gradmatch.core.store import GradientStore
from gradmatch.zoo import convnet


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def images(n=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=g), torch.arange(n) % 3


def net(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return convnet(channels=1, size=8, classes=3, width=4, depth=1, norm="none")


def problem(**options) -> Problem:
    return Problem(net(), "cross_entropy", images(), **{"batch_size": 8, **options})


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    ids = torch.randint(0, 50, (11, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[3, 5:] = 0
    model = transformers.GPT2LMHeadModel(config).eval()
    return Problem(model, "next_token", {"input_ids": ids, "attention_mask": mask}, batch_size=2)


def content(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(Path(folder).iterdir())}


# --- what the rows are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [problem, gpt2])
def test_whole_gradients_are_the_gradients(make, tmp_path):
    p = make()
    store = GradientStore.build(p, tmp_path / "g", project=None, part_rows=4)
    truth = per_example_gradients(p)
    torch.testing.assert_close(store[:], truth)
    torch.testing.assert_close(store.norms, truth.double().norm(dim=1), rtol=1e-5, atol=1e-8)
    assert store.shape == (p.n, p.space.size)


@pytest.mark.parametrize("make", [problem, gpt2])
def test_projected_rows_are_the_projection_of_the_gradients(make, tmp_path):
    p = make()
    store = GradientStore.build(p, tmp_path / "g", project=64, seed=3, part_rows=4)
    expected = store.projection()(per_example_gradients(p))
    torch.testing.assert_close(store[:], expected, rtol=1e-4, atol=1e-5)
    assert store.space.names == p.space.names


def test_memory_limits_change_nothing(tmp_path, monkeypatch):
    """Blocks streamed one example at a time, and pieces of three coordinates, against all at once."""
    p = problem()
    whole = GradientStore.build(p, tmp_path / "a", project=None)[:]
    monkeypatch.setattr(_per_example, "_BUDGET", 1)
    torch.testing.assert_close(GradientStore.build(p, tmp_path / "b", project=None)[:], whole)
    monkeypatch.setattr(_projection, "_PIECE", 3)
    store = GradientStore.build(p, tmp_path / "c", project=16)
    torch.testing.assert_close(store[:], store.projection()(whole), rtol=1e-4, atol=1e-5)


def test_never_all_parameters_at_once(tmp_path):
    """One block's rows are the largest tensor made: here the layers are equal, so [m, P] would be ten times that."""
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(10)), nn.Linear(40, 3))
    p = Problem(model, "cross_entropy", (torch.randn(64, 40), torch.arange(64) % 3), batch_size=64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                largest = max(largest, result.untyped_storage().nbytes() // result.element_size())
            return result

    with Watch():
        GradientStore.build(p, tmp_path / "g", project=64)
    assert 64 * 1600 <= largest < 2 * 64 * 1600


@pytest.mark.parametrize("pieces", [2**16, 7])
def test_inner_products_are_unbiased_with_the_stated_variance(pieces, monkeypatch):
    """Over seeds, of a spiky and a flat vector that share some coordinates, in blocks of several pieces."""
    monkeypatch.setattr(_projection, "_PIECE", pieces)
    space = ParamSpace.of({"a": torch.zeros(5, 6), "b": torch.zeros(17), "c": torch.zeros(1)})
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, generator=g).double(), torch.zeros(48).double()
    y[[0, 1, 30, 47]] = torch.tensor([3.0, -2.0, 1.0, 0.5]).double()
    width, seeds = 32, 1000
    sketched = torch.stack(
        [SparseProjection(space, width, s)(torch.stack([x, y])) for s in range(seeds)]
    )  # [seeds, 2, k]
    for a, b, one, other in ((x, y, 0, 1), (x, x, 0, 0), (y, y, 1, 1)):
        values = (sketched[:, one] * sketched[:, other]).sum(1)
        error = values.std() / seeds**0.5
        assert abs(values.mean() - a @ b) < 4 * error
        bound = (1 + 16 / width) * (a @ a * (b @ b) + (a @ b) ** 2) / width
        assert values.var() < 1.25 * bound
        assert values.var() > 0.2 * bound or other == one == 1  # a sketch, not a copy


def test_rows_of_other_data_are_comparable(tmp_path):
    """Same seed and parameters: inner products across two stores are those of the gradients, to the sketch's noise."""
    a = GradientStore.build(problem(), tmp_path / "a", project=2048)
    other = Problem(net(), "cross_entropy", images(20, seed=1))
    b = GradientStore.build(other, tmp_path / "b", project=2048)
    found = a[:] @ b[:].T
    truth = per_example_gradients(problem()) @ per_example_gradients(other).T
    scale = a.norms[:, None] * b.norms
    assert float(((found - truth) / scale).abs().max()) < 5 * (2 / 2048) ** 0.5


def test_half_precision_on_disk_and_double_models(tmp_path):
    store = GradientStore.build(problem(), tmp_path / "h", project=None, dtype="float16")
    assert store[:].dtype == torch.float16
    x, y = images()
    double = Problem(net().double(), "cross_entropy", (x.double(), y))
    exact = GradientStore.build(double, tmp_path / "d", project=None, dtype="float64")
    torch.testing.assert_close(exact[:], per_example_gradients(double))
    big = Problem(net().double(), "cross_entropy", (x.double() * 1e9, y))
    with pytest.raises(InputError, match=r"gradients as torch.float16"):
        GradientStore.build(big, tmp_path / "o", project=None, dtype="float16")


def test_a_model_of_unknown_layers_and_batches_of_unequal_size(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(64, 5)), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(x.flatten(1) @ self.w))

    x, y = images()
    batches = [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])]
    p = Problem(Own(), "cross_entropy", batches)
    store = GradientStore.build(p, tmp_path / "g", project=None, part_rows=8)
    assert [stop for _, stop in store.manifest["parts"]] == [8, 50]
    torch.testing.assert_close(store[:], per_example_gradients(p))


# --- reading -------------------------------------------------------------------------------------------------


def test_reading_by_place_slice_mask_and_part(tmp_path):
    store = GradientStore.build(problem(), tmp_path / "g", project=16, part_rows=10)
    rows = torch.cat(list(store))
    assert [len(part) for part in store] == [16, 16, 16, 2]
    assert torch.equal(store[:], rows)
    assert torch.equal(store[17], rows[17])
    assert torch.equal(store[-1], rows[-1])
    assert torch.equal(store[3:40:7], rows[3:40:7])
    assert torch.equal(store[::-1], rows.flip(0))
    wanted = torch.tensor([49, 0, 0, 17, -2])
    assert torch.equal(store[wanted], rows[wanted])
    assert torch.equal(store[wanted.numpy()], rows[wanted])
    assert torch.equal(store[rows[:, 0] > 0], rows[rows[:, 0] > 0])
    assert store[[]].shape == (0, 16)
    assert len(store) == 50
    for bad in ([50], [-51], [0.5], torch.zeros(3, dtype=torch.bool), torch.zeros(2, 2).long()):
        with pytest.raises(InputError, match="index"):
            store[bad]
    with pytest.raises(IndexError):
        store[50]


def test_parts_are_opened_only_where_rows_are_asked_for(tmp_path):
    GradientStore.build(problem(), tmp_path / "g", project=16, part_rows=10)
    store = GradientStore(tmp_path / "g")
    assert store[20:30].shape == (10, 16)
    assert sorted(store._open) == [1]


def test_mapped_rows_take_no_memory_until_touched(tmp_path):
    """80 MiB of rows: opening all and reading one adds far less to the process."""
    file = tmp_path / "g"
    p = Problem(nn.Linear(1, 1), "mse", (torch.zeros(40, 1), torch.zeros(40, 1)))
    store = GradientStore.build(p, file, project=None)
    store.manifest |= {"width": 2**19, "examples": 40}
    from gradmatch.core.store import save_tensors

    big = {"features": torch.ones(40, 2**19), "norms": torch.zeros(40).double()}
    save_tensors(_gradient_store.part_file(file, 0), big)
    del big
    store._open.clear()

    def resident() -> int:
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
        return int(line.split()[1])

    before = resident()
    assert float(store[7].sum()) == 2**19
    assert resident() - before < 20_000


# --- interruptions, shards, workers ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [problem, gpt2])
def test_a_run_goes_on_and_two_shards_merged_are_one_store(make, tmp_path):
    GradientStore.build(make(), tmp_path / "one", project=16, part_rows=4)
    whole = content(tmp_path / "one")
    assert len(whole) > 3
    half = [
        GradientStore.build(make(), tmp_path / f"s{k}", project=16, part_rows=4, shard=(k, 2)) for k in (0, 1)
    ]
    assert not half[0].complete
    assert sorted(half[0].present() + half[1].present()) == list(range(len(whole) - 1))
    with pytest.raises(InputError, match=r"lacks part-000001.*merge the other shards"):
        half[0][:]
    merged = GradientStore.merge(tmp_path / "both", *half)
    assert merged.complete
    assert content(tmp_path / "both") == whole
    GradientStore.build(make(), tmp_path / "s0", project=16, part_rows=4)  # a shard completed in place
    assert content(tmp_path / "s0") == whole
    (tmp_path / "one" / "part-000000.safetensors").unlink()
    GradientStore.build(make(), tmp_path / "one", project=16, part_rows=4)
    assert content(tmp_path / "one") == whole


def test_the_number_of_workers_is_chosen_by_what_is_left(tmp_path):
    began = time.perf_counter()
    GradientStore.build(problem(), tmp_path / "auto", project=16, part_rows=8, workers=None)
    assert time.perf_counter() - began < 3  # no process was started for a moment's work
    GradientStore.build(problem(), tmp_path / "one", project=16, part_rows=8)
    assert content(tmp_path / "auto") == content(tmp_path / "one")


# --- refusals ------------------------------------------------------------------------------------------------


def test_a_store_of_another_problem_or_setting_is_refused(tmp_path):
    made = problem()
    GradientStore.build(made, tmp_path / "g", project=16)
    assert len(GradientStore(tmp_path / "g", made)) == 50
    loader = DataLoader(TensorDataset(*images()), batch_size=13)
    GradientStore(tmp_path / "g", Problem(net(), "cross_entropy", loader))  # same examples, batched otherwise
    other = net()
    with torch.no_grad():
        other.classifier.bias[0] += 1e-3
    x, y = images()
    moved = x.clone()
    moved[7, 0, 0, 0] += 1
    for changed, word in (
        (Problem(other, "cross_entropy", (x, y)), "model"),
        (Problem(nn.Sequential(net(), nn.ReLU()), "cross_entropy", (x, y)), "blocks"),
        (Problem(net(), "cross_entropy", (moved, y)), "data"),
        (Problem(net(), "cross_entropy", (x, y.flip(0))), "data"),
        (Problem(net(), "cross_entropy", (x[:40], y[:40])), "examples"),
        (Problem(net(), "cross_entropy", (x, y), select="classifier"), "blocks"),
        (Problem(net(), lambda z, t: z[:, 0], (x, y)), "loss"),
    ):
        with pytest.raises(InputError, match=f"gradients with {word}"):
            GradientStore(tmp_path / "g", changed)
    for options, word in (
        ({"project": 32}, "width"),
        ({"project": 16, "seed": 1}, "projection"),
        ({"project": 16, "dtype": "float16"}, "dtype"),
        ({"project": 16, "part_rows": 3}, "parts"),
    ):
        with pytest.raises(InputError, match=f"gradients with {word}"):
            GradientStore.build(problem(), tmp_path / "g", **options)
    with pytest.raises(InputError, match="gradients with batches"):
        GradientStore.build(problem(batch_size=50), tmp_path / "g", project=16, part_rows=512)
    GradientStore.build(problem(), tmp_path / "h", project=32)
    with pytest.raises(InputError, match="width"):
        GradientStore.merge(tmp_path / "m", tmp_path / "g", tmp_path / "h")
    assert not (tmp_path / "m").exists()


def test_activation_functions_count_as_the_model(tmp_path):
    x, y = images()
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 3), act) for act in (nn.ReLU(), nn.Tanh())]
    nets[1].load_state_dict(nets[0].state_dict())
    GradientStore.build(Problem(nets[0], "cross_entropy", (x, y)), tmp_path / "g", project=16)
    with pytest.raises(InputError, match="gradients with model"):
        GradientStore(tmp_path / "g", Problem(nets[1], "cross_entropy", (x, y)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"project": 30}, "multiple of 4"),
        ({"project": 0}, "project is 0"),
        ({"project": 16, "seed": -1}, "seed is -1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"part_rows": 0}, "part_rows is 0"),
        ({"shard": (2, 2)}, "shard is 2"),
        ({"shard": (0, 0)}, "shard is 0"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_bad_options_are_refused(options, says, tmp_path):
    with pytest.raises(InputError, match=says):
        GradientStore.build(problem(), tmp_path / "g", **options)


def test_gradients_that_are_not_a_function_of_the_example_are_refused(tmp_path):
    x, y = images()
    noisy = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))
    normed = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))
    for model, name in ((noisy, "dropout"), (normed, "batchnorm")):
        with pytest.raises(InputError, match=f"active {name}"):
            GradientStore.build(
                Problem(model, "cross_entropy", (x, y), allow=name), tmp_path / "g", project=16
            )
    shuffled = DataLoader(TensorDataset(x, y), shuffle=True)
    with pytest.raises(InputError, match="fingerprint"):
        GradientStore.build(
            Problem(net(), "cross_entropy", shuffled, allow="order"), tmp_path / "g", project=16
        )
    broken = net()
    with torch.no_grad():
        broken.classifier.weight[0, 0] = 1e30
    with pytest.raises(InputError, match="gradients"):
        GradientStore.build(Problem(broken, "cross_entropy", (x * 1e20, y)), tmp_path / "n", project=16)


def test_no_store_a_file_and_a_broken_part(tmp_path):
    with pytest.raises(InputError, match="holds no gradients"):
        GradientStore(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        GradientStore.build(problem(), tmp_path / "file", project=16)
    GradientStore.build(problem(), tmp_path / "g", project=16)
    part = tmp_path / "g" / "part-000000.safetensors"
    part.write_bytes(b"not tensors")
    with pytest.raises(InputError, match="not a readable part"):
        GradientStore(tmp_path / "g")[0]
    from gradmatch.core.store import save_tensors

    save_tensors(part, {"features": torch.zeros(3, 16), "norms": torch.zeros(3)})
    with pytest.raises(InputError, match="has shape"):
        GradientStore(tmp_path / "g")[0]


def test_nothing_of_the_model_changes_and_selection_reads_the_rows(tmp_path):
    """A consumer: dataset quantization on the stored rows."""
    from gradmatch.data import DQ

    p = problem()
    model = p.module.train()
    state = torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    store = GradientStore.build(p, tmp_path / "g", project=64)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(q.grad is None for q in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    kept = DQ(n_bins=2, ratio=0.5, features=store[:]).select(images())
    assert len(kept) == 24
