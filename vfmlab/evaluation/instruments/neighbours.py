"""Classes among a latent's neighbours: is what lies close of one kind?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import HIGHER, LATENT, TOKENIZERS, Draft, Published, Quantity
from vfmlab.evaluation.representation import pool
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

K = 10
NEAREST_GRAPH = 10  # neighbours in the graph whose clusters are compared with the classes


def nearest(x: Tensor, k: int) -> Tensor:
    """Indices of the k nearest other rows of N D (Euclid): N k.

    Raises:
        DataError: no k other rows.
    """
    if not 1 <= k < len(x):
        raise DataError(f"k = {k} neighbours of N = {len(x)} images: needs 1 <= k < N; use more images")
    x = x.flatten(1).float()
    rows = []
    for start, part in zip(range(0, len(x), 1024), x.split(1024), strict=True):
        distance = torch.cdist(part, x)
        distance[torch.arange(len(part)), start + torch.arange(len(part))] = torch.inf
        rows.append(distance.topk(k, largest=False).indices)
    return torch.cat(rows)


def mutual_information(a: Tensor, b: Tensor) -> float:
    """Normalised mutual information of two partitions (long N), 2 I / (H(a) + H(b)): 0 to 1."""
    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    table.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    p = table / table.sum()

    def entropy(q: Tensor) -> Tensor:
        q = q[q > 0]
        return -(q * q.log()).sum()

    rows, columns, both = entropy(p.sum(1)), entropy(p.sum(0)), entropy(p.flatten())
    return float(2 * (rows + columns - both) / (rows + columns)) if rows + columns > 0 else 1.0


def spectral_clusters(x: Tensor, clusters: int, seed: int, k: int = NEAREST_GRAPH) -> Tensor:
    """Clusters (long N) of rows N D: k-means on the unit rows of the normalised neighbour graph's leading
    eigenvectors."""
    from scipy.cluster.vq import kmeans2

    near = nearest(x, k)
    graph = torch.zeros(len(x), len(x), dtype=torch.float64).scatter_(1, near, 1.0)
    graph = torch.maximum(graph, graph.T)
    scale = graph.sum(1).rsqrt()
    vectors = torch.linalg.eigh(scale[:, None] * graph * scale).eigenvectors[:, -clusters:]
    _, labels = kmeans2(F.normalize(vectors, dim=1).numpy(), clusters, iter=50, minit="++", seed=seed)
    return torch.as_tensor(labels).long()


@INSTRUMENTS.register("neighbours")
class Neighbours(Instrument):
    """Three measures of class structure: LNC, SSC and GSQ.

    `lnc`: share of the 10 nearest images, by all values of the latent, that have the image's class (LNC,
    arXiv 2606.03578). `ssc`: normalised mutual information of the classes and of as many spectral clusters of
    token means (SSC, PAE, 2605.07915). `gsq`: accuracy of the class of the one nearest token mean (GSQ,
    there). k, the graph and the seed: ours.
    """

    quantities = (Quantity("lnc", "neighbours of the class", HIGHER, shown=(LATENT,),
                           definition="share of the 10 nearest latents that have the image's class",
                           published=Published(-0.79, TOKENIZERS)),
                  Quantity("ssc", "clusters against classes", HIGHER,
                           definition="normalised mutual information of classes and spectral clusters of token means"),
                  Quantity("gsq", "class of the nearest", HIGHER,
                           definition="accuracy of the class of the nearest token mean"))  # fmt: skip

    def measure(self, subject: Subject, report: Draft) -> None:
        held, classes = subject.held_out, subject.source.num_classes
        if classes < 2:
            raise DataError("the data has no classes")
        means, n = pool(held.maps), len(held)
        section = subject.section({"measure": "neighbours", "k": K, "graph": NEAREST_GRAPH})
        chance = float((held.labels.bincount() / n).square().sum())
        same = held.labels[nearest(held.maps, K)] == held.labels[:, None]
        report.add("lnc", float(same.double().mean()), section, n, chance=chance)
        right = held.labels[nearest(means, 1)[:, 0]] == held.labels
        report.add("gsq", float(right.double().mean()), section, n, chance=chance)
        clusters = spectral_clusters(means, classes, subject.protocol.seed)
        report.add("ssc", mutual_information(clusters, held.labels), section, n)
