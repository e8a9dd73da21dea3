"""Learned proximal networks: known priors recovered, a prior of images read out, and images reconstructed with it.

Laplace: samples with noise of deviation 1 have the soft threshold for a proximal operator and R = |x|; a network is
trained with squares, absolute values, and then by proximal matching with gamma falling to 0.1, at a tenth of the
published steps. Mixture: two modes, whose R is not convex. Images: Fashion-MNIST with noise 0.1; R of 50 test images
made worse in three ways; 32 test images deblurred and filled in from a quarter of their pixels, next to a plain
denoiser of equal size in the same loops, total variation, and a classical method. Each of those chooses among six
settings on 8 images held out of the training set (but for the biharmonic surface, which has none).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gradmatch.core.networks import build
from gradmatch.datasets import fashion_mnist
from gradmatch.evidence._common import Gain, Result, Row, Settings, gain, parallel, verdict_of
from gradmatch.evidence.solve import _lpn_images as images
from gradmatch.evidence.solve import _lpn_toys as toys
from gradmatch.evidence.solve._lpn_picture import picture
from gradmatch.solve import ConvexNet, LearnedProx, ProximalMatching, Stage, pnp

SLUG = "lpn"
TITLE = "LPN: learned proximal networks"
CLAIM = (
    "A denoiser that is the gradient of a convex network is a proximal operator; trained by proximal matching it "
    "recovers the prior of the data, whose value can be read, and reconstruction with it converges and is as good as "
    "with denoisers that promise nothing."
)
RULE = (
    "All figures are means over the seeds. (1) Laplace, largest error of f on [-3, 3] against the soft threshold: at "
    "most 0.25 by proximal matching at gamma 0.1, at least 0.38 with squares and with absolute values, all three and "
    "gamma 0.5 and 0.2 within 0.08 of what the loss would give without limits (0.1 need not be); (2) largest error of "
    "R on [-2, 2] against |x|: proximal matching at 0.1 below absolute values below squares. (3) Mixture: f within "
    "0.25 of the numerical proximal operator for 0.15 <= |y| <= 3, and R between the modes above them by half to "
    "twice of what it should. (4) Images: the mean R of 50 test images rises at every step of noise (0 to 0.3), of "
    "blur (0 to 2) and of mixing with another image (0 to 0.5), for every seed; (5) u.Jv and v.Ju differ by less than "
    "1e-4 of their size for the learned prox and by more than 1e-2 for the plain denoiser, which therefore has no R. "
    "(6) Deblurring and (7) filling in: ahead of total variation and of the classical method (Wiener; biharmonic) by "
    "two standard errors, paired by seed, and at most 1 dB behind the plain denoiser. (8) In proximal gradient "
    "descent below the bound the objective rises for no image in any step by more than 1e-4 of its whole fall. "
    "'holds' if all eight are met, 'holds in part' if some are, 'does not hold' if none is."
)

PLAIN_SHARE, LADDER_SHARE, BATCH = 0.08, 0.15, 500
MIXTURE_STEPS = 200
GAMMAS = (0.5, 0.2, 0.1)
SIGMA, ALPHA, CHANNELS, IMAGE_BATCH = 0.1, 0.01, 16, 32
PRETRAIN, STAGE_STEPS = 300, 75
ITERATIONS, HELD_OUT, TESTED, READ = 60, 8, 32, 50
TASKS = ("deblurring", "filling in")


def _plain(loss: str) -> list[Stage]:
    steps = round(PLAIN_SHARE * 10_000)
    return [Stage(loss, steps, 1e-3), Stage(loss, steps, 1e-4)]


def _matched(gamma: float, *stages: tuple[int, float]) -> list[Stage]:
    return [Stage("proximal", round(LADDER_SHARE * steps), lr, gamma) for steps, lr in stages]


def laplace_plans() -> list[dict[str, list[Stage]]]:
    """The published stages at a share of their steps, for two networks; those of each follow one another."""
    ladder = {
        "absolute": _plain("l1"),
        "gamma 0.5": _matched(0.5, (2000, 1e-3), (2000, 1e-4)),
        "gamma 0.2": [
            *_matched(0.4, (4000, 1e-4)),
            *_matched(0.3, (4000, 1e-4)),
            *_matched(0.2, (4000, 1e-5)),
        ],
        "gamma 0.1": _matched(0.1, (4000, 1e-5), (4000, 1e-6)),
    }
    return [{"squares": _plain("l2")}, ladder]


def _laplace(seed: int) -> dict[str, Any]:
    """Curves of f and R by loss."""
    found = {}
    for plans in laplace_plans():
        for name, model in toys.trained(toys.laplace, toys.SIGMA, plans, BATCH, seed).items():
            found[name] = toys.curves(model)
    return found


def _mixture(seed: int) -> dict[str, Any]:
    """Curves of f and R of the mixture, whose stages are our own."""
    ladder = [
        Stage("proximal", MIXTURE_STEPS, lr, g)
        for g, lr in ((0.5, 1e-3), (0.3, 1e-3), (0.2, 1e-4), (0.1, 1e-4))
    ]
    plan = {"all": [Stage("l1", 2 * MIXTURE_STEPS, 1e-3), *ladder]}
    (model,) = toys.trained(toys.mixture, toys.MIXTURE_SIGMA, plan, BATCH, seed).values()
    return {"mixture": toys.curves(model, toys.BETWEEN)}


def _toys(name: str, seed: int) -> dict[str, Any]:
    return _laplace(seed) if name == "laplace" else _mixture(seed)


def denoisers(seed: int) -> dict[str, Any]:
    """The learned prox and the plain denoiser, with the same noise, batches and rates."""
    train = fashion_mnist().train.x[HELD_OUT:]
    prox = LearnedProx(ConvexNet.conv((1, 28, 28), CHANNELS, seed=seed), ALPHA)
    ProximalMatching(prox, SIGMA, pretrain=PRETRAIN, steps=STAGE_STEPS).fit(train, IMAGE_BATCH, seed=seed)
    plain = build(images.PlainDenoiser, seed)
    stages = [Stage("l2", PRETRAIN, 1e-3), Stage("l2", 4 * STAGE_STEPS, 1e-4)]
    ProximalMatching(plain, SIGMA, schedule=stages).fit(train, IMAGE_BATCH, seed=seed)
    return {"LPN": prox.eval(), "plain denoiser": plain.eval()}


def _images(seed: int) -> dict[str, Any]:
    """Everything on images."""
    split = fashion_mnist()
    order = torch.randperm(len(split.test.x), generator=torch.Generator().manual_seed(seed))
    test, held = split.test.x[order[:READ]], split.train.x[:HELD_OUT]
    nets = denoisers(seed)
    prox = nets["LPN"]
    found: dict[str, Any] = {
        "priors": {
            way: [(s, float(prox.prior(x).value.mean())) for s, x in worse]
            for way, worse in images.disturbed(test, seed).items()
        },
        "asymmetry": {name: images.asymmetry(net, test[:8], seed) for name, net in nets.items()},
        "shown": {},
    }
    methods = {name: images.plugged(net, ITERATIONS) for name, net in nets.items()}
    methods["total variation"] = images.total_variation(ITERATIONS)
    for task in TASKS:
        found[task] = {}
        methods["classical"] = images.classical(task)
        given = images.measured(test[:TESTED], task, seed)
        found["shown"][task] = {"measured": given[0][:4].numpy(), "truth": test[:4].numpy()}
        for name, settings in methods.items():
            trial = images.measured(held, task, 1000 + seed)
            scores = {k: images.psnr(run(*trial, task), held) for k, run in settings.items()}
            best = max(scores, key=lambda k: scores[k])
            x = settings[best](*given, task)
            found[task][name] = images.psnr(x, test[:TESTED]), best
            found["shown"][task][name] = x[:4].numpy()
        found[task]["measured"] = images.psnr(given[0], test[:TESTED]), ""
        found[f"{task}, rise"] = _largest_rise(prox, *given)
    return found


def _largest_rise(prox: LearnedProx, y: torch.Tensor, A: images.Map) -> float:
    """The largest rise of an image's objective in a step, over its whole fall; in double precision."""
    exact = copy.deepcopy(prox).double()
    trace = pnp(y.double(), A, A, exact, "pgd", iters=ITERATIONS).objective
    assert trace is not None
    return float((trace.diff(dim=0).amax(0).clamp_min(0) / (trace[0] - trace.amin(0)).clamp_min(1e-12)).max())


