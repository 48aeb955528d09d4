"""Procedural images: pure functions of their index, with true factors and masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vfmlab.config import Data
from vfmlab.data import open_source, to_float, to_uint8
from vfmlab.data.scenes import STYLES, SceneSource
from vfmlab.errors import ConfigError, DataError

STYLE = st.sampled_from(sorted(STYLES))


@settings(max_examples=25)
@given(style=STYLE, size=st.sampled_from([8, 17, 32, 64]), seed=st.integers(0, 2**31), data=st.data())
def test_a_pixel_depends_on_nothing_but_its_index(style, size, seed, data):
    count = 200
    index = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=40))
    whole = SceneSource(style, "train", size, count, seed).batch(torch.arange(count))
    some = SceneSource(style, "train", size, 2 * count, seed).batch(torch.tensor(index))
    assert torch.equal(some.images, whole.images[index])
    assert torch.equal(some.labels, whole.labels[index])
    assert some.indices.tolist() == index


@pytest.mark.parametrize("style", sorted(STYLES))
def test_classes_are_balanced_and_named(style):
    source = SceneSource(style, "train", 16, 12 * 16 * 5)
    counts = torch.bincount(source.labels, minlength=source.num_classes)
    assert counts.max() - counts.min() <= 1
    assert len(set(source.class_names)) == source.num_classes
    if style != "other":
        assert 10 <= source.num_classes <= 16
    factors = source.factors(torch.arange(len(source)))
    textures = source.factor_classes["texture"]
    assert torch.equal(source.labels, factors["shape"] * textures + factors["texture"])


def test_the_other_family_shares_no_shape_or_texture():
    other = STYLES["other"]
    for name in ("easy", "medium", "hard"):
        assert not set(other.shapes) & set(STYLES[name].shapes)
        assert not set(other.textures) & set(STYLES[name].textures)


def test_train_and_val_are_different_streams():
    config = Data(source="scenes:medium", train=500, val=500)
    train, val = (open_source(config, split) for split in ("train", "val"))
    seen = {image.numpy().tobytes() for image in train.batch(torch.arange(500)).images}
    assert len(seen) == 500
    assert not seen & {image.numpy().tobytes() for image in val.batch(torch.arange(500)).images}


@pytest.mark.parametrize("style", sorted(STYLES))
def test_factors_stay_in_their_ranges_and_vary(style):
    source, s = SceneSource(style, "train", 16, 4000), STYLES[style]
    factors = source.factors(torch.arange(4000))
    bounds = {
        "x": (-s.offset, s.offset),
        "y": (-s.offset, s.offset),
        "scale": s.radius,
        "rotation": (-s.rotation, s.rotation),
        "background_angle": (0, 2 * np.pi),
        "foreground": (0, 1),
        "background": (0, 1),
        "background_end": (0, 1),
    }
    assert set(bounds) | set(source.factor_classes) == set(factors)
    for name, (low, high) in bounds.items():
        values = factors[name].reshape(4000, -1)[:, 0]
        used = 0.25 if name.endswith(("ground", "end")) else 0.99  # a colour is dark or bright
        assert low - 1e-6 <= values.min() <= values.max() <= high + 1e-6, name
        assert values.max() - values.min() > used * (high - low), name
    for name, count in source.factor_classes.items():
        assert torch.bincount(factors[name], minlength=count).min() > 0, name
    continuous = torch.stack([factors[name] for name in ("x", "y", "scale", "rotation")])
    others = torch.corrcoef(continuous) - torch.eye(4)
    assert others.abs().max() < 0.08  # 5 standard deviations of 4000 independent pairs


def test_the_mask_is_where_the_factors_say():
    source = SceneSource("easy", "train", 64, 200)
    index = torch.nonzero(source.labels == source.class_names.index("plain disc"))[:, 0]
    factors, masks = source.factors(index), source.masks(index)
    assert masks.dtype == torch.bool
    assert masks.shape == (len(index), 1, 64, 64)
    axis = (torch.arange(64) * 2 + 1) / 64 - 1
    for i in range(len(index)):
        inside = (axis[None] - factors["x"][i]) ** 2 + (axis[:, None] - factors["y"][i]) ** 2 < factors["scale"][i] ** 2
        assert (inside != masks[i, 0]).float().mean() < 0.005
        colour = source.batch(index[i : i + 1]).images[0][:, masks[i, 0]].float().median(dim=1).values / 255
        assert torch.allclose(colour, factors["foreground"][i], atol=0.01)
    corners = source.batch(index).images[:, :, 0, 0].float() / 255
    assert torch.allclose(corners, factors["background"], atol=0.01)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_another_size_shows_the_same_scene(style):
    small, large = (SceneSource(style, "val", size, 48) for size in (32, 128))
    index = torch.arange(48)
    halved = torch.nn.functional.avg_pool2d(large.batch(index).images.float(), 4)
    assert (halved - small.batch(index).images.float()).abs().mean() < 3.0
    assert torch.equal(small.factors(index)["x"], large.factors(index)["x"])
    assert small.fingerprint != large.fingerprint


@pytest.mark.parametrize("style", ["easy", "medium"])
def test_classes_can_be_told_apart_from_their_mean_mask_and_texture(style):
    """A nearest-mean classifier on masks finds the shape far above chance; the texture shows as variance inside."""
    source = SceneSource(style, "train", 32, 4000)
    index = torch.arange(4000)
    shape = source.factors(index)["shape"]
    masks = source.masks(index).float().flatten(1)
    train, test = index < 3000, index >= 3000
    means = torch.stack([masks[train & (shape == k)].mean(0) for k in range(5)])
    guess = torch.cdist(masks[test], means).argmin(1)
    assert (guess == shape[test]).float().mean() > 0.5
    images = source.batch(index).images.float().mean(1).flatten(1)
    mean = (images * masks).sum(1, True) / masks.sum(1, True)
    spread = (((images / mean - 1) * masks) ** 2).sum(1) / masks.sum(1)
    striped = source.factors(index)["texture"] == 1
    assert ((spread > 0.04) == striped).float().mean() > 0.95


def test_fingerprint_names_everything_that_decides_the_pixels():
    def mark(style="medium", split="train", size=32, count=100, seed=0):
        return SceneSource(style, split, size, count, seed).fingerprint

    marks = [mark(), mark("easy"), mark(split="val"), mark(size=64), mark(count=101), mark(seed=1)]
    assert len(set(marks)) == 6
    assert mark() == marks[0]


def test_scenes_are_cached_once_drawn(monkeypatch):
    source = SceneSource("easy", "train", 16, 50)
    first = source.batch(torch.tensor([3, 4]))
    monkeypatch.setattr(source, "read", lambda indices: pytest.fail(f"drawn again: {indices}"))
    again = source.batch(torch.tensor([4, 3, 3]))
    assert torch.equal(again.images, first.images[[1, 0, 0]])


@pytest.mark.parametrize(
    ("source", "needle"),
    [
        ("scenes:medum", "did you mean 'medium'"),
        ("scene:medium", "did you mean 'scenes'"),
        ("scenes", "scenes:..."),
        ("scenes:", "scenes:..."),
    ],
)
def test_unknown_sources_are_one_clear_line(source, needle):
    with pytest.raises(ConfigError, match=needle) as caught:
        open_source(Data(source=source, train=10), "train")
    assert "\n" not in str(caught.value)
    assert f"'{source}'" in str(caught.value)


def test_scenes_need_a_number_and_indices_within_it():
    with pytest.raises(ConfigError, match=r"data\.train"):
        open_source(Data(source="scenes:easy"), "train")
    with pytest.raises(ConfigError, match="'tset'"):
        open_source(Data(source="scenes:easy", train=5), "tset")
    source = open_source(Data(source="scenes:easy", train=5), "train")
    for wrong, named in (([5], "5 to 5"), ([-1, 3], "-1 to 3")):
        with pytest.raises(DataError, match=f"image indices {named} are outside this split of 5 images"):
            source.batch(torch.tensor(wrong))


def test_pixels_and_model_range_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert to_float(pixels).min() == -1
    assert to_float(pixels).max() == 1
    assert torch.equal(to_uint8(to_float(pixels)), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
