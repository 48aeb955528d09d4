"""Captions: of drawn scenes from their factors and back, of files beside images, of a column of a table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_files import both, fill, png

from vfmlab.config import Data
from vfmlab.data import captions, open_source
from vfmlab.data.groups import COLOURS, STYLE
from vfmlab.errors import ConfigError, DataError

EVERY = torch.arange(200)


@pytest.fixture(scope="module")
def groups():
    return open_source(Data(source="scenes:groups", size=32, train=200), "train")


@pytest.mark.parametrize("style", ["easy", "medium", "hard", "other", "groups"])
def test_a_caption_is_read_back_into_its_scene(style):
    for caption in open_source(Data(source=f"scenes:{style}", size=16, train=200), "train").captions(EVERY):
        assert str(captions.parse(caption)) == caption
        assert set(caption.split()) <= set(captions.WORDS)


def test_a_caption_says_what_is_where(groups):
    """Against the cells, which decide the pixels."""
    cells, sides = groups.cells(EVERY), set()
    for i, caption in enumerate(groups.captions(EVERY)):
        scene = captions.parse(caption)
        where = {"first": [], "second": []}
        for place in range(4):
            if cells["shape"][i, place] < 0:
                continue
            kind = STYLE.textures[cells["texture"][i, place]], COLOURS[cells["colour"][i, place]], STYLE.shapes[cells["shape"][i, place]]
            first = kind == (scene.first.texture, scene.first.colour, scene.first.shape)
            where["first" if first else "second"].append((place % 2, place // 2))
        assert len(where["first"]) == scene.first.count
        assert len(where["second"]) == (scene.second is not None)
        sides.add(scene.side)
        for x, y in where["first"] if scene.second else ():
            ((other_x, other_y),) = where["second"]
            truth = {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}
            assert truth[scene.side], caption
    assert sides == {None, *captions.SIDES}
    assert groups.class_names[int(groups.labels[0])].split() == [captions.parse(groups.captions(EVERY[:1])[0]).first.texture, "disc"]


def test_what_a_caption_says_is_drawn(groups):
    """A taken place is bright in its colour, a free one is the even ground."""
    images, cells = groups.batch(EVERY).images.float() / 255, groups.cells(EVERY)
    for i in range(60):
        for place in range(4):
            y, x = 16 * (place // 2), 16 * (place % 2)
            part = images[i, :, y : y + 16, x : x + 16].flatten(1).T.numpy()
            if cells["colour"][i, place] < 0:
                assert np.ptp(part, axis=0).max() < 0.02
            else:
                brightest = part[part.max(1).argsort()[-8:]]
                assert captions.colour_names(brightest.mean(0, keepdims=True)) == [COLOURS[cells["colour"][i, place]]]


def test_a_pixel_of_a_group_depends_on_nothing_but_its_index(groups):
    again = open_source(Data(source="scenes:groups", size=32, train=500), "train").batch(torch.tensor([120, 3, 77]))
    assert torch.equal(again.images, groups.batch(EVERY).images[[120, 3, 77]])
    other = open_source(Data(source="scenes:groups", size=32, train=200), "val")
    assert not torch.equal(other.batch(EVERY[:5]).images, groups.batch(EVERY[:5]).images)


@pytest.mark.parametrize("text", ["", "red", "a red", "two red disc", "a red disc beside a blue ring", "a red disc above", "four red discs"])
def test_what_is_no_caption_is_one_line(text):
    with pytest.raises(ConfigError, match="no caption of drawn scenes; write for example") as caught:
        captions.parse(text)
    assert "\n" not in str(caught.value)


def test_captions_beside_images(tmp_path):
    root = fill(tmp_path / "d")
    for path in root.rglob("*.png"):
        suffix = ".TXT" if path.stem in ("0004", "0024") else ".txt"  # as other systems write it
        path.with_suffix(suffix).write_text(f"image\n {path.stem} ", "utf-8-sig" if suffix == ".TXT" else "utf-8")
    (root / "cat/notes.txt").write_text("no image has this name")
    train, val = both(f"folder:{root}")
    assert train.captions(torch.arange(3)) == [f"image {train.records.files[p].split('/')[1][:4]}" for p in train.picked[:3]]
    every = [*train.captions(torch.arange(len(train))), *val.captions(torch.arange(len(val)))]
    assert sorted(every) == [f"image {i:04}" for i in range(40)]
    assert train.dropped[".txt not read"] == [1, ["cat/notes.txt"]]
    missing = root / train.records.files[train.picked[2]]
    missing.with_suffix(".txt").unlink()
    with pytest.raises(DataError, match=rf"{missing.stem}.png has no caption, others have; write it into a .txt"):
        train.captions(torch.arange(3))
    missing.with_suffix(".txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=rf"caption .*{missing.stem}.txt cannot be read"):
        train.captions(torch.arange(3))


def test_captions_of_a_table(tmp_path):
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(20)], "label": [i % 2 for i in range(20)]}
    texts = [f"number {i}" for i in range(20)]
    pq.write_table(pa.table(rows | {"text": texts, "more": [[t, "other"] for t in texts], "bad": list(range(20))}), tmp_path / "t.parquet")
    what = f"parquet:{tmp_path / 't.parquet'}"
    train, _ = both(what)
    assert train.captions(torch.arange(3)) == [f"number {p}" for p in train.picked[:3]]
    assert both(what, caption_column="more")[0].captions(torch.arange(3)) == train.captions(torch.arange(3))
    with pytest.raises(DataError, match=r"column 'bad' holds int, not captions; name another in data\.caption_column"):
        both(what, caption_column="bad")[0].captions(torch.arange(3))
    with pytest.raises(ConfigError, match=r"data\.caption_column' = 'txet'.*did you mean 'text'"):
        both(what, caption_column="txet")


def test_a_source_without_captions_says_so_by_none(tmp_path):
    assert both(f"folder:{fill(tmp_path / 'd')}")[0].captions(torch.arange(3)) is None
