"""GBNN: sequential training of neural networks with gradient boosting (IEEE Access 11, 2023; arXiv 1909.12098).

The last hidden layer of a network is trained a few units at a time. From the constant F_0, for t = 1..T ::

    r_i = - dl/dF (y_i, F_{t-1}(x_i))                  pseudo-residuals
    h_t = a net of J hidden units and linear output fitted to r by least squares, on a random part of the rows
    F_t = F_{t-1} + eta rho_t h_t                       rho_t one Newton step along h_t, on all rows

All h_t side by side are one network of T J hidden units, to be cut after any t. These are scikit-learn estimators, so
scikit-learn is imported with this module; options are checked in ``fit``, as its conventions ask.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from gradmatch.core import checks
from gradmatch.optim._boosting_losses import Binary, BoostingLoss, Softmax, Squared
from gradmatch.optim._folded_net import FoldedNet
from gradmatch.optim._small_net import ACTIVATIONS, SmallNet, fit_small_net

__all__ = ["GBNNClassifier", "GBNNRegressor"]


ROUNDING = 1e-14
"""Residuals up to this share of the largest target are rounding."""


class _Rows(NamedTuple):
    """Rows (n, d), targets (n, K), weights (n,)."""

    X: np.ndarray
    y: np.ndarray
    weight: np.ndarray

    def take(self, index: Any) -> _Rows:
        return _Rows(self.X[index], self.y[index], self.weight[index])

    @property
    def share(self) -> np.ndarray:
        """Weights of sum 1."""
        part: np.ndarray = self.weight / self.weight.sum()
        return part


class _GBNN(BaseEstimator):  # type: ignore[misc]
    """What both estimators share: the boosting loop and the folded network."""

    loss_: BoostingLoss

    def _boost(self, X: np.ndarray, y: np.ndarray, loss: BoostingLoss, weight: np.ndarray) -> None:
        self._check_options(len(X))
        rng = check_random_state(self.random_state)
        rows, apart = self._held_out(_Rows(X, y, weight).take(weight > 0), rng)
        self.loss_, start = loss, loss.start(rows.y, rows.share)
        F, held_F = np.tile(start, (len(rows.y), 1)), np.tile(start, (len(apart.y), 1))
        self.rho_, self.train_loss_, self.validation_loss_ = [], [], []
        nets: list[SmallNet] = []
        for _ in range(self.total_units // self.units_per_step):
            r = loss.slope(rows.y, F)
            if np.abs(r).max() <= ROUNDING * np.abs(rows.y).max():
                break  # nothing is left to be explained
            net = self._small_net(rows, r, rng)
            h = net(rows.X, self.activation)
            rho = self._step(loss, rows.y, r, h, rows.share)
            if not np.isfinite(rho) or rho == 0:
                break
            F += self.eta * rho * h
            nets.append(net)
            self.rho_.append(rho)
            self.train_loss_.append(loss.value(rows.y, F, rows.share))
            if self.early_stopping:
                held_F += self.eta * rho * net(apart.X, self.activation)
                self.validation_loss_.append(loss.value(apart.y, held_F, apart.share))
                if self._stale():
                    break
        if self.validation_loss_:
            nets = nets[: int(np.argmin(self.validation_loss_)) + 1]
        del self.rho_[len(nets) :], self.train_loss_[len(nets) :]
        scales = [self.eta * rho for rho in self.rho_]
        self.network_ = FoldedNet.of(nets, scales, start, X.shape[1], self.units_per_step, self.activation)
        self.n_steps_ = self.n_iter_ = len(nets)

    def _small_net(self, rows: _Rows, r: np.ndarray, rng: np.random.RandomState) -> SmallNet:
        """A net fitted to the pseudo-residuals of a random part of the rows."""
        n = len(r)
        size = min(n, max(2, round(self.subsample * n)))
        some = slice(None) if size == n else rng.permutation(n)[:size]
        part = rows.take(some)
        return fit_small_net(
            part.X,
            r[some],
            part.weight,
            units=self.units_per_step,
            activation=self.activation,
            l2=self.l2,
            max_iter=self.max_iter,
            tol=self.tol,
            restarts=self.restarts,
            rng=rng,
        )

    def _step(self, loss: BoostingLoss, y: np.ndarray, r: np.ndarray, h: np.ndarray, w: np.ndarray) -> float:
        rho = loss.step(y, r, h, w)
        return rho if self.rho_max is None else float(np.clip(rho, -self.rho_max, self.rho_max))

    def _held_out(self, rows: _Rows, rng: np.random.RandomState) -> tuple[_Rows, _Rows]:
        """The rows fitted, and those on which the end of boosting is decided: alike in their first target."""
        n = len(rows.y)
        if not self.early_stopping:
            return rows, rows.take(slice(0, 0))
        count = max(1, round(self.validation_fraction * n))
        checks.require(
            n - count >= 2,
            f"validation_fraction is {self.validation_fraction} of {n} rows; it leaves too few.",
        )
        order = rng.permutation(n)
        key = rows.y @ np.arange(1, rows.y.shape[1] + 1)  # of a one-hot row, its class
        order = order[np.argsort(key[order], kind="stable")]
        apart = order[((np.arange(count) + 0.5) * n / count).astype(int)]
        kept = np.setdiff1d(np.arange(n), apart)
        return rows.take(kept), rows.take(apart)

    def _stale(self) -> bool:
        losses: list[float] = self.validation_loss_
        return bool(len(losses) - 1 - int(np.argmin(losses)) >= self.n_iter_no_change)

    def _check_options(self, n: int) -> None:
        units = checks.whole("total_units", self.total_units)
        J = checks.whole("units_per_step", self.units_per_step)
        checks.require(units >= J, f"units_per_step is {J}; it must be at most total_units, {units}.")
        checks.positive("eta", self.eta)
        checks.nonnegative("l2", self.l2)
        checks.nonnegative("tol", self.tol)
        share = checks.fraction("subsample", self.subsample)
        checks.require(
            share == 1 or share * n >= 2, f"subsample is {share:g} of {n} rows; it must leave at least 2."
        )
        checks.one_of("activation", self.activation, ACTIVATIONS)
        checks.whole("max_iter", self.max_iter)
        checks.whole("restarts", self.restarts)
        checks.fraction("validation_fraction", self.validation_fraction, one=False)
        checks.whole("n_iter_no_change", self.n_iter_no_change)
        if self.rho_max is not None:
            checks.positive("rho_max", self.rho_max)
        if units % J:
            warnings.warn(
                f"total_units {units} is no multiple of units_per_step {J}; {units // J} steps make {units // J * J}.",
                stacklevel=4,
            )

    def _rows(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        rows: np.ndarray = validate_data(self, _array(X), reset=False, dtype=np.float64)
        return rows

    def _raw(self, X: Any, n_steps: int | None = None) -> np.ndarray:
        rows = self._rows(X)
        return self.network_(rows, n_steps)

    def _staged(self, X: Any) -> Iterator[np.ndarray]:
        rows = self._rows(X)
        return self.network_.staged(rows)

    def to_module(self, n_steps: int | None = None, *, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The first ``n_steps`` steps (default all) as one ordinary network, differentiable and ready to be tuned on.

        It gives predictions (n, K) for regression, the logit (n, 1) of the second class for two classes, and logits
        (n, K) for more; ``n_steps=0`` gives the constant.
        """
        check_is_fitted(self)
        return self.network_.scaled(self.loss_.scale).module(n_steps, dtype)


