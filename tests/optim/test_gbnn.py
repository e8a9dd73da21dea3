"""Every check, refusal and pitfall of sequential training by gradient boosting."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, load_wine, make_friedman1
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradmatch.core.checks import InputError
from gradmatch.optim import GBNNClassifier, GBNNRegressor, boost_head
from gradmatch.optim._boosting_losses import Binary, Softmax, Squared
from gradmatch.optim._small_net import ACTIVATIONS, SmallNet, _Objective, fit_small_net


def standard(X: np.ndarray) -> np.ndarray:
    return StandardScaler().fit_transform(X)


X2, Y2 = load_breast_cancer(return_X_y=True)
X2 = standard(X2)[:200]
Y2 = Y2[:200]
X3, Y3 = load_wine(return_X_y=True)
X3 = standard(X3)
XR, YR = make_friedman1(200, 6, noise=1.0, random_state=0)
XR = standard(XR)
QUICK = {"total_units": 12, "max_iter": 40, "random_state": 0}


# --- scikit-learn ---------------------------------------------------------------------------------------------

SUBSAMPLED = {
    "check_sample_weight_equivalence_on_dense_data": "small nets are fitted to random parts of the rows"
}


@parametrize_with_checks(
    [
        GBNNClassifier(total_units=6, eta=0.5, max_iter=60),
        GBNNRegressor(total_units=24, eta=0.5, max_iter=60),
    ],
    expected_failed_checks=lambda estimator: SUBSAMPLED,
)
def test_it_is_a_scikit_learn_estimator(estimator, check) -> None:
    check(estimator)


def test_clone_pickle_grid_search_and_pipeline() -> None:
    model = GBNNClassifier(**QUICK, units_per_step=2)
    assert clone(model).get_params() == model.get_params()
    fitted = model.fit(X3, Y3)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict_proba(X3), fitted.predict_proba(X3))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), clone(model)), {"gbnnclassifier__eta": [0.1, 0.5]}, cv=2
    )
    assert search.fit(X3, Y3).best_score_ > 0.85


# --- losses ---------------------------------------------------------------------------------------------------


def torch_loss(name: str, y: torch.Tensor, F: torch.Tensor) -> torch.Tensor:
    """Written out for autograd, per example."""
    if name == "squared":
        return (y - F).square().sum(1) / 2
    if name == "binary":
        return torch.log1p(torch.exp(-2 * y * F)).sum(1)
    return -(y * F.log_softmax(1)).sum(1)


CASES = {
    "squared": (Squared(), np.random.default_rng(0).standard_normal((7, 2))),
    "binary": (Binary(), np.array([[1.0], [-1], [1], [1], [-1], [-1], [1]])),
    "softmax": (Softmax(), np.eye(3)[[0, 1, 2, 2, 1, 0, 0]]),
    "softmax exact": (Softmax(True), np.eye(3)[[0, 1, 2, 2, 1, 0, 0]]),
}


@pytest.mark.parametrize("name", CASES)
def test_slopes_and_bends_are_derivatives(name: str) -> None:
    loss, y = CASES[name]
    rng = np.random.default_rng(1)
    F, h, w = rng.standard_normal(y.shape), rng.standard_normal(y.shape), rng.random(7)
    w /= w.sum()
    at = torch.from_numpy(F).requires_grad_()
    values = torch_loss(name.split()[0], torch.from_numpy(y), at)
    assert loss.value(y, F, w) == pytest.approx(float(values.detach().numpy() @ w))
    (slope,) = torch.autograd.grad(values.sum(), at)
    r = loss.slope(y, F)
    assert np.allclose(r, -slope.numpy(), atol=1e-12)
    step = 1e-4
    bend = (
        sum(
            sign
            * torch_loss(name.split()[0], torch.from_numpy(y), torch.from_numpy(F + k * step * h)).numpy()
            for k, sign in ((1, 1), (0, -2), (-1, 1))
        )
        / step**2
    )
    if name == "softmax":  # the published diagonal
        p = y - r
        assert np.allclose(loss.bend(r, y, h), (p * (1 - p) * h**2).sum(1), atol=1e-12)
        assert not np.allclose(loss.bend(r, y, h), bend, rtol=0.05)
    else:
        assert np.allclose(loss.bend(r, y, h), bend, atol=1e-5)
    rho = loss.step(y, r, h, w)
    if name != "softmax":
        expansion = np.array(
            [-w @ (r * h).sum(1) * s + w @ bend * s**2 / 2 for s in (rho - 1e-3, rho, rho + 1e-3)]
        )
        assert expansion[1] < min(expansion[0], expansion[2])


def test_for_two_opposite_classes_the_exact_bend_is_twice_the_diagonal() -> None:
    rng = np.random.default_rng(0)
    y, one = np.eye(2)[rng.integers(2, size=9)], rng.standard_normal((9, 1))
    h, r = np.hstack([one, -one]), Softmax().slope(y, rng.standard_normal((9, 2)))
    assert np.allclose(Softmax(True).bend(r, y, h), 2 * Softmax().bend(r, y, h))


@pytest.mark.parametrize("name", ["squared", "binary"])
def test_the_start_has_zero_mean_slope(name: str) -> None:
    loss, y = CASES[name]
    w = np.random.default_rng(0).random(7)
    w /= w.sum()
    assert np.allclose(w @ loss.slope(y, np.tile(loss.start(y, w), (7, 1))), 0, atol=1e-12)
    assert not Softmax().start(CASES["softmax"][1], w).any()


# --- small nets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_fused_objective_equals_autograd(activation: str) -> None:
    rng = np.random.default_rng(0)
    X, r, w = rng.standard_normal((20, 4)), rng.standard_normal((20, 2)), rng.random(20)
    flat = rng.standard_normal(3 * 5 + 2 * 4)
    value, gradient = _Objective(X, r, w, 0.3, 0.7, 3, ACTIVATIONS[activation])(flat)
    t = torch.from_numpy(flat).requires_grad_()
    a = {"logistic": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}[activation]
    first, second = t[:15].reshape(3, 5), t[15:].reshape(2, 4)
    out = a(torch.from_numpy(X) @ first[:, :4].T + first[:, 4]) @ second[:, :3].T + second[:, 3]
    loss = (torch.from_numpy(w) * (out - torch.from_numpy(r)).square().sum(1)).sum() / 2
    loss = loss + 0.15 * first[:, :4].square().sum() + 0.35 * second[:, :3].square().sum()
    loss.backward()
    assert value == pytest.approx(loss.item())
    assert np.allclose(gradient, t.grad.numpy())
    net = SmallNet.of(flat, 4, 3, 2)
    assert np.allclose(net(X, activation), out.detach().numpy())


def value_of(net: SmallNet, X: np.ndarray, r: np.ndarray, l2: float) -> float:
    """The objective as the paper has it."""
    decay = (net.weight**2).sum() + (net.out_weight**2).sum()
    return float((((net(X, "logistic") - r) ** 2).sum() + l2 * decay) / 2 / len(X))


def fitted(X: np.ndarray, r: np.ndarray, **changed) -> tuple[SmallNet, float]:
    options = {
        "units": 2,
        "activation": "logistic",
        "l2": 0.1,
        "max_iter": 500,
        "tol": 0.0,
        "restarts": 1,
    } | changed
    net = fit_small_net(X, r, np.ones(len(X)), **options, rng=np.random.RandomState(0))
    return net, value_of(net, X, r, options["l2"])


def test_the_objective_is_that_of_scikit_learns_perceptron() -> None:
    y = (YR - YR.mean()) / YR.std()
    options = {"activation": "logistic", "solver": "lbfgs", "alpha": 0.1, "max_iter": 500, "tol": 0}
    fits = [MLPRegressor(hidden_layer_sizes=(2,), **options, random_state=s).fit(XR, y) for s in range(4)]
    for theirs in fits:
        (first, second), (bias, out) = theirs.coefs_, theirs.intercepts_
        assert value_of(SmallNet(first.T, bias, second.T, out), XR, y[:, None], 0.1) == pytest.approx(
            theirs.loss_
        )
    assert fitted(XR, y[:, None], restarts=4)[1] < min(m.loss_ for m in fits) * 1.05


def test_restarts_keep_the_best_and_small_residuals_are_fitted_as_well() -> None:
    r = (YR - YR.mean())[:, None]
    values = [fitted(XR, r, units=1, restarts=k)[1] for k in (1, 2, 5)]
    assert values[0] >= values[1] >= values[2]
    small, _ = fitted(XR, 1e-6 * r, tol=1e-5, l2=0.0)  # an absolute tolerance would stop at once
    assert np.var(1e6 * small(XR, "logistic") - r) < 0.5 * np.var(r)


# --- boosting and folding -------------------------------------------------------------------------------------

MODELS = {
    "regression": (GBNNRegressor(**QUICK), XR, YR),
    "two outputs": (GBNNRegressor(**QUICK), XR, np.stack([YR, XR[:, 0] * 100], 1)),
    "binary": (GBNNClassifier(**QUICK, units_per_step=2), X2, Y2),
    "three classes": (GBNNClassifier(**QUICK, units_per_step=3), X3, Y3),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_folded_network_is_the_sum(name: str) -> None:
    model, X, y = MODELS[name]
    model = clone(model).fit(X, y)
    x32, x64 = torch.from_numpy(X).float(), torch.from_numpy(X)

    def linked(out: torch.Tensor) -> np.ndarray:
        if name == "binary":  # one logit of twice F
            return torch.cat([1 - out.sigmoid(), out.sigmoid()], 1).detach().numpy()
        return (out.softmax(1) if name == "three classes" else out).detach().numpy()

    def predicted(t: int | None = None) -> np.ndarray:
        if isinstance(model, GBNNClassifier):
            return model.predict_proba(X, t)
        return model.predict(X, t).reshape(len(X), -1)

    spread = np.abs(predicted()).max()
    assert np.allclose(linked(model.to_module()(x32)), predicted(), atol=3e-6 * max(1, spread))
    assert np.allclose(
        linked(model.to_module(dtype=torch.float64)(x64)), predicted(), atol=1e-12 * max(1, spread)
    )
    staged = list(
        model.staged_predict_proba(X) if isinstance(model, GBNNClassifier) else model.staged_predict(X)
    )
    assert len(staged) == model.n_steps_ + 1
    for t in (0, 1, model.n_steps_ // 2, model.n_steps_):
        assert np.allclose(
            staged[t].reshape(len(X), -1), predicted(t).reshape(len(X), -1), atol=1e-10 * max(1, spread)
        )
        module = model.to_module(t, dtype=torch.float64)
        assert np.allclose(linked(module(x64)), predicted(t), atol=1e-12 * max(1, spread))
        assert module[0].out_features == t * model.units_per_step
    assert np.ptp(staged[0], axis=0).max() == 0  # the constant


def test_the_fold_is_the_sum_of_the_small_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[SmallNet] = []

    def recorded(*args, **options) -> SmallNet:
        kept.append(fit_small_net(*args, **options))
        return kept[-1]

    monkeypatch.setattr("gradmatch.optim.gbnn.fit_small_net", recorded)
    model = GBNNClassifier(**QUICK, eta=0.3).fit(X2, Y2)
    F = np.arctanh(2 * Y2.mean() - 1) + sum(
        0.3 * rho * net(X2, "logistic")[:, 0] for rho, net in zip(model.rho_, kept, strict=True)
    )
    assert np.allclose(model.predict_proba(X2)[:, 1], expit(2 * F), atol=1e-12)
    assert np.allclose(model.decision_function(X2), 2 * F)


def test_the_module_can_be_tuned_on() -> None:
    module = GBNNClassifier(**QUICK).fit(X3, Y3).to_module()
    x, y = torch.from_numpy(X3).float(), torch.from_numpy(Y3)
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("eta", "subsample", "units"), [(0.1, 0.5, 3), (1.0, 0.3, 1), (0.5, 1.0, 2), (1.0, 0.9, 4)]
)
def test_with_a_line_search_the_training_loss_never_rises(eta: float, subsample: float, units: int) -> None:
    model = GBNNRegressor(
        total_units=20 * units,
        units_per_step=units,
        eta=eta,
        subsample=subsample,
        l2=1e-4,
        max_iter=60,
        random_state=0,
    ).fit(XR, YR)
    losses = model.train_loss_
    assert len(losses) == 20
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))


def test_published_steps_fall_only_on_all_rows() -> None:
    options = {
        "total_units": 25,
        "units_per_step": 1,
        "line_search": False,
        "l2": 0.0,
        "eta": 1.0,
        "random_state": 1,
    }
    whole = GBNNRegressor(**options, subsample=1.0, tol=1e-9).fit(XR, YR)
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(whole.train_loss_))
    part = GBNNRegressor(**options, subsample=0.2).fit(XR, YR)
    assert any(b > a for a, b in itertools.pairwise(part.train_loss_))
    assert set(part.rho_) == {1.0}


def test_large_steps_of_single_units_are_no_default() -> None:
    """eta 1 with one unit blows up on held-out rows in the published form; the default and a line search do not."""
    X, y = make_friedman1(700, 10, noise=1.0, random_state=3)
    Xt, yt, X, y = X[300:], y[300:], X[:300], y[:300]

    def error(**options) -> float:
        model = GBNNRegressor(random_state=0, max_iter=100, **options).fit(X, y)
        return float(np.sqrt(np.mean((model.predict(Xt) - yt) ** 2)))

    published = error(total_units=40, units_per_step=1, eta=1.0, l2=1e-4, line_search=False, tol=1e-9)
    ours = error(total_units=120)
    assert ours < 2.1
    assert published > 1.3 * ours


def test_random_state_fixes_subsamples_and_starts() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    a, b, c = (GBNNClassifier(**(QUICK | {"random_state": s})).fit(X2, Y2) for s in (0, 0, 1))
    assert np.array_equal(a.predict_proba(X2), b.predict_proba(X2))
    assert not np.array_equal(a.predict_proba(X2), c.predict_proba(X2))
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_the_order_of_the_rows_does_not_matter_without_subsampling() -> None:
    order = np.random.default_rng(0).permutation(len(XR))
    options = {"total_units": 6, "subsample": 1.0, "max_iter": 15, "random_state": 0}
    a = GBNNRegressor(**options).fit(XR, YR)
    b = GBNNRegressor(**options).fit(XR[order], YR[order])
    assert np.allclose(a.predict(XR), b.predict(XR), rtol=1e-6)


def test_weights_count_as_copies_without_subsampling() -> None:
    weight = np.random.default_rng(0).integers(0, 3, len(XR))
    options = {"total_units": 6, "subsample": 1.0, "max_iter": 15, "random_state": 0}
    a = GBNNRegressor(**options).fit(XR, YR, sample_weight=weight)
    b = GBNNRegressor(**options).fit(XR.repeat(weight, 0), YR.repeat(weight))
    assert np.allclose(a.predict(XR), b.predict(XR), rtol=1e-6)
    c = GBNNClassifier(**options).fit(X3, Y3, sample_weight=np.where(Y3 == 0, 1.0, 1e-6))
    assert (c.predict(X3) == 0).mean() > 0.9


def test_units_that_do_not_divide_are_reported() -> None:
    with pytest.warns(UserWarning, match="total_units 10 is no multiple of units_per_step 4; 2 steps make 8"):
        model = GBNNClassifier(10, 4, random_state=0).fit(X3, Y3)
    assert model.n_steps_ == 2
    assert model.network_.weight.shape == (8, 13)


def test_nothing_left_to_explain_ends_early() -> None:
    model = GBNNRegressor(**QUICK).fit(XR, np.full(len(XR), 3.0))
    assert model.n_steps_ == 0
    assert np.array_equal(model.predict(XR), np.full(len(XR), 3.0))
    assert np.allclose(model.to_module()(torch.from_numpy(XR).float()).detach().numpy(), 3.0)
    y, r = np.ones((4, 1)), np.zeros((4, 1))
    for loss in (Squared(), Binary()):
        assert loss.step(y, r, np.zeros((4, 1)), np.full(4, 0.25)) == 0.0


def test_saturated_probabilities_do_not_break_the_step() -> None:
    loss, y = Softmax(), np.eye(3)[[0, 1, 2]]
    r = loss.slope(y, 800 * y)
    rho = loss.step(y, r, np.random.default_rng(0).standard_normal((3, 3)), np.full(3, 1 / 3))
    assert np.isfinite(rho)
    sharp = GBNNClassifier(total_units=60, eta=1.0, max_iter=60, random_state=0).fit(X3, Y3)
    assert np.isfinite(sharp.predict_proba(X3)).all()
    bounded = GBNNClassifier(total_units=60, eta=1.0, max_iter=60, rho_max=2.0, random_state=0).fit(X3, Y3)
    assert np.abs(bounded.rho_).max() <= 2.0 < np.abs(sharp.rho_).max()
    assert all(np.ndim(rho) == 0 for rho in sharp.rho_)  # one step for all classes


def test_targets_of_any_scale_and_place() -> None:
    plain = GBNNRegressor(**QUICK).fit(XR, YR)
    large = GBNNRegressor(**QUICK).fit(XR, 2.0**20 * YR)
    assert np.array_equal(large.predict(XR), 2.0**20 * plain.predict(XR))
    far = GBNNRegressor(**QUICK).fit(XR, YR - 1e4)
    assert np.abs(far.predict(XR) + 1e4 - plain.predict(XR)).max() < 0.5 * YR.std()
    raw = GBNNRegressor(**QUICK, normalize_y=False).fit(XR, YR)
    assert raw.predict(XR, 0)[0] == pytest.approx(YR.mean())
    assert not np.allclose(raw.predict(XR), plain.predict(XR))


def test_early_stopping_keeps_the_best_prefix() -> None:
    model = GBNNRegressor(
        total_units=200, units_per_step=2, eta=0.5, l2=1e-4, early_stopping=True, validation_fraction=0.3,
        n_iter_no_change=4, random_state=0,
    ).fit(XR, YR)  # fmt: skip
    best = int(np.argmin(model.validation_loss_))
    assert model.n_steps_ == best + 1 < 100
    assert len(model.validation_loss_) == best + 1 + 4
    assert len(model.rho_) == len(model.train_loss_) == model.n_steps_


def test_validation_rows_hold_every_class_in_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    value = Softmax.value
    monkeypatch.setattr(Softmax, "value", lambda self, y, F, w: kept.append(y.sum(0)) or value(self, y, F, w))
    GBNNClassifier(total_units=1, early_stopping=True, validation_fraction=0.2, random_state=0).fit(X3, Y3)
    fitted_rows, apart = kept
    assert np.allclose(apart, 0.2 * np.bincount(Y3), atol=1)
    assert np.array_equal(fitted_rows + apart, np.bincount(Y3))


def test_exact_newton_steps_and_other_activations_learn() -> None:
    for options in ({"newton": "exact"}, {"activation": "tanh"}, {"activation": "relu"}):
        assert GBNNClassifier(**QUICK, **options).fit(X3, Y3).score(X3, Y3) > 0.95


def test_takes_tensors_and_string_labels() -> None:
    names = np.array(["a", "b", "c"])[Y3]
    a = GBNNClassifier(**QUICK).fit(torch.from_numpy(X3), torch.from_numpy(Y3))
    b = GBNNClassifier(**QUICK).fit(X3, names)
    assert np.array_equal(a.predict_proba(torch.from_numpy(X3)), b.predict_proba(X3))
    assert set(b.predict(X3)) == {"a", "b", "c"}
    assert b.score(X3, names) == a.score(torch.from_numpy(X3), torch.from_numpy(Y3))


# --- heads of networks ----------------------------------------------------------------------------------------


def digits_loader() -> tuple[DataLoader, torch.Tensor, torch.Tensor]:
    data = load_digits()
    x, y = torch.from_numpy(data.images[:300, None] / 16).float(), torch.from_numpy(data.target[:300])
    return DataLoader(TensorDataset(x, y), batch_size=64), x, y


class Net(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.BatchNorm1d(24), nn.Tanh())
        self.fc = nn.Linear(24, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


@pytest.mark.parametrize("classes", [10, 2])
def test_a_head_is_boosted_on_frozen_features(classes: int) -> None:
    loader, x, y = digits_loader()
    if classes == 2:
        loader = DataLoader(TensorDataset(x, y % 2), batch_size=64)
    torch.manual_seed(0)
    network = Net(classes).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    found = boost_head(network, loader, total_units=20, max_iter=40, random_state=0)
    assert network.training
    assert network.body.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert isinstance(network.fc, nn.Linear)
    found.eval()
    network.eval()
    with torch.no_grad():
        features = network.body(x).double().numpy()
        proba = found(x).softmax(1).numpy()
    rows = (features - features.mean(0)) / features.std(0)
    assert np.allclose(proba, found.boosted.predict_proba(rows), atol=1e-4)
    assert found(x).shape == (300, classes)
    assert (proba.argmax(1) == (y % 2 if classes == 2 else y).numpy()).mean() > 0.8
    assert not any("boosted" in k for k in found.state_dict())


def test_a_hugging_face_classifier_takes_a_boosted_head() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 3
    batches = [{"pixel_values": x[i : i + 16], "labels": y[i : i + 16]} for i in (0, 16, 32)]
    found = boost_head(model, batches, total_units=10, max_iter=40, random_state=0)
    with torch.no_grad():
        logits = found(pixel_values=x).logits
    assert logits.shape == (40, 3)
    assert isinstance(found.classifier, nn.Sequential)
    assert (logits.argmax(1) == y).float().mean() > 0.6


# --- refusals -------------------------------------------------------------------------------------------------


def with_hole(X: np.ndarray, value: float) -> np.ndarray:
    X = X.copy()
    X[3, 1] = value
    return X


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: GBNNClassifier().fit(with_hole(X3, np.nan), Y3), "contains NaN"),
        (lambda: GBNNClassifier().fit(with_hole(X3, np.inf), Y3), "contains infinity"),
        (lambda: GBNNRegressor().fit(XR, np.where(np.arange(200) == 3, np.nan, YR)), "y contains NaN"),
        (lambda: GBNNClassifier().fit(X3, np.zeros(178)), r"y has the single class .*0\.0"),
        (lambda: GBNNClassifier().fit(X3, Y3, (Y3 == 1) * 1.0), "y has the single class"),
        (lambda: GBNNRegressor().fit(XR, np.array(["a"] * 200)), "could not convert string"),
        (lambda: GBNNClassifier(3, 4).fit(X3, Y3), "units_per_step is 4; it must be at most total_units, 3"),
        (lambda: GBNNClassifier(eta=0).fit(X3, Y3), "eta is 0"),
        (lambda: GBNNClassifier(eta=-1).fit(X3, Y3), "eta is -1"),
        (lambda: GBNNClassifier(subsample=0).fit(X3, Y3), r"subsample is 0; it must lie in \(0, 1\]"),
        (lambda: GBNNClassifier(subsample=1.1).fit(X3, Y3), "subsample is 1.1"),
        (lambda: GBNNClassifier(subsample=0.005).fit(X3, Y3), "subsample is 0.005 of 178 rows; .* at least 2"),
        (lambda: GBNNClassifier(activation="gelu").fit(X3, Y3), "activation is 'gelu'"),
        (lambda: GBNNClassifier(newton="full").fit(X3, Y3), "newton is 'full'"),
        (lambda: GBNNClassifier(rho_max=0).fit(X3, Y3), "rho_max is 0"),
        (lambda: GBNNClassifier(l2=-1).fit(X3, Y3), "l2 is -1"),
        (lambda: GBNNRegressor(restarts=0).fit(XR, YR), "restarts is 0"),
        (lambda: GBNNClassifier(early_stopping=True, validation_fraction=0.995).fit(X3, Y3), "leaves too few"),
        (lambda: GBNNClassifier(**QUICK).fit(X3, Y3).score(X3, Y3 + 1), r"y has the labels 3, which were not"),
        (lambda: GBNNClassifier(**QUICK).fit(X3, Y3).predict(X3, 13), "n_steps is 13; it must be between 0 and 12"),
        (lambda: boost_head(nn.Sequential(nn.Flatten()), []), "no nn.Linear inside"),
        (lambda: boost_head(Net(), digits_loader()[0], head="fx"), "head is 'fx'"),
        (lambda: boost_head(Net(), []), "loader gave no batch"),
        (lambda: boost_head(Net(), [(torch.randn(8, 1, 8, 8), torch.arange(8) * 2)]), "has no sample of class 1"),
        (lambda: boost_head(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(6, 2)), digits_loader()[0]), "must be rows"),
    ],
)  # fmt: skip
def test_refuses(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_own_refusals_are_input_errors() -> None:
    with pytest.raises(InputError):
        GBNNClassifier(eta=0).fit(X3, Y3)
