"""The sections of a config that stand on their own: VFM, training, diffusion, protocol; frozen, nothing
unknown allowed.

Budgets (`samples`, `*_every`, `warmup`, `ema_halflife`) are counted in training images seen, never in steps,
so that batch size and number of devices do not change what a config means.

Parts that bring their own options (tokenizers, decoders, losses, diffusion networks) declare a nested
`Config` derived from the section here; the registry picks it by name, and an unknown option is refused like
any unknown field.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from vfmlab.config.permuted import Permuted
from vfmlab.config.section import Section, by_name, under
from vfmlab.config.stale import Stale
from vfmlab.config.text import Text
from vfmlab.errors import ConfigError
from vfmlab.registry import DECODERS, LOSSES, NETWORKS, PATHS, QUANTIZERS, TOKEN_NETWORKS


class VFM(Section):
    """A frozen vision foundation model: a row of `vfmlab.vfm`'s table, or `timm:NAME` for any timm model."""

    name: str = "pocket"
    layers: tuple[int, ...] | None = Field(None, description="0 patch embedding, k after block or stage k, "
                                                             "-1 after the final norm; None: the row's "
                                                             "default")
    weights: str = Field("pretrained", description="'pretrained', 'random', or a safetensors file")
    upscale: float = Field(1.0, gt=0,
                           description="images are resized by this factor before they enter the VFM")
    seed: int = Field(0, description="initialisation of random weights")
    stride: Literal[8, 16, 32] | None = Field(None, description="of a convolutional model's last map, which "
                                                                "is then dilated; null: the model's own")


class DecoderConfig(Section):
    """Latent -> image. Each registered decoder extends this."""

    kind: str


class QuantizerConfig(Section):
    """Vectors -> codes -> vectors. Each registered quantiser extends this.

    whole_batch: whether the codebook moves by what all vectors of a batch chose, which one forward pass must
    then see.
    """

    whole_batch: ClassVar[bool] = False

    kind: str

    @property
    def parts(self) -> int:
        """Codes of one vector."""
        return 1


