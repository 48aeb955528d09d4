"""Results as small HTML cards: pixels stay pixels, colours belong to methods, everything has words beside it.

All text that is not ours (ids, class names) is escaped here. Images are N 3 H W in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from vfmlab import api
from vfmlab.plots import primitives


def uri(images: Any, gap: int = 0) -> str:
    """Images in a row as one PNG in a data URI, at their own size; the page enlarges them."""
    return primitives.data_uri(primitives.tile(images, columns=64, scale=1, gap=gap))


def figure(images: Any, caption: str) -> str:
    """One picture (images, or one that is drawn already) with a caption."""
    source = primitives.data_uri(images) if isinstance(images, Image.Image) else uri(images)
    image = f'<img src="{source}" alt="{escape(caption)}">'
    wide = ' class="wide"' if isinstance(images, Image.Image) else ""
    return f"<figure{wide}>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def before_after(before: Any, after: Any, left: str, right: str) -> str:
    """Two pictures of one size under a divider that a slider moves (mouse, touch, arrow keys). Lossless."""
    both = ((before, left), (after, right))
    pictures = "".join(f'<img src="{uri(image)}" alt="{escape(name)}">' for image, name in both)
    slider = f'aria-label="{escape(left)} or {escape(right)}" oninput="vlCut(this)"'
    return (
        f'<figure class="wide"><div class="vl-compare">{pictures}</div>'
        f'<input type="range" min="0" max="100" value="50" {slider}>'
        f"<figcaption>left: {escape(left)}, right: {escape(right)}</figcaption></figure>"
    )


def strip(frames: Any, caption: str) -> str:
    """Frames in a row, to be scrolled where they do not fit."""
    size = f"width: 100%; min-width: {56 * len(frames)}px; max-width: {128 * len(frames)}px"
    image = f'<img style="{size}" src="{uri(frames, gap=1)}" alt="{escape(caption)}">'
    row = f'<div class="vl-strip" tabindex="0">{image}</div>'
    return f'<figure class="wide">{row}<figcaption>{escape(caption)}</figcaption></figure>'


def state(preview: api.Preview, early: bool = False) -> str:
    """Where a sampling is. early: it was stopped there."""
    at = f"step {preview.step} of {preview.total}"
    return "done" if preview.final else f"stopped at {at}" if early else at


def early(done: int, of: int) -> list[str]:
    """A card that says so where a job was stopped before all tokenizers were through."""
    return [card(f"stopped after {done} of {of} tokenizers", None, [])] if done < of else []


def moving(frames: Any) -> list[str]:
    """Frames to be looked at one by one with a slider, and as they move."""
    last = len(frames) - 1
    view = f"""<div class="vl-view" style="background-image: url('{uri(frames)}')"></div>"""
    slider = f'<input type="range" min="0" max="{last}" value="0" aria-label="frame" oninput="vlFrame(this)">'
    viewer = f"<figure>{view}{slider}<figcaption>frame by frame, 0 to {last}</figcaption></figure>"
    # there and back as an animated PNG, lossless
    first, *others = (primitives.tile(frame[None], scale=1) for frame in frames)
    others += others[-2::-1]
    source = primitives.data_uri(first, save_all=True, append_images=others, duration=140, loop=0)
    save = f'<a download="path.png" href="{source}">save</a>'
    image = f'<img class="small" src="{source}" alt="there and back">'
    return [viewer, f"<figure>{image}<figcaption>there and back &middot; {save}</figcaption></figure>"]


def table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Figures in cells, with a heading over each column and before each row. rows: (heading, cells)."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *columns))
    lines = [f"<th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in row)}" for name, row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in (head, *lines))
    return f'<div class="vl-table"><table>{body}</table></div>'


def card(title: str, method: str | None, figures: Sequence[str], numbers: Sequence[tuple[str, str]] = (),
         facts: str = "", full: bool = False, many: bool = False) -> str:
    """One result. method: decides the colour. numbers: (name, value). facts: N, protocol, weights, seconds.

    full: a row for itself. many: of small figures.
    """
    colour = primitives.colour(method) if method else "#7F7F7F"
    values = "".join(f"<span>{escape(name)} <b>{escape(value)}</b></span>" for name, value in numbers)
    parts = [f'<div class="vl-figures{" many" if many else ""}">{"".join(figures)}</div>',
             f'<div class="vl-numbers">{values}</div>' if values else "",
             f'<div class="vl-facts">{escape(facts)}</div>']
    whole = "".join(reversed(parts) if many else parts)  # facts on many pictures stand above them, in view
    look = f'class="vl-card{" full" if full else ""}" style="--method: {colour}"'
    return f"<section {look}><h3>{escape(title)}</h3>{whole}</section>"


def cards(parts: Sequence[str], together: bool = False) -> str:
    """Cards side by side. together: with a box that links the dividers of all."""
    check = '<input type="checkbox" checked> move all dividers together'
    box = f'<label class="vl-together vl-facts">{check}</label>'
    return f'<div class="vl-cards">{box if together else ""}{"".join(parts)}</div>'


def stack(pictures: Sequence[Image.Image]) -> Image.Image | None:
    """Pictures below each other as one, to be saved; None where there is none."""
    if not pictures:
        return None
    size = max(p.width for p in pictures), sum(p.height + 2 for p in pictures) - 2
    sheet = Image.new("RGB", size, "white")
    for i, one in enumerate(pictures):
        sheet.paste(one, (0, sum(p.height + 2 for p in pictures[:i])))
    return sheet
