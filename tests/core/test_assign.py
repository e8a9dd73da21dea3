"""Assignments against brute force; specifications of many kinds of networks by whether permuting leaves them alone."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradmatch.core._axes import Concat, Leaf, Product
from gradmatch.core.assign import (
    Permutation,
    PermutationSpec,
    apply_matrices,
    linear_assignment,
    linear_assignments,
    overlap,
    singular,
    sinkhorn,
)
from gradmatch.core.checks import InputError
from gradmatch.zoo import convnet, mlp


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """Batch-norm, a residual stream, a shortcut and functional operations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1)
        self.down, self.short = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(6, 8, 1, stride=2)
        self.head = nn.Linear(8 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        x = torch.relu(x + self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        x = nn.functional.gelu(self.down(x) + self.short(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).reshape(len(x), -1))


class Pieces(nn.Module):
    """Slices, padding with zero channels, concatenation, halves that gate each other, symmetric sums."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 3), nn.Linear(9, 10)
        self.d = nn.Linear(8, 8)
        self.e = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.glu(self.c(torch.cat([self.a(x).tanh(), self.b(x)], 1)), 1)
        h = nn.functional.pad(h, (0, 3))
        h = self.e(self.d(h) * self.scale)
        return torch.stack([h[:, :2].sum(1), h[:, 2:].square().mean(1), h.amax(1)], 1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body, self.head = kind(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def grouped() -> nn.Module:
    """Depthwise, grouped and transposed convolutions, group and instance norm."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.GroupNorm(2, 8), nn.Conv2d(8, 12, 1, groups=2),
        nn.PReLU(12), nn.InstanceNorm2d(12, affine=True), nn.ConvTranspose2d(12, 6, 2, groups=3),
        nn.ConvTranspose2d(6, 4, 2), nn.ReLU(), nn.Upsample(scale_factor=2), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1),
    )  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=9, bos_token_id=0, eos_token_id=0
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=1, hidden_size=16, intermediate_size=12, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=11,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            num_hidden_layers=1, hidden_size=8, intermediate_size=12, num_attention_heads=2, image_size=8,
            patch_size=4, num_labels=3,
        )
    )  # fmt: skip


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1,
        attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


TOKENS = torch.arange(10).reshape(2, 5)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], object, dict[str, int] | None]] = {
    "mlp": (lambda: mlp(6, (5, 4), 3), randn(2, 6), {"1": 5, "3": 4}),
    **{
        f"convnet {n}": (
            lambda n=n: convnet(width=8, depth=2, size=8, norm=n),
            randn(2, 1, 8, 8),
            {"features.0": 8, "features.4": 8},
        )
        for n in ("batch", "layer", "instance", "none")
    },
    "convnet group": (
        lambda: convnet(width=8, depth=1, size=8, norm="group"),
        randn(2, 1, 8, 8),
        {"features.0": 4, "features.0.1": 2},
    ),
    "residual": (Residual, randn(2, 3, 8, 8), {"stem": 6, "conv1": 5, "down": 8}),
    "grouped": (grouped, randn(2, 2, 8, 8), None),
    "pieces": (Pieces, randn(2, 4), {"a": 6, "b": 3, "c": 5, "scale": 8, "e": 2, "e.1": 6}),
    "lstm": (lambda: Recurrent(nn.LSTM), randn(2, 4, 3), {"body": 5}),
    "gru": (lambda: Recurrent(nn.GRU), randn(2, 4, 3), {"body": 5}),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
        randn(2, 3, 8),
        {"self_attn": 2, "self_attn.1": 4, "linear1": 12},
    ),
    "gpt2": (gpt2, {"input_ids": TOKENS}, None),
    "llama": (llama, {"input_ids": TOKENS}, None),
    "vit": (vit, {"pixel_values": randn(2, 3, 8, 8)}, None),
    "unet": (unet, (randn(2, 1, 8, 8), torch.tensor(3)), None),
}


def outputs(module: nn.Module, example: object, state: dict[str, Tensor]) -> Tensor:
    module.load_state_dict(state)
    with torch.no_grad():
        if isinstance(example, dict):
            found = module(**example)
        else:
            found = module(*example) if isinstance(example, tuple) else module(example)
    return next(
        v for v in (getattr(found, "logits", None), getattr(found, "sample", None), found) if v is not None
    )


