"""Every check, refusal and named fault of reflection between a strong and a weak model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmatch.core.bridge import from_diffusers
from gradmatch.core.checks import InputError
from gradmatch.core.path import LinearPath, Prediction, VariancePreserving
from gradmatch.core.sampler import Hook, Network, Solver, State
from gradmatch.generate.w2sd import Reflection, W2SDCallback, adapter_scale, w2sd_sample
from gradmatch.zoo import MixtureOracle

diffusers = pytest.importorskip("diffusers")
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATH = VariancePreserving.from_betas(0.00085, 0.012, scaled=True)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(left: float, **options: Any) -> MixtureOracle:
    """Two modes at -4 and 4 with this weight of the left one."""
    means = torch.tensor([[-4.0], [4.0]], dtype=torch.float64)
    weights = torch.tensor([left, 1 - left])
    return MixtureOracle(means, 0.5, weights, **{"path": PATH, "kind": "noise", **options})


def gaussian(mean: float, kind: str = "noise") -> MixtureOracle:
    """N(mean, 1) in two dimensions, whose score is linear."""
    return MixtureOracle(torch.full((1, 2), mean, dtype=torch.float64), 1.0, path=PATH, kind=kind)


def plain(model: Any, x: Tensor, steps: int) -> Tensor:
    times = torch.linspace(999, -1, steps + 1, dtype=torch.float64)
    return Solver(times, "ddim").run(model, PATH, x).x


def levels(t: float) -> tuple[Tensor, Tensor]:
    found = PATH.levels(torch.tensor(t, dtype=torch.float64))
    return found.alpha.square(), found.sigma


# --- the method ---------------------------------------------------------------------------------------------------


def test_the_loop_is_the_published_one() -> None:
    """Written out in alphas_cumprod; the weak network is called at the less noisy latent with the noisier time."""
    strong, weak, steps, many = mixture(0.25), mixture(0.05), 10, 4
    x = start = randn(50, 1, dtype=torch.float64)
    times = torch.linspace(999, -1, steps + 1, dtype=torch.float64).tolist()

    def move(x: Tensor, e: Tensor, t: float, to: float) -> Tensor:
        (a, s), (b, r) = levels(t), levels(to)
        return b.sqrt() * (x - s * e) / a.sqrt() + r * e

    for i in range(steps):
        t, to = times[i], times[i + 1]
        if i < many:
            y = move(x, strong(x, t).tensor, t, to)
            x = move(y, weak(y, t).tensor, to, t)
        x = move(x, strong(x, t).tensor, t, to)
    found = w2sd_sample(strong, weak, start, PATH, steps, many)
    assert torch.allclose(found.x, x, atol=1e-9)
    assert found.calls.tolist() == [steps + 2 * many] * 50


def test_calls_are_exact_and_the_last_step_never_reflects() -> None:
    seen: list[float] = []

    def weak(x: Tensor, t: Tensor) -> Prediction:
        seen.append(float(t[0]))
        return Prediction("noise", x * 0.1)

    strong = Network(lambda x, t: x * 0.2, "noise")
    found = w2sd_sample(strong, weak, randn(3, 2), PATH, 6)
    times = torch.linspace(999, -1, 7).tolist()
    assert found.calls.tolist() == [6 + 2 * 5] * 3
    assert seen == pytest.approx(times[:5])
    more = w2sd_sample(strong, weak, randn(3, 2), PATH, 6, 2, inverse="fixed_point", iterations=4)
    assert more.calls.tolist() == [6 + 2 * (2 + 4)] * 3


def test_no_reflection_is_the_plain_sampler_bit_for_bit() -> None:
    model, x = mixture(0.25), randn(20, 1, dtype=torch.float64)
    found = w2sd_sample(model, mixture(0.05), x, PATH, 12, 0)
    assert torch.equal(found.x, plain(model, x, 12))
    assert found.calls.tolist() == [12] * 20


def test_a_pair_of_equals_reduces_to_the_plain_sampler() -> None:
    """Exactly where the inverse is; else the gap of one reflection falls with the square of the step."""
    model, x = gaussian(1.0), randn(20, 2, dtype=torch.float64)
    want = plain(model, x, 20)
    exact = w2sd_sample(model, model, x, PATH, 20, inverse="fixed_point", iterations=40)
    assert torch.allclose(exact.x, want, atol=1e-6)
    gaps = []
    for width in (40.0, 20.0, 10.0):
        hook, state = Reflection(model, 1), _state(x, model, 600.0, 600.0 - width)
        hook.before_step(state)
        gaps.append(float((state.x - x).abs().max()))
    assert 3.0 < gaps[0] / gaps[1] < 5.0
    assert 3.0 < gaps[1] / gaps[2] < 5.0


def _state(x: Tensor, model: Any, t: float, t_next: float) -> State:
    from gradmatch.core.sampler import Calls

    calls = Calls(len(x))
    return State(x, PATH, calls.counted(model), None, calls, 2, 0, t, t_next)


@pytest.mark.parametrize("kind", ["noise", "x0", "v"])
def test_the_step_back_undoes_the_step_with_the_same_prediction(kind: str) -> None:
    x, said = randn(5, 3, dtype=torch.float64), randn(5, 3, seed=1, dtype=torch.float64)
    prediction = Prediction(kind, said)
    down = PATH.step(x, prediction, 700.0, 650.0)
    assert torch.allclose(PATH.inverse_step(down, prediction, 700.0, 650.0), x, atol=1e-10)


@pytest.mark.parametrize("width", [5.0, 40.0])
def test_the_shift_of_linear_scores_has_its_closed_form(width: float) -> None:
    """x~ - x = c (score_strong - score_weak) = c sqrt(a) (m_s - m_w); a swapped pair has the other sign."""
    t, m_s, m_w = 500.0, 1.5, -0.5
    (a, s), (b, _) = levels(t), levels(t - width)
    c = s * (s - (a * (1 - b) / b).sqrt())
    assert c > 0
    x = randn(30, 2, dtype=torch.float64)
    for one, two, sign in ((m_s, m_w, 1.0), (m_w, m_s, -1.0)):
        state = _state(x, gaussian(one), t, t - width)
        Reflection(gaussian(two), 1).before_step(state)
        ratio = (state.x - x) / (sign * c * a.sqrt() * (m_s - m_w))
        # what is left is the weak score at y instead of x
        assert float((ratio - 1).abs().max()) < 0.006 * width


def test_shares_of_a_mixture_move_towards_balance_and_the_swap_away() -> None:
    strong, weak, x = mixture(0.25), mixture(0.05), randn(4000, 1, dtype=torch.float64)

    def share(a: Any, b: Any, **options: Any) -> float:
        return float((w2sd_sample(a, b, x, PATH, 50, **options).x < 0).double().mean())

    alone = float((plain(strong, x, 50) < 0).double().mean())
    assert alone == pytest.approx(0.29, abs=0.03)
    assert share(strong, weak) == pytest.approx(0.45, abs=0.03)
    assert share(weak, strong) < 0.03  # S2WD
    assert share(strong, strong, inner=weak) < alone - 0.1  # roles swapped inside the reflection alone
    assert (
        share(strong, mixture(0.5)) < alone - 0.1
    )  # a "weak" model that is the better one amplifies the defect
    assert share(strong, strong) == pytest.approx(alone, abs=0.02)


def test_flow_form() -> None:
    path, x = LinearPath(), randn(6, 3, dtype=torch.float64)

    def strong(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) + t[:, None]

    def weak(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x - t[:, None]

    y, steps = x, 4
    for i in range(steps):
        t, dt = torch.full((6,), 1 - i / steps, dtype=torch.float64), -1 / steps
        if i < 3:
            z = y + dt * strong(y, t)
            y = z - dt * weak(z, t)
        y = y + dt * strong(y, t)
    found = w2sd_sample(strong, weak, x, path, steps, kind="velocity", record=True)
    assert torch.allclose(found.x, y, atol=1e-12)
    assert found.states is not None
    assert len(found.states) == steps + 1


def test_half_precision_latents_are_stepped_in_float32() -> None:
    """Two steps in half precision would lose the small difference of near-equal latents."""
    x = randn(200, 2).half()
    strong, weak = (
        Network(lambda x, t, k=k: (x.float() * 0.3 + k).to(x.dtype), "noise") for k in (0.0, 0.02)
    )
    kinds: list[torch.dtype] = []

    class Watch(Hook):
        def before_step(self, state: State) -> None:
            kinds.append(state.x.dtype)

    hooks = [Reflection(weak, 1), Watch()]
    Solver([600.0, 590.0, -1.0], "ddim").run(strong, PATH, x, hooks=hooks)
    assert kinds == [torch.float16] * 2
    half, full = _state(x, strong, 600.0, 590.0), _state(x.double(), strong, 600.0, 590.0)
    for state in (half, full):
        Reflection(weak, 1).before_step(state)
    assert (
        float((half.x.double() - full.x).abs().max()) < 3e-3
    )  # one rounding of the result, and of the network's


# --- pairs that differ otherwise ------------------------------------------------------------------------------------


def conditional(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    return 0.1 * x + cond


def test_guidance_and_condition_of_each_part_are_their_own() -> None:
    x, word, none, raw = randn(3, 2), torch.ones(3, 2), torch.zeros(1, 2), torch.full((3, 2), 0.3)

    def at(k: float) -> Network:
        return Network(lambda x, t: 0.1 * x + k, "noise")

    zee = w2sd_sample(conditional, None, x, PATH, 5, cond=word, null=none, guidance=2.0, strong_guidance=5.5,
                      weak_guidance=0.0)  # fmt: skip
    want = w2sd_sample(at(2.0), at(0.0), x, PATH, 5, inner=at(5.5))
    assert torch.allclose(zee.x, want.x, atol=1e-5)
    assert zee.calls.tolist() == [5 * 2 + 4 * (2 + 1)] * 3  # guidance 0 is one call
    refined = w2sd_sample(conditional, None, x, PATH, 5, cond=word, weak_cond=raw)
    assert torch.allclose(refined.x, w2sd_sample(at(1.0), at(0.3), x, PATH, 5).x, atol=1e-5)
    assert refined.calls.tolist() == [5 + 2 * 4] * 3


def adapted() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(2, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.line(x)
            return out

    net = get_peft_model(Net(), LoraConfig(r=2, lora_alpha=4, target_modules=["line"]))
    nn.init.normal_(net.base_model.model.line.lora_B["default"].weight)
    return net


def test_adapters_at_two_scales_come_back_also_when_the_network_raises() -> None:
    net, x = adapted(), randn(4, 2)
    layer = net.base_model.model.line
    before = dict(layer.scaling)

    def merged(scale: float) -> Network:
        weight = (
            layer.base_layer.weight
            + scale * 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        )
        return Network(lambda x, t: nn.functional.linear(x, weight, layer.base_layer.bias), "noise")

    found = w2sd_sample(net, None, x, PATH, 5, strong_adapter_scale=0.8, weak_adapter_scale=-1.5)
    want = w2sd_sample(merged(1.0), merged(-1.5), x, PATH, 5, inner=merged(0.8))
    assert torch.allclose(found.x, want.x, atol=1e-4)
    assert layer.scaling == before
    with adapter_scale(net, -1.5):
        assert layer.scaling == {"default": -3.0}
    handle = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        w2sd_sample(net, None, x, PATH, 5, weak_adapter_scale=-1.5)
    handle.remove()
    assert layer.scaling == before


# --- diffusers ----------------------------------------------------------------------------------------------------


def unet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8, attention_head_dim=2,
    ).eval()  # fmt: skip


def pipeline(scheduler: Any) -> Any:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), latent_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=None, tokenizer=None, unet=unet(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


WORDS, NONE, LATENTS = randn(2, 5, 8), randn(1, 5, 8, seed=1), randn(2, 4, 8, 8)


def drawn(pipe: Any, callback: Any, steps: int = 5, latents: Tensor = LATENTS) -> Tensor:
    latents = latents if callback is None else callback.start(pipe, latents, steps)
    return pipe(
        prompt_embeds=WORDS, negative_prompt_embeds=NONE.expand(2, 5, 8), latents=latents.clone(),
        num_inference_steps=steps, guidance_scale=3.0, output_type="latent", callback_on_step_end=callback,
    ).images  # fmt: skip


@pytest.mark.parametrize("make", ["ddim", "euler"])
def test_the_callback_is_the_explicit_loop(make: str) -> None:
    scheduler = (
        diffusers.DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        if make == "ddim"
        else diffusers.EulerDiscreteScheduler(**STABLE, steps_offset=1)
    )
    pipe, other = pipeline(scheduler), unet(1)
    cond, null = {"encoder_hidden_states": WORDS}, {"encoder_hidden_states": NONE}
    untouched = drawn(pipe, None)
    none = W2SDCallback(other, 0, cond=cond)
    assert torch.equal(drawn(pipe, none), untouched)
    assert none.calls == 0
    for weak, options in ((other, {}), (None, {"strong_guidance": 5.5, "weak_guidance": 0.0})):
        callback = W2SDCallback(weak, 3, cond=cond, null=null, **options)
        found = drawn(pipe, callback)
        model = from_diffusers(pipe.unet, pipe.scheduler)
        second = None if weak is None else from_diffusers(weak, pipe.scheduler)
        model.times(5)
        want = w2sd_sample(model, second, model.start(LATENTS), None, 5, 3, cond=cond, null=null, guidance=3.0,
                           **options)  # fmt: skip
        assert float((found - want.x).abs().max()) < 1e-5 * max(1.0, float(found.abs().max()))
        assert float((found - untouched).abs().max()) > 1e-3
        assert callback.calls == int(want.calls[0]) - 2 * 5


def test_a_network_and_its_scheduler_a_transformer_with_a_flow_scheduler() -> None:
    torch.manual_seed(0)
    strong = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=1,
    ).eval()  # fmt: skip
    weak = copy.deepcopy(strong)
    with torch.no_grad():
        for p in weak.parameters():
            p.mul_(0.9)
    scheduler, x = diffusers.FlowMatchEulerDiscreteScheduler(), randn(2, 1, 8, 8)
    found = w2sd_sample(strong, weak, x, scheduler, 4, cond={"class_labels": torch.tensor([1, 2])})
    assert found.calls.tolist() == [4 + 2 * 3] * 2
    assert torch.equal(found.times, from_diffusers(strong, scheduler).times(4))
    half = w2sd_sample(
        lambda x, t: x * 0.1, lambda x, t: x * 0.2, x, scheduler, 4
    )  # reads its kind from it too
    assert half.times.tolist() == found.times.tolist()


def test_modes_and_global_randomness_are_left() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = 0.1 * self.drop(x)
            return out

    net, weak = Noisy().train(), Noisy().train()
    state = torch.get_rng_state()
    a = w2sd_sample(net, weak, randn(3, 2), PATH, 4)
    assert torch.equal(a.x, w2sd_sample(net, weak, randn(3, 2), PATH, 4).x)
    assert net.training
    assert weak.drop.training
    assert torch.equal(torch.get_rng_state(), state)


# --- refusals -----------------------------------------------------------------------------------------------------

EPS = Network(lambda x, t: x * 0.1, "noise")


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**{**STABLE, "clip_sample": False, **options})


def called_unstarted() -> None:
    W2SDCallback()(None, 0, 0, {})


def other_steps() -> None:
    pipe, callback = (
        pipeline(ddim(set_alpha_to_one=False, steps_offset=1)),
        W2SDCallback(cond={"encoder_hidden_states": WORDS}),
    )
    latents = callback.start(pipe, LATENTS, 5)
    pipe(prompt_embeds=WORDS, negative_prompt_embeds=NONE.expand(2, 5, 8), latents=latents, num_inference_steps=4,
         output_type="latent", callback_on_step_end=callback)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), PATH, 5, 5), "reflect_steps is 5"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), PATH, 5, -1), "reflect_steps is -1"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), PATH, 0), "steps is 0"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2)), "path is None"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), PATH, 5, inverse="newton"), "inverse is 'newton'"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), PATH, 5, inverse="fixed_point", iterations=0), "iterations is 0"),
        (lambda: w2sd_sample(EPS, Network(lambda x, t: x, "x0"), randn(2, 2), PATH, 5), "gives 'x0'"),
        (lambda: w2sd_sample(EPS, Network(lambda x, t: x[:, :1], "noise"), randn(2, 2), PATH, 5), r"shape \(2, 1\)"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), PATH, 5, guidance=5.5), "guidance is 5.5 and no null"),
        (lambda: w2sd_sample(EPS, None, randn(2, 2), PATH, 5, weak_guidance=0.0), "guidance is 0 and no null"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), PATH, 5, weak_adapter_scale=-1.5), "has no adapters"),
        (lambda: w2sd_sample(nn.Linear(2, 2), None, randn(2, 2), PATH, 5, weak_adapter_scale=float("nan")), "finite"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2) * float("nan"), PATH, 5), "x has 4 NaN"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), diffusers.DDPMScheduler(), 5), "draws noise at every step"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), diffusers.PNDMScheduler(), 5), "remembers of earlier steps"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), diffusers.DPMSolverMultistepScheduler(), 5), "remembers"),
        (lambda: w2sd_sample(EPS, EPS, randn(2, 2), diffusers.DDIMScheduler(clip_sample=True), 5), "clips x0"),
        (lambda: w2sd_sample(from_diffusers(unet(), ddim()), from_diffusers(unet(), ddim(beta_end=0.03)), LATENTS),
         "other noise levels"),
        (lambda: W2SDCallback(strong_guidance=5.5), "guidance is 5.5 and no null"),
        (lambda: W2SDCallback(reflect_steps=-1), "reflect_steps is -1"),
        (lambda: W2SDCallback(None, 5).start(pipeline(ddim(steps_offset=1)), LATENTS, 5), "reflect_steps is 5"),
        (lambda: W2SDCallback().start(object(), LATENTS, 5), "must have a unet or a transformer"),
        (lambda: W2SDCallback().start(pipeline(diffusers.PNDMScheduler(steps_offset=1)), LATENTS, 5), "remembers"),
        (called_unstarted, "start was not called"),
        (other_steps, "start was called for 5 steps"),
    ],
)  # fmt: skip
def test_refusals(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()