class TokenizerConfig(Section):
    """Image -> latent -> image. Each registered tokenizer extends this.

    quantised: whether its latent is codes, for a generator of tokens in order. seeded: whether decoding draws
    noise: `decode` and `decode_raw` then take `seeds`, one for each image.
    """

    quantised: ClassVar[bool] = False
    seeded: ClassVar[bool] = False

    method: str
    channels: int = Field(8, ge=1, description="latent channels (d in f16d32)")
    factor: int = Field(4, ge=1, description="spatial down-sampling (f in f16d32)")
    radius: float | None = Field(None, ge=1e-9, le=1e9, description="normalised latents lie on a sphere: "
        "each token has this length; null: zero mean and unit variance")
    places: bool | None = Field(None, description="latent statistics for every place by itself; null: for "
        "every channel")
    decode_length: float | None = Field(None, gt=0, description="length of the raw tokens that are decoded, "
        "where radius is set; null: the mean over training images")

    @model_validator(mode="after")
    def _length(self) -> TokenizerConfig:
        if self.decode_length is not None and self.radius is None:
            raise ValueError(f"decode_length {self.decode_length:g}: only latents on a sphere have one; set "
                             "radius too, or leave it null")
        if self.places and self.radius is not None:
            raise ValueError("places: latents on a sphere have no statistics of places; set places or radius "
                             "to null")
        return self

    @field_validator("channels")
    @classmethod
    def _few(cls, channels: int) -> int:
        if channels > 16_384:
            raise ValueError("a latent has at most 16384 channels")
        return channels

    def map_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of the vectors that decoding starts from, for images of side `size`."""
        return self.channels, size // self.factor, size // self.factor

    def latent_shape(self, size: int) -> tuple[int, ...]:
        """What a generator makes: (C, h, w), or (T,) codes of quantised tokenizers."""
        _, h, w = shape = self.map_shape(size)
        return (h * w * self.quantizer.parts,) if self.quantised else shape

    def latent_text(self, size: int) -> str:
        """The latent in words: "8 x 8 x 8 (f4d8)", "64 codes (d 8)"."""
        if self.quantised:
            return f"{self.latent_shape(size)[0]} codes (d {self.channels})"
        return f"{' x '.join(map(str, self.map_shape(size)))} (f{self.factor}d{self.channels})"


Beta = Annotated[float, Field(ge=0, lt=1)]


class LossConfig(Section):
    """One term of the training loss. Each registered loss extends this."""

    weight: float = Field(1.0, ge=0)
    until: int | None = Field(None, ge=0, description="switched off after so many samples")

    def factor(self, samples: int) -> float:
        """What the weight is multiplied by after `samples` images: 0 once the term is over or before it
        begins."""
        return 0.0 if self.until is not None and samples >= self.until else 1.0


def loss_config(name: str) -> type[LossConfig]:
    """The options of the term `name`. One loss may stand in a recipe several times, as "loss:label"."""
    return LOSSES.get(name.partition(":")[0]).Config


LABELLED = re.compile(r"[^.:/]{1,60}(:[A-Za-z0-9_-]{1,60})?$")


def _losses(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    chosen = {}
    for name, term in value.items():
        if not LABELLED.match(name):
            shown = name if len(name) < 60 else f"{name[:57]}..."
            raise ConfigError(f"losses: '{shown}' is no name of a term; write TERM or TERM:LABEL, a label in "
                              "letters, digits, _ and -")
        config = loss_config(name)
        if not isinstance(term, Section):
            try:
                term = config.model_validate({"weight": term} if isinstance(term, int | float) else term)
            except ValidationError as error:
                raise under(name, error) from None
        if term.weight > 0:  # a term of weight 0 is the same run as one without it, so it gets the same id
            chosen[name] = term
    return chosen


Losses = Annotated[dict[str, SerializeAsAny[LossConfig]], BeforeValidator(_losses)]
AnyQuantizer = Annotated[SerializeAsAny[QuantizerConfig], by_name(QUANTIZERS, "kind")]
AnyDecoder = Annotated[SerializeAsAny[DecoderConfig], by_name(DECODERS, "kind")]


class Equivariance(Section):
    """Equivariance regularisation of VFM-VAE: per batch either the latent or the prior path (arXiv
    2510.18457, released config).
    """

    p_latent: float = Field(0.0, ge=0, le=1,
                            description="chance that latent and target are scaled / rotated alike; 0: off")
    p_prior: float = Field(0.0, ge=0, le=1,
                           description="otherwise, chance that the input is down-scaled before encoding")
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field((0.25, 0.5, 0.75, 1.0), min_length=1)


class Train(Section):
    """One training phase. All budgets are in samples (images) seen."""

    dropped: ClassVar = {"guard_explode": 1e3}

    samples: int = Field(..., ge=1)
    batch: int = Field(32, ge=1, le=65_536,
                       description="global batch over all devices and accumulation steps")
    accumulation: int = Field(1, ge=1)
    optimizer: Literal["adam", "adamw", "muon"] = Field("adamw", description="muon: of matrices in blocks")
    lr: float = Field(1e-3, gt=0)
    matrix_lr: float | None = Field(None, gt=0, description="muon's rate for the matrices; null: 0.02")
    lr_for: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="glob on parameter names -> "
        "factor on lr; the last match counts")
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = Field(0, ge=0)
    clip: float | None = Field(1.0, gt=0, description="gradient norm is clipped to this; null: never")
    ema_halflife: int = Field(10_000, ge=0, description="half-life of the weight average; 0: no average")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    recompute: bool | None = Field(None, description="blocks store their inputs only, and compute the rest "
        "again in backward: less memory, about a third more work")
    vfm_cache: float | None = Field(None, gt=0, description="of tokenizers: gigabytes that the frozen VFM's "
        "features of all images may take on disk; null, or where they take more: asked at every step")
    log_every: int = Field(640, ge=1)
    preview_every: int = Field(8_000, ge=1)
    checkpoint_every: int = Field(8_000, ge=1)
    evaluate_at: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="sample counts at which the "
        "protocol is run on the EMA weights")
    guard_patience: int = Field(3, ge=1, description="bad steps in a row that end the run")
    logger: Literal["none", "tensorboard", "trackio", "wandb"] = "none"

    @model_validator(mode="after")
    def _rates(self) -> Train:
        if self.matrix_lr is not None and self.optimizer != "muon":
            raise ValueError(f"matrix_lr is read by optimizer=muon only, not {self.optimizer}; use lr")
        if self.compile and self.recompute:
            raise ValueError("compile and recompute do not go together; set one of them to false")
        return self


class TimeSampling(Section):
    """How t is drawn in training; t = 0 is data, t = 1 is noise."""

    kind: Literal["uniform", "lognormal"] = "lognormal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0, description="t -> s t / (1 + (s - 1) t); > 1 spends more time near noise")


class PathConfig(Section):
    """How data and noise are joined. Each registered path extends this; the radius is the tokenizer's."""

    kind: str


