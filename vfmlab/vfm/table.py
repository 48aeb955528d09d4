"""Known vision foundation models, one row each. A new one is a new row; `timm:NAME` needs none.

The weights of some come inside packages; files and origins are in `vfmlab/vfm/shipped.py`.

Mean, std and the weights' file come from timm; its tests hold every row against timm's own record. Licences
are those that the publishers state for the weights on the hub; read them before you use or share a model
built on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfmlab.vfm.shipped import SHIPPED, Shipped


@dataclass(frozen=True)
class Facts:
    """What is known about a model.

    name: in `vfm.name`. timm: model name in timm, "" for the pocket models. layers: read by default. size:
    native side in pixels. patch: pixels per token, of hierarchical models in the last map. interpolation: how
    its training images were resized. licence: of the weights. hierarchical: maps of several widths and grids.
    """

    name: str
    timm: str
    layers: tuple[int, ...]
    size: int
    patch: int
    interpolation: str
    licence: str
    hierarchical: bool = False

    @property
    def side(self) -> int:
        """`size` at the nearest whole number of tokens, in pixels."""
        return max(1, round(self.size / self.patch)) * self.patch

    @property
    def shipped(self) -> Shipped | None:
        """The package's file that holds the weights; None where no package does."""
        return SHIPPED.get(self.name)

    @property
    def hub(self) -> str:
        """Repository on the Hugging Face hub that holds `model.safetensors`, "" for bundled models and
        packages'."""
        return f"timm/{self.timm}" if self.timm and self.shipped is None else ""


# The middle layer is block depth/2: SigLIP2-L reads (0, 12, -1) in VFM-VAE's released config; the others
# follow it.
_ROWS = """
siglip2_b16_256      vit_base_patch16_siglip_256.v2_webli        0,6,-1   256  16  bicubic  apache-2.0
siglip2_b16_384      vit_base_patch16_siglip_384.v2_webli        0,6,-1   384  16  bicubic  apache-2.0
siglip2_b16_512      vit_base_patch16_siglip_512.v2_webli        0,6,-1   512  16  bicubic  apache-2.0
siglip2_l16_256      vit_large_patch16_siglip_256.v2_webli       0,12,-1  256  16  bicubic  apache-2.0
siglip2_l16_384      vit_large_patch16_siglip_384.v2_webli       0,12,-1  384  16  bicubic  apache-2.0
siglip2_l16_512      vit_large_patch16_siglip_512.v2_webli       0,12,-1  512  16  bicubic  apache-2.0
siglip2_so400m_256   vit_so400m_patch16_siglip_256.v2_webli      0,13,-1  256  16  bicubic  apache-2.0
siglip2_so400m_384   vit_so400m_patch16_siglip_384.v2_webli      0,13,-1  384  16  bicubic  apache-2.0
siglip2_so400m_512   vit_so400m_patch16_siglip_512.v2_webli      0,13,-1  512  16  bicubic  apache-2.0
dinov2_s14           vit_small_patch14_dinov2.lvd142m            0,6,-1   518  14  bicubic  apache-2.0
dinov2_b14           vit_base_patch14_dinov2.lvd142m             0,6,-1   518  14  bicubic  apache-2.0
dinov2_l14           vit_large_patch14_dinov2.lvd142m            0,12,-1  518  14  bicubic  apache-2.0
dinov2_g14           vit_giant_patch14_dinov2.lvd142m            0,20,-1  518  14  bicubic  apache-2.0
dinov2_s14_reg       vit_small_patch14_reg4_dinov2.lvd142m       0,6,-1   518  14  bicubic  apache-2.0
dinov2_b14_reg       vit_base_patch14_reg4_dinov2.lvd142m        0,6,-1   518  14  bicubic  apache-2.0
dinov2_l14_reg       vit_large_patch14_reg4_dinov2.lvd142m       0,12,-1  518  14  bicubic  apache-2.0
dinov2_g14_reg       vit_giant_patch14_reg4_dinov2.lvd142m       0,20,-1  518  14  bicubic  apache-2.0
dinov3_s16           vit_small_patch16_dinov3.lvd1689m           0,6,-1   256  16  bicubic  dinov3-license
dinov3_b16           vit_base_patch16_dinov3.lvd1689m            0,6,-1   256  16  bicubic  dinov3-license
dinov3_l16           vit_large_patch16_dinov3.lvd1689m           0,12,-1  256  16  bicubic  dinov3-license
eva02_l14            eva02_large_patch14_224.mim_m38m            0,12,-1  224  14  bicubic  mit
eva_clip_b16         eva02_base_patch16_clip_224.merged2b        0,6,-1   224  16  bicubic  mit
eva_clip_l14         eva02_large_patch14_clip_224.merged2b       0,12,-1  224  14  bicubic  mit
eva_clip_l14_336     eva02_large_patch14_clip_336.merged2b       0,12,-1  336  14  bicubic  mit
mae_b16              vit_base_patch16_224.mae                    0,6,-1   224  16  bicubic  cc-by-nc-4.0
mae_l16              vit_large_patch16_224.mae                   0,12,-1  224  16  bicubic  cc-by-nc-4.0
clip_b16             vit_base_patch16_clip_224.openai            0,6,-1   224  16  bicubic  apache-2.0
clip_l14             vit_large_patch14_clip_224.openai           0,12,-1  224  14  bicubic  apache-2.0
dino_s16             vit_small_patch16_224.dino                  0,6,-1   224  16  bicubic  apache-2.0
dino_b16             vit_base_patch16_224.dino                   0,6,-1   224  16  bicubic  apache-2.0
efficientnet_lite0   tf_efficientnet_lite0                       0,3,-1   224  32  bicubic  apache-2.0
efficientnet_lite1   tf_efficientnet_lite1                       0,3,-1   240  32  bicubic  apache-2.0
efficientnet_lite2   tf_efficientnet_lite2                       0,3,-1   260  32  bicubic  apache-2.0
mobilenetv2          mobilenetv2_100                             0,3,-1   224  32  bicubic  mit
pocket               -                                           0,2,-1   32   4   bicubic  mit
pocket_leaky         -                                           0,2,-1   32   4   bicubic  mit
pocket_random        -                                           0,2,-1   32   4   bicubic  mit
"""


def _parse(line: str) -> Facts:
    name, timm, layers, size, patch, interpolation, licence = line.split()
    numbers = tuple(int(k) for k in layers.split(","))
    hierarchical = name in SHIPPED
    return Facts(name, timm.strip("-"), numbers, int(size), int(patch), interpolation, licence, hierarchical)


TABLE: dict[str, Facts] = {facts.name: facts for facts in map(_parse, _ROWS.strip().splitlines())}
