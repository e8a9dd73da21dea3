"""Every check, refusal and named fault of Fisher-weighted averaging."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core.checks import InputError
from gradmatch.core.state_dicts import open_state_dict
from gradmatch.core.store import RunFolder
from gradmatch.weights import fisher_diagonal, merge, search

Dict = dict[str, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def models(count: int = 3) -> list[Dict]:
    """Fine-tuned copies: a common start and small steps."""
    return [
        {"w": randn(5, 4) + 0.1 * randn(5, 4, seed=k + 1), "b": randn(5) + 0.1 * randn(5, seed=k + 9)}
        for k in range(count)
    ]


def fishers(count: int = 3, low: float = 0.01) -> list[Dict]:
    return [
        {"w": low + randn(5, 4, seed=20 + k) ** 2, "b": low + randn(5, seed=30 + k) ** 2}
        for k in range(count)
    ]


def scaled(fisher: Dict, by: float) -> Dict:
    return {k: v * by for k, v in fisher.items()}


def close(a: Dict, b: Dict, atol: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=0, atol=atol)


def norm(fisher: Dict) -> float:
    return float(sum(v.double().square().sum() for v in fisher.values())) ** 0.5


def formula(
    thetas: list[Dict], fs: list[Dict], weights: list[float], normalize: bool = True, floor: float = 1e-6
) -> Dict:
    """The closed form in double precision, the floor under the target's raw Fisher."""
    clamped = [{k: v.clamp(min=floor) for k, v in f.items()} if i == 0 else f for i, f in enumerate(fs)]
    w = [x / norm(f) if normalize else x for x, f in zip(weights, fs, strict=True)]
    return {
        k: sum(a * f[k] * t[k] for a, f, t in zip(w, clamped, thetas, strict=True))
        / sum(a * f[k] for a, f in zip(w, clamped, strict=True))
        for k in thetas[0]
    }


# --- merging -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_closed_form(normalize) -> None:
    weights = [0.2, 0.5, 0.3]
    close(
        merge(models(), fishers(), weights, normalize=normalize),
        formula(models(), fishers(), weights, normalize),
    )


@pytest.mark.parametrize("value", [1.0, 1e-3, 250.0])
def test_equal_fishers_average(value) -> None:
    same = [{k: torch.full_like(v, value) for k, v in m.items()} for m in models()]
    plain = merge(models(), weights=[1, 2, 5])
    close(merge(models(), same, [1, 2, 5]), plain, 1e-7)
    close(
        plain,
        {k: sum(w * m[k] for w, m in zip((0.125, 0.25, 0.625), models(), strict=True)) for k in ("w", "b")},
        1e-15,
    )


def test_one_model_stays_itself_and_all_the_weight_gives_that_model_exactly() -> None:
    for fisher in (None, fishers(1)):
        close(merge(models(1), fisher), models(1)[0], 0)
    for k in range(3):
        weights = [float(i == k) for i in range(3)]
        for fisher in (None, fishers()):
            close(merge(models(), fisher, weights), models()[k], 0)


def test_the_scale_of_a_donors_fisher_does_not_matter() -> None:
    first = merge(models(), fishers())
    close(merge(models(), [fishers()[0], scaled(fishers()[1], 1000), fishers()[2]]), first, 1e-14)
    # not so for the target, on whose raw Fisher the floor acts, but without a floor
    tiny = [{k: v * 1e-7 for k, v in f.items()} for f in fishers(low=0.0)]
    raised = [scaled(tiny[0], 1000), *tiny[1:]]
    assert float((merge(models(), raised)["w"] - merge(models(), tiny)["w"]).abs().max()) > 1e-3
    close(merge(models(), raised, floor=0), merge(models(), tiny, floor=0))
    donor = [tiny[0], scaled(tiny[1], 1000), tiny[2]]
    close(merge(models(), donor), merge(models(), tiny))
    changed = merge(models(), donor, favor_target=False)
    assert float((changed["w"] - merge(models(), tiny, favor_target=False)["w"]).abs().max()) > 1e-3
    close(
        merge(models(), donor, favor_target=False, floor=0),
        merge(models(), tiny, favor_target=False, floor=0),
    )
    assert (
        float(
            (merge(models(), donor, normalize=False)["w"] - merge(models(), tiny, normalize=False)["w"])
            .abs()
            .max()
        )
        > 1e-3
    )