class NetworkConfig(Section):
    """The network that predicts the velocity. Each registered network extends this."""

    kind: str


class SizedConfig(NetworkConfig):
    """A transformer's size: one of `SIZES`, or numbers, or one of these with some numbers replaced."""

    SIZES: ClassVar[dict[str, tuple[int, int, int]]] = {}  # name: (width, depth, heads)

    size: str | None = None
    width: int | None = Field(None, ge=4)
    depth: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _sized(self) -> Self:
        if self.size is None and None in (self.width, self.depth, self.heads):
            raise ValueError(f"needs either size={'|'.join(self.SIZES)} or all of width, depth, heads")
        width, _, heads = self.sizes
        if width % (4 * heads):
            raise ValueError(f"width {width} is not a multiple of 4 x heads ({4 * heads}); change width or "
                             "heads")
        return self

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(width, depth, heads)."""
        preset = self.SIZES[self.size] if self.size else (None, None, None)
        given = (self.width, self.depth, self.heads)
        return tuple(p if g is None else g for g, p in zip(given, preset, strict=True))  # type: ignore


class Imported(Section):
    """Weights released by others; see `vfmlab.weights`. They are not trained: `vfmlab import NAME` makes the
    run.
    """

    name: str = Field(..., description="entry of the table of released weights")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$",
                               description="of the weights file, where it is to be checked")


class Alignment(Section):
    """REPA (arXiv 2410.06940): tokens after an early block are read out to the patch tokens of a frozen VFM.

    iREPA is `projector=conv` with `spatial_norm`: targets lose `spatial_norm` times their mean over places
    and are divided by their spread over places.
    """

    vfm: VFM = Field(VFM(), description="the target; its `layers` are not read")
    layer: int = Field(-1, description="of the target, numbered as in `vfm.layers`")
    block: int = Field(8, ge=1, description="of the diffusion network, after which tokens are read out")
    weight: float = Field(0.5, gt=0)
    projector: Literal["mlp", "conv"] = "mlp"
    hidden: int = Field(2048, ge=1, description="width of the MLP's two hidden layers")
    spatial_norm: float | None = Field(None, ge=0, le=1, description="share of the mean over places that "
                                                                     "targets lose; null: targets as they "
                                                                     "are")
    resample: bool = Field(True,
                           description="bring targets of another grid to the network's; false: refuse them")
    until: int | None = Field(None, ge=1, description="switched off after so many samples")
    cache: bool = Field(True, description="encode the targets once, beside the latents; false: at every step")


class ClassToken(Section):
    """REG (arXiv 2507.01467): the global token of a frozen VFM is denoised beside the latents, by networks
    with a `token`.
    """

    vfm: VFM = Field(VFM(), description="whose global token; its `layers` are not read")
    weight: float = Field(0.03, ge=0, description="of the token's velocity loss")
    normalise: bool = Field(True, description="to zero mean and unit variance over the training images, "
                                              "channel by channel; false: as it is")
    cache: bool = Field(True, description="encode the tokens once; false: at every step")


class Tune(Section):
    """REPA-E (arXiv 2504.10483): the tokenizer learns on through the alignment loss while diffusion is
    trained.

    The diffusion loss stops at the latents; the alignment loss and the tokenizer's own losses reach the
    tokenizer. What of it trains are `trains`, at which rate says `diffusion.train.lr_for` with globs such as
    "tokenizer.*".
    """

    dropped: ClassVar = {"momentum": 0.1}

    weight: float = Field(1.5, gt=0, description="of the alignment loss as the tokenizer sees it; the "
                                                 "network's is alignment.weight")
    trains: tuple[str, ...] = Field(("*",), description="globs on the tokenizer's parameter names")
    losses: Losses | None = Field(None, description="the tokenizer's own; null: those of its last stage")
    statistics: Literal["batch"] | None = Field(None, description="that normalise the latents which "
        "diffusion learns: batch, the batch's own, as in the paper (the tokenizer's step keeps the running "
        "ones); null: running ones for both")


class Generator(Section):
    """What is trained on a tokenizer's latents, or imported."""

    train: Train | None = None
    imported: Imported | None = Field(None, description="released weights in place of `train`")
    class_dropout: float = Field(0.1, ge=0, le=1)
    cache: bool = Field(True, description="train on cached latents or codes; False encodes on the fly")
    tokenizer_of: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.]*$",
                                     description="run name whose tokenizer is taken; null: the run's own")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.train is None) == (self.imported is None):
            raise ValueError("needs a training budget, 'train', or 'imported' weights, one of the two")
        return self

    @property
    def null_label(self) -> bool:
        """Whether "no class" (or the empty text) was trained, so that guidance can lead away from it."""
        return self.class_dropout > 0 or self.imported is not None


