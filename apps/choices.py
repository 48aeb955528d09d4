"""A card below the comparisons: which VFM and tokenizer `vfmlab choose` found for one's own images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import gradio as gr

from apps.common import LIGHT, text

RECIPE = ".recipe.json"
SHOWN = "## Finalists"  # what stands above it on the page: question, verdict, ranking, what to go on with


def there(root: Path) -> dict[str, Path]:
    """Pages of choices by name: in the folder of runs, and beside it, where the command writes them."""
    pages = sorted(page for folder in (root.parent, root) for recipe in folder.glob(f"*{RECIPE}")
                   if (page := recipe.with_name(recipe.name.removesuffix(RECIPE) + ".md")).is_file())
    return {page.stem: page for page in pages}


def build(root: Path) -> None:
    """Lay the card out. root: folder of runs."""
    with gr.Accordion("Which VFM and tokenizer for my images?", open=False, elem_id="vl-choices"):
        with gr.Row():
            which = gr.Dropdown([], label="choice", scale=3, min_width=200, allow_custom_value=True)
            again = gr.Button("look again", min_width=120)
        shown = gr.Markdown()

    def look(name: str | None) -> tuple[Any, str]:
        """The names of the choices, and the page of one (empty: the first) down to its ranking."""
        pages, name = there(root), text(name)
        name = name if name in pages else next(iter(pages), None)
        if name is None:
            command = ["vfmlab", "choose", "--data", "folder:PATH", "--vfm", "efficientnet_lite0",
                       "mobilenetv2", "--root", str(root)]
            return gr.update(choices=[], value=None), (
                "No choice was made beside this folder yet. The command trains small tokenizers and short "
                f"generators on your images and ranks them:\n\n    {shlex.join(command)}")
        page = pages[name].read_text(encoding="utf-8")
        return gr.update(choices=list(pages), value=name), page.partition(SHOWN)[0]

    names, page = look(None)
    which.choices, which.value, shown.value = [(n, n) for n in names["choices"]], names["value"], page
    again.click(look, which, [which, shown], **LIGHT)
    which.input(look, which, [which, shown], **LIGHT)
