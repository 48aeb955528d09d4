"""Pictures for the docs: originals, a line of reconstructions per stage, errors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vfmlab import api, data, runs
from vfmlab.plots import primitives
from vfmlab.runs import finished
from vfmlab.studies.rows import Row

SHOWN = 10


def sheet(groups: Mapping[str, Tensor], width: int = 1000, columns: Sequence[str] = ()) -> Image.Image:
    """One labelled line per group N 3 H W in [-1, 1], enlarged. columns: what stands above each image."""
    first = next(iter(groups.values()))
    scale = max(1, width // (first.shape[0] * first.shape[-1]))
    font = ImageFont.load_default(size=15)
    left = max(round(font.getlength(line)) for name in groups for line in name.splitlines()) + 16
    lines = [primitives.tile(images, columns=len(images), scale=scale) for images in groups.values()]
    gap, step = 2 * scale, (first.shape[-1] + 2) * scale
    names = [_fitted(name, step - 4, font) for name in columns[: len(first)]]
    top = 10 + 18 * max((name.count("\n") + 1 for name in names), default=0) if names else 0
    whole = Image.new("RGB", (left + lines[0].width, top + sum(line.height + gap for line in lines) - gap),
                      "white")
    draw = ImageDraw.Draw(whole)
    for k, name in enumerate(names):
        draw.multiline_text((left + k * step, 4), name, fill="#1b1f23", font=font)
    for name, line in zip(groups, lines, strict=True):
        draw.multiline_text((8, top + line.height // 2), name, fill="#1b1f23", font=font, anchor="lm")
        whole.paste(line, (left, top))
        top += line.height + gap
    return whole


def write(rows: Sequence[Row], root: str | Path, folder: Path, stem: str) -> dict[str, Path]:
    """`<stem>_<label>.png` for each label with a trained tokenizer (first seed), and `<stem>.png` of all.
    A label is left out where a stage's weights are gone: its numbers may be there still.

    The held-out images are the same wherever the data are. Returns label -> file; the overview is under "".
    """
    folder.mkdir(parents=True, exist_ok=True)
    files, overview, taken = {}, {}, set()
    for row in rows:
        stages = [phase for phase in row.tokenizers if finished(phase, root)
                  and runs.RunDir(runs.root_folder(root) / phase.id).ema.exists()]
        if row.label in files or len(stages) < len(row.tokenizers):
            continue
        images, _, _ = data.examples(row.run.data, SHOWN)
        shown = {"original": images}
        for phase in stages:
            _, restored, psnr = api.reconstruct(phase.id, images, root)
            shown[f"{row.label if len(stages) == 1 else phase.stage}\n{psnr.mean():.1f} dB"] = restored
        shown["error x4"] = primitives.error_map(images, restored)
        files[row.label] = folder / f"{stem}_{_free(slug(row.label), taken)}.png"
        runs.write_atomic(files[row.label], primitives.png(sheet(shown), optimize=True))
        if images.equal(overview.setdefault("original", images)):
            overview[f"{row.label}\n{psnr.mean():.1f} dB"] = restored
    if len(overview) > 2:
        files[""] = folder / f"{stem}.png"
        runs.write_atomic(files[""], primitives.png(sheet(overview), optimize=True))
    return files


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Text broken at blanks and underscores into lines of at most `width` pixels where possible."""
    lines = [""]
    for word in re.findall(r"[^ _-]+[ _-]*", text):
        longer = lines[-1] + word
        lines = [*lines[:-1], longer] if not lines[-1] or font.getlength(longer) <= width else [*lines, word]
    return "\n".join(lines)


def _free(name: str, taken: set[str]) -> str:
    """`name`, or with a number behind it where another label is written alike; it is then taken too."""
    free = next(each for n in itertools.count(1) if (each := f"{name}_{n}" if n > 1 else name) not in taken)
    taken.add(free)
    return free


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_") or "row"