def run(settings: Settings) -> Result:
    """All parts, a task for each; judged by ``RULE``."""
    seeds = settings.seed_list(3)
    shown = parallel(_images, [(s,) for s in seeds], settings, label="images")
    tasks = [(name, s) for name in ("laplace", "mixture") for s in seeds]
    found = dict(zip(tasks, parallel(_toys, tasks, settings, label="known priors"), strict=True))
    known = [found["laplace", s] | found["mixture", s] for s in seeds]
    rows = [*_known_rows(known), *_image_rows(shown)]
    return judged(rows, picture(known, shown))


def _known_rows(known: Sequence[dict[str, Any]]) -> list[Row]:
    rows = []
    losses = {"squares": ("l2", None), "absolute": ("l1", None)} | {
        f"gamma {g:g}": ("proximal", g) for g in GAMMAS
    }

    def largest(gaps: Sequence[np.ndarray]) -> tuple[float, ...]:
        return tuple(float(np.abs(gap).max()) for gap in gaps)

    soft = toys.soft_threshold(toys.AT)
    for name, loss in losses.items():
        best, learned = toys.ideal(*loss), [k[name] for k in known]
        limit = float(np.abs(best - soft).max())
        rows += [
            Row(
                f"Laplace, error of f, {name}",
                largest([f - soft for f, _ in learned]),
                f"{limit:.2f} at best",
            ),
            Row(f"Laplace, f less its best, {name}", largest([f - best for f, _ in learned])),
            Row(f"Laplace, error of R, {name}", largest([R - np.abs(toys.AT_R) for _, R in learned])),
        ]
    apart, truth = np.abs(toys.AT) >= 0.15, toys.mixture_prox(toys.AT)
    rows.append(Row("mixture, error of f", largest([(k["mixture"][0] - truth)[apart] for k in known])))
    should = _barrier(toys.mixture_hull(toys.BETWEEN))
    heights = tuple(_barrier(k["mixture"][1]) / should for k in known)
    rows.append(
        Row("mixture, R between the modes over what it should be", heights, f"should be {should:.3f}")
    )
    return rows


