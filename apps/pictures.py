"""Pictures from outside: which are let in, and the few that the app offers itself."""

from __future__ import annotations

from abc import ABCMeta
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from apps.common import problem
from vfmlab import config, data, runs
from vfmlab.data.decode import FORMATS, MAX_PIXELS
from vfmlab.errors import VfmlabError
from vfmlab.plots import primitives


class Checked:
    """Part of :class:`Picture`: a file's header must be that of an image that the project's decoder reads."""

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
        too_many = f"too many pixels; at most {MAX_PIXELS:,} are decoded here"
        try:
            with Image.open(payload.path, formats=FORMATS) as image:
                width, height = image.size
        except Image.DecompressionBombError:
            raise problem(f"This picture has {too_many}.") from None
        except Exception:  # readers raise nearly every type on what is no image
            raise problem("This is not a picture that can be read. Give a PNG, JPEG or WebP file.") from None
        if width * height > MAX_PIXELS:
            raise problem(f"This picture has {width} x {height} pixels, {too_many}.")
        return payload.path

    def from_name(self, name: Any) -> str | None:
        """The example that a state names."""
        names = {f"example:{i}": example for i, example in enumerate(self.examples)}
        return names.get(name) if isinstance(name, str) else None


# Not by gradio's metaclass, which would write a .pyi file; no constructor, whose arguments would be sent.
_FACTS = {"__module__": __name__, "is_template": True}
Picture = ABCMeta.__new__(type(gr.Image), "Picture", (Checked, gr.Image), _FACTS)


def picture(label: str, examples: list[str], **more: Any) -> Picture:
    """A place for a picture, by file, clipboard or camera."""
    # "filepath" without a mode: gradio would decode the whole image to convert it
    look = {"sources": ["upload", "clipboard", "webcam"], "buttons": ["fullscreen"]}
    place = Picture(label=label, type="filepath", image_mode=None, **look, **more)
    place.examples = list(examples)
    return place


def named(examples: list[str], **path: str | None) -> dict[str, str]:
    """How pictures stand in a shared state: field -> which of the examples; one's own is not shared."""
    names = {Path(each).read_bytes(): f"example:{i}" for i, each in enumerate(examples)}
    mine = {field: names.get(Path(one).read_bytes()) for field, one in path.items() if one}
    return {field: name for field, name in mine.items() if name}


def given(path: str | None) -> str:
    if not path:
        raise problem("Choose a picture first: upload one, paste one, take one, or click an example.")
    return path


def examples(root: Path, folder: Path, n: int = 4) -> tuple[list[str], str]:
    """Files of a few images in `folder`, and whose: the newest tokenizer's held-out ones, or drawn scenes."""
    drawn, whose = config.Data(size=64, val=64), "drawn scenes"
    try:
        newest = next((run for run in reversed(runs.scan(root)) if run.kind == "tokenizer"), None)
        images, _, _ = data.examples(drawn if newest is None else newest.config().data, n, seed=1)
        if newest is not None:
            whose = "held-out images of the newest tokenizer"
    except (VfmlabError, OSError, ValueError):
        images, _, _ = data.examples(drawn, n, seed=1)
        whose += "; the images of the newest tokenizer cannot be read here"
    # larger to the eye; halving gives back the very pixels
    scale = 2 ** max(0, (256 // images.shape[-1]).bit_length() - 1)
    for i, image in enumerate(images):
        primitives.tile(image, scale=scale).save(folder / f"example_{i}.png")
    return [str(folder / f"example_{i}.png") for i in range(len(images))], whose
