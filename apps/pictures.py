"""Pictures from outside: which are let in, and the few that the app offers itself."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from apps.common import problem
from vfmlab import config, runs
from vfmlab.data.decode import MAX_PIXELS
from vfmlab.errors import VfmlabError
from vfmlab.plots import figures, primitives

REFUSED = "This is not a picture that can be read here. Give a PNG, JPEG or WebP file."


class Checked:
    """Part of :class:`Picture`: a file is looked at before anything decodes it; its header must be that of an image of at most MAX_PIXELS."""

    examples: list[str]

    def get_block_name(self) -> str:
        return "image"  # what it is for the page

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        if str(url_or_file_path).lower().startswith(("http:", "https:", "ftp:")):
            raise problem("An address is not fetched for you. Save the picture and upload the file.")
        return await super().async_move_resource_to_block_cache(url_or_file_path)

    def preprocess(self, payload: Any) -> str | None:
        if payload is None:
            return None
        if payload.path is None or (payload.url or "").startswith("data:"):
            raise problem("Upload the picture as a file.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
                with Image.open(payload.path) as image:
                    width, height = image.size
        except Image.DecompressionBombError:
            raise problem(f"This picture has too many pixels; at most {MAX_PIXELS:,} are decoded here.") from None
        except Exception:  # decoders raise nearly every type on what is no image
            raise problem(REFUSED) from None
        if width * height > MAX_PIXELS:
            raise problem(f"This picture has {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded here.")
        return payload.path

    def name_of(self, path: str | None) -> str | None:
        """How a picture stands in a shared state: one of the examples, or None (a person's own picture is not shared)."""
        found = _digest(path) if path else None
        return next((f"example:{i}" for i, example in enumerate(self.examples) if _digest(example) == found), None)

    def from_name(self, name: Any) -> str | None:
        """The example that a state names."""
        kind, _, number = str(name).partition(":")
        return self.examples[int(number)] if kind == "example" and number.isdecimal() and int(number) < len(self.examples) else None


# Made without gradio's metaclass, which would write a .pyi file beside this one. No constructor of its own: its arguments are sent to the page.
Picture = ABCMeta.__new__(type(gr.Image), "Picture", (Checked, gr.Image), {"__module__": __name__, "is_template": True})


def picture(label: str, examples: list[str], **more: Any) -> Picture:
    """A place for a picture, by file, clipboard or camera."""
    # "filepath" without a mode: gradio would decode the whole image to convert it
    made = Picture(label=label, type="filepath", image_mode=None, sources=["upload", "clipboard", "webcam"], buttons=["fullscreen"], **more)
    made.examples = list(examples)
    return made


def given(path: str | None) -> str:
    if not path:
        raise problem("Choose a picture first: upload one, paste one, take one, or click an example.")
    return path


def examples(root: Path, n: int = 4) -> list[str]:
    """Files of a few held-out images: of the data of the newest tokenizer run where it can be had, else drawn scenes."""
    newest = next((run for run in reversed(runs.scan(root)) if run.kind == "tokenizer"), None)
    drawn = config.Data(size=64, val=64)
    try:
        images, _, _ = figures.examples(drawn if newest is None else newest.config().data, n, seed=1)
    except VfmlabError:
        images, _, _ = figures.examples(drawn, n, seed=1)
    folder = Path(tempfile.mkdtemp(prefix="vfmlab_examples_"))
    scale = 2 ** max(0, (256 // images.shape[-1]).bit_length() - 1)  # larger to the eye; halving gives back the very pixels
    for i, image in enumerate(images):
        primitives.tile(image, scale=scale).save(folder / f"example_{i}.png")
    return [str(folder / f"example_{i}.png") for i in range(len(images))]


def _digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