def disturbed(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Every stored tensor at random, so that nothing is symmetric by its initialisation."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for k, t in module.state_dict().items():
        state[k] = t + 0.3 * torch.rand(t.shape, generator=g).to(t) if t.is_floating_point() else t
    return state


@pytest.mark.parametrize("name", NETWORKS)
def test_a_permuted_network_computes_the_same(name: str) -> None:
    make, example, groups = NETWORKS[name]
    torch.manual_seed(0)
    module = make().eval()
    spec = PermutationSpec.from_module(module, example, verify=False)
    assert spec.sizes == (spec.sizes if groups is None else groups)
    assert spec.sizes
    state = disturbed(module)
    permutation = Permutation.random(spec, seed=1)
    assert max(permutation.moved().values()) > 0
    before, after = (outputs(module, example, s) for s in (state, permutation.apply(state)))
    assert float((before - after).abs().max()) <= 1e-5 * float(before.abs().max())
    changed = sum(not torch.equal(t, state[k]) for k, t in permutation.apply(state).items())
    assert changed >= 2


def test_what_transformers_have_in_common_with_their_specification() -> None:
    torch.manual_seed(0)
    spec = PermutationSpec.from_module(gpt2(), {"input_ids": TOKENS})
    stream = spec.axes["transformer.wte.weight"][1]
    assert isinstance(stream, Leaf)
    assert spec.axes["lm_head.weight"] == spec.axes["transformer.wte.weight"]  # tied
    assert spec.axes["transformer.h.0.attn.c_attn.weight"][0] == stream
    fused = spec.axes["transformer.h.0.attn.c_attn.weight"][1]
    assert isinstance(fused, Concat)
    heads = {part.parts[0] for part in fused.parts if isinstance(part, Product)}
    assert len(heads) == 1  # queries, keys and values of a head go together
    assert spec.axes["transformer.wpe.weight"][0].name is None  # places of tokens
    rotary = PermutationSpec.from_module(llama(), {"input_ids": TOKENS}).axes[
        "model.layers.0.self_attn.q_proj.weight"
    ][0]
    assert isinstance(rotary, Product)
    assert rotary.parts[-1] == Leaf(4)  # rotary pairs have their places within a head


def test_the_network_is_left_as_found() -> None:
    module = Residual().train()
    module.norm.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    random = torch.random.get_rng_state()
    PermutationSpec.from_module(module, randn(2, 3, 8, 8))
    assert [module.training, module.norm.training] == [True, False]
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(m._forward_pre_hooks for m in module.modules())
    assert torch.equal(random, torch.random.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_unknown_operation_costs_freedom_only() -> None:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.fft.fft(self.a(x)).real))

    assert PermutationSpec.from_module(Fourier(), randn(2, 3)).sizes == {"b": 5}
    order = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2))
    assert PermutationSpec.from_module(order, randn(2, 3)).sizes == {"0": 4}


def test_what_depends_on_the_place_of_hidden_units_in_ways_unseen_is_refused() -> None:
    class Peeking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h) * h.detach().numpy()[0, 0].item()

    with pytest.raises(InputError, match="depends on hidden units by their place"):
        PermutationSpec.from_module(Peeking(), randn(2, 3))
    with pytest.raises(InputError, match="does not run on the example"):
        PermutationSpec.from_module(nn.Linear(3, 2), randn(2, 4))
    with pytest.raises(InputError, match=r"must be an nn\.Module"):
        PermutationSpec.from_module(torch.relu, randn(2, 4))  # type: ignore[arg-type]


def test_a_branch_that_is_not_run_is_named() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    with pytest.warns(UserWarning, match=r"does not reach spare\.weight, spare\.bias"):
        PermutationSpec.from_module(Branch(), randn(2, 3))


# --- by hand --------------------------------------------------------------------------------------------------


def test_by_hand_equals_what_is_traced() -> None:
    module = convnet(width=4, depth=1, size=8, norm="batch")
    axes = {
        "features.0.weight": ("P", None, None, None),
        **{f"features.1.{k}": ("P",) for k in ("weight", "bias", "running_mean", "running_var")},
        "features.0.bias": ("P",),
        "classifier.weight": (None, ("P", 16)),  # the flattened map: channels x pixels
        "classifier.bias": (None,),
    }
    hand = PermutationSpec.from_axes(axes, module)
    traced = PermutationSpec.from_module(module, randn(1, 1, 8, 8))
    order = torch.tensor([2, 0, 3, 1])
    a = Permutation(hand, {"P": order}).apply(module)
    b = Permutation(traced, {"features.0": order}).apply(module)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert hand.buffers == {"features.1.running_mean", "features.1.running_var"}