def test_where_no_model_cares_the_targets_value_stays_bit_for_bit() -> None:
    fs, weights = fishers(), [0.2, 0.5, 0.3]
    for f in fs:
        f["w"][1:3] = 0
    merged = merge(models(), fs, weights)
    assert torch.equal(merged["w"][1:3], models()[0]["w"][1:3])
    for normalize in (True, False):
        w = torch.tensor(
            [x / norm(f) if normalize else x for x, f in zip(weights, fs, strict=True)], dtype=torch.double
        )
        mean = sum(a * m["w"][1:3] for a, m in zip(w / w.sum(), models(), strict=True))
        merged = merge(models(), fs, weights, favor_target=False, normalize=normalize)
        torch.testing.assert_close(merged["w"][1:3], mean, rtol=0, atol=1e-12)


def test_no_weight_and_no_fisher_is_the_target_not_nan() -> None:
    """The published code divides by zero at the end of its own grid."""
    fs = fishers(2)
    fs[1]["w"][0] = 0
    for normalize in (True, False):
        for floor in (1e-6, 0.0):
            merged = merge(models(2), fs, [0, 1], normalize=normalize, floor=floor)
            assert torch.equal(merged["w"][0], models()[0]["w"][0])
            assert torch.equal(merged["w"][1:], models()[1]["w"][1:])


def test_the_order_of_models_does_not_matter_without_a_favoured_target() -> None:
    order = [2, 0, 1]
    options = {"favor_target": False}
    first = merge(models(), fishers(), [0.2, 0.5, 0.3], **options)
    again = merge([models()[k] for k in order], [fishers()[k] for k in order], [0.3, 0.2, 0.5], **options)
    close(again, first)


def test_heads_integers_and_statistics_are_the_targets() -> None:
    thetas, fs = models(2), fishers(2)
    for k, m in enumerate(thetas):
        m |= {
            "steps": torch.tensor([k, 7]),
            "bn.running_mean": randn(3, seed=k),
            "bn.num_batches_tracked": torch.tensor(k),
        }
        m["head.weight"] = randn(3 + k, 4, seed=k)
    merged = merge(thetas, fs, mergeable="^(w|b)$")
    assert all(torch.equal(merged[k], thetas[0][k]) for k in thetas[0] if k not in ("w", "b"))
    close({k: merged[k] for k in ("w", "b")}, formula(models(2), fishers(2), [0.5, 0.5]))
    by_function = merge(thetas, fs, mergeable=lambda name: not name.startswith("head"))
    close(by_function, merged, 0)
    averaged = merge(thetas, fs, mergeable="^(w|b)$", buffers="average", weights=[1, 3])
    expected = 0.25 * thetas[0]["bn.running_mean"] + 0.75 * thetas[1]["bn.running_mean"]
    torch.testing.assert_close(averaged["bn.running_mean"], expected)
    assert int(averaged["bn.num_batches_tracked"]) == 0


def test_types_are_kept_and_half_precision_is_merged_in_single() -> None:
    a = {"w": torch.full((1000,), 1.0).bfloat16(), "h": torch.ones(3).half()}
    b = {"w": torch.full((1000,), 1.0078125).bfloat16(), "h": 3 * torch.ones(3).half()}
    fs = [{"w": torch.full((1000,), 1e-9), "h": torch.full((3,), 1e-9)}] * 2
    for fisher in (None, fs):
        merged = merge([a, b], fisher, floor=0)
        assert merged["w"].dtype == torch.bfloat16
        assert merged["h"].dtype == torch.float16
        assert torch.equal(merged["h"], 2 * torch.ones(3).half())
    with pytest.warns(UserWarning, match="cosine"):
        merge([{"w": torch.eye(4)}, {"w": torch.eye(4).flip(0)}])


