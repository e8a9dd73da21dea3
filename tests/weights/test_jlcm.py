"""Codebooks and mappings: packing, k-means start, gradients against autograd, reordering, sizes and files."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core.checks import InputError
from gradmatch.core.kmeans import kmeans_1d
from gradmatch.weights import CompressedModel, compress
from gradmatch.weights._coded import Coded, CodedLayer, coded_layer, matrix_of, pack, unpack
from gradmatch.weights._compressed import halved
from gradmatch.weights._mapping import Learner, Learning, code_gradient, moves, started
from gradmatch.weights._neurons import clusters, grouped


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n: int) -> Tensor:
    """Inputs of few directions, which leave the weights room."""
    return randn(n, 4) @ randn(4, 12, seed=1)


def mlp(width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5)
    )


class Block(nn.Module):
    """A residual stream with batch-norm, convolutions and a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1)
        )
        self.fc, self.out = nn.Linear(8 * 16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(torch.relu(self.fc((x + self.body(x)).flatten(1))))


def settled(net: nn.Module) -> nn.Module:
    """Statistics and biases that a wrong permutation would not leave alone."""
    g = torch.Generator().manual_seed(3)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.running_var, m.weight.data, m.bias.data):
                t.copy_(torch.rand(t.shape, generator=g) + 0.5)
    return net.eval()


def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compress(*args, **kwargs)


# --- packing and codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_round_trips(bits: int) -> None:
    for count in (1, 7, 8, 9, 1003):
        numbers = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count))
        stream = pack(numbers, bits)
        assert len(stream) == math.ceil(count * bits / 8)
        assert torch.equal(unpack(stream, bits, count), numbers)


def test_eight_bits_keep_256_half_precision_values_exactly() -> None:
    values = torch.arange(256).half() / 64 - 2
    matrix = values[torch.randperm(256).repeat(3).reshape(24, 32)].float()
    coded = started(matrix, torch.tensor([24]), 8, "codebooks")
    assert torch.equal(coded.dense(), matrix)