def test_stretches_and_products_by_hand() -> None:
    state = {"w": torch.arange(8.0), "q": torch.zeros(2), "h": torch.zeros(3)}
    spec = PermutationSpec.from_axes({"w": (["q", ("h", 2)],), "q": ("q",), "h": ("h",)}, state)
    moved = Permutation(spec, {"q": torch.tensor([1, 0]), "h": torch.tensor([2, 0, 1])}).apply(state)
    assert moved["w"].tolist() == [1, 0, 6, 7, 2, 3, 4, 5]
    one = PermutationSpec.from_axes({"w": (("P", 2),)}, {"w": torch.zeros(8)})
    assert one.sizes == {"P": 4}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"v": (None,)}, "names 'v', which the weights do not have"),
        ({"w": ("P",)}, "must be a tuple of 2 entries"),
        ({"w": ("P", None), "b": (("P", 2),)}, r"axis 0 of 'b' of 4 entries cannot be cut as \('P', 2\)"),
        ({"w": (None, ("P", "Q")), "b": (None,)}, "cannot be cut"),
        ({"w": ("P", None)}, r"says nothing of 'b' of shape \(4,\)"),
        ({"w": ("P", "P"), "b": ("P",)}, "gives group 'P' 6 units; it has 4 elsewhere"),
        ({"w": (5, None), "b": (None,)}, "has 4, not 5"),
        ({"w": ({"P"}, None), "b": (None,)}, "an axis is a name, None"),
    ],
)
def test_specifications_by_hand_that_do_not_fit_are_refused(axes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PermutationSpec.from_axes(axes, {"w": torch.zeros(4, 6), "b": torch.zeros(4)})


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    net = mlp(6, (5,), 3)
    spec = PermutationSpec.from_module(net, randn(1, 6))
    state = net.state_dict()
    for changed, message in (
        (
            {k: v for k, v in state.items() if k != "1.bias"},
            r"has no 1\.bias; the specification is of another",
        ),
        (state | {"extra": torch.zeros(5)}, "has extra, of whose axes the specification says nothing"),
        (state | {"1.bias": torch.zeros(4)}, r"weights\['1.bias'\] has the shape \(4,\); .* has \(5,\)"),
        (state | {"1.bias": torch.full((5,), torch.nan)}, "has 5 NaN"),
    ):
        with pytest.raises(InputError, match=message):
            Permutation.identity(spec).apply(changed)
    with pytest.raises(InputError, match="no permutation of 5 units"):
        Permutation(spec, {"1": torch.tensor([0, 1, 1, 2, 3])})
    with pytest.raises(InputError, match="names the group x"):
        Permutation(spec, {"x": torch.arange(5)})
    with pytest.raises(InputError, match=r"must be an nn\.Module or a state dict"):
        Permutation.identity(spec).apply([1])  # type: ignore[arg-type]


# --- permutations ---------------------------------------------------------------------------------------------


def test_inverse_and_composition() -> None:
    net = Residual()
    spec = PermutationSpec.from_module(net, randn(1, 3, 8, 8))
    p, q = Permutation.random(spec, 1), Permutation.random(spec, 2)
    state = net.state_dict()
    for undone in (p.compose(p.inverse()), p.inverse().compose(p)):
        assert all(torch.equal(o, torch.arange(len(o))) for o in undone.order.values())
    twice = p.compose(q).apply(state)
    assert all(torch.equal(t, twice[k]) for k, t in p.apply(q.apply(state)).items())
    assert p.apply(state)["norm.num_batches_tracked"].dtype == torch.long
    with pytest.raises(InputError, match="another specification"):
        p.compose(Permutation.identity(PermutationSpec.from_module(mlp(3, (2,)), randn(1, 3))))


def test_matrices_act_as_orders_and_half_precision_stays() -> None:
    net = convnet(width=4, depth=2, size=8, norm="batch").half()
    spec = PermutationSpec.from_module(net.float(), randn(1, 1, 8, 8))
    p = Permutation.random(spec, 3)
    state = net.state_dict()
    matrices = {k: torch.eye(len(o))[o] for k, o in p.order.items()}
    soft = apply_matrices(spec, state, matrices)
    assert all(torch.equal(t, p.apply(state)[k]) for k, t in soft.items())
    half = p.apply(net.half())
    assert {t.dtype for t in half.values()} == {torch.float16, torch.long}
    assert not any(
        t.data_ptr() == s.data_ptr() for t, s in zip(half.values(), net.state_dict().values(), strict=True)
    )


def test_saved_and_loaded(tmp_path) -> None:
    spec = PermutationSpec.from_module(gpt2(), {"input_ids": TOKENS})
    p = Permutation.random(spec, 4)
    back = Permutation.load(p.save(tmp_path / "p.safetensors"))
    assert back.spec.axes == spec.axes
    assert back.spec.buffers == spec.buffers
    assert all(torch.equal(o, back.order[k]) for k, o in p.order.items())
    from gradmatch.core.store import save_tensors

    with pytest.raises(InputError, match="does not hold a permutation"):
        Permutation.load(save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)}))


# --- assignments ----------------------------------------------------------------------------------------------