def test_modules_give_a_new_module_and_stay_untouched() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    nets = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        for k, net in enumerate(nets):
            for p in net.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
    before = copy.deepcopy(nets)
    merged = merge(nets, weights=[1, 1])
    torch.testing.assert_close(merged[0].weight, (nets[0][0].weight + nets[1][0].weight) / 2)
    assert merged.training
    for old, new in zip(before, nets, strict=True):
        close(dict(old.state_dict()), dict(new.state_dict()), 0)
    assert torch.equal(merged[1].running_mean, nets[0][1].running_mean)
    x = 3 + torch.randn(64, 3)
    anew = merge(nets, buffers=[(x, None)])
    torch.testing.assert_close(anew[1].running_mean, anew[0](x).mean(0), rtol=1e-4, atol=1e-5)
    assert anew.training
    labels = torch.zeros(64)
    for data in (x, [x], (x, labels), TensorDataset(x, labels), DataLoader(TensorDataset(x), batch_size=64)):
        again = merge(nets, buffers=data)
        torch.testing.assert_close(again[1].running_mean, anew[1].running_mean)
    plain = [nn.Linear(2, 2) for _ in range(2)]
    plain[1].load_state_dict(plain[0].state_dict())
    assert torch.equal(merge(plain, buffers=(torch.zeros(3, 2), torch.zeros(3))).weight, plain[0].weight)


def test_tied_weights_stay_tied_and_are_merged_once() -> None:
    class Tied(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.embed.weight.data = (randn(5, 3) + 0.1 * randn(5, 3, seed=seed)).float()
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).mean(1))

    nets = [Tied(1), Tied(2)]
    ids = torch.randint(0, 5, (12, 4), generator=torch.Generator().manual_seed(0))
    fs = [fisher_diagonal(n, (ids, torch.zeros(12))) for n in nets]
    assert list(fs[0]) == ["embed.weight"]
    merged = merge(nets, fs)
    assert merged.head.weight is merged.embed.weight
    as_dict = merge([n.state_dict() for n in nets], fs)
    assert as_dict["head.weight"].data_ptr() == as_dict["embed.weight"].data_ptr()
    assert torch.equal(as_dict["embed.weight"], merged.embed.weight)
    apart = {k: t.clone() for k, t in nets[1].state_dict().items()}  # saved twice, still one
    assert torch.equal(merge([nets[0], apart]).head.weight, merge(nets).embed.weight)
    apart["head.weight"] += 1
    with pytest.raises(InputError, match="ties 'head"):
        merge([nets[0], apart])
    assert merge([nets[0], apart], mergeable="embed").head.weight.shape == (5, 3)


