"""The VFM-VAE importer on configurations of which no reference is stored: ours written in the release's names and back."""

from __future__ import annotations

import re

import pytest
import torch

from vfmlab.tokenizers.vfm_vae import VFMVAE
from vfmlab.weights import import_state_dict
from vfmlab.weights.families import vfm_vae

BASE = {
    "patch_from_layers": [0, 3], "patch_in_dimensions": [24, 32], "patch_out_dimensions": [8, 4],
    "compression_mode": "continuous", "how_to_compress": "attnproj", "how_to_decompress": "attnproj",
    "decompress_factor": 2, "resolution_compression_factor": 8, "z_dimension": 4, "z_dim_for_mapping_mlp_output": 12,
    "concat_z_block_indices": [0, 1], "concat_z_mapped_dims": [12, 8], "attn_block_indices": [0], "attn_depths": [1],
    "img_resolution": 32, "num_blocks": 3,
    "synthesis_kwargs": {"channel_base": 1024, "channel_max": 16, "num_res_blocks": 1, "architecture": "skip"},
}  # fmt: skip


def theirs(key: str, tokenizer: VFMVAE) -> str:
    """The release's name of one of our keys: the tables of the importer, read backwards."""

    def back(rest: str, table: dict[str, str]) -> str:
        ours = {value: old for old, value in table.items()}
        head = max((value for value in ours if rest == value or rest.startswith(value + ".")), key=len)
        return ours[head] + rest[len(head) :]

    def projected(head: str, rest: str) -> str:
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", rest)
        return f"{head}.blocks.{match[1]}.{back(match[2], vfm_vae.PROJECTION)}" if match else f"{head}.{rest}"

    if match := re.fullmatch(r"projections\.(\d+)\.(.+)", key):
        return projected(f"ldm_adapter.patch_quants.{match[1]}.0", match[2])
    for ours, release in (("final_projection", "final_quant"), ("decoder.decompress", "post_quant")):
        if key.startswith(ours):
            return projected(f"ldm_adapter.{release}", key.removeprefix(ours + "."))
    if match := re.fullmatch(r"quantizer\.codebooks\.(\d+)\.(weight|usage)", key):
        names = {"weight": "codebook.weight", "usage": "vocab_usage"}
        return f"ldm_adapter.quantizer.codebooks.{match[1]}.{names[match[2]]}"
    if key == "alignment.weight":
        return "ldm_adapter.linear_proj.weight"
    if match := re.fullmatch(r"decoder\.mapping\.layers\.(\d)\.(.+)", key):
        return f"mapping.mlp.fc{match[1]}.{match[2]}"
    if match := re.fullmatch(r"decoder\.fusion\.(\d+)\.(.+)", key):
        fusion = tokenizer.decoder.fusion[match[1]]
        first = match[2].split(".")[0] in vfm_vae.FUSION_FIRST.values()
        stage = int(fusion.down > 1) + (0 if first else 1 + int(fusion.up > 1))
        table = vfm_vae.FUSION_FIRST if first else vfm_vae.FUSION_LAST
        return f"synthesis.z_convs.{match[1]}.{stage}.{back(match[2], table)}"
    block, part, rest = re.fullmatch(r"decoder\.blocks\.(\d+)\.(\w+)\.(.+)", key).groups()
    head = f"synthesis.blocks.{block}"
    if part == "layers":
        number, rest = rest.split(".", 1)
        name = "conv0" if number == "0" else f"convs1.{int(number) - 1}"
        return f"{head}.{name}.{back(rest, vfm_vae.LAYER)}"
    if part.endswith("attention"):
        number, rest = rest.split(".", 1)
        name = "self_attns" if part == "attention" else "cross_attns"
        return f"{head}.{name}.{number}.{back(rest, vfm_vae.ATTENTION)}"
    table = vfm_vae.TO_RGB if part == "to_rgb" else vfm_vae.UPSAMPLE
    name = {"upsample": "seperate_upsample_conv", "sum_upsample": "last_upsample_conv", "to_rgb": "torgb"}[part]
    return f"{head}.{name}.{back(rest, table)}"


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({"hidden": 8}, {}),  # in -> in -> out, as in the release
        ({"hidden": 16, "z_pooled_resolution": 2}, {}),
        ({}, {}),
        ({"how_to_compress": "conv", "how_to_decompress": "conv"}, {"projection": "conv"}),
        ({"attnproj_quant_layers": 2, "attnproj_post_quant_layers": 3}, {"projection_layers": 2}),
        ({"z_pooled_resolution": 2}, {}),
        ({"compression_mode": "discrete"}, {"discrete": True, "codebooks": 2, "vocabulary": 32}),
        ({"use_kl_loss": False}, {"kl": False}),
        ({"use_cross_attn": True}, {}),
        ({"use_self_attn": False}, {}),
        ({"use_gaussian_blur": False, "activation_for_concat_z": "silu"}, {}),
        ({"use_vf_loss": True}, {"alignment_width": 32}),
        ({"legacy": True}, {}),
        ({"concat_z_block_indices": [0, 2], "concat_z_mapped_dims": [12, 4]}, {}),
        ({"img_resolution": 64, "num_blocks": 4}, {}),
        ({"synthesis_kwargs": {"channel_base": 512, "channel_max": 8, "num_res_blocks": 2}}, {}),
    ],
)
def test_round_trip(arguments, fields):
    """The decoder is built by the importer's reading of the arguments, the adapter here: keys and shapes must agree."""
    config = {**BASE, **arguments}
    hidden = config.pop("hidden", 12)
    read, layers = vfm_vae._settings(config), BASE["patch_from_layers"]
    side = 2 * config["img_resolution"] // 8
    shapes = {k: vfm_vae.LayerShape(w, side) for k, w in zip(layers, BASE["patch_in_dimensions"], strict=True)}
    ours = VFMVAE.Config(channels=4, factor=8, widths=(8, 4), decoder=vfm_vae._decoder(read, {"mapping.mlp.fc0.weight": torch.zeros(hidden, 8)}), **fields)
    torch.manual_seed(0)
    source = VFMVAE(ours, config["img_resolution"], shapes=shapes).eval()
    for p in source.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    own = {k: v for k, v in source.state_dict().items() if not k.startswith("stat_") and not k.endswith(".batches")}
    state = {theirs(key, source): value for key, value in own.items()}
    assert len(state) == len(own)
    tokenizer = import_state_dict("vfm-vae", state, config)
    assert tokenizer.decoder.mapping.layers[0].weight.shape[0] == hidden
    assert tokenizer.config == ours or config.get("use_cross_attn")  # there, the context's width is read off the weights
    features = [torch.randn(2, side * side, w) for w in BASE["patch_in_dimensions"]]
    with torch.no_grad():
        q, reference = tokenizer.encode_features(features), source.encode_features(features)
        assert torch.equal(q.mean, reference.mean)
        assert (q.logvar is None) == (reference.logvar is None)
        for a, b in zip(tokenizer.decode_raw(q.mean), source.decode_raw(q.mean), strict=True):
            assert torch.equal(a, b)
