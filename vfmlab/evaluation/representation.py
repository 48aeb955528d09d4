"""How alike two representations of the same images are: CKNNA, mutual k-nearest neighbours, linear CKA.

CKNNA (Huh et al. 2024, "The Platonic Representation Hypothesis", arXiv 2405.07987, appendix A) restricts CKA
to those pairs (i, j) where j is among the k nearest neighbours of i in both representations. Only k entries
of each row of the kernels K = A A^T and L = B B^T matter, so nothing of size N x N is ever held: similarities
are computed in blocks of rows, the k best of each row are held, and the estimator runs on these N k entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vfmlab.errors import DataError

BLOCK = 512  # rows of a similarity block: 20 MB at ten thousand samples
QUANTILE = 0.95
K = 10  # neighbours


def pool(features: Tensor) -> Tensor:
    """Feature maps (B C h w), tokens (B T C) or vectors (B C) -> mean over tokens (B C)."""
    if features.ndim == 4:
        return features.mean(dim=(2, 3))
    if features.ndim == 3:
        return features.mean(dim=1)
    if features.ndim == 2:
        return features
    raise DataError(f"features of shape {tuple(features.shape)} are neither B C, B T C nor B C h w")


def prepare(features: Tensor, quantile: float | None = QUANTILE, normalise: bool = True) -> Tensor:
    """Features as the published alignment figures take them: token mean, clamped, unit length; N C, fp32.

    Args:
        features: N C h w, N T C or N C. quantile: values are clamped to +- this quantile of |features| over
            the whole set; None: no clamp. normalise: divide each row by its L2 norm.

    Raises:
        DataError: not finite, or a constant (after pooling) that carries no information.
    """
    x = pool(features).float()
    check_finite(x)
    if len(x) > 1:
        _check_varied(x)
    if quantile is not None:
        magnitude = x.abs().flatten()
        bound = magnitude.kthvalue(min(int(quantile * len(magnitude)), len(magnitude) - 1) + 1).values
        x = x.clamp(-bound, bound)
    if normalise:
        x = torch.nn.functional.normalize(x, dim=1)
    return x


@dataclass(frozen=True)
class Neighbours:
    """The k most similar others of each sample. index: N k, sorted along k; similarity: inner products."""

    index: Tensor
    similarity: Tensor

    @property
    def keys(self) -> Tensor:
        """Each (row, neighbour) pair as one integer, ascending [N k]."""
        n = len(self.index)
        return (torch.arange(n, device=self.index.device)[:, None] * n + self.index).flatten()


def neighbours(features: Tensor, k: int) -> Neighbours:
    """The k nearest neighbours by inner product, a sample itself left out. features: N D."""
    n = len(features)
    if not 2 <= k < n:
        raise DataError(f"k = {k} neighbours of N = {n} samples: needs 2 <= k < N; lower k or use more "
                        "samples")
    index, similarity = [], []
    buffer = features.new_empty(min(BLOCK, n), n)
    for start in range(0, n, BLOCK):
        rows = features[start : start + BLOCK]
        block = torch.mm(rows, features.T, out=buffer[: len(rows)])
        here = torch.arange(len(rows), device=features.device)
        block[here, here + start] = -torch.inf
        best = block.topk(k, dim=1)
        order = best.indices.argsort(dim=1)
        index.append(best.indices.gather(1, order))
        similarity.append(best.values.gather(1, order))
    return Neighbours(torch.cat(index), torch.cat(similarity))


def cknna(a: Tensor, b: Tensor, k: int = K, unbiased: bool = True, epsilon: float = 0.0) -> float:
    """Centred kernel nearest-neighbour alignment of two representations of the same N samples.

    Args:
        a, b: N x D features, usually from :func:`prepare`; D may differ. k: neighbours. unbiased: Song et
            al.'s unbiased HSIC (published figures), else the biased one. epsilon: added to the denominator.
            Released code adds 1e-6, which is not scale-free (it makes the alignment of features with
            themselves 0.9998 at N = 512); 0 leaves it exactly 1.

    Returns:
        About k / (N - 1) for unrelated representations (see :func:`beyond_chance`), 1 for equal ones. As
            published, it is not exactly symmetric in a and b: the masks are not, and the last term of the
            estimator sums columns of the first and rows of the second.

    Raises:
        DataError: different N, k >= N, features constant or not finite.
    """
    _check(a, b, 4)
    return _cknna(neighbours(a.float(), k), neighbours(b.float(), k), unbiased, epsilon)


def beyond_chance(value: float, k: int, n: int) -> float:
    """CKNNA of n samples beyond chance: (value - c) / (1 - c), c = k / (n - 1).

    Raises:
        DataError: k >= n - 1, where all others are neighbours.
    """
    if n <= k + 1:
        raise DataError(f"N = {n}: at k = {k} all others are neighbours, and nothing is beyond chance; use "
                        "more images")
    chance = k / (n - 1)
    return (value - chance) / (1 - chance)


def _cknna(a: Neighbours, b: Neighbours, unbiased: bool = True, epsilon: float = 0.0) -> float:
    in_b, place = _find(a.keys, b.keys)
    keys = a.keys[in_b]
    cross = _hsic(keys, a.similarity.flatten()[in_b], b.similarity.flatten()[place[in_b]], len(a.index),
                  unbiased)
    own_a = _hsic(a.keys, a.similarity.flatten(), a.similarity.flatten(), len(a.index), unbiased)
    own_b = _hsic(b.keys, b.similarity.flatten(), b.similarity.flatten(), len(b.index), unbiased)
    product = own_a * own_b
    if not product > 0:
        raise DataError(f"neighbourhoods carry no structure at N = {len(a.index)}, k = {a.index.shape[1]} "
                        "(HSIC with itself is not positive); use more samples or another k")
    return cross / (product**0.5 + epsilon)


def _find(keys: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `keys` are in the ascending `table`, and where."""
    place = torch.searchsorted(table, keys).clamp_max(len(table) - 1)
    return table[place] == keys, place