def test_assignment_equals_brute_force_in_batches_and_rectangles() -> None:
    scores = randn(2, 3, 5, 5)
    found = linear_assignment(scores)
    for i, j in itertools.product(range(2), range(3)):
        best = max(
            itertools.permutations(range(5)), key=lambda p: sum(scores[i, j, k, c] for k, c in enumerate(p))
        )
        assert tuple(found[i, j].tolist()) == best
    assert torch.equal(linear_assignment(-scores, maximize=False), found)
    wide, tall = randn(3, 6), randn(6, 3)
    assert len(set(linear_assignment(wide).tolist())) == 3
    assert sorted(linear_assignment(tall).tolist()) == [-1, -1, -1, 0, 1, 2]
    large = [randn(40, 40, seed=k) for k in range(3)]  # worked on by several threads
    assert all(
        torch.equal(a, linear_assignment(s)) for a, s in zip(linear_assignments(large), large, strict=True)
    )
    assert linear_assignment(torch.empty(0, 3, 3)).shape == (0, 3)
    with pytest.raises(InputError, match="1 NaN or infinite"):
        linear_assignment(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
    with pytest.raises(InputError, match="must be"):
        linear_assignment(torch.zeros(3))


@pytest.mark.parametrize("shape", [(48, 48), (40, 64), (64, 40)])
@pytest.mark.parametrize("maximize", [True, False])
def test_large_problems_have_the_optimum_that_scipy_finds(shape: tuple[int, int], maximize: bool) -> None:
    from scipy.optimize import linear_sum_assignment

    g = torch.Generator().manual_seed(1)
    # offsets of rows and columns, and whole numbers with many ties
    for scores in (
        torch.randn(shape, generator=g).double() + 50 * torch.randn(shape[0], 1, generator=g),
        torch.randint(0, 4, shape, generator=g).double(),
        torch.zeros(shape).double(),
    ):
        before = scores.clone()
        columns = linear_assignment(scores, maximize=maximize)
        kept = columns >= 0
        assert int(kept.sum()) == len(set(columns[kept].tolist())) == min(shape)
        rows, best = linear_sum_assignment(scores.numpy(), maximize=maximize)
        truth = float(scores.numpy()[rows, best].sum())
        assert float(scores[torch.nonzero(kept)[:, 0], columns[kept]].sum()) == pytest.approx(
            truth, rel=1e-12
        )
        assert torch.equal(scores, before)
    for size, bad in ((40, float("nan")), (40, float("inf")), (3, -float("inf")), (3, float("inf"))):
        scores = torch.rand(size, size)
        scores[1, 2] = bad  # scipy takes an infinite cost for a pair that may not be
        with pytest.raises(InputError, match="1 NaN or infinite"):
            linear_assignment(scores, maximize=maximize)


def test_sinkhorn_is_doubly_stochastic_and_sharpens_to_the_assignment() -> None:
    scores = randn(4, 6, 6).double()
    soft = sinkhorn(scores, rounds=200)
    for d in (-1, -2):
        assert torch.allclose(soft.sum(d), torch.ones(4, 6).double(), atol=1e-6)
    sharp = sinkhorn(scores, tau=0.002, rounds=3000)
    assert torch.equal(sharp.argmax(-1), linear_assignment(scores))
    with pytest.raises(InputError, match="tau"):
        sinkhorn(scores, tau=0)


# --- singular vectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (4, 3, 2, 2)])
def test_leading_singular_vectors_equal_the_whole_decomposition(shape: tuple[int, ...]) -> None:
    weight = randn(*shape)
    u, s, vh = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    keep = s >= 0.3 * s[0]
    few, all_ = singular(weight, 0.3), singular(weight)
    assert torch.allclose(few.s, s[keep], atol=1e-10)
    assert torch.allclose(few.u @ few.vh, u[:, keep] @ vh[keep], atol=1e-9)
    assert torch.allclose(all_.u @ torch.diag(all_.s) @ all_.vh, weight.flatten(1).double(), atol=1e-10)
    assert overlap(few, few) == pytest.approx(len(few))


def test_overlap_knows_no_signs_and_drops_directions_that_do_not_exist() -> None:
    a, b = singular(randn(5, 7)), singular(randn(5, 7, seed=1))
    signs = torch.tensor([1.0, -1, -1, 1, -1]).double()
    flipped = type(b)(b.u * signs, b.s, b.vh * signs[:, None])
    assert overlap(a, b) == pytest.approx(overlap(a, flipped))
    assert abs(overlap(a, b)) <= 5
    assert len(singular(randn(6, 2) @ randn(2, 6))) == 2
    assert len(singular(torch.zeros(3, 3))) == 0
    assert len(singular(torch.zeros(3, 3), 0.5)) == 0
    with pytest.raises(InputError, match="two axes"):
        singular(torch.zeros(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        singular(randn(3, 3), 1.0)
