"""diffusers: every scheduler is stepped and undone exactly, or refused; networks and pipelines are wired."""

from __future__ import annotations

import ast
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradmatch.core.bridge import (
    GuideCallback,
    from_diffusers,
    noise_path,
    path_times,
    prediction_kind,
    to_scheduler,
)
from gradmatch.core.checks import InputError
from gradmatch.core.guidance import ClassifierFreeGuidance, GradientGuide
from gradmatch.core.path import EDM, LinearPath, Prediction, VariancePreserving
from gradmatch.core.sampler import Solver

diffusers = pytest.importorskip("diffusers")
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Toy(nn.Module):
    """A network in diffusers' manner whose output depends on what it is given and when."""

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> tuple[Tensor]:
        t = torch.as_tensor(timestep, dtype=sample.dtype).reshape(-1, 1)
        return (torch.tanh(sample * 0.7 + 0.1) + torch.sin(t / 300),)


CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {"prediction_type": kind, "clip_sample": False, **options})
        for name in ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
        for kind in ("epsilon", "sample", "v_prediction")
        for options in (
            {**STABLE, "set_alpha_to_one": False, "steps_offset": 1},
            {"timestep_spacing": "trailing"},
        )
    ),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "clip_sample": False, "rescale_betas_zero_snr": True,
                       "timestep_spacing": "trailing"}),
    *(
        ("EulerDiscreteScheduler", {"prediction_type": kind, **options})
        for kind in ("epsilon", "sample", "v_prediction")
        for options in (STABLE, {"timestep_spacing": "leading", "steps_offset": 1}, {"use_karras_sigmas": True},
                        {"use_exponential_sigmas": True})
    ),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_type": "continuous",
                                "use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 50.0}),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_schedule": "exponential"}),
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1, "use_karras_sigmas": True}),
]  # fmt: skip


def scheduler_of(name: str, options: dict[str, Any], steps: int = 10) -> Any:
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_path_steps_as_the_scheduler_and_undoes_it(name: str, options: dict[str, Any]) -> None:
    """The scheduler's own loop in float64 latents, each of its steps repeated and undone by the path."""
    scheduler = scheduler_of(name, options)
    model, path = from_diffusers(Toy(), scheduler), noise_path(scheduler)
    times = path_times(scheduler).tolist()
    x = model.start(randn(3, 2)).double()
    first = x
    for timestep, t, t_next in zip(scheduler.timesteps, times[:-1], times[1:], strict=True):
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        out = Toy()(seen, timestep)[0]
        after = scheduler.step(out, timestep, x).prev_sample.double()
        said = model(x, torch.full((3,), t, dtype=torch.float64))
        mine = path.step(x, said, t, t_next)
        size = float(after.abs().max())
        assert float((mine - after).abs().max()) < 3e-6 * size + 1e-6 * float(x.abs().max()), (t, t_next)
        if not (model.kind == "x0" and t_next in (0.0, -1.0)) and not (
            options.get("rescale_betas_zero_snr") and t == times[0]
        ):
            back = path.inverse_step(mine, said, t, t_next)
            assert torch.allclose(back, x, rtol=1e-6, atol=1e-6 * float(x.abs().max()))
        x = after
    found = Solver(times, "ddim").run(model, path, first)
    assert torch.allclose(found.x, x, rtol=1e-3, atol=1e-3)
    assert found.calls.tolist() == [10] * 3
    assert torch.equal(model.times(10), torch.tensor(times, dtype=torch.float64))


def all_schedulers() -> list[str]:
    from diffusers import schedulers

    names = [n for part in schedulers._import_structure.values() for n in part]
    return sorted({n for n in names if n.endswith("Scheduler")})


ACCEPTED = {name for name, _ in CASES}


def test_diffusers_still_has_the_schedulers_that_are_proven() -> None:
    assert set(all_schedulers()) >= ACCEPTED
    assert len(all_schedulers()) > 45


