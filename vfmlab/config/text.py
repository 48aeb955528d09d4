"""Captions as the condition of a diffusion network."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from vfmlab.config.section import Section


class Text(Section):
    """The images' captions in place of their classes: tokens of a frozen text encoder, which the network
    reads before those of the latents. `class_dropout` is the share of empty captions.
    """

    encoder: str = Field("words", description="words: of drawn scenes, offline; transformers:NAME: any text "
                                              "tower of that library")

    def check(self, diffusion: Any) -> None:
        """ValueError where the diffusion section has no network that reads text."""
        network = diffusion.network
        if "text" not in type(network).model_fields:
            raise ValueError(f"text: network '{network.kind}' reads no text; use lightningdit or sit, with "
                             "network.text = [tokens, width] of the encoder (words: [12, 64])")
        if network.text is None:
            raise ValueError("text: network.text is null; set it to [tokens, width] of the encoder (words: "
                             "[12, 64])")
        if diffusion.class_token is not None:
            raise ValueError("text: a network reads text or denoises a class token; set one of them to null")