def _barrier(R: np.ndarray) -> float:
    """R at 0 less its mean at the modes."""
    modes = np.abs(np.abs(toys.BETWEEN) - toys.MODES) < 1e-9
    return float(R[len(R) // 2] - R[modes].mean())


def _image_rows(shown: Sequence[dict[str, Any]]) -> list[Row]:
    rows = []
    for way, curve in shown[0]["priors"].items():
        for i, (strength, _) in enumerate(curve):
            values = tuple(
                s["priors"][way][i][1] - s["priors"][way][0][1] for s in shown
            )  # R has a free constant
            rows.append(Row(f"mean R less that of the images, {way} {strength:g}", values, f"{READ} images"))
    for name in shown[0]["asymmetry"]:
        rows.append(Row(f"asymmetry of the Jacobian, {name}", tuple(s["asymmetry"][name] for s in shown)))
    for task in TASKS:
        for name in shown[0][task]:
            chosen = "; ".join(sorted({s[task][name][1] for s in shown}))
            rows.append(Row(f"PSNR in dB, {task}, {name}", tuple(s[task][name][0] for s in shown), chosen))
        rows.append(Row(f"largest rise of the objective, {task}", tuple(s[f"{task}, rise"] for s in shown)))
    return rows


def judged(rows: Sequence[Row], png: bytes | None = None) -> Result:
    """The verdict by ``RULE``."""
    found = {r.method: r for r in rows}

    def mean(name: str) -> float:
        return found[name].mean

    error = {n: mean(f"Laplace, error of f, {n}") for n in ("squares", "absolute", "gamma 0.1")}
    off = max(
        mean(f"Laplace, f less its best, {n}") for n in ("squares", "absolute", "gamma 0.5", "gamma 0.2")
    )
    prior = {n: mean(f"Laplace, error of R, {n}") for n in ("squares", "absolute", "gamma 0.1")}
    height = mean("mixture, R between the modes over what it should be")
    rises = {way: _least_rise(found, way) for way in ("noise", "blur", "mixing")}
    skew = {n: mean(f"asymmetry of the Jacobian, {n}") for n in ("LPN", "plain denoiser")}
    leads = {task: _leads(found, task) for task in TASKS}
    objective = max(max(found[f"largest rise of the objective, {task}"].values) for task in TASKS)
    met = [
        error["gamma 0.1"] <= 0.25 and min(error["squares"], error["absolute"]) >= 0.38 and off <= 0.08,
        prior["gamma 0.1"] < prior["absolute"] < prior["squares"],
        mean("mixture, error of f") <= 0.25 and 0.5 <= height <= 2,
        min(rises.values()) > 0,
        skew["LPN"] < 1e-4 and skew["plain denoiser"] > 1e-2,
        *(tv.above() and old.above() and plain.mean >= -1 for tv, old, plain in leads.values()),
        objective <= 1e-4,
    ]
    fails = ", ".join(f"({k})" for k, m in enumerate(met, 1) if not m)
    words = [f"{sum(met)} of {len(met)} conditions met" + (f", not {fails}." if fails else ".")]
    words.append(
        f"(1) Error of f {error['squares']:.2f}, {error['absolute']:.2f}, {error['gamma 0.1']:.2f} with squares, "
        f"absolute values, proximal matching; at most {off:.2f} from the best possible; (2) of R "
        f"{prior['squares']:.2f}, {prior['absolute']:.2f}, {prior['gamma 0.1']:.2f}; (3) mixture: error of f "
        f"{mean('mixture, error of f'):.2f}, barrier {height:.2f} of what it should be; (4) least rise of R "
        + ", ".join(f"{v:+.2g} ({k})" for k, v in rises.items())
        + f"; (5) asymmetry {skew['LPN']:.0e} and {skew['plain denoiser']:.0e}; "
        + "; ".join(
            f"({6 + k}) {task}: ahead of total variation {tv}, of the classical method {old}, of the plain denoiser "
            f"{plain} dB"
            for k, (task, (tv, old, plain)) in enumerate(leads.items())
        )
        + f"; (8) the objective rises by at most {objective:.0e} of its fall."
    )
    links = {
        "paper": "https://arxiv.org/abs/2310.14344",
        "code": "https://github.com/ZhenghanFang/learned-proximal-networks",
    }
    return Result(
        SLUG,
        TITLE,
        CLAIM,
        RULE,
        verdict_of(met),
        " ".join(words),
        "error, R, or PSNR in dB, as each row says",
        tuple(rows),
        pictures=() if png is None else ((f"{SLUG}.png", png),),
        links=links,
    )


def _least_rise(found: dict[str, Row], way: str) -> float:
    """The smallest rise of the mean R from one strength to the next, over all seeds."""
    values = np.array(
        [r.values for name, r in found.items() if name.startswith(f"mean R less that of the images, {way} ")]
    )
    return float(np.diff(values, axis=0).min())


def _leads(found: dict[str, Row], task: str) -> tuple[Gain, Gain, Gain]:
    own = found[f"PSNR in dB, {task}, LPN"]
    others = ("total variation", "classical", "plain denoiser")
    tv, old, plain = (gain(own, found[f"PSNR in dB, {task}, {n}"]) for n in others)
    return tv, old, plain