@pytest.mark.parametrize("name", sorted(set(all_schedulers()) - ACCEPTED))
def test_every_other_scheduler_of_diffusers_is_refused_in_one_sentence(name: str) -> None:
    from diffusers import schedulers

    try:
        kind = getattr(schedulers, name)
        made = kind()
    except (
        ImportError,
        TypeError,
        AttributeError,
        ValueError,
    ):  # a library of its own, or options without defaults
        made = type(name, (), {"config": {}})()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError) as refusal:
            from_diffusers(Toy(), made)
    sentence = str(refusal.value)
    assert sentence.startswith(f"scheduler is a {name}, which ")
    assert "use " in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "DDIMScheduler",
            {},
            r"clip_sample=True\), so its step cannot be undone; use DDIMScheduler.from_config",
        ),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding=True"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "log_linear"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "draws noise at every step"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "runs from data at 1"),
        (
            "DDPMScheduler",
            {},
            "draws noise at every step, which has no inverse; use DDIMScheduler.from_config",
        ),
        ("PNDMScheduler", {}, "remembers of earlier steps"),
        ("HeunDiscreteScheduler", {}, "several times a step"),
        ("DDIMInverseScheduler", {}, "runs towards noise"),
        ("PiflowScheduler", {}, "is not known to step"),
    ],
)
def test_what_cannot_be_undone_is_refused_with_its_reason(
    name: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        noise_path(getattr(diffusers, name)(**options))


def test_the_advice_of_a_refusal_works() -> None:
    trained = diffusers.DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    scheduler = diffusers.DDIMScheduler.from_config(trained.config, clip_sample=False)
    path = noise_path(scheduler)
    assert isinstance(path, VariancePreserving)
    assert prediction_kind(scheduler) == "v"
    alpha = path.levels(torch.tensor([0.0, 500.0, 999.0]).double()).alpha.square()
    assert torch.allclose(alpha, trained.alphas_cumprod[[0, 500, 999]].double(), rtol=1e-6)


def test_times_that_miss_the_listed_timesteps_are_refused() -> None:
    scheduler = scheduler_of("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, 7)
    with pytest.raises(InputError, match=r"lists timesteps 999, 856, 713 and 4 more but .* by 142"):
        path_times(scheduler)
    with pytest.raises(InputError, match="no steps yet"):
        path_times(diffusers.DDIMScheduler(clip_sample=False))


def test_kinds_and_paths() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    assert prediction_kind(flow) == "velocity"
    assert isinstance(noise_path(flow), LinearPath)
    assert isinstance(noise_path(diffusers.EulerDiscreteScheduler()), EDM)
    with pytest.raises(InputError, match="prediction_type is 'score'"):
        prediction_kind(diffusers.DDIMScheduler(prediction_type="score"))
    with pytest.raises(InputError, match="must be a network"):
        from_diffusers(None, flow)  # type: ignore[arg-type]


# --- schedules into schedulers -----------------------------------------------------------------------------------


def test_a_times_array_goes_into_a_scheduler_as_it_is() -> None:
    for times in ([1.0, 0.74, 0.45, 0.0], [0.0, 0.26, 0.55, 1.0]):
        scheduler = to_scheduler(times)
        assert torch.allclose(scheduler.sigmas, torch.tensor([1.0, 0.74, 0.45, 0.0]))
        assert torch.allclose(path_times(scheduler), torch.tensor([1.0, 0.74, 0.45, 0.0]).double(), atol=1e-6)
    assert len(scheduler.timesteps) == 3  # passing the final 0 too would add a step of length 0


def test_times_in_a_scheduler_sample_as_times_in_a_solver() -> None:
    times = [1.0, 0.74, 0.45, 0.0]
    scheduler = to_scheduler(times)
    model = from_diffusers(Toy(), scheduler)
    x = randn(3, 2)
    found = Solver(times).run(model, LinearPath(), x)
    for timestep in scheduler.timesteps:
        x = scheduler.step(Toy()(x, timestep)[0], timestep, x).prev_sample
    assert torch.allclose(found.x, x, atol=1e-6)


@pytest.mark.parametrize(
    ("times", "scheduler", "says"),
    [
        ([1.0, 0.5, 0.1], None, "it must span the path"),
        ([1.0, 0.0], lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), "shift set, which bends"),
        (
            [1.0, 0.0],
            lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "dynamic_shifting",
        ),
        ([1.0, 0.0], lambda: diffusers.DDIMScheduler(), "go into a FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_times_that_would_be_bent_are_refused(times: list[float], scheduler: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        to_scheduler(times, scheduler and scheduler())


# --- diffusers' own networks and pipelines ------------------------------------------------------------------------


def conditional_unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()


def test_guidance_on_a_conditional_unet_takes_one_call_of_twice_the_batch() -> None:
    unet, scheduler = conditional_unet(), diffusers.DDIMScheduler(**STABLE, clip_sample=False)
    model = from_diffusers(unet, scheduler)
    rows: list[int] = []
    unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    words, none = randn(2, 5, 8), randn(1, 5, 8, seed=1)
    guide = ClassifierFreeGuidance(3.0, {"encoder_hidden_states": none})
    times = model.times(4)
    found = Solver(times, "ddim").run(
        model, model.path, randn(2, 4, 8, 8), cond={"encoder_hidden_states": words}, hooks=[guide]
    )
    assert rows == [4] * 4
    assert found.calls.tolist() == [8, 8]
    with torch.no_grad():
        x = randn(2, 4, 8, 8)
        for timestep in scheduler.timesteps:
            e_c = unet(x, timestep, words).sample
            e_u = unet(x, timestep, none.expand(2, 5, 8)).sample
            x = scheduler.step(e_u + 3.0 * (e_c - e_u), timestep, x).prev_sample
    assert torch.allclose(found.x, x, atol=2e-5)
    with pytest.raises(InputError, match="needs a mapping"):
        model(x, torch.zeros(2), words)


def tiny_pipeline(scheduler: Any) -> Any:
    """diffusers' latent pipeline without text: StableDiffusionPipeline around a random U-Net, given embeddings."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), latent_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=None, tokenizer=None, unet=conditional_unet(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("make", ["ddim", "euler"])
def test_a_gradient_guide_in_a_pipeline_is_the_guide_in_the_solver(make: str, guidance: float) -> None:
    scheduler = (
        diffusers.DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        if make == "ddim"
        else diffusers.EulerDiscreteScheduler(**STABLE, steps_offset=1)
    )
    pipe = tiny_pipeline(scheduler)
    words, none, latents = randn(2, 5, 8), randn(1, 5, 8, seed=1).expand(2, 5, 8), randn(2, 4, 8, 8)
    way = randn(2, 4, 8, 8, seed=4)

    def run(callback: Any = None) -> Tensor:
        return pipe(
            prompt_embeds=words, negative_prompt_embeds=none, latents=latents.clone(), num_inference_steps=5,
            guidance_scale=guidance, output_type="latent", callback_on_step_end=callback,
        ).images  # fmt: skip

    def guide(scale: float, **options: Any) -> GradientGuide:
        return GradientGuide([lambda x0, _: (x0 * way).sum()], scale=scale, **options)

    plain = run()
    assert torch.equal(run(GuideCallback(guide(0.0), latents)), plain)
    assert torch.equal(run(GuideCallback(guide(0.1, interval=(-3, -2)), latents)), plain)
    moved = run(GuideCallback(guide(0.1), latents))
    assert float((moved - plain).abs().max()) > 0.05
    model = from_diffusers(pipe.unet, pipe.scheduler)
    hooks = [ClassifierFreeGuidance(guidance, {"encoder_hidden_states": none}), guide(0.1)]
    found = Solver(model.times(5), "ddim").run(
        model, model.path, model.start(latents), cond={"encoder_hidden_states": words}, hooks=hooks
    )
    scale = float(moved.abs().max())
    assert float((found.x - moved).abs().max()) < 2e-5 * max(1.0, scale)
    with pytest.raises(InputError, match="only 'x0' is within reach"):
        GuideCallback(guide(0.1, through="network"), latents)


def test_an_unconditional_unet_and_a_transformer_with_a_flow_scheduler() -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        8, 1, 1, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    ).eval()  # fmt: skip
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=1,
    ).eval()  # fmt: skip
    for net, cond in ((unet, None), (transformer, {"class_labels": torch.tensor([1, 2])})):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        model = from_diffusers(net, scheduler)
        times = model.times(3)
        found = Solver(times).run(model, model.path, randn(2, 1, 8, 8), cond=cond)
        x = randn(2, 1, 8, 8)
        with torch.no_grad():
            for timestep in scheduler.timesteps:
                out = net(x, timestep.expand(2), **(cond or {})).sample
                x = scheduler.step(out, timestep, x).prev_sample
        assert torch.allclose(found.x, x, atol=1e-5)


def test_a_transformer_that_takes_its_timestep_elsewhere() -> None:
    """Stable Diffusion 3's second argument is the text; Flux is called with a thousandth of the timestep."""
    torch.manual_seed(0)
    net = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
    ).eval()  # fmt: skip
    cond = {"encoder_hidden_states": randn(2, 5, 16), "pooled_projections": randn(2, 8)}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = from_diffusers(net, scheduler)
    found = Solver(model.times(3)).run(model, model.path, randn(2, 4, 8, 8), cond=cond)
    x = randn(2, 4, 8, 8)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            out = net(x, timestep=timestep.expand(2), **cond).sample
            x = scheduler.step(out, timestep, x).prev_sample
    assert torch.allclose(found.x, x, atol=1e-5)
    seen = []

    class Flux(Toy):
        def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> tuple[Tensor]:
            seen.append(float(timestep[0]))
            return super().forward(sample, timestep)

    from_diffusers(Flux(), scheduler, timestep_scale=1e-3)(randn(2, 2), torch.full((2,), 0.25))
    assert seen == pytest.approx([0.25])


def test_predictions_convert_as_the_schedulers_own_formulas() -> None:
    scheduler = diffusers.DDPMScheduler()
    path = VariancePreserving(scheduler.alphas_cumprod)
    x0, noise, t = randn(4, 3).double(), randn(4, 3, seed=1).double(), torch.tensor([0, 10, 500, 999])
    noised = scheduler.add_noise(x0, noise, t)
    assert torch.allclose(path.sample(x0, noise, t), noised, atol=1e-6)
    v = scheduler.get_velocity(x0, noise, t)
    assert torch.allclose(path.target("v", x0, noise, t), v, atol=1e-6)
    assert torch.allclose(path.convert(Prediction("v", v), "x0", noised, t).tensor, x0, atol=1e-5)


def test_the_core_does_not_load_diffusers() -> None:
    from gradmatch.core import _schedulers, bridge

    for module in (bridge, _schedulers):
        top = ast.parse(inspect.getsource(module)).body
        names = [n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in top
                 if isinstance(n, ast.Import | ast.ImportFrom)]  # fmt: skip
        assert not [n for n in names if n and n.startswith("diffusers")]


def test_a_scheduler_that_shifts_by_the_images_size_needs_to_be_told() -> None:
    model = from_diffusers(Toy(), diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(InputError, match="use_dynamic_shifting=True"):
        model.times(5)


def test_a_guide_reads_x0_of_half_precision_latents_in_float32() -> None:
    scheduler = diffusers.DDIMScheduler(**STABLE, clip_sample=False)
    scheduler.set_timesteps(50)
    path, times = noise_path(scheduler), path_times(scheduler).tolist()
    seen: list[Tensor] = []

    def loss(x0: Tensor, _: Any) -> Tensor:
        seen.append(x0.detach())
        return x0.sum()

    before = randn(2, 4).half()
    after = path.step(before.double(), Prediction("noise", randn(2, 4, seed=1).double()), *times[:2]).half()
    callback = GuideCallback(GradientGuide([loss], scale=0.1), before)
    pipe = type("Pipe", (), {"scheduler": scheduler})
    moved = callback(pipe, 0, None, {"latents": after})["latents"]
    assert moved.dtype == torch.float16
    exact = path.aim("x0", before.double(), after.double(), *times[:2]).tensor
    assert float((seen[0].double() - exact).abs().max()) < 1e-3 * float(exact.abs().max())
