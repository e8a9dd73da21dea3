"""The synthetic set, its evaluator, and the resumable loop, on a toy distiller."""

import numpy as np
import pytest
import torch
from torch import nn

from gradmatch.core.checks import InputError
from gradmatch.data import DCC, TESLA
from gradmatch.data._common import (
    FILE,
    Distiller,
    SyntheticDataset,
    channel_moments,
    evaluate,
    random_subset,
    standardise,
    unstandardise,
)

GEN = torch.Generator().manual_seed(0)
X = torch.rand(30, 1, 4, 4, generator=GEN) * 5 + 2
Y = torch.arange(30) % 3


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


class Toy(Distiller):
    """Pulls images towards random real ones: draws at every step, so a lost generator state shows."""

    def start(self, job):
        return {
            "x": job.images.clone(),
            "v": torch.zeros_like(job.images),
            "draw": torch.Generator().manual_seed(1),
        }

    def step(self, job, state, k):
        pick = torch.randint(len(job.real), (len(job.images),), generator=state["draw"])
        state["v"] = 0.5 * state["v"] + job.real.x[pick] - state["x"]
        state["x"] = state["x"] + 0.1 * state["v"]
        return {"loss": float(state["v"].square().mean())}

    def images_of(self, job, state):
        return state["x"]


def synthetic(**changes):
    given = {
        "images": X[:6],
        "labels": Y[:6],
        "classes": 3,
        "lr": 0.02,
        "mean": (1.0,),
        "std": (2.0,),
        "meta": {"a": 1},
    }
    return SyntheticDataset(**(given | changes))


@pytest.mark.parametrize("labels", [Y[:6], torch.full((6, 3), 1 / 3)], ids=["hard", "soft"])
def test_save_and_load_give_the_same_set(tmp_path, labels):
    original = synthetic(labels=labels)
    original.save(tmp_path / "out")
    back = SyntheticDataset.load(tmp_path / "out")
    assert torch.equal(back.images, original.images)
    assert torch.equal(back.labels, original.labels)
    assert (back.classes, back.lr, back.mean, back.std, back.meta) == (3, 0.02, (1.0,), (2.0,), {"a": 1})
    assert back.soft == (labels.ndim == 2)


def test_it_is_a_torch_dataset():
    batches = list(torch.utils.data.DataLoader(synthetic(), batch_size=4))
    assert [len(y) for _, y in batches] == [4, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), X[:6])


def test_refused_sets(tmp_path):
    for changes, words in (
        ({"labels": Y[:5]}, "equally many"),
        ({"images": X[:6] / 0}, "NaN or infinite"),
        ({"labels": torch.zeros(6, 4)}, "one for each of 3 classes"),
    ):
        with pytest.raises(InputError, match=words):
            synthetic(**changes)
    from gradmatch.core.store import save_tensors

    save_tensors(tmp_path / FILE, {"w": X})
    with pytest.raises(InputError, match="does not hold a synthetic set"):
        SyntheticDataset.load(tmp_path)


def test_contact_sheet_shows_a_row_a_class(tmp_path):
    sheet = synthetic().contact_sheet(tmp_path / "sheet.png", real=(X, Y))
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert sheet.dtype == np.uint8
    rows = 3
    assert sheet.shape[0] % rows == 0
    assert sheet.shape[0] // rows > 4
    assert sheet.std() > 10