@pytest.mark.parametrize(
    ("thetas", "options", "word"),
    [
        ([{"a": torch.ones(2)}, {"b": torch.ones(2)}], {}, "models[1] has no 'a'"),
        ([{"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}], {}, "models[0] has no 'b'"),
        ([{"a": torch.ones(2)}, {"a": torch.ones(3)}], {}, "'a' has shape (3,)"),
        (models(2), {"weights": [1, -1]}, "weights[1] is -1"),
        (models(2), {"weights": [1, float("nan")]}, "weights[1] is nan"),
        (models(2), {"weights": [0, 0]}, "weights are all 0"),
        (models(2), {"weights": [1]}, "weights has 1 entries"),
        (models(2), {"fishers": fishers(3)}, "fishers has 3 entries"),
        (models(2), {"fishers": [fishers()[0], {"w": torch.ones(5, 4)}]}, "fishers[1] has no 'b'"),
        (models(2), {"fishers": [fishers()[0], {"w": torch.ones(4, 5), "b": torch.ones(5)}]}, "has shape (4, 5)"),
        (models(2), {"fishers": [fishers()[0], scaled(fishers()[1], -1)]}, "negative or not finite"),
        (models(2), {"fishers": [fishers()[0], scaled(fishers()[1], float("nan"))]}, "negative or not finite"),
        (models(2), {"fishers": [fishers()[0], scaled(fishers()[1], float("inf"))]}, "negative or not finite"),
        (models(2), {"fishers": [fishers()[0], scaled(fishers()[1], 0)]}, "fishers[1] is 0 everywhere"),
        ([models()[0], {k: v * float("nan") for k, v in models()[1].items()}], {}, "merged"),
        (models(2), {"mergeable": "nothing"}, "mergeable leaves no parameter"),
        (models(2), {"mergeable": "("}, "no regular expression"),
        (models(2), {"buffers": "mean"}, "buffers is 'mean'"),
        (models(2), {"floor": -1}, "floor is -1"),
        ([], {}, "at least one model"),
        ("folder", {}, "at least one model"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(thetas, options, word) -> None:
    with pytest.raises(InputError) as error:
        merge(thetas, **options)
    assert word in str(error.value)


def test_adapters_merge_only_over_a_shared_a() -> None:
    shared = randn(2, 4)
    a = [
        {"q.lora_A.weight": shared, "q.lora_B.weight": randn(4, 2) + 0.1 * randn(4, 2, seed=k)}
        for k in (1, 2)
    ]
    merged = merge(a)
    product = sum(m["q.lora_B.weight"] @ shared for m in a) / 2
    torch.testing.assert_close(merged["q.lora_B.weight"] @ merged["q.lora_A.weight"], product)
    a[1]["q.lora_A.weight"] = shared + 0.01
    with pytest.raises(InputError, match="adapters of different A"):
        merge(a)


# --- the Fisher --------------------------------------------------------------------------------------------


def softmax_linear(n: int = 40, classes: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Linear(4, classes).double()
    x = randn(n, 4, seed=3)
    return net, x, torch.softmax(net(x), 1).detach()


class Convolutional(nn.Module):
    """With dropout and batch norm, both of which must be off."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
        )
        self.head = nn.Linear(3 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def looped(net: nn.Module, x: Tensor) -> Dict:
    """The definition: one backward pass for every example and class."""
    total = {k: torch.zeros_like(p) for k, p in net.named_parameters()}
    for i in range(len(x)):
        logp = torch.log_softmax(net(x[i : i + 1]), 1)[0]
        for c in range(len(logp)):
            grads = torch.autograd.grad(logp[c], list(net.parameters()), retain_graph=True)
            for k, g in zip(total, grads, strict=True):
                total[k] += logp[c].exp().detach() * g.square() / len(x)
    return total


def test_a_softmax_linear_model_has_its_hessians_diagonal() -> None:
    net, x, p = softmax_linear()
    found = fisher_diagonal(net, (x, torch.zeros(40)))
    torch.testing.assert_close(found["weight"], ((p * (1 - p)).T @ x.square()) / 40, rtol=0, atol=1e-14)
    torch.testing.assert_close(found["bias"], (p * (1 - p)).mean(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_it_is_the_loop_of_single_examples_at_any_batch_size(batch) -> None:
    """Not the square of a batch's mean gradient, nor of a sum over examples and classes, as copied code has it."""
    torch.manual_seed(0)
    net = Convolutional().double().eval()
    x = randn(9, 1, 6, 6)
    expected = looped(net, x)
    net.train()
    found = fisher_diagonal(net, DataLoader(TensorDataset(x, torch.zeros(9)), batch_size=batch))
    for k, value in expected.items():
        torch.testing.assert_close(found[k], value, rtol=1e-8, atol=1e-13)
    assert all(m.training for m in net.modules())
    assert all(
        torch.equal(m.running_mean, torch.zeros(3).double())
        for m in net.modules()
        if isinstance(m, nn.BatchNorm2d)
    )
    net.eval()
    logp = torch.log_softmax(net(x), 1)
    mixed = torch.autograd.grad((logp * logp.exp().detach().sqrt()).sum(), net.head.weight)[0].square() / 9
    assert float((mixed - expected["head.weight"]).abs().max()) > 0.1 * float(expected["head.weight"].max())


def test_sampled_labels_converge_and_are_seeded() -> None:
    net, x, _ = softmax_linear(20)
    exact = fisher_diagonal(net, (x, torch.zeros(20)))
    options = {"labels": "sample", "n_samples": 1500}
    sampled = fisher_diagonal(net, (x, torch.zeros(20)), seed=1, **options)
    for k in exact:
        assert float((sampled[k] / exact[k] - 1).abs().max()) < 0.05
    again = fisher_diagonal(net, (x, torch.zeros(20)), seed=1, **options)
    other = fisher_diagonal(net, (x, torch.zeros(20)), seed=2, **options)
    assert torch.equal(again["weight"], sampled["weight"])
    assert not torch.equal(other["weight"], sampled["weight"])


def test_the_empirical_fisher_is_another_quantity_and_needs_labels() -> None:
    net, x, p = softmax_linear()
    y = torch.arange(40) % 3
    found = fisher_diagonal(net, (x, y), labels="empirical")
    score = torch.nn.functional.one_hot(y, 3) - p
    torch.testing.assert_close(found["weight"], score.square().T @ x.square() / 40, rtol=0, atol=1e-14)
    assert not torch.allclose(found["weight"], fisher_diagonal(net, (x, y))["weight"])
    with pytest.raises(InputError, match="'empirical', which needs class ids"):
        fisher_diagonal(net, (x, torch.zeros(40)), labels="empirical")
    with pytest.raises(InputError, match=r"must be in 0\.\.2"):
        fisher_diagonal(net, (x, y + 1), labels="empirical")


def test_only_the_first_examples_are_used_of_any_data() -> None:
    net, x, _ = softmax_linear()
    y = torch.zeros(40)
    expected = fisher_diagonal(net, (x[:10], y[:10]))
    sets = [
        (x, y),
        x,
        {"input": x, "labels": y},
        TensorDataset(x, y),
        DataLoader(TensorDataset(x, y), batch_size=7),
    ]
    sets += [[x[:7], x[7:20], x[20:]]]
    for data in sets:
        found = fisher_diagonal(net, data, n_examples=10, batch_size=4)
        torch.testing.assert_close(found["weight"], expected["weight"])
    by_call = fisher_diagonal(
        net, {"pixels": x, "labels": y}, n_examples=10, forward=lambda m, batch: m(batch["pixels"])
    )
    torch.testing.assert_close(by_call["weight"], expected["weight"])
    assert list(by_call) == ["weight", "bias"]
    shuffled = DataLoader(TensorDataset(x, y), batch_size=40, shuffle=True)
    torch.testing.assert_close(
        fisher_diagonal(net, shuffled)["weight"], fisher_diagonal(net, (x, y))["weight"]
    )


def test_parameters_are_chosen_by_pattern_names_or_function() -> None:
    net, x, _ = softmax_linear()
    for params in ("weight", ["weight"], lambda name: name == "weight"):
        assert list(fisher_diagonal(net, (x, torch.zeros(40)), params=params)) == ["weight"]
    with pytest.raises(InputError, match="params chooses none"):
        fisher_diagonal(net, (x, torch.zeros(40)), params="nothing")


class Own(nn.Module):
    """A layer of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(randn(4, 3)), nn.Parameter(randn(3, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("make", [Own, lambda: OwnLinear(4, 3).double()])
def test_layers_of_no_known_kind(make, wrapped) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.Tanh()) if wrapped else make()
    x = randn(9, 4, seed=2)
    found = fisher_diagonal(net, x, batch_size=4)
    for name, p in net.named_parameters():
        wanted = torch.zeros_like(p)
        for row in x:
            logs = torch.log_softmax(net(row[None])[0], 0)
            for log in logs:
                wanted += log.detach().exp() * torch.autograd.grad(log, p, retain_graph=True)[0] ** 2 / len(x)
        torch.testing.assert_close(found[name], wanted)


def test_what_has_no_fisher_is_refused() -> None:
    net, x, _ = softmax_linear()

    class NoLogits(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"hidden": super().forward(x)}

    with pytest.raises(InputError, match="must return logits"):
        fisher_diagonal(NoLogits(4, 3).double(), (x, torch.zeros(40)))
    for empty in (DataLoader(TensorDataset(x[:0], x[:0])), [], TensorDataset(x[:0], x[:0]), (x[:0], x[:0])):
        with pytest.raises(InputError, match="empty"):
            fisher_diagonal(net, empty)
    with pytest.raises(InputError, match="labels is 'true'"):
        fisher_diagonal(net, (x, torch.zeros(40)), labels="true")
    with pytest.raises(InputError, match="use labels='sample'"):
        fisher_diagonal(nn.Linear(4, 5000).double(), (x, torch.zeros(40)))
    for labels in ("exact", "sample", "empirical"):
        with pytest.raises(InputError, match="one class, shape"):
            fisher_diagonal(nn.Linear(4, 1).double(), (x, torch.zeros(40).long()), labels=labels)
    with pytest.raises(InputError, match="needs class ids"):
        fisher_diagonal(net, x, labels="empirical")
    with pytest.raises(InputError, match="walked again"):
        fisher_diagonal(net, iter([(x, x)]))


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path, monkeypatch) -> None:
    net, x, _ = softmax_linear()
    monkeypatch.setattr("time.monotonic", iter(range(0, 10**6, 60)).__next__)
    for labels in ("exact", "sample"):
        options = {"labels": labels, "batch_size": 8, "n_samples": 3}
        whole = fisher_diagonal(net, (x, torch.zeros(40)), **options)

        def stop(done: int, total: int) -> None:
            if done == 24:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fisher_diagonal(
                net, (x, torch.zeros(40)), run=RunFolder(tmp_path / labels, {}), progress=stop, **options
            )
        seen: list[int] = []
        again = fisher_diagonal(
            net, (x, torch.zeros(40)), run=RunFolder(tmp_path / labels, {}, resume=True),
            progress=lambda done, _, seen=seen: seen.append(done), **options,
        )  # fmt: skip
        assert seen == [32, 40]
        assert all(torch.equal(again[k], whole[k]) for k in whole)


# --- language models ---------------------------------------------------------------------------------------


def sequence_truth(logits: Tensor, model: nn.Module, counted: Tensor) -> Dict:
    """sum_t sum_c p (d log p_tc)^2 for one sequence, one backward for every position and class."""
    total = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    for t in torch.nonzero(counted).flatten().tolist():
        logp = torch.log_softmax(logits[0, t], 0)
        for c in range(len(logp)):
            grads = torch.autograd.grad(logp[c], list(model.parameters()), retain_graph=True)
            for k, g in zip(total, grads, strict=True):
                total[k] += logp[c].exp().detach() * g.square()
    return total


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def test_a_language_model_counts_positions_that_predict_a_token(gpt2) -> None:
    model = copy.deepcopy(gpt2).double()
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = fisher_diagonal(model, {"input_ids": ids, "attention_mask": mask})
    model.eval()
    total: Dict = {}
    for i, counted in enumerate(([1, 1, 1, 1, 0], [1, 1, 0, 0, 0])):
        logits = model(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]).logits
        for k, v in sequence_truth(logits, model, torch.tensor(counted)).items():
            total[k] = total.get(k, 0) + v / 2
    for k, v in total.items():
        torch.testing.assert_close(found[k], v, rtol=1e-6, atol=1e-12, msg=k)
    assert "lm_head.weight" not in found  # tied to the embedding, and one parameter
    sampled = fisher_diagonal(
        model, {"input_ids": ids, "attention_mask": mask}, labels="sample", n_samples=2000
    )
    big = total["transformer.h.0.mlp.c_fc.weight"] > 1e-3 * total["transformer.h.0.mlp.c_fc.weight"].max()
    ratio = sampled["transformer.h.0.mlp.c_fc.weight"][big] / total["transformer.h.0.mlp.c_fc.weight"][big]
    assert abs(float(ratio.mean()) - 1) < 0.05
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    empirical = fisher_diagonal(model, {"input_ids": ids, "labels": ids}, labels="empirical")
    by_hand = fisher_diagonal(model, {"input_ids": ids, "labels": shifted}, labels="empirical", causal=False)
    torch.testing.assert_close(empirical["transformer.wpe.weight"], by_hand["transformer.wpe.weight"])


def test_two_gpt2_saved_in_shards_are_merged_on_disk_as_in_memory(gpt2, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    batches = [
        {"input_ids": torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(s))}
        for s in (0, 1)
    ]
    nets, folders, fs = [], [], []
    for k in range(2):
        net = copy.deepcopy(gpt2).eval()
        with torch.no_grad():
            for p in net.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) * p.abs().mean()
        folder = tmp_path / f"model{k}"
        net.save_pretrained(folder, max_shard_size="3KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
        nets.append(net)
        folders.append(folder)
        fs.append(fisher_diagonal(net, [batches[k]], labels="sample", n_samples=4))
    for name, fisher in (("average", None), ("fisher", fs)):
        out = merge(folders, fisher, [0.3, 0.7], out=tmp_path / name, shard_bytes=3000)
        assert len(list(Path(out).glob("*.safetensors"))) > 1
        loaded = AutoModelForCausalLM.from_pretrained(out).eval()
        inside = merge(nets, fisher, [0.3, 0.7])
        logits, wanted = (m(**batches[0]).logits for m in (loaded, inside))
        assert bool(torch.isfinite(logits).all())
        assert torch.equal(logits, wanted)
        assert not torch.equal(logits, nets[0](**batches[0]).logits)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert list(open_state_dict(out).specs) == list(open_state_dict(folders[0]).specs)


# --- choosing lambda ---------------------------------------------------------------------------------------


def test_the_search_tries_a_grid_or_dirichlet_draws() -> None:
    torch.manual_seed(0)
    base = nn.Linear(2, 2, bias=False)
    nets = [copy.deepcopy(base) for _ in range(3)]
    for k, net in enumerate(nets):
        net.weight.data += 0.1 * k

    def nearness(net: nn.Module) -> float:
        return -float((net.weight - base.weight - 0.07).detach().abs().sum())

    scores, best = search(nets[:2], None, nearness, n=11)
    assert [w for w, _ in scores] == [(1 - k / 10, k / 10) for k in range(11)]
    assert best[0] == pytest.approx((0.3, 0.7))
    scores, best = search(nets, None, nearness, n=40, seed=3)
    assert len(scores) == 40
    assert all(sum(w) == pytest.approx(1) and min(w) >= 0 for w, _ in scores)
    assert best == max(scores, key=lambda s: s[1])
    assert scores == search(nets, None, nearness, n=40, seed=3)[0]
    with pytest.raises(InputError, match="for two models"):
        search(nets, None, nearness, mode="grid")
    with pytest.raises(InputError, match="must be finite"):
        search(nets[:2], None, lambda net: float("nan"))
    with pytest.raises(InputError, match="must be modules"):
        search([{"w": torch.ones(1)}] * 2, None, nearness)


def gaussian_models() -> tuple[list[Dict], list[Dict], list[int], Dict]:
    """Two regressions on disjoint data, of orthogonal designs that cover different columns, and the pooled solution."""
    scales = torch.tensor([[3.0, 1, 2, 1, 0, 0], [1, 0, 2, 4, 1, 3]]).double()
    sizes, truth = [8, 20], randn(6, seed=5)
    xs = [torch.linalg.qr(randn(n, 6, seed=n))[0] * s for n, s in zip(sizes, scales, strict=True)]
    ys = [x @ truth + 0.3 * randn(len(x), seed=len(x) + 1) for x in xs]
    thetas = [{"w": torch.linalg.pinv(x) @ y} for x, y in zip(xs, ys, strict=True)]
    fs = [{"w": x.square().sum(0) / len(x)} for x in xs]
    return thetas, fs, sizes, {"w": torch.linalg.pinv(torch.cat(xs)) @ torch.cat(ys)}


def test_gaussian_linear_models_merge_to_the_pooled_solution() -> None:
    """Only with the mean Fisher of each, lambda_i = N_i / N, not normalised, without a floor."""
    thetas, fs, sizes, pooled = gaussian_models()

    def error(**options) -> float:
        return float((merge(thetas, **options)["w"] - pooled["w"]).abs().max())

    assert error(fishers=fs, weights=sizes, normalize=False, floor=0) < 1e-12
    for worse in (
        {"fishers": fs, "normalize": False, "floor": 0},
        {"fishers": fs, "weights": sizes, "floor": 0},
        {"weights": sizes},
    ):
        assert error(**worse) > 1e-3
