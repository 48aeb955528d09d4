"""Feature spaces in which sets of images are compared: the judge, timm's vision models, Inception.

A space is named by one string: `judge` (bundled), `judge:RUN` (one trained on own data; a run's id, prefix or
directory), `factors` or `factors:RUN` (true factors of drawn scenes), `groups` or `groups:RUN` (what stands
where in `scenes:groups`), a row of the VFM table such as `dinov2_b14`, `timm:NAME`, either with `@SIDE` for a
side in pixels, `classifier:VFM@SIDE` (with a linear head that knows the data's classes), or `inception`.
Everything that could change its numbers (weights, pre-processing, dimension) is part of what it declares, and
so of a protocol's hash.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vfmlab import config, data, vfm
from vfmlab.errors import CheckpointError, ConfigError, nearest
from vfmlab.registry import FEATURE_SPACES

OWN = ("judge", "factors", "groups")  # trained here: opened at once; other weights may come with a version


class Seen(NamedTuple):
    """What a space makes of B images: features B D (fp32), logits B K where it is a classifier, and spatial
    features B S where sFID is defined."""

    features: Tensor
    logits: Tensor | None
    spatial: Tensor | None = None


@torch.no_grad()
def over(source: data.ImageSource, indices: Tensor, function: Callable[[Tensor], Tensor],
         batch: int) -> tuple[Tensor, Tensor]:
    """`function` of images of a source (B 3 H W in [-1, 1]), in fp32, and their labels; on the CPU."""
    values, labels = [], []
    for part in indices.split(batch):
        images = source.batch(part)
        values.append(function(data.to_float(images.images)).float().cpu())
        labels.append(images.labels)
    return torch.cat(values), torch.cat(labels)


class FeatureSpace(nn.Module):
    """Base of all spaces. Frozen, in eval mode; maps images in [-1, 1] (B 3 H W) to :class:`Seen`.

    Attributes:
        name: as asked for. version: of weights and code. dimension: D. preprocessing: one line.
        class_names: what the logits stand for, in order; None where the space knows no classes.
    """

    name: str
    version: str
    dimension: int
    preprocessing: str
    class_names: list[str] | None = None

    def facts(self) -> dict[str, str | int]:
        """What enters a protocol's hash."""
        return {
            "name": self.name.partition(":")[0],  # a run's directory is not part of a number; the version is
            "version": self.version,
            "dimension": self.dimension,
            "preprocessing": self.preprocessing,
        }

    def prepare(self, cfg: config.Data) -> None:
        """Before images of `cfg` are judged: what is to be learnt from its training images. Here: nothing."""

    def forward(self, images: Tensor) -> Seen:
        raise NotImplementedError

    def train(self, mode: bool = True) -> FeatureSpace:
        """Frozen: stays in eval mode."""
        return super().train(False)


def open_space(name: str, size: int, root: str | Path = "runs") -> FeatureSpace:
    """The feature space called `name` for images of `size` pixels.

    Args:
        root: folder of the runs, for `judge:RUN`.

    Raises:
        ConfigError: no such space, or a library or file it needs is not there.
        CheckpointError: weights are missing or not usable; the message says which file to put where.
    """
    kind, _, rest = name.partition(":")
    if kind in FEATURE_SPACES:
        space = FEATURE_SPACES.get(kind)(rest, size, root)
    elif Path(name).expanduser().is_dir():
        space = FEATURE_SPACES.get("judge")(name, size, root)
    elif name.partition("@")[0] in vfm.names():
        space = FEATURE_SPACES.get("vfm")(name, size, root)
    else:
        known = [*FEATURE_SPACES.names(), *vfm.names()]
        raise ConfigError(f"protocol.features '{name}' is no feature space{nearest(name, known)}")
    space.name = name
    return space.requires_grad_(False).eval()


def run_or_path(reference: str, root: str | Path) -> Path | None:
    """What `judge:REFERENCE` names: a path, or a pretraining run of `root`; None for "", the bundled one."""
    from vfmlab import runs

    path = Path(reference).expanduser()
    if not reference or path.exists():
        return path if reference else None
    return runs.open_run(reference, root, kind="pretrain").path


