"""Ridge regression in closed form, its strength chosen by generalised cross-validation.

Inputs are standardised per column with the fitting set's mean and std, so the answer does not depend on their
scale. With more columns than samples the kernel form is solved, so the cost follows the smaller of the two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vfmlab.errors import DataError
from vfmlab.evaluation.representation import standardiser

DECAYS = tuple(10.0 ** (k / 2) for k in range(-10, 9))  # in units of the mean eigenvalue
FACTS = {"fit": "ridge, strength by generalised cross-validation", "decays": len(DECAYS)}


class Ridge:
    """The decomposition that fits of several targets on the same inputs share.

    Args:
        x: N x ... inputs (flattened).

    Raises:
        DataError: fewer than 2 samples, inputs not finite or constant.
    """

    def __init__(self, x: Tensor):
        x = x.flatten(1).double()
        if len(x) < 2:
            raise DataError(f"a linear fit needs at least 2 samples, got {len(x)}")
        self.standardise = standardiser(x)
        self.x = self.standardise(x)
        n, d = self.x.shape
        self.n, self.dual = n, d > n
        gram = (self.x @ self.x.T if self.dual else self.x.T @ self.x) / n
        self.value, self.basis = torch.linalg.eigh(gram)
        self.value = self.value.clamp_min(0)

    def fit(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        """Targets N K -> a function from inputs M x ... to predictions M K (float64)."""
        y = y.double()
        if len(y) != self.n:
            raise DataError(f"{self.n} samples and {len(y)} targets; give one target per sample")
        offset = y.mean(0)
        y, e, n = y - offset, self.value[:, None], self.n
        if self.dual:
            inner = self.basis.T @ y
            # per eigenvector and target; `2 gain/(e+s) - gain e/(e+s)^2` is what the fit explains
            gain = e * inner.square()
        else:
            inner = self.basis.T @ (self.x.T @ y) / n
            gain = n * inner.square()
        best = None
        for decay in DECAYS:
            s = decay * float(self.value.mean())
            rest = y.square().sum() - (gain / (e + s) * (2 - e / (e + s))).sum()
            freedom = 1 - (float((e / (e + s)).sum()) + 1) / n
            if freedom > 1e-3:
                score = float(rest.clamp_min(0)) / freedom**2
                best = min(best, (score, s)) if best else (score, s)
        s = best[1] if best else DECAYS[-1] * float(self.value.mean())
        weight = self.basis @ (inner / (e + s))
        if self.dual:
            weight = self.x.T @ weight / n
        return lambda z: self.standardise(z.flatten(1).double()) @ weight + offset


def r2(prediction: Tensor, truth: Tensor, centre: Tensor) -> float:
    """1 - squared error / squared distance of `truth` (M K) to `centre` (K), over all outputs."""
    total = (truth.double() - centre.double()).square().sum()
    if not total > 0:
        raise DataError("the target is constant; there is no variance to explain")
    return float(1 - (prediction.double() - truth.double()).square().sum() / total)


def classify(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of the least-squares classifier (ridge on one-hot labels): a probe in closed form."""
    if labels.unique().numel() < 2:
        raise DataError("a probe needs at least two classes; the data has one (no labels?)")
    classes = int(max(labels.max(), test_labels.max())) + 1
    predicted = Ridge(train).fit(torch.nn.functional.one_hot(labels, classes))(test).argmax(1)
    return float((predicted == test_labels).double().mean())
