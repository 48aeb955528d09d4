"""What logistic regression (linear probe) and nearest neighbours read from a representation.

One protocol for latents and VFM features, so that numbers can be compared: features are flattened (or pooled
first, by the caller), standardised with the training part's mean and std; the linear probe minimises
cross-entropy plus `DECAY / 2 |W|^2` to convergence (convex, so there is one answer and no learning rate); kNN
votes by cosine similarity. Numbers do not compare with papers, whose probes all differ; orderings do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config, data
from vfmlab.errors import DataError
from vfmlab.evaluation.features import over
from vfmlab.evaluation.representation import check_finite, standardiser
from vfmlab.evaluation.roundtrip import CPU_PART
from vfmlab.seeding import generator
from vfmlab.tokenizers.base import Tokenizer

DECAY = 0.01
NEIGHBOURS = 10
TRAIN_IMAGES = 1000  # encoding them is the dearest part of a report on a CPU
FACTS = {"probe": "logistic, lbfgs", "decay": DECAY, "knn": NEIGHBOURS, "train_images": TRAIN_IMAGES}


def probe(features: Tensor, labels: Tensor, seed: int = 0, train_share: float = 0.5) -> dict[str, float]:
    """Linear-probe and kNN accuracy on a seeded split of one set.

    Args:
        features: N x ... (flattened). labels: long N. train_share: part of the samples that is fitted on.

    Returns:
        {"linear": accuracy, "knn": accuracy, "chance": share of the commonest class among those tested}.

    Raises:
        DataError: different N, too few samples, one class only, features not finite or constant.
    """
    if len(features) != len(labels):
        raise DataError(f"{len(features)} features and {len(labels)} labels; give one label per sample")
    if len(features) < 4:
        raise DataError(f"a probe needs at least 4 samples, got {len(features)}")
    order = torch.randperm(len(features), generator=generator("probe", seed)).to(features.device)
    cut = min(max(1, round(train_share * len(order))), len(order) - 1)
    return probe_split(features[order[:cut]], labels[order[:cut]], features[order[cut:]], labels[order[cut:]])


def probe_split(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """As :func:`probe`, with the split given."""
    train, test = train.flatten(1).float(), test.flatten(1).float()
    check_finite(test)
    if train_labels.unique().numel() < 2:
        raise DataError("a probe needs at least two classes; the data has one (no labels?)")
    train, test = map(standardiser(train), (train, test))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    weight, bias = _logistic(train, train_labels, classes)
    linear = (test @ weight + bias).argmax(1) == test_labels
    near = knn(train, train_labels, test, classes) == test_labels
    chance = test_labels.bincount().max() / len(test_labels)
    return {"linear": float(linear.float().mean()), "knn": float(near.float().mean()),
            "chance": float(chance)}


def _logistic(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: weight D K, bias K; deterministic (starts at zero)."""
    weight = x.new_zeros(x.shape[1], classes, requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_change=1e-7,
                               line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + DECAY / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(closure)
    return weight.detach(), bias.detach()


def knn(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = NEIGHBOURS) -> Tensor:
    """Class of each test row by its k nearest training rows, weighted by exp(cosine / 0.07) as in DINO."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    votes = []
    for rows in test.split(1024):
        near = (rows @ train.T).topk(min(k, len(train)), dim=1)
        weights = ((near.values - 1) / 0.07).exp()
        votes.append(weights.new_zeros(len(rows),
                                       classes).scatter_add_(1, labels[near.indices], weights).argmax(1))
    return torch.cat(votes)


def training_images(source: data.ImageSource, seed: int, n: int = TRAIN_IMAGES) -> Tensor:
    """Which training images probes are fitted on: a seeded choice of n (all, where there are fewer), long."""
    return torch.randperm(len(source), generator=generator("probe images", seed))[:n].sort().values


def training_latents(tokenizer: Tokenizer, cfg: config.Data, seed: int, batch_size: int,
                     n: int = TRAIN_IMAGES) -> tuple[Tensor, Tensor]:
    """Normalised latents (mode, n C h w) and labels of a seeded choice of training images."""
    source = data.open_source(cfg, "train")
    device = tokenizer.stat_mean.device
    return over(source, training_images(source, seed, n),
                lambda x: tokenizer.encode(x.to(device, memory_format=torch.channels_last)).mode(),
                min(batch_size, CPU_PART) if device.type == "cpu" else batch_size)
