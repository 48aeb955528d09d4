"""What can be read from a tokenizer's latents, and how they agree with the feature space."""

from __future__ import annotations

from vfmlab.errors import DataError
from vfmlab.evaluation import probes
from vfmlab.evaluation.instruments.base import LATENTS, Metric
from vfmlab.evaluation.number import ENCODERS, HEADLINE, HIGHER, TABLE, Draft, Published, Quantity
from vfmlab.evaluation.precision import precise
from vfmlab.evaluation.protocol import Resolved
from vfmlab.evaluation.representation import QUANTILE, K, beyond_chance, cknna, prepare
from vfmlab.evaluation.roundtrip import evaluating
from vfmlab.registry import INSTRUMENTS

ALIGNMENT = {"measure": "cknna", "k": K, "quantile": QUANTILE, "pool": "token mean"}


@INSTRUMENTS.register("latent_probes")
class LatentProbes(Metric):
    """Accuracy of simple classifiers on all values of the latent."""

    order, over = 30, LATENTS
    quantities = (
        Quantity("probe_linear", "linear probe", HIGHER, "", (TABLE, HEADLINE),
                 definition="accuracy of a logistic regression on all values of the latent, on held-out images",
                 published=Published(-0.81, ENCODERS)),
        Quantity("probe_knn", "kNN", HIGHER, "", (TABLE,),
                 definition="accuracy of 10 nearest neighbours on all values of the latent"),
    )  # fmt: skip

    def write(self, draft: Draft) -> None:
        one, n = self.gathered, len(self.gathered.latents)
        setup, tokenizer = one.setup, one.tokenizer
        if setup.source.num_classes < 2:
            raise DataError("the data has no classes")
        if int(tokenizer.stat_count) == 0:
            raise DataError("the tokenizer has no latent statistics yet")
        with evaluating(tokenizer), precise(setup.protocol.precision, tokenizer.stat_mean.device):
            train = probes.training_latents(tokenizer, setup.cfg, setup.protocol.seed, setup.protocol.batch)
        scores = probes.probe_split(*train, one.latents, one.labels)
        fitted = {"train_images": len(train[0]), "test_images": n}
        section = Resolved({**one.resolved.of("images").sections, "latents": probes.FACTS | fitted})
        draft.add("probe_linear", scores["linear"], section, n, chance=scores["chance"])
        draft.add("probe_knn", scores["knn"], section, n, chance=scores["chance"])


@INSTRUMENTS.register("latent_alignment")
class LatentAlignment(Metric):
    """CKNNA between token-mean latents and the features of the same images."""

    order, over = 31, LATENTS
    quantities = (
        Quantity("cknna", "CKNNA (judge)", HIGHER,
                 definition="agreement of the latent's neighbourhoods with those of the protocol's feature space; about k / (N - 1) by chance"),
        Quantity("cknna_corrected", "CKNNA beyond chance", HIGHER,
                 definition="CKNNA with its chance value k / (N - 1) taken away, 1 for equal representations"),
    )  # fmt: skip

    def write(self, draft: Draft) -> None:
        one, n = self.gathered, len(self.gathered.latents)
        section = Resolved({**one.resolved.sections, "latents": ALIGNMENT | {"test_images": n}})
        value = cknna(prepare(one.latents), prepare(one.real.features()[:n]), K)
        draft.add("cknna", value, section, n)
        draft.add("cknna_corrected", beyond_chance(value, K, n), section, n)