def _array(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


class GBNNClassifier(ClassifierMixin, _GBNN):  # type: ignore[misc]
    """A one-hidden-layer classifier trained a few units at a time by gradient boosting.

    Args:
        total_units: hidden units in all, 200 as published; ``total_units // units_per_step`` steps are made.
        units_per_step: J, 1 as published (1 to 4 in its grid).
        eta: shrinkage, 1 as published (0.025 to 1 in its grid).
        subsample: share of the rows that each small net is fitted to, without replacement; 0.5 as published.
        activation: "logistic" as published, "tanh" or "relu".
        max_iter: most L-BFGS iterations of a small net, 200 as published.
        l2: its penalty, 1e-4 as published.
        tol: relative decrease in an iteration at which L-BFGS stops (published: machine precision).
        restarts: random starts of each small net, of which the best is taken; 2 or 3 help with one unit.
        newton: "diagonal" takes only the diagonal of the softmax's Hessian in the Newton step, as published, "exact"
            all of it; no difference for two classes.
        rho_max: bound on |rho|, which grows where all probabilities are near 0 or 1; default none.
        early_stopping: end when the loss on ``validation_fraction`` of the rows has not fallen for
            ``n_iter_no_change`` steps, and keep the best prefix (our extension).
        random_state: of subsamples, starts and the validation rows.

    Attributes:
        classes_, n_features_in_: as in scikit-learn.
        n_steps_: steps made (fewer than asked for if nothing was left to explain, or by early stopping).
        rho_, train_loss_, validation_loss_: of every step.
        network_: all steps folded into one network (:class:`FoldedNet`).

    Raises:
        InputError: one class only, options out of range, a subsample of fewer than two rows.

    >>> from sklearn.datasets import load_breast_cancer
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> X = (X - X.mean(0)) / X.std(0)
    >>> model = GBNNClassifier(total_units=20, eta=0.5, random_state=0).fit(X, y)
    >>> bool(model.score(X, y) > 0.95), model.to_module(n_steps=5)[0].out_features
    (True, 5)
    """

    def __init__(
        self,
        total_units: int = 200,
        units_per_step: int = 1,
        eta: float = 1.0,
        subsample: float = 0.5,
        *,
        activation: str = "logistic",
        max_iter: int = 200,
        l2: float = 1e-4,
        tol: float = 1e-4,
        restarts: int = 1,
        newton: str = "diagonal",
        rho_max: float | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        random_state: Any = None,
    ) -> None:
        self.total_units, self.units_per_step, self.eta = total_units, units_per_step, eta
        self.subsample, self.activation, self.max_iter = subsample, activation, max_iter
        self.l2, self.tol, self.restarts, self.newton = l2, tol, restarts, newton
        self.rho_max, self.early_stopping = rho_max, early_stopping
        self.validation_fraction, self.n_iter_no_change = validation_fraction, n_iter_no_change
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> GBNNClassifier:
        """Fit to rows (n, d) and labels (n,), arrays or tensors; ``sample_weight`` (n,) weighs the rows."""
        X, y = validate_data(self, _array(X), _array(y), dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        checks.one_of("newton", self.newton, ("diagonal", "exact"))
        weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        self.classes_, index = np.unique(y, return_inverse=True)
        present = np.unique(index[weight > 0])
        checks.require(
            len(present) > 1,
            f"y has the single class {self.classes_[present].tolist()[0]!r}; a classifier needs at least two classes.",
        )
        if len(self.classes_) == 2:
            self._boost(X, 2.0 * index[:, None] - 1, Binary(), weight)
        else:
            self._boost(X, np.eye(len(self.classes_))[index], Softmax(self.newton == "exact"), weight)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logit of the second class (n,) for two classes, logits (n, K) for more."""
        return self._logits(self._raw(X))

    def _logits(self, F: np.ndarray) -> np.ndarray:
        return 2 * F[:, 0] if len(self.classes_) == 2 else F

    def _proba(self, F: np.ndarray) -> np.ndarray:
        if len(self.classes_) == 2:
            one = expit(2 * F[:, 0])
            return np.stack([1 - one, one], 1)
        p: np.ndarray = softmax(F, axis=1)
        return p

    def predict_proba(self, X: Any, n_steps: int | None = None) -> np.ndarray:
        """Probabilities (n, K) after ``n_steps`` steps, default all."""
        return self._proba(self._raw(X, n_steps))

    def predict(self, X: Any, n_steps: int | None = None) -> np.ndarray:
        """Labels (n,) after ``n_steps`` steps, default all."""
        best = self.predict_proba(X, n_steps).argmax(1)
        labels: np.ndarray = self.classes_[best]
        return labels

    def staged_predict(self, X: Any) -> Iterator[np.ndarray]:
        """Labels after 0, 1, ..., T steps."""
        return (self.classes_[p.argmax(1)] for p in self.staged_predict_proba(X))

    def staged_predict_proba(self, X: Any) -> Iterator[np.ndarray]:
        """Probabilities after 0, 1, ..., T steps."""
        return (self._proba(F) for F in self._staged(X))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy.

        Raises:
            InputError: labels that were not in the training data.
        """
        check_is_fitted(self)
        y = _array(y)
        new = np.setdiff1d(unique_labels(y), self.classes_).tolist()
        checks.require(
            not new, f"y has the labels {checks.listing(new)}, which were not in the training data."
        )
        return float(super().score(X, y, sample_weight))


class GBNNRegressor(RegressorMixin, _GBNN):  # type: ignore[misc]
    """A one-hidden-layer regression network trained a few units at a time by gradient boosting.

    The options of :class:`GBNNClassifier`, but for ``newton``, and:

    Args:
        units_per_step, eta, l2, tol: 3, 0.1, 0.1 and 1e-5; the published 1, 1, 1e-4 and 0 let a unit saturate on its
            subsample, with huge weights that its rho of 1 adds unchecked.
        line_search: rho is the best step along h on all rows; False takes 1, as published.
        normalize_y: fit to (y - mean) / deviation and undo it in the folded network, so that ``l2`` and the start
            suit targets of any scale.
    """

    def __init__(
        self,
        total_units: int = 200,
        units_per_step: int = 3,
        eta: float = 0.1,
        subsample: float = 0.5,
        *,
        activation: str = "logistic",
        max_iter: int = 200,
        l2: float = 0.1,
        tol: float = 1e-5,
        restarts: int = 1,
        line_search: bool = True,
        normalize_y: bool = True,
        rho_max: float | None = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        random_state: Any = None,
    ) -> None:
        self.total_units, self.units_per_step, self.eta = total_units, units_per_step, eta
        self.subsample, self.activation, self.max_iter = subsample, activation, max_iter
        self.l2, self.tol, self.restarts, self.line_search = l2, tol, restarts, line_search
        self.normalize_y, self.rho_max, self.early_stopping = normalize_y, rho_max, early_stopping
        self.validation_fraction, self.n_iter_no_change = validation_fraction, n_iter_no_change
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> GBNNRegressor:
        """Fit to rows (n, d) and targets (n,) or (n, K), arrays or tensors; ``sample_weight`` (n,) weighs the rows."""
        X, y = validate_data(
            self,
            _array(X),
            _array(y),
            dtype=np.float64,
            multi_output=True,
            y_numeric=True,
            ensure_min_samples=2,
        )
        weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        targets = y.astype(np.float64).reshape(len(y), -1)
        self._one_target = y.ndim == 1
        mean, deviation = np.zeros(targets.shape[1]), np.ones(targets.shape[1])
        if self.normalize_y:
            w = weight / weight.sum()
            mean = w @ targets
            deviation = np.sqrt(w @ np.square(targets - mean))
            deviation = np.where(deviation > 0, deviation, 1.0)
        self._boost(X, (targets - mean) / deviation, Squared(), weight)
        self.network_ = self.network_.scaled(deviation, mean)
        return self

    def _step(self, loss: BoostingLoss, y: np.ndarray, r: np.ndarray, h: np.ndarray, w: np.ndarray) -> float:
        return super()._step(loss, y, r, h, w) if self.line_search else 1.0

    def _shaped(self, F: np.ndarray) -> np.ndarray:
        return F[:, 0] if self._one_target else F

    def predict(self, X: Any, n_steps: int | None = None) -> np.ndarray:
        """Predictions, shaped as the targets were, after ``n_steps`` steps, default all."""
        return self._shaped(self._raw(X, n_steps))

    def staged_predict(self, X: Any) -> Iterator[np.ndarray]:
        """Predictions after 0, 1, ..., T steps."""
        return (self._shaped(F) for F in self._staged(X))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
