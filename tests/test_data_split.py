"""Splits and classes: in proportion, by name, and stable when the data grows."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch
from data_files import both, data, fill, numbers, png, shard, table
from hypothesis import given, settings
from hypothesis import strategies as st

from vfmlab.data import class_number, open_source
from vfmlab.data.split import split_of, stratified
from vfmlab.errors import ConfigError


@settings(max_examples=60)
@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=9), seed=st.integers(0, 9), share=st.floats(0, 1))
def test_every_prefix_holds_the_classes_in_proportion(counts, seed, share):
    labels = np.repeat(np.arange(len(counts)), counts)
    hashes = np.random.default_rng(seed).integers(0, 2**63, len(labels), dtype=np.uint64)
    for spare in (False, True):
        order = stratified(hashes, labels, spare)
        assert sorted(order.tolist()) == list(range(len(labels)))
        n = int(share * len(labels))
        part = np.bincount(labels[order[:n]], minlength=len(counts))
        if not spare:
            expected = np.array(counts) * n / len(labels)
            assert (np.abs(part - expected) < 1 + len(counts) * np.array(counts) / len(labels)).all()
        elif n <= len(labels) - len(counts):
            assert (part < np.array(counts)).all()  # each class has one left


@pytest.mark.parametrize("each", [{"a": 48, "b": 2}, dict.fromkeys("abcdefghijkl", 9), {"a": 300, "b": 20, "c": 5}])
def test_no_class_is_without_images_on_either_side(tmp_path, each):
    for k, (name, count) in enumerate(each.items()):
        fill(tmp_path, classes=(name,), each=count, first=400 * k)
    for seed in range(3):
        train, val = both(f"folder:{tmp_path}", val=24, seed=seed)
        assert len(val) == min(24, sum(each.values()) // 5)
        for source in (train, val):
            assert torch.bincount(source.labels, minlength=len(each)).min() >= 1
        share = torch.bincount(val.labels) / torch.tensor(list(each.values()))
        assert share.max() < 0.55


def test_a_class_with_too_few_images_is_said(tmp_path):
    fill(tmp_path, classes=("many",), each=40)
    fill(tmp_path, classes=("two",), each=2, first=100)
    fill(tmp_path, classes=("one",), each=1, first=200)
    notes = "\n".join(both(f"folder:{tmp_path}")[0].notes)
    assert "1 of 3 classes have no held-out image: 'one'" in notes
    assert "2 of 3 classes have fewer than 5 training images: 'one', 'two'" in notes


def test_classes_that_a_cap_leaves_too_few_images_are_said(tmp_path):
    fill(tmp_path, classes=("a", "b", "c"), each=20)
    train, _ = both(f"folder:{tmp_path}", train=9)
    assert "3 of 3 classes have fewer than 5 training images: 'a', 'b', 'c'" in "\n".join(train.notes)
    assert not both(f"folder:{tmp_path}", train=30)[0].notes


@pytest.mark.parametrize("kind", ["folder", "parquet", "wds"])
def test_one_image_more_does_not_draw_the_split_anew(tmp_path, kind):
    def write(folder, which):
        if kind == "folder":
            for i in which:
                fill(folder, classes=("cat" if i % 2 else "dog",), each=1, first=i)
        elif kind == "parquet":
            table(folder / "x.parquet", [png(i) for i in which], [i % 2 for i in which])
        else:
            folder.mkdir()
            shard(folder / "x.tar", [(f"{i:04}.png", png(i)) for i in which])

    write(tmp_path / "a", range(60))
    write(tmp_path / "b", [200, *range(60)])
    before, after = ([set(numbers(s)) for s in both(f"{kind}:{tmp_path / name}")] for name in "ab")
    assert len(before[1] ^ after[1]) <= 2
    assert len(before[0] ^ after[0]) <= 3


@pytest.mark.parametrize("kind", ["folder", "parquet", "hf", "wds"])
@pytest.mark.parametrize("change", ["pixels", "labels", "nothing"])
def test_the_fingerprint_follows_pixels_and_labels(tmp_path, kind, change):
    """Same names, same number of bytes: only what they hold differs."""
    datasets = pytest.importorskip("datasets")

    def write(folder, pixels, labels):
        rows = [(png(i + pixels * (i == 3)), f"{(i + labels) % 2}") for i in range(20)]
        if kind == "folder":
            for i, (row, label) in enumerate(rows):
                (folder / label).mkdir(parents=True, exist_ok=True)
                (folder / label / f"{i}.png").write_bytes(row)
        elif kind == "parquet":
            table(folder / "x.parquet", [row for row, _ in rows], [int(label) for _, label in rows])
        elif kind == "hf":
            columns = {"image": [row for row, _ in rows], "label": [int(label) for _, label in rows]}
            datasets.Dataset.from_dict(columns).save_to_disk(folder)
        else:
            folder.mkdir()
            pairs = [((f"{i}.png", row), (f"{i}.cls", label.encode())) for i, (row, label) in enumerate(rows)]
            shard(folder / "x.tar", [member for pair in pairs for member in pair])

    write(tmp_path / "a", 0, 0)
    write(tmp_path / "b", change == "pixels", change == "labels")
    first, second = ([s.fingerprint for s in both(f"{kind}:{tmp_path / name}")] for name in "ab")
    assert (first == second) == (change == "nothing")


@pytest.mark.parametrize("kind", ["folder", "wds"])
def test_a_large_set_is_known_by_size_and_time(tmp_path, monkeypatch, kind):
    import os

    monkeypatch.setattr("vfmlab.data.records.HASHED", 0)
    if kind == "folder":
        fill(tmp_path / "d")
    else:
        (tmp_path / "d").mkdir()
        shard(tmp_path / "d/x.tar", [(f"{i}.png", png(i)) for i in range(20)])
    files = [path for path in (tmp_path / "d").rglob("*") if path.is_file()]
    first = both(f"{kind}:{tmp_path / 'd'}")[0].fingerprint
    assert both(f"{kind}:{tmp_path / 'd'}")[0].fingerprint == first
    for path in files:
        os.utime(path, ns=(1, 1))
    assert both(f"{kind}:{tmp_path / 'd'}")[0].fingerprint != first


def test_names_of_numbers_are_in_the_order_of_numbers(tmp_path):
    names = [str(i) for i in range(12)]
    random.Random(0).shuffle(names)
    fill(tmp_path / "a", classes=names, each=2)
    train, _ = both(f"folder:{tmp_path / 'a'}", val=1)
    assert train.class_names == [str(i) for i in range(12)]
    fill(tmp_path / "b", classes=("2", "10", "x"), each=4)
    assert both(f"folder:{tmp_path / 'b'}")[0].class_names == ["10", "2", "x"]


def test_a_class_is_meant_by_name_before_number():
    names = ["3", "8", "ring"]
    assert [class_number(text, names) for text in ("8", "3", "ring", "0", "7")] == [1, 0, 2, 0, 7]
    for text in ("rng", "²", "", "1" * 5000):
        with pytest.raises(ConfigError, match="unknown class '"):
            class_number(text, names)


@pytest.mark.parametrize(
    ("name", "part"),
    [("Train", "train"), ("TRAINING", "train"), ("train_images", "train"), ("train2017", "train"), ("Test", "val"),
     ("Validation-Set", "val"), ("testing_set", "val"), ("DEV", "val"), ("trainer", None), ("test tube", None), ("cat", None)],
)  # fmt: skip
def test_folders_that_are_called_like_splits(name, part):
    assert split_of(name) == part


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("TRAIN", "VAL"), ("Training", "Testing"), ("Train", "Validation"), ("trainset", "testset")]
)
def test_folders_of_splits_in_any_case(tmp_path, names):
    fill(tmp_path / names[0], each=10)
    fill(tmp_path / names[1], each=4, first=100)
    fill(tmp_path / "extras", each=1, first=200)
    train, val = both(f"folder:{tmp_path}")
    assert train.class_names == ["cat", "dog"]
    assert (max(numbers(train)), min(numbers(val))) == (19, 100)
    assert "not read, beside the folders of the splits: 'extras'" in train.notes


def test_a_class_called_train_is_a_class(tmp_path):
    fill(tmp_path, classes=("train", "bus", "test tube"), each=6)
    assert both(f"folder:{tmp_path}")[0].class_names == ["bus", "test tube", "train"]


def test_what_looks_like_splits_or_like_deeper_classes_is_said(tmp_path):
    fill(tmp_path / "a", classes=("my_train", "my_test"), each=6)
    assert any("look like splits" in line for line in both(f"folder:{tmp_path / 'a'}")[0].notes)
    fill(tmp_path / "b", classes=("images/cat", "images/dog"), each=6)
    notes = both(f"folder:{tmp_path / 'b'}")[0].notes
    assert any("one class only, 'images'" in line and f"name folder:{tmp_path / 'b/images'}" in line for line in notes)
    fill(tmp_path / "c", each=6)
    assert both(f"folder:{tmp_path / 'c'}")[0].notes == []


def test_words_of_splits_are_looked_for_below_the_given_root(tmp_path):
    root = tmp_path / "training_set" / "train" / "val"
    root.mkdir(parents=True)
    for k in range(3):
        shard(root / f"part-{k}.tar", [(f"{i}.png", png(i)) for i in range(20 * k, 20 * k + 20)])
    for pattern in ("part-{0..2}.tar", "part-*.tar", ""):
        train, val = both(f"wds:{root}/{pattern}")
        assert (len(train), len(val)) == (52, 8)
    shutil.copy(root / "part-2.tar", root / "val-0.tar")
    train, val = both(f"wds:{root}/{{part-{{0..1}},val-0}}.tar")
    assert len(train) + len(val) == 60  # no shard is called train, so there is one set
    (root / "part-0.tar").rename(root / "train-0.tar")
    train, val = both(f"wds:{root}/{{train,val}}-0.tar", val=99)
    assert set(numbers(train)) == set(range(20))
    assert set(numbers(val)) == set(range(40, 60))


def test_what_a_source_says_of_itself(tmp_path):
    fill(tmp_path, each=30)
    for name in ("cat/a.heic", "cat/b.heic", "dog/c.AVIFX", "loose.png"):
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "dog/0055.png").write_bytes(b"")
    train = open_source(data(f"folder:{tmp_path}", train=40), "train")
    train.batch(torch.arange(len(train)))
    said = train.describe()
    assert said.startswith(f"folder:{tmp_path}, 2 classes, 40 of 52 images, 8 held out (")
    assert "2 .heic not read" in said
    assert "1 .avifx not read" in said
    assert "1 loose beside class folders" in said
    assert train.dropped[".heic not read"][1] == ["cat/a.heic", "cat/b.heic"]
    scenes = open_source(data("scenes:easy", train=50), "train")
    assert scenes.describe() == "scenes:easy, 10 classes, 50 images, 8 held out"