class Diffusion(Generator):
    """Latent diffusion (flow matching on a straight path or a sphere) of a tokenizer's normalised latents."""

    network: Annotated[SerializeAsAny[NetworkConfig], by_name(NETWORKS, "kind")]
    path: Annotated[SerializeAsAny[PathConfig], by_name(PATHS, "kind")] | None = Field(
        None, description="null: linear; 'sphere' for tokenizers with a radius")
    time: TimeSampling = TimeSampling()
    cosine_loss: float = Field(0.0, ge=0, description="weight of 1 - cos(v, v_target), LightningDiT's option")
    sample_posterior: bool = Field(True, description="cache mean and std and draw z anew each time; False: "
                                                     "the mode")
    alignment: Alignment | None = Field(None, description="REPA; null: off")
    class_token: ClassToken | None = Field(None, description="REG; null: off")
    stale: Stale | None = Field(None, description="the head learns on encodings of earlier steps; null: off")
    tune: Tune | None = Field(None, description="REPA-E; null: the tokenizer stays as it is")
    text: Text | None = Field(None, description="captions as condition; null: classes")

    @model_validator(mode="after")
    def _straight(self) -> Diffusion:
        if self.path is not None and self.path.kind != "linear":
            if "least_time" in type(self.network).model_fields:
                raise ValueError(f"network '{self.network.kind}' predicts the clean latent of the straight "
                                 f"path; take another network for the path '{self.path.kind}'")
            for field in ("class_token", "tune"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{field}: works on the straight path only, not on '{self.path.kind}'; "
                                     f"set {field} or path to null")
        return self

    @model_validator(mode="after")
    def _shared(self) -> Diffusion:
        for part in (self.stale, self.text):
            if part is not None:
                part.check(self)
        if self.text is None and getattr(self.network, "text", None) is not None:
            raise ValueError(f"network.text {list(self.network.text)}: there is no text to read; add 'text', "
                             "or set network.text to null")
        return self

    @model_validator(mode="after")
    def _aligned(self) -> Diffusion:
        token, kind = getattr(self.network, "token", None), self.network.kind
        if self.class_token is not None and "token" not in type(self.network).model_fields:
            raise ValueError(f"class_token: network '{kind}' has no class token; use lightningdit or sit, "
                             "with network.token = width of the VFM's global token")
        if self.class_token is not None and token is None:
            raise ValueError("class_token: network.token is null; set it to the width of the VFM's global "
                             "token (pocket: 128)")
        if self.class_token is None and token is not None and self.train is not None:
            raise ValueError(f"network.token {token}: nothing trains it; add 'class_token', or set "
                             "network.token to null")
        sizes = getattr(self.network, "sizes", None)
        depth = 10**9 if sizes is None else sizes[1] + getattr(self.network, "head_depth", 0)
        if self.alignment is not None and self.alignment.block > depth:
            raise ValueError(f"alignment.block {self.alignment.block}: the network has blocks 1 to {depth}")
        if self.tune is not None and self.alignment is None:
            raise ValueError("tune: the tokenizer is tuned through the alignment loss, which is off; add "
                             "'alignment'")
        return self


class AR(Generator):
    """A generator that draws a quantised tokenizer's codes one after the other."""

    network: Annotated[SerializeAsAny[NetworkConfig], by_name(TOKEN_NETWORKS, "kind")]
    ten_crops: float | None = Field(None, gt=1, le=4, description="cache codes of ten crops (corners and "
        "centre, mirrored too) of images larger by this factor; null: of the image, and with data.flip of "
        "its mirror image")
    permuted: Permuted | None = Field(None, description="RAR's orders; null: raster order")

    @model_validator(mode="after")
    def _fits(self) -> AR:
        if self.ten_crops is not None and not self.cache:
            raise ValueError("ten_crops: crops are cached; set cache=true, or leave ten_crops out")
        if self.permuted is not None and not getattr(self.network, "target_places", False):
            raise ValueError("permuted: in another order the network must know which place it predicts; set "
                             "network.target_places=true")
        return self


class Pretrain(Section):
    """Pretraining of the small offline networks (pocket VFM, judge); see `vfmlab.training.pretrain`."""

    objective: str = "factors+mae"
    mask: float = Field(0.5, ge=0, le=1)
