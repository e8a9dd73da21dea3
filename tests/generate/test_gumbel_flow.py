"""GumbelSimplexFlow: loss, sampling with exact posteriors, guidance, padding, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradmatch.core.checks import InputError
from gradmatch.core.simplex import dirichlet_noise
from gradmatch.generate import GumbelSimplexFlow


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(prior: Tensor, **options) -> GumbelSimplexFlow:
    """A flow whose denoiser is the posterior of independent tokens."""
    flow = GumbelSimplexFlow(lambda x, t: x, len(prior), **options)
    flow.denoiser = lambda x, t: flow.path.posterior(x, t, prior.to(x)).clamp_min(1e-30).log()
    return flow


def divergence(prior: Tensor, tokens: Tensor) -> float:
    """KL(prior || generated), with half a count added to each."""
    counts = torch.bincount(tokens.flatten(), minlength=len(prior)).double() + 0.5
    return float((prior * (prior / (counts / counts.sum())).log()).sum())


class Tiny(nn.Module):
    def __init__(self, k: int, length: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(length * k, 32), nn.ReLU(), nn.Linear(32, length * k)
        )
        self.k = k

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x).reshape(x.shape)


def tiny(k: int = 6, **options) -> GumbelSimplexFlow:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GumbelSimplexFlow(Tiny(k), k, **options)


@pytest.mark.parametrize("k", [4, 20])
def test_the_consistent_path_is_exact_and_the_published_one_biased(k):
    prior = dirichlet_noise(k, generator=seeded(5)).double()
    n = 8000
    found = {}
    for path in ("published", "consistent"):
        for decode in ("posterior", "argmax_x", "argmax_p"):
            tokens = exact(prior, path=path).sample(n, 1, steps=50, decode=decode, generator=seeded()).tokens
            found[path, decode] = divergence(prior, tokens)
    floor = (k - 1) / (2 * n)
    assert found["consistent", "posterior"] < 6 * floor + 5e-4
    assert found["published", "posterior"] > 20 * found["consistent", "posterior"]
    assert found["published", "argmax_p"] > 1.5 * found["published", "posterior"]


def test_ten_exact_steps_are_as_good_as_a_hundred_and_euler_agrees():
    prior = dirichlet_noise(4, generator=seeded(5)).double()
    flow = exact(prior)
    ten, hundred, euler = (
        flow.sample(4000, 1, steps=s, integrator=i, generator=seeded())
        for s, i in ((10, "exp"), (100, "exp"), (400, "euler"))
    )
    assert float((ten.x - hundred.x).abs().mean()) < 0.02
    assert float((euler.x - hundred.x).abs().max()) < 0.02
    assert hundred.calls.tolist() == [101] * 4000
    for found in (ten, euler):
        torch.testing.assert_close(found.x.sum(-1), torch.ones(4000, 1))
        assert float(found.x.min()) >= 0


def test_coarse_euler_steps_are_put_back_on_the_simplex():
    found = tiny(path="consistent").sample(50, 4, steps=3, integrator="euler", generator=seeded())
    torch.testing.assert_close(found.x.sum(-1), torch.ones(50, 4))


def test_the_loss_is_cross_entropy_at_the_paths_points():
    flow = tiny()
    tokens = torch.randint(6, (9, 4), generator=seeded(1))
    x, t = flow.noised(tokens, None, seeded(2))
    expected = F.cross_entropy(flow.denoiser(x, t).flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(flow.loss(tokens, generator=seeded(2)), expected)
    assert 0 <= float(t.min()) < float(t.max()) <= 1


def test_training_learns_what_goes_with_what():
    """Tokens of a sequence are all equal: so are those of samples, mostly."""
    flow = tiny(path="consistent")
    optimizer, g = torch.optim.Adam(flow.parameters(), 1e-2), seeded()
    for _ in range(300):
        tokens = torch.randint(6, (64, 1), generator=g).expand(64, 4)
        optimizer.zero_grad()
        flow.loss(tokens, generator=g).backward()
        optimizer.step()
    found = flow.sample(300, 4, steps=20, generator=g).tokens
    assert float((found == found[:, :1]).double().mean()) > 0.8


def test_padding_does_not_count_and_does_not_move():
    flow = tiny()
    tokens = torch.randint(6, (5, 4), generator=seeded(1))
    mask = torch.arange(4)[None] < torch.tensor([4, 3, 2, 1, 4])[:, None]
    other = torch.where(mask, tokens, torch.full_like(tokens, -7))  # what stands in padding may be anything
    for loss in (flow.loss, flow.score_loss):
        torch.testing.assert_close(
            loss(tokens, mask=mask, generator=seeded()), loss(other, mask=mask, generator=seeded())
        )
    found = flow.sample(5, 4, steps=7, mask=mask, generator=seeded(), guide=weighted, guide_scale=5.0)
    assert torch.equal(found.x[~mask], torch.full_like(found.x[~mask], 1 / 6))
    assert torch.equal(found.tokens[~mask], torch.zeros_like(found.tokens[~mask]))


def weighted(s: Tensor) -> Tensor:
    return (s * torch.arange(s.shape[-1])).sum((1, 2))


def test_guidance_raises_the_score_and_zero_changes_nothing():
    flow = tiny()
    plain = flow.sample(200, 4, steps=10, generator=seeded())
    zero = flow.sample(200, 4, steps=10, generator=seeded(), guide=weighted, guide_scale=0.0)
    assert torch.equal(plain.tokens, zero.tokens)
    assert torch.equal(plain.x, zero.x)
    for options in ({}, {"guide_at": "prediction"}, {"integrator": "euler"}):
        means = []
        for scale in (0.0, 0.3, 1.0):
            guide = {"guide": weighted, "guide_scale": scale, **options}
            found = flow.sample(400, 4, steps=10, decode="argmax_x", generator=seeded(), **guide)
            means.append(float(found.tokens.double().mean()))
        assert means == sorted(means)
        assert means[-1] > means[0] + 0.3


def test_the_same_seed_gives_the_same_and_the_global_generator_is_left_alone():
    flow, before = tiny(), torch.get_rng_state()
    a, b = (flow.sample(9, 4, steps=5, generator=seeded()).tokens for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, flow.sample(9, 4, steps=5, generator=seeded(1)).tokens)
    assert torch.equal(torch.get_rng_state(), before)


def test_low_temperature_is_the_mode():
    flow = tiny()
    cold = flow.sample(50, 4, steps=5, temperature=1e-4, generator=seeded())
    assert torch.equal(cold.tokens, cold.posterior.argmax(-1))


def test_score_matching_recovers_the_paths_end():
    prior = torch.tensor([0.7, 0.2, 0.1])
    flow = GumbelSimplexFlow(lambda x, t: x, 3)

    def denoiser(
        x: Tensor, t: Tensor
    ) -> Tensor:  # the exact mean of the weights, put back behind the softmax
        p = flow.path.posterior(x, t, prior)
        hot = torch.eye(3).expand(*x.shape[:-1], 3, 3)
        each = (2.0 * hot - (2.0 * flow.path.tau(t).reshape(-1, 1, 1) * x.log())[..., None, :]).softmax(-1)
        mean = (p[..., None] * each).sum(-2)
        return mean.log() + 2.0 * flow.path.tau(t).reshape(-1, 1, 1) * x.log()

    flow.denoiser = denoiser
    found = flow.sample_score(1500, 1, steps=10, corrections=20, generator=seeded())
    tokens = torch.multinomial(prior, 20000, replacement=True, generator=seeded(1))
    noise = -torch.log(-torch.log(torch.rand(20000, 1, 3, generator=seeded(2)).clamp(1e-9, 1 - 1e-7)))
    truth = flow.path.sample(F.one_hot(tokens, 3)[:, None].float(), noise, 1.0)
    torch.testing.assert_close(found.mean(0), truth.mean(0), rtol=0, atol=0.03)


def test_a_hugging_face_encoder_is_a_denoiser():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=2, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        hidden_dropout_prob=0.5,
    )  # fmt: skip

    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.body, self.out = (
                nn.Linear(7, 8),
                BertModel(config, add_pooling_layer=False),
                nn.Linear(8, 7),
            )

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.out(self.body(inputs_embeds=self.into(x) + t[:, None, None]).last_hidden_state)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = GumbelSimplexFlow(Denoiser(), 7).train()
        flow.loss(torch.zeros(2, 5, dtype=torch.long), generator=seeded()).backward()
    assert flow.denoiser.out.weight.grad is not None
    a, b = (flow.sample(2, 5, steps=4, generator=seeded()) for _ in range(2))
    assert torch.equal(a.x, b.x)  # no dropout in sampling
    assert flow.denoiser.body.training


def test_wrong_uses_are_refused():
    flow = tiny()
    for bad in (torch.tensor([[0, 6]]), torch.tensor([[-1, 0]])):
        with pytest.raises(InputError, match=r"tokens run from .* they must lie in 0..5"):
            flow.loss(bad, generator=seeded())
    with pytest.raises(InputError, match=r"tokens is torch\.float32"):
        flow.loss(torch.zeros(2, 4), generator=seeded())
    with pytest.raises(InputError, match="num_classes is 1"):
        GumbelSimplexFlow(lambda x, t: x, 1)
    for bad in ({"tau_max": 0}, {"decay": 0}, {"beta": -1}):
        with pytest.raises(InputError, match="above 0"):
            GumbelSimplexFlow(lambda x, t: x, 3, **bad)
    with pytest.raises(InputError, match="path is 'linear'"):
        GumbelSimplexFlow(lambda x, t: x, 3, path="linear")
    with pytest.raises(InputError, match="one number for each sequence"):
        flow.sample(2, 4, generator=seeded(), guide=lambda s: s.sum())
    with pytest.raises(InputError, match="must be differentiable"):
        flow.sample(2, 4, generator=seeded(), guide=lambda s: s.detach().sum((1, 2)))
    with pytest.raises(InputError, match="x lies off the simplex"):
        flow.posterior(torch.full((2, 4, 6), 0.5), torch.zeros(2))
    with pytest.raises(InputError, match=r"mask is torch.bool of shape \(2, 3\)"):
        flow.loss(
            torch.zeros(2, 4, dtype=torch.long), mask=torch.ones(2, 3, dtype=torch.bool), generator=seeded()
        )
    with pytest.raises(InputError, match="it must give logits shaped as x"):
        GumbelSimplexFlow(lambda x, t: x[..., :2], 3).sample(2, 4, generator=seeded())
    with pytest.raises(InputError, match="decode is 'mode'"):
        flow.sample(2, 4, decode="mode", generator=seeded())


def test_guided_euler_steps_that_leave_the_simplex_are_put_back_before_logarithms():
    prior = torch.tensor([0.7, 0.1, 0.1, 0.05, 0.05])
    flow = exact(prior, path="consistent")
    for steps in (3, 7):
        found = flow.sample(
            64,
            3,
            steps=steps,
            integrator="euler",
            guide=lambda s: s[..., 4].sum(1),
            guide_scale=1.0,
            generator=seeded(),
        )
        assert torch.allclose(found.x.sum(-1), torch.ones(64, 3))


def test_tokens_of_any_whole_type_and_networks_of_any_precision():
    torch.manual_seed(0)
    net = Tiny(6)
    flow, tokens = GumbelSimplexFlow(net, 6), torch.tensor([[0, 1, 2, 5]])
    wanted = flow.loss(tokens, generator=seeded()), flow.score_loss(tokens, generator=seeded())
    for kind in (torch.uint8, torch.int32):
        got = (
            flow.loss(tokens.to(kind), generator=seeded()),
            flow.score_loss(tokens.to(kind), generator=seeded()),
        )
        assert [float(v.detach()) for v in got] == [float(v.detach()) for v in wanted]
    flow = GumbelSimplexFlow(net.double(), 6)
    assert float(flow.loss(tokens, generator=seeded()).detach()) == pytest.approx(
        float(wanted[0].detach()), abs=1e-5
    )
    assert flow.sample(2, 4, steps=3, generator=seeded()).tokens.shape == (2, 4)