def test_standardise_and_back():
    x = torch.randn(20, 3, 5, 5, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1]).reshape(3, 1, 1) + 4
    mean, std = channel_moments(x)
    z = standardise(x, mean, std)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(z.transpose(0, 1).flatten(1).std(1), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(unstandardise(z, mean, std), x)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_run_resumed_equals_an_unbroken_one(tmp_path, stop):
    toy = Toy(per_class=2, steps=7, seed=3)
    whole = toy.distill((X, Y), network)
    broken = Toy(per_class=2, steps=7, seed=3)
    broken.checkpoint_seconds = 0

    def kill(done, total, figures):
        if done == stop + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.distill((X, Y), network, out=tmp_path / "run", progress=kill)
    seen = []
    again = broken.distill(
        (X, Y), network, out=tmp_path / "run", resume=True, progress=lambda done, total, f: seen.append(done)
    )
    assert seen[0] == stop + 1
    assert torch.equal(again.images, whole.images)
    assert torch.equal(SyntheticDataset.load(tmp_path / "run").images, whole.images)
    assert torch.equal(
        broken.distill((X, Y), network, out=tmp_path / "run", resume=True).images, whole.images
    )


def test_resume_refuses_other_data_and_other_options(tmp_path):
    Toy(per_class=2, steps=2).distill((X, Y), network, out=tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        Toy(per_class=2, steps=2).distill((X, Y), network, out=tmp_path / "run")
    with pytest.raises(InputError, match="steps=2, and this one has steps=3"):
        Toy(per_class=2, steps=3).distill((X, Y), network, out=tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="data="):
        Toy(per_class=2, steps=2).distill((X + 1, Y), network, out=tmp_path / "run", resume=True)


def test_result_is_in_the_scale_of_the_data_and_starts_where_told():
    start = Toy(per_class=2, steps=0).distill((X, Y), network)
    assert all(any(torch.allclose(image, real, atol=1e-5) for real in X) for image in start.images)
    assert torch.equal(start.labels, torch.tensor([0, 0, 1, 1, 2, 2]))
    mean = Toy(per_class=1, steps=0, init="mean").distill((X, Y), network)
    assert torch.allclose(mean.images[1], X[Y == 1].mean(0), atol=1e-5)
    noise = Toy(per_class=1, steps=0, init="noise").distill((X, Y), network)
    assert not torch.allclose(noise.images, start.images[::2])
    onward = Toy(per_class=1, steps=0).distill((X, Y), network, init=start)
    assert torch.allclose(onward.images, start.images[::2], atol=1e-5)


def test_distill_refusals(tmp_path):
    for options, data, net, init, words in (
        ({}, (X, Y), lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), None, "network has 4 outputs"),
        ({"per_class": 11}, (X, Y), network, None, "class 0 has 10 samples"),
        ({}, (X[:, :, :2], Y), network, None, r"network does not take inputs of shape \(1, 2, 4\)"),
        ({}, (X.reshape(30, 1, 2, 8), Y), network, synthetic(), "init holds images"),
        ({"per_class": 3}, (X, Y), network, synthetic(), "per_class 3 needs that many"),
        ({}, (X, Y), network, tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(InputError, match=words):
            Toy(**({"per_class": 2, "steps": 1} | options)).distill(data, net, init=init)
    for options, words in (
        ({"per_class": 0}, "per_class"),
        ({"steps": -1}, "steps"),
        ({"init": "zeros"}, "init"),
    ):
        with pytest.raises(InputError, match=words):
            Toy(**options)


def test_non_finite_figures_stop_the_run_with_the_step():
    class Bad(Toy):
        def step(self, job, state, k):
            return {"loss": float("nan") if k == 2 else 0.0}

    with pytest.raises(InputError, match="loss became non-finite at step 2"):
        Bad(per_class=1, steps=5).distill((X, Y), network)


def separable(n, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 1, 4, 4, generator=generator) * 0.3
    x.flatten(1)[torch.arange(n), y] += 3
    return x, y


def test_evaluator_learns_what_can_be_learned_and_is_seeded():
    subset = random_subset(separable(60, 0), per_class=5)
    first = evaluate(subset, network, separable(90, 1), networks=2, epochs=40, lr=0.1)
    again = evaluate(subset, network, separable(90, 1), networks=2, epochs=40, lr=0.1)
    assert first.accuracies == again.accuracies
    assert first.mean > 0.95
    shuffled = SyntheticDataset(subset.images, (subset.labels + 1) % 3, 3, None, subset.mean, subset.std)
    assert evaluate(shuffled, network, separable(90, 1), networks=2, epochs=40, lr=0.1).mean < 0.1


def test_evaluator_equals_a_plain_loop():
    subset = random_subset(separable(60, 0), per_class=3)
    x_test, y_test = separable(90, 1)
    got = evaluate(subset, network, (x_test, y_test), networks=1, epochs=6, lr=0.05, seed=4, program="loop")
    from gradmatch.core.ensemble import train_ensemble

    ensemble = train_ensemble(network, (subset.standardised(), subset.labels), 1, epochs=6, lr=0.05, seed=4)
    logits = ensemble.modules()[0](standardise(x_test, subset.mean, subset.std))
    assert got.accuracies[0] == pytest.approx(float((logits.argmax(1) == y_test).float().mean()))


def test_networks_follow_float64_data():
    """As float64 is what NumPy and scikit-learn give; a factory's own networks are in float32."""
    for made in (network, network()):
        for method in (DCC(per_class=1, steps=3, inner_loop=2, net_epochs=1), _matcher()):
            found = method.distill((X.double().numpy(), Y.numpy()), made)
            assert found.images.dtype == torch.float64
    assert evaluate(found, network, (X, Y), networks=1, epochs=2).accuracies


def test_experts_and_images_read_an_iterator_once():
    batches = ((X[i : i + 7], Y[i : i + 7]) for i in range(0, 30, 7))
    assert torch.equal(
        _matcher().distill(batches, network).images, _matcher().distill((X, Y), network).images
    )


def _matcher():
    experts = {"n_experts": 1, "epochs": 2, "batch_size": 8, "lr": 0.1}
    return TESLA(
        per_class=1, steps=2, syn_steps=2, expert_epochs=1, max_start_epoch=2, lr_syn=0.1, experts=experts
    )


def test_learned_rate_is_used_and_soft_labels_train():
    subset = random_subset(separable(60, 0), per_class=5)
    soft = torch.nn.functional.one_hot(subset.labels, 3).float() * 0.7 + 0.1
    frozen = SyntheticDataset(subset.images, soft, 3, 1e-9, subset.mean, subset.std)
    assert evaluate(frozen, network, separable(90, 1), networks=2, epochs=5).mean < 0.8
    moving = SyntheticDataset(subset.images, soft, 3, 0.1, subset.mean, subset.std)
    assert evaluate(moving, network, separable(90, 1), networks=2, epochs=40).mean > 0.95
    with pytest.raises(InputError, match="network has 5 outputs"):
        evaluate(frozen, lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), separable(9, 1))


def test_random_subset_draws_without_replacement_and_by_class():
    a, b = random_subset((X, Y), 4, seed=0), random_subset((X, Y), 4, seed=1)
    assert torch.bincount(a.labels).tolist() == [4, 4, 4]
    assert len(a.images.flatten(1).unique(dim=0)) == 12
    assert not torch.equal(a.images, b.images)
