"""Results as small HTML cards: pixels stay pixels, colours belong to methods, everything has words beside it.

All text that is not ours (ids, class names) is escaped here.
"""

from __future__ import annotations

import html
import io
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from PIL import Image

from vfmlab.plots import primitives

CSS = """
.vl-cards { display: flex; flex-wrap: wrap; gap: 14px; }
.vl-card { flex: 1 1 300px; min-width: 0; max-width: 100%; border: 1px solid var(--border-color-primary); border-top: 4px solid var(--method, #7f7f7f);
  border-radius: 8px; padding: 10px 12px; background: var(--background-fill-secondary); color: var(--body-text-color); }
.vl-card h3 { font-size: .95rem; margin: 0 0 8px; overflow-wrap: anywhere; color: var(--body-text-color); }
.vl-card h3::before { content: ''; display: inline-block; width: .7em; height: .7em; border-radius: 50%; background: var(--method, #7f7f7f); margin-right: .45em; }
.vl-card.full { flex-basis: 100%; }
.vl-figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(110px, 1fr)); gap: 10px; }
.vl-card figure { margin: 0; min-width: 0; }
.vl-card figure.wide { grid-column: 1 / -1; }
.vl-card figcaption, .vl-facts { font-size: .8rem; color: var(--body-text-color); opacity: .78; margin-top: 4px; overflow-wrap: anywhere; }
.vl-card img { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px; }
.vl-card img.small { max-width: 220px; }
.vl-numbers { font-size: .95rem; margin-top: 8px; display: flex; flex-wrap: wrap; gap: 2px 16px; }
.vl-numbers b { font-variant-numeric: tabular-nums; }
.vl-compare { position: relative; --cut: 50%; }
.vl-compare img + img { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--cut)); }
.vl-compare::after { content: ''; position: absolute; top: 0; bottom: 0; left: var(--cut); width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 3px #000; pointer-events: none; }
.vl-card input[type=range] { width: 100%; accent-color: var(--method, #7f7f7f); margin: 6px 0 0; }
.vl-strip { overflow-x: auto; }
.vl-strip img { max-width: none; }
.vl-link { overflow-wrap: anywhere; font-size: .85rem; }
"""


def escape(text: Any) -> str:
    return html.escape(str(text))


def uri(images: Any, columns: int = 64, gap: int = 0) -> str:
    """Images N 3 H W in [-1, 1] as one PNG in a data URI, at their own size; the page enlarges them."""
    return primitives.data_uri(primitives.tile(images, columns=columns, scale=1, gap=gap))


def figure(images: Any, caption: str, alt: str | None = None, wide: bool = False, small: bool = False) -> str:
    """One picture with a caption."""
    image = f'<img class="{"small" if small else ""}" src="{uri(images)}" alt="{escape(alt or caption)}">'
    return f'<figure class="{"wide" if wide else ""}">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def logged(picture: Image.Image, caption: str) -> str:
    """A picture as it was written, over the whole width."""
    image = f'<img src="{primitives.data_uri(picture)}" alt="{escape(caption)}">'
    return f'<figure class="wide">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def before_after(before: Any, after: Any, name: str) -> str:
    """Two pictures of one size under a divider that a slider moves (mouse, touch, arrow keys). Lossless."""
    move = "this.previousElementSibling.style.setProperty('--cut', this.value + '%')"
    return (
        f'<figure class="wide"><div class="vl-compare"><img src="{uri(before)}" alt="original"><img src="{uri(after)}" alt="{escape(name)}"></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="original or {escape(name)}" oninput="{move}">'
        f"<figcaption>left: original, right: {escape(name)}</figcaption></figure>"
    )


def strip(frames: Any, caption: str) -> str:
    """Frames in a row, to be scrolled where they do not fit."""
    size = f"width: 100%; min-width: {56 * len(frames)}px; max-width: {128 * len(frames)}px"
    row = f'<div class="vl-strip" tabindex="0"><img style="{size}" src="{uri(frames, gap=1)}" alt="{escape(caption)}"></div>'
    return f'<figure class="wide">{row}<figcaption>{escape(caption)}</figcaption></figure>'


def playback(frames: Any, caption: str, ms: int = 140) -> str:
    """Frames there and back as an animated PNG, lossless."""
    pictures = [primitives.tile(frame[None], scale=1) for frame in frames]
    there_and_back = pictures + pictures[-2:0:-1]
    buffer = io.BytesIO()
    there_and_back[0].save(buffer, "PNG", save_all=True, append_images=there_and_back[1:], duration=ms, loop=0)
    source = "data:image/png;base64," + b64encode(buffer.getvalue()).decode()
    return f'<figure><img class="small" src="{source}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def card(title: str, method: str | None, figures: Sequence[str], numbers: Sequence[tuple[str, str]] = (), facts: str = "", full: bool = False) -> str:
    """One result. method: decides the colour. numbers: (name, value). facts: N, protocol, weights, seconds. full: a row for itself."""
    colour = primitives.colour(method) if method else "#7F7F7F"
    told = "".join(f"<span>{escape(name)} <b>{escape(value)}</b></span>" for name, value in numbers)
    return (
        f'<section class="vl-card{" full" if full else ""}" style="--method: {colour}"><h3>{escape(title)}</h3><div class="vl-figures">{"".join(figures)}</div>'
        f'{f"""<div class="vl-numbers">{told}</div>""" if told else ""}<div class="vl-facts">{escape(facts)}</div></section>'
    )


def cards(parts: Sequence[str]) -> str:
    return f'<div class="vl-cards">{"".join(parts)}</div>'
