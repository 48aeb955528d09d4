"""How well an ar generator predicts the codes of held-out images."""

from __future__ import annotations

import torch

from vfmlab.ar.objective import image_bits
from vfmlab.evaluation.instruments.base import CODES, Metric
from vfmlab.evaluation.number import CURVE, LOWER, Draft, Quantity
from vfmlab.evaluation.protocol import Resolved, exact, resolve
from vfmlab.registry import INSTRUMENTS
from vfmlab.weights import io


@INSTRUMENTS.register("code_bits")
class CodeBits(Metric):
    """Cross-entropy in bits an image, under each image's own label; spread: standard deviation over images.

    A codebook that keeps less of the image needs fewer bits, so the number's protocol holds the tokenizer's
    weights: values of two tokenizers are never ranked. It stands in curves and reports, and in no table of
    several runs, whose rows one codebook alone could share.
    """

    order, over = 45, CODES
    quantities = (
        Quantity("bits_per_image", "bits per image", LOWER, "bit", (CURVE,),
                 definition="cross-entropy of held-out images' codes under the generator; for one tokenizer alone",
                 apart=True),
    )  # fmt: skip

    def write(self, draft: Draft) -> None:
        gathered, rows = self.gathered, []
        tokenizer, network = gathered.tokenizer, gathered.network
        for batch, images in gathered.setup.images(next(network.parameters()).device):
            codes = tokenizer.codes(images)
            rows.append(image_bits(network, batch.labels.to(codes.device), codes).cpu())
        bits = torch.cat(rows)
        shape = network.codes
        own = {"tokenizer": io.digest(tokenizer), "entries": shape.entries, "tokens": shape.tokens}
        setup = gathered.setup
        images = resolve(exact(setup.protocol), setup.cfg, setup.source)
        resolved = Resolved({**images.sections, "codes": own})
        draft.mean("bits_per_image", bits, resolved)