def test_constant_and_few_values() -> None:
    for matrix in (torch.full((4, 6), 0.25), torch.tensor([[1.0, -1.0], [0.5, 1.0]])):
        coded = started(matrix, torch.tensor([len(matrix)]), 4, "codebooks")
        assert torch.equal(coded.dense(), matrix)
        scaled = started(matrix, torch.tensor([len(matrix) // 2, len(matrix)]), 4, "scales")
        assert torch.allclose(scaled.dense(), matrix, atol=1e-3)


@pytest.mark.parametrize("variant", ["codebooks", "scales"])
def test_one_group_is_plain_kmeans(variant: str) -> None:
    net, x = mlp(), randn(64, 12)
    small, _ = quiet(net, x, bits=3, groups=1, steps=0, variant=variant, keep_first_last=False)
    for name, layer in small.coded.items():
        matrix = matrix_of(net, name)
        codes = kmeans_1d(matrix, 8).codes.float()
        nearest = codes.half().float()[(matrix[..., None] - codes).abs().argmin(-1)]
        assert torch.allclose(layer.weight, nearest, atol=1e-6)


def test_scales_are_ratios_of_deviations() -> None:
    matrix = torch.cat([randn(5, 40), 10 * randn(7, 40, seed=1)])
    coded = started(matrix, torch.tensor([5, 12]), 3, "scales")
    wanted = torch.stack([matrix[:5].std(correction=0), matrix[5:].std(correction=0)]) / matrix.std(
        correction=0
    )
    assert torch.allclose(coded.scales.float(), wanted, rtol=1e-3)
    one = started(matrix, torch.tensor([12]), 3, "codebooks")
    assert (coded.dense() - matrix).square().sum() < (one.dense() - matrix).square().sum()


def test_codes_that_half_precision_would_spoil_stay_float32() -> None:
    for scale in (1e-9, 1e6):
        coded = started(scale * randn(6, 50), torch.tensor([6]), 3, "codebooks")
        assert coded.codes.dtype == torch.float32
        assert halved(scale * randn(4)).dtype == torch.float32
    assert halved(randn(4)).dtype == torch.float16


# --- gradients -----------------------------------------------------------------------------------------------


def test_code_gradient_is_autograd_through_the_gather() -> None:
    ends, indices, slope = torch.tensor([2, 5]), torch.randint(0, 4, (5, 7)), randn(5, 7)
    books = torch.tensor([0, 0, 1, 1, 1])
    codes = randn(2, 4).requires_grad_()
    torch.autograd.backward((slope * codes[books[:, None], indices]).sum())
    assert torch.allclose(code_gradient(slope, indices, books, (2, 4)), codes.grad, atol=1e-6)
    assert int(ends[-1]) == 5


@pytest.mark.parametrize("variant", ["codebooks", "scales"])
@pytest.mark.parametrize("candidates", [8, 3])
def test_default_rule_is_autograd_of_the_soft_mixture(variant: str, candidates: int) -> None:
    matrix, ends = randn(6, 9), torch.tensor([2, 6], dtype=torch.int32)
    learner = Learner(
        started(matrix, ends, 3, variant), matrix, Learning(grad="default", candidates=candidates)
    )
    learner.logits = randn(*learner.logits.shape, seed=5)
    slope = randn(6, 9, seed=6)
    scaled = slope if learner.scales is None else slope * learner.scales
    logits = learner.logits.clone().requires_grad_()
    values = torch.stack([learner._code(j) for j in range(learner.width)])
    mixture = (torch.softmax(logits, 0) * values).sum(0)
    torch.autograd.backward((scaled * mixture).sum())
    assert torch.allclose(torch.stack(list(learner.map_gradients(scaled))), logits.grad, atol=1e-6)


def test_proximal_weights_fall_with_distance_and_change_sign() -> None:
    codes = torch.tensor([[-1.0, -0.2, 0.1, 0.9]])
    for rule in ("proximal", "proximal-exp"):
        table = moves(codes, rule)[0]
        assert torch.equal(table.diagonal(), torch.zeros(4))
        assert bool((table.triu(1) >= 0).all())
        assert bool((table.tril(-1) <= 0).all())
        for i in range(4):
            away = (codes[0] - codes[0, i]).abs()
            order = away.argsort()[1:]
            assert bool((table[i][order].abs().diff() < 0).all())
    sign = moves(codes, "sign")[0]
    assert torch.equal(sign, (codes[0][None] - codes[0][:, None]).sign())


def test_the_surrogate_equals_its_formula_and_descent_reaches_better_codes() -> None:
    matrix, ends = randn(3, 5), torch.tensor([3], dtype=torch.int32)
    learner = Learner(started(matrix, ends, 2, "codebooks"), matrix, Learning())
    slope, codes = randn(3, 5, seed=2), learner.codes[0]
    found = torch.stack(list(learner.map_gradients(slope)))
    spread = codes.max() - codes.min()
    for j in range(4):
        away = codes[j] - codes[learner.indices]
        wanted = slope * away.sign() / (away.abs() / spread + 0.1)
        assert torch.allclose(found[j], wanted, atol=1e-5)
    better = (slope * (codes[:, None, None] - codes[learner.indices])) < 0
    assert bool((found[better] < 0).all())  # descent raises the logits of codes that lower the loss


def test_nothing_moves_at_the_start() -> None:
    matrix, ends = randn(8, 20), torch.tensor([3, 8], dtype=torch.int32)
    for init in ("onehot", "distance"):
        for variant in ("codebooks", "scales"):
            start = started(matrix, ends, 3, variant)
            learner = Learner(start, matrix, Learning(map_init=init, candidates=4))
            learner._follow()
            assert torch.equal(learner.indices, start.indices)


def test_shared_second_moment_keeps_the_weighting_and_plain_adam_erases_it() -> None:
    """Adam divides each logit's gradient by its own size, so that the distance to a code no longer matters."""
    matrix, ends = randn(4, 30), torch.tensor([4], dtype=torch.int32)
    moved = {}
    for opt in ("shared", "adam"):
        learner = Learner(started(matrix, ends, 3, "codebooks"), matrix, Learning(map_opt=opt, lr_map=1e-4))
        before, learner.step = learner.logits.clone(), 1
        learner._move(torch.ones(4, 30))
        step = (learner.logits - before).abs()
        moved[opt] = float(step[step > 0].std() / step[step > 0].mean())
    assert moved["adam"] < 1e-3
    assert moved["shared"] > 0.3


def test_a_dead_code_takes_the_weight_with_the_largest_error() -> None:
    matrix, ends = torch.tensor([[0.0, 0.0, 1.0, 1.1, 5.0]]), torch.tensor([1], dtype=torch.int32)
    start = Coded(torch.tensor([[0, 0, 1, 1, 2]]), torch.tensor([[0.0, 1.05, 3.0, 9.0]]), None, ends, 2)
    learner = Learner(start, matrix, Learning())
    learner._reseed()
    assert float(learner.codes[0, 3]) == 5.0
    assert learner.indices.tolist() == [[0, 0, 1, 1, 3]]
    learner._follow()
    assert learner.indices.tolist() == [[0, 0, 1, 1, 3]]


# --- neurons in order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, Block])
def test_reordering_changes_nothing(make) -> None:
    net = settled(make())
    x = randn(6, 12) if make is mlp else randn(6, 2, 4, 4)
    names = ["0", "2"] if make is mlp else ["stem.0", "body.0", "body.3", "fc"]
    moved, ends = grouped(net, names, 3, x, 0)
    assert torch.allclose(moved(x), net(x), atol=1e-5)
    assert any(not torch.equal(matrix_of(moved, n), matrix_of(net, n)) for n in names)
    assert all(len(e) == 3 and bool((e.diff() > 0).all()) for e in ends.values())


def test_a_stream_has_one_order_for_all_who_write_it() -> None:
    net = settled(Block())
    _, ends = grouped(net, ["stem.0", "body.3"], 3, randn(4, 2, 4, 4), 0)
    assert torch.equal(ends["stem.0"], ends["body.3"])


def test_groups_are_of_like_neurons() -> None:
    rows = torch.cat([randn(10, 3), 20 + randn(5, 3, seed=1), -20 + randn(7, 3, seed=2)])
    found = clusters(rows, 3, 0)
    assert found.tolist() == [1] * 10 + [2] * 5 + [0] * 7
    assert sorted(clusters(torch.ones(4, 3), 4, 0).tolist()) == [0, 1, 2, 3]


def test_untraceable_networks_and_fixed_orders_keep_one_group() -> None:
    class Reads(nn.Module):
        """Chooses by the value of a unit, which a permutation would change."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            h = h if bool(h[0, 0] > h[0, 1]) else -h
            return self.c(torch.tanh(self.b(h)))

    torch.manual_seed(0)
    net, x = Reads(), randn(32, 12)
    with pytest.warns(UserWarning, match="order"):
        small, figures = compress(net, x, groups=2, steps=0, bits=8, keep_first_last=False)
    assert torch.allclose(small(x), net(x), atol=0.05)
    assert figures.layers[-1].groups == 1
    with pytest.warns(UserWarning, match="'?4'?: the order of outputs is fixed"):
        _, figures = compress(mlp(), x, groups=2, steps=0, keep_first_last=False)
    assert [layer.groups for layer in figures.layers] == [2, 2, 1]


def test_even_stretches_without_reordering() -> None:
    small, figures = compress(mlp(), randn(32, 12), groups=5, steps=0, reorder=False)
    assert figures.layers[0].groups == 5
    assert next(iter(small.coded.values())).coded.ends.tolist() == [4, 9, 14, 19, 24]


# --- learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", ["proximal", "proximal-exp", "sign", "default", None])
def test_learning_never_ends_worse_than_it_started(grad) -> None:
    _, figures = quiet(mlp(), correlated(200), bits=2, groups=2, steps=120, keep_first_last=False, grad=grad)
    for layer in figures.layers:
        assert layer.error <= layer.error_kmeans
    if grad not in ("default", None):
        assert figures.layers[0].error < 0.9 * figures.layers[0].error_kmeans


@pytest.mark.parametrize(
    "options",
    [{"map_opt": "sgd", "lr_map": 0.01}, {"map_opt": "adam"}, {"candidates": 2}, {"candidates": "all"}],
)
def test_other_ways_to_learn(options) -> None:
    _, figures = quiet(mlp(), correlated(200), bits=3, groups=2, steps=100, **options)
    assert figures.layers[0].error < figures.layers[0].error_kmeans


def test_proximal_jumps_are_short_and_default_ones_long() -> None:
    jumps = {
        grad: quiet(mlp(), correlated(200), bits=3, steps=150, grad=grad)[1].layers[0].jump
        for grad in ("proximal", "default")
    }
    assert 0 < jumps["proximal"] < 0.3 < jumps["default"]


def test_inputs_come_from_the_compressed_prefix() -> None:
    """Else the errors of the layers add up: what the second layer is fitted to must know the first one's."""
    net, x = mlp(), randn(256, 12)
    small, figures = quiet(net, x, bits=2, groups=1, steps=200, keep_first_last=False)
    inner = small.network[:4](x)
    wanted = net[:4](x)
    alone = copy.deepcopy(net)
    alone[2] = small.network[2]
    assert (inner - wanted).square().mean() < 2 * figures.layers[1].error * wanted.square().mean() + 0.1
    assert (small.network[:3](x) - net[:3](x)).square().mean() < (
        alone[2](small.network[:2](x)) - net[:3](x)
    ).square().mean() * 1.01


def test_same_seed_same_result_and_nothing_is_touched() -> None:
    net, x = settled(Block()), randn(40, 2, 4, 4)
    net.train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    before = torch.random.get_rng_state()
    a, b = (quiet(net, x, bits=2, groups=2, steps=10)[0] for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    for (k, v), w in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(v, w), k


def test_takes_loaders_and_counts_progress() -> None:
    x = randn(90, 12)
    seen = []
    loader = DataLoader(TensorDataset(x, torch.zeros(90).long()), batch_size=20)
    a, _ = quiet(mlp(), loader, bits=2, steps=5, progress=lambda done, total: seen.append((done, total)))
    b, _ = quiet(mlp(), x, bits=2, steps=5)
    assert seen[-1] == (5, 5)
    assert torch.equal(a(x), b(x))


def test_weights_alone_need_no_data() -> None:
    net = mlp()
    small, figures = compress(net, objective="weight", bits=3, groups=3, reorder=False)
    assert figures.layers[0].error == figures.layers[0].error_kmeans < 0.2
    assert small(randn(3, 12)).shape == (3, 5)


def test_layers_that_data_does_not_reach_keep_the_start() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.spare = mlp(), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.warns(UserWarning, match="does not reach layer 'spare'"):
        compress(Spare(), randn(20, 12), bits=2, groups=1, steps=2, keep_first_last=False)


# --- layers, models, files -----------------------------------------------------------------------------------


def test_dense_and_compressed_agree_and_types_follow() -> None:
    net, x = settled(Block()), randn(7, 2, 4, 4)
    small, _ = quiet(net, randn(30, 2, 4, 4), bits=3, groups=2, steps=5, variant="scales")
    dense = small.to_dense()
    assert not any(isinstance(m, CodedLayer) for m in dense.modules())
    assert [type(m) for m in dense.modules()] == [type(m) for m in net.modules()]
    assert torch.allclose(dense(x), small(x), atol=1e-6)
    assert isinstance(small.network.body[0], nn.Conv2d)
    doubled = copy.deepcopy(small).double()
    assert torch.allclose(doubled(x.double()).float(), small(x), atol=1e-4)
    assert {b.dtype for n, b in doubled.named_buffers() if n.endswith("_codes")} == {torch.float16}
    again = copy.deepcopy(small)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("variant", ["codebooks", "scales"])
def test_saved_size_is_the_one_predicted(tmp_path, bits: int, variant: str) -> None:
    net, groups = mlp(200), 3
    small, figures = quiet(net, randn(20, 12), bits=bits, groups=groups, steps=0, variant=variant)
    file = small.save(tmp_path / "m.safetensors")
    assert file.stat().st_size == figures.bytes
    tables = 2 * groups * 2**bits if variant == "codebooks" else 2 * (2**bits + groups)
    rest = 2 * (12 * 200 + 200 + 200 + 200 * 5 + 5)
    formula = 200 * 200 * bits / 8 + tables + 4 * groups + rest
    assert 0 <= figures.bytes - formula < 1000  # the header
    assert abs((figures.bytes - 1000) / formula - 1) < 0.08
    again = CompressedModel.load(file, mlp(200))
    x = randn(9, 12)
    assert torch.equal(again(x), small(x))
    assert figures.ratio == pytest.approx(figures.dense_bytes / figures.bytes)


def test_within_one_percent_of_the_formula_at_size(tmp_path) -> None:
    net = nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 600))
    small, _ = quiet(net, randn(8, 600), bits=2, groups=4, steps=0, keep_first_last=False)
    size = small.save(tmp_path / "m.safetensors").stat().st_size
    formula = 2 * 600 * 600 * 2 / 8 + 2 * (4 + 1) * 4 + 4 * 5 + 2 * 1200
    assert abs(size / formula - 1) < 0.01


def test_a_hugging_face_model_with_tied_weights(tmp_path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1)
    net = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 40, (12, 16), generator=torch.Generator().manual_seed(0))
    small, figures = quiet(net, {"input_ids": ids}, bits=4, groups=2, steps=20, keep_first_last=False)
    names = [layer.name for layer in figures.layers]
    assert names[:4] == [
        f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert "lm_head" not in names  # tied to the embedding, which is stored once
    assert (small(ids).logits - net(ids).logits).square().mean() < 0.05 * net(ids).logits.var()
    file = small.save(tmp_path / "m.safetensors")
    assert file.stat().st_size == figures.bytes
    torch.manual_seed(5)
    again = CompressedModel.load(file, GPT2LMHeadModel(config).eval())
    assert torch.equal(again(ids).logits, small(ids).logits)
    dense = small.to_dense()
    dense.save_pretrained(tmp_path / "dense")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "dense").eval()
    assert torch.allclose(loaded(ids).logits, small(ids).logits, atol=1e-5)


def test_another_process_gets_the_same_model() -> None:
    import pickle

    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    small = compress(net, randn(20, 6), steps=0)[0].half()
    again = pickle.loads(pickle.dumps(small))
    for made in (again, copy.deepcopy(small)):
        assert type(made.network[2]) is type(small.network[2])
        assert torch.equal(made(randn(4, 6).half()), small(randn(4, 6).half()))
    again.network[2].weight_codes.zero_()
    assert bool(small.network[2].weight.any())


def test_files_that_do_not_fit_are_refused(tmp_path) -> None:
    small, _ = quiet(mlp(), randn(20, 12), bits=2, steps=0)
    file = small.save(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="do not fit a weight"):
        CompressedModel.load(file, mlp(28))
    with pytest.raises(InputError, match="layer '2', which the network does not have"):
        CompressedModel.load(file, nn.Sequential(nn.Linear(12, 24)))
    from gradmatch.core.store import save_tensors

    other = save_tensors(tmp_path / "other.safetensors", {"w": torch.ones(2)})
    with pytest.raises(InputError, match="not a compressed model"):
        CompressedModel.load(other, mlp())
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        small.save(tmp_path / "m.bin")
    with pytest.raises(InputError, match="does not exist"):
        CompressedModel.load(tmp_path / "nowhere.safetensors", mlp())


def spoiled() -> nn.Module:
    net = mlp()
    net[2].weight.data[0, 0] = float("inf")
    return net


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: compress(mlp(), x, bits=0), "bits is 0; it must be between 1 and 8"),
        (lambda x: compress(mlp(), x, bits=9), "bits is 9"),
        (lambda x: compress(mlp(), x, groups=25), "groups is 25, but layer '2' has 24 output neurons"),
        (lambda x: compress(nn.Sequential(nn.ReLU()), x), "no chosen Linear or convolution"),
        (lambda x: compress(mlp(), x, layers=lambda n: False), "no chosen Linear or convolution"),
        (lambda x: compress(mlp()), "calibration is empty"),
        (lambda x: compress(mlp(), x[:0]), "calibration is empty"),
        (lambda x: compress(mlp(), objective="weight"), "an input is needed"),
        (lambda x: compress(spoiled(), x), "NaN or infinite"),
        (lambda x: compress(mlp(), x * float("nan")), "calibration has"),
        (lambda x: compress(mlp(), randn(4, 3)), "does not run on the example"),
        (lambda x: compress(mlp(), x, variant="both"), "variant is 'both'"),
        (lambda x: compress(mlp(), x, objective="loss"), "objective is 'loss'"),
        (lambda x: compress(mlp(), x, grad="ste"), "grad is 'ste'"),
        (lambda x: compress(mlp(), x, map_init="zero"), "map_init is 'zero'"),
        (lambda x: compress(mlp(), x, map_opt="lion"), "map_opt is 'lion'"),
        (lambda x: compress(mlp(), x, candidates=1), "candidates is 1"),
        (lambda x: compress(mlp(), x, steps=-1), "steps is -1"),
        (lambda x: compress(lambda y: y, x), "model is a function"),
    ],
)
def test_refuses(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(randn(8, 12))


def test_whole_number_weights_are_refused() -> None:
    net = mlp()
    net[2].weight = nn.Parameter(torch.ones(24, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"int8 weights; they must be floating"):
        compress(net, objective="weight", reorder=False)


def test_a_coded_layer_is_not_coded_twice() -> None:
    layer = nn.Linear(4, 4)
    coded = coded_layer(layer, started(layer.weight.detach(), torch.tensor([4]), 2, "codebooks"))
    with pytest.raises(InputError, match="no chosen"):
        compress(nn.Sequential(coded), randn(4, 4), keep_first_last=False)