@FEATURE_SPACES.register("judge")
class JudgeSpace(FeatureSpace):
    """The small independent classifier: bundled (knows the scenes' classes), or one trained on own data."""

    def __init__(self, reference: str, size: int, root: str | Path):
        super().__init__()
        from vfmlab.evaluation import judge

        self.judge = judge.load(run_or_path(reference, root))
        self.version, self.dimension = self.judge.fingerprint, self.judge.dim
        self.class_names = list(self.judge.class_names)
        self.preprocessing = f"bilinear antialiased to {judge.SIZE}"

    def forward(self, images: Tensor) -> Seen:
        return Seen(*self.judge(images))


@FEATURE_SPACES.register("vfm")
class VisionModelSpace(FeatureSpace):
    """Global features of a vision foundation model: its pooled token, else the mean of the last map.

    Args:
        row: name of the model, and `@SIDE` where it is to see another side than its native one.
    """

    def __init__(self, row: str, size: int, root: str | Path):
        super().__init__()
        row, at, given = row.partition("@")
        facts = vfm.facts(row)
        if at and not (given.isdigit() and 0 < int(given) <= 4096):
            raise ConfigError(f"protocol.features '{row}@{given}': the side after '@' is a number of pixels, "
                              f"for example {row}@{facts.side}")
        side = int(given) if at else facts.side
        try:
            self.model = vfm.build(config.VFM(name=row, upscale=side / size), size)
        except ConfigError as error:  # the line speaks of the run's VFM
            raise ConfigError(f"protocol.features '{row}@{side}': {error}") from None
        with torch.no_grad():
            self.dimension = self(torch.zeros(1, 3, size, size)).features.shape[1]
        self.version = self.model.fingerprint
        self.preprocessing = f"{facts.interpolation} to {side}, own mean and std"

    def forward(self, images: Tensor) -> Seen:
        maps, pooled = self.model.features(images, (-1,))
        return Seen(maps[-1].mean((2, 3)) if pooled is None else pooled, None)


@FEATURE_SPACES.register("timm")
def timm_space(name: str, size: int, root: str | Path) -> FeatureSpace:
    """`timm:NAME`: any vision model of timm."""
    return VisionModelSpace(f"timm:{name}", size, root)


@FEATURE_SPACES.register("inception")
class InceptionSpace(FeatureSpace):
    """torch-fidelity's InceptionV3 (the 2015-12-05 TensorFlow weights): pool features, logits without bias,
    and the first 7 channels of `mixed_6/conv` (17 x 17), places before channels, as ADM's evaluator has them.

    The weights (91 MB) are looked for in torch's hub folder, and downloaded there if that is possible.
    """

    def __init__(self, _: str, size: int, root: str | Path):
        super().__init__()
        try:
            import torch_fidelity
            from torch_fidelity import feature_extractor_inceptionv3 as source
        except ImportError:
            install = "install torch-fidelity (pip install 'vfmlab[metrics]')"
            raise ConfigError(f"protocol.features 'inception': {install}") from None
        path = fetch(source.URL_INCEPTION_V3, "protocol.features 'inception'")
        try:
            # torch-fidelity unpickles it: plain tensors only
            torch.load(path, map_location="cpu", weights_only=True)
            self.net = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                                          str(path))
        except Exception as error:
            why = str(error).splitlines()[0]
            raise CheckpointError(f"protocol.features 'inception': '{path}' does not hold its weights "
                                  f"({why}); delete it") from None
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.dimension = 2048
        self.version = f"torch-fidelity {torch_fidelity.__version__}, {path.name}, ADM's counts"
        self.preprocessing = "uint8, TensorFlow 1.x bilinear to 299"

    def forward(self, images: Tensor) -> Seen:
        return Seen(*self.net(data.to_uint8(images)), self._spatial)

    def _keep(self, _: nn.Module, __: tuple[Tensor, ...], maps: Tensor) -> None:
        self._spatial = maps[:, :7].permute(0, 2, 3, 1).flatten(1).float()


def fetch(url: str, what: str, download: bool = True) -> Path:
    """The copy of `url` in torch's hub folder, downloaded where it is missing, else a ConfigError."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if path.is_file():
        return path
    help_ = f"put {url} into {path.parent}"
    if not download:
        raise ConfigError(f"{what}: weights are not here and are too large to download for a number; {help_}")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise ConfigError(f"{what}: weights are not here and HF_HUB_OFFLINE forbids downloads; {help_}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2],
                                       progress=False)
    except (OSError, RuntimeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{what}: weights could not be downloaded ({why}); {help_}") from None
    return path