def _hsic(keys: Tensor, k: Tensor, l: Tensor, n: int, unbiased: bool) -> float:  # noqa: E741
    """HSIC of two sparse n x n kernels with zero diagonals and the same support.

    keys: support as row * n + column, ascending; k, l: their values there. Unbiased: Song et al. 2012 (eq.
    5); biased: Tr(K H L H) / (n - 1)^2.
    """
    row, column = keys // n, keys % n
    k, l = k.double(), l.double()  # noqa: E741

    def sums(value: Tensor, where: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64, device=value.device).index_add_(0, where, value)

    # sum_ij K_ij L_ji: masks are not symmetric, so only pairs whose mirror image is in the support count.
    mirrored, place = _find(column * n + row, keys)
    trace = (k[mirrored] * l[place[mirrored]]).sum()
    chained = (sums(k, column) * sums(l, row)).sum()  # 1^T K L 1
    if unbiased:
        value = trace + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * chained / (n - 2)
        return float(value / (n * (n - 3)))
    swapped = (sums(k, row) * sums(l, column)).sum()  # 1^T L K 1
    return float((trace - (chained + swapped) / n + k.sum() * l.sum() / n**2) / (n - 1) ** 2)


def mutual_knn(a: Tensor, b: Tensor, k: int = 10) -> float:
    """Mean share of the k nearest neighbours that two representations have in common, in [0, 1]."""
    _check(a, b, 3)
    shared, _ = _find(neighbours(a.float(), k).keys, neighbours(b.float(), k).keys)
    return float(shared.double().mean())


def linear_cka(a: Tensor, b: Tensor, unbiased: bool = True) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414), at most 1.

    unbiased uses Song et al.'s HSIC, so that unrelated wide features come out near 0; else the original, in
    [0, 1]. Nothing of size N x N is built: sums over kernels are taken as D x D products.
    """
    _check(a, b, 4)
    a, b = a.double(), b.double()
    # HSIC is invariant to it, and it makes the sums below well conditioned
    a, b = a - a.mean(0), b - b.mean(0)

    def hsic(x: Tensor, y: Tensor) -> float:
        n = len(x)
        trace = (x.T @ y).square().sum()
        if not unbiased:
            return float(trace)
        dx, dy = x.square().sum(1), y.square().sum(1)  # diagonals, which the estimator leaves out
        # Rows of the centred kernels sum to 0, so without diagonals they sum to -d.
        value = trace - (dx * dy).sum() + dx.sum() * dy.sum() / (
            (n - 1) * (n - 2)) - 2 * (dx * dy).sum() / (n - 2)
        return float(value / (n * (n - 3)))

    product = hsic(a, a) * hsic(b, b)
    if not product > 0:
        raise DataError(f"features carry no structure at N = {len(a)} (own HSIC is not positive); use more "
                        "samples")
    return hsic(a, b) / product**0.5


def _check(a: Tensor, b: Tensor, at_least: int) -> None:
    for x in (a, b):
        if x.ndim != 2:
            raise DataError(f"features of shape {tuple(x.shape)} are not N x D; pool tokens first (prepare "
                            "does)")
    if len(a) != len(b):
        raise DataError(f"features of {len(a)} and {len(b)} samples cannot be compared; use the same images "
                        "for both")
    if len(a) < at_least:
        raise DataError(f"N = {len(a)} samples are too few, at least {at_least} are needed")
    for x in (a, b):
        check_finite(x)
        _check_varied(x)


def _check_varied(x: Tensor) -> None:
    if bool((x == x[:1]).all()):
        raise DataError(f"features are constant over all {len(x)} samples; their neighbours are undefined")


def check_finite(x: Tensor) -> None:
    """:class:`DataError` for features that are not finite."""
    if not torch.isfinite(x).all():
        raise DataError("features are not finite; look at the network that made them")


def standardiser(x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that standardises rows with the mean and std of `x` (N D); constant columns are left out.

    Raises:
        DataError: `x` is not finite, or constant.
    """
    check_finite(x)
    mean, std = x.mean(0), x.std(0, correction=0)
    if not std.max() > 0:
        raise DataError(f"features are constant over all {len(x)} samples; nothing can be read from them")
    alive = std > 1e-6 * std.max()
    return lambda z: (z[:, alive] - mean[alive]) / std[alive]
