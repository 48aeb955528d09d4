"""Folders, tables and shards: splits, caps, labels, and what is done about unreadable images."""

from __future__ import annotations

import io
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_files import both, data, fill, numbers, png, shard, shards, table
from PIL import Image

from vfmlab.config import Data
from vfmlab.data import BatchStream, open_source
from vfmlab.data.split import split_names
from vfmlab.errors import ConfigError, DataError

# ---- splits, caps, labels


def test_folder_holds_images_out(tmp_path):
    fill(tmp_path)
    train, val = both(f"folder:{tmp_path}")
    assert train.class_names == val.class_names == ["cat", "dog"]
    assert (len(train), len(val)) == (32, 8)
    assert sorted(numbers(train) + numbers(val)) == list(range(40))
    batch = train.batch(torch.arange(32))
    assert batch.images.shape == (32, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.tolist() == [int(n >= 20) for n in numbers(train)]
    assert train.masks(torch.arange(2)) is None
    assert train.factors(torch.arange(2)) is None
    other = open_source(data(f"folder:{tmp_path}", seed=1), "val")
    assert set(numbers(other)) != set(numbers(val))


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_folder_with_a_split_of_its_own(tmp_path, name):
    fill(tmp_path / "train", each=10)
    fill(tmp_path / name, each=5, first=100)
    train, val = both(f"folder:{tmp_path}", val=7)
    assert sorted(numbers(train)) == list(range(20))
    assert len(val) == 7
    assert set(numbers(val)) <= set(range(100, 110))


def test_a_validation_folder_is_preferred_to_a_test_folder(tmp_path):
    for i, name in enumerate(("train", "test", "val")):
        fill(tmp_path / name, each=4, first=100 * i)
    assert min(numbers(both(f"folder:{tmp_path}")[1])) == 200


def test_a_class_only_in_val_is_an_error(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val", classes=("cat", "dgo"))
    with pytest.raises(DataError, match=r"class 'dgo' is in the val part only \(did you mean 'dog'\?\)"):
        both(f"folder:{tmp_path}")


def test_folder_of_loose_images_is_one_class(tmp_path):
    fill(tmp_path, classes=("",), each=10)
    (tmp_path / ".hidden.png").write_bytes(png(0))
    (tmp_path / "notes.txt").write_text("x")
    train, val = both(f"folder:{tmp_path}")
    assert train.class_names == ["all"]
    assert sorted(numbers(train) + numbers(val)) == list(range(10))


def test_a_cap_takes_a_seeded_random_subset_over_all_classes(tmp_path):
    fill(tmp_path / "train", classes=[f"c{i}" for i in range(8)], each=30)
    fill(tmp_path / "val", classes=[f"c{i}" for i in range(8)], each=3)
    train, val = both(f"folder:{tmp_path}", train=64, val=12)
    assert (len(train), len(val)) == (64, 12)
    assert len(train.labels.unique()) == 8
    assert len(val.labels.unique()) > 4
    again = open_source(data(f"folder:{tmp_path}", train=64), "train")
    assert numbers(again) == numbers(train)
    fewer = open_source(data(f"folder:{tmp_path}", train=32), "train")
    assert numbers(fewer) == numbers(train)[:32]


def test_fingerprint_follows_the_content_not_the_place(tmp_path):
    fill(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def mark(folder="a", split="train", **fields):
        return open_source(data(f"folder:{tmp_path / folder}", **fields), split).fingerprint

    first = mark()
    assert mark() == first
    assert mark("b") == first
    marks = {first, mark(split="val"), mark(size=16), mark(train=10), mark(seed=1), mark(val=4)}
    assert len(marks) == 6
    (tmp_path / "b/cat/0000.png").write_bytes(png(0, side=99))
    assert mark("b") not in marks
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/cat/0000.png").rename(tmp_path / "b/dog/0000.png")
    assert mark("b") not in marks


def test_parquet_file_with_class_names(tmp_path):
    table(tmp_path / "x.parquet", [png(i) for i in range(30)], [i // 10 for i in range(30)], ["a", "b", "c"])
    train, val = both(f"parquet:{tmp_path / 'x.parquet'}", val=6)
    assert train.class_names == ["a", "b", "c"]
    assert sorted(numbers(train) + numbers(val)) == list(range(30))
    assert train.labels.tolist() == [n // 10 for n in numbers(train)]


def test_parquet_folder_with_splits_and_several_files(tmp_path):
    for part in range(3):
        rows = range(part * 10, part * 10 + 10)
        table(tmp_path / f"data/train-{part:05}-of-00003.parquet", [png(i) for i in rows], [i % 4 for i in rows])
    table(tmp_path / "data/test-00000-of-00001.parquet", [png(i) for i in range(100, 110)], [5] * 10)
    train, val = both(f"parquet:{tmp_path}", val=50)
    assert sorted(numbers(train)) == list(range(30))
    assert train.labels.tolist() == [n % 4 for n in numbers(train)]
    assert sorted(numbers(val)) == list(range(100, 110))
    assert train.num_classes == val.num_classes == 6  # the largest label of both parts


def test_parquet_columns(tmp_path):
    path = tmp_path / "x.parquet"
    table(path, [png(i) for i in range(20)], ["x", "y"] * 10, struct=False, label="fine_label")
    train, _ = both(f"parquet:{path}")
    assert train.class_names == ["x", "y"]
    assert train.labels.tolist() == [n % 2 for n in numbers(train)]
    table(path, [png(i) for i in range(20)])
    assert both(f"parquet:{path}")[0].class_names == ["all"]
    table(path, [png(i) for i in range(20)], list(range(20)), label="colour")
    assert both(f"parquet:{path}")[0].num_classes == 1
    assert both(f"parquet:{path}", label_column="colour")[0].num_classes == 20
    with pytest.raises(ConfigError, match=r"data\.label_column' = 'color'.*did you mean 'colour'"):
        both(f"parquet:{path}", label_column="color")
    with pytest.raises(ConfigError, match=r"data\.image_column' = 'imge'.*did you mean 'image'"):
        both(f"parquet:{path}", image_column="imge")
    pq.write_table(pa.table({"text": ["a", "b"]}), path)
    with pytest.raises(DataError, match="no column of images among text"):
        both(f"parquet:{path}")


@pytest.mark.parametrize(
    ("labels", "needle"), [([-1] * 20, "label -1"), ([None, 1] * 10, "without a label"), ([7, 2**40] * 10, "outside")]
)
def test_parquet_labels_that_are_none(tmp_path, labels, needle):
    table(tmp_path / "x.parquet", [png(i) for i in range(20)], pa.array(labels, pa.int64()))
    with pytest.raises(DataError, match=needle):
        both(f"parquet:{tmp_path / 'x.parquet'}")


def test_large_parquet_goes_through_the_arrow_cache(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    import datasets

    monkeypatch.setattr("vfmlab.data.tables.IN_MEMORY", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table(tmp_path / "d/train.parquet", [png(i) for i in range(30)], [i % 3 for i in range(30)])
    table(tmp_path / "d/test.parquet", [png(i) for i in range(100, 110)], [0] * 10)
    train, val = both(f"parquet:{tmp_path / 'd'}")
    assert sorted(numbers(train)) == list(range(30))
    assert train.labels.tolist() == [n % 3 for n in numbers(train)]
    assert min(numbers(val)) >= 100


def test_hf_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")

    def made(rows):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
        columns = {"img": [{"bytes": png(i), "path": None} for i in rows], "label": [i % 2 for i in rows]}
        return datasets.Dataset.from_dict(columns, features=features)

    splits = {"train": made(range(20)), "validation": made(range(100, 105)), "test": made(range(200, 205))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    train, val = both(f"hf:{tmp_path / 'd'}")
    assert train.class_names == ["even", "odd"]
    assert sorted(numbers(train)) == list(range(20))
    assert train.labels.tolist() == [n % 2 for n in numbers(train)]
    assert sorted(numbers(val)) == list(range(100, 105))
    shutil.copytree(tmp_path / "d", tmp_path / "e")
    assert both(f"hf:{tmp_path / 'e'}")[0].fingerprint == train.fingerprint
    made(range(20)).save_to_disk(tmp_path / "single")
    train, val = both(f"hf:{tmp_path / 'single'}")
    assert sorted(numbers(train) + numbers(val)) == list(range(20))


def test_hf_local_image_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    fill(tmp_path / "d")
    train, val = both(f"hf:{tmp_path / 'd'}")
    assert train.class_names == ["cat", "dog"]
    assert sorted(numbers(train) + numbers(val)) == list(range(40))


def test_hf_without_the_library_or_the_network(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"^hf:no-such-owner/no-such-set: .*give a local directory$") as caught:
        both("hf:no-such-owner/no-such-set")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'vfmlab\[data\]'"):
        both("hf:no-such-owner/no-such-set")
    with pytest.raises(DataError, match="there is no 'missing'"):
        both(f"hf:{tmp_path}/missing")


@pytest.mark.parametrize("label", ["cls", "json", None])
def test_shards(tmp_path, label):
    shards(tmp_path, {f"part-{k:02}": range(10 * k, 10 * k + 10) for k in range(4)}, label)
    train, val = both(f"wds:{tmp_path}/part-{{00..03}}.tar")
    assert sorted(numbers(train) + numbers(val)) == list(range(40))
    assert train.class_names == {"cls": ["0", "1", "2"], "json": ["x", "y", "z"], None: ["all"]}[label]
    if label:
        assert train.labels.tolist() == [n % 3 for n in numbers(train)]
    for same in (f"wds:{tmp_path}", f"wds:{tmp_path}/part-*.tar"):
        assert both(same)[0].fingerprint == train.fingerprint


def test_shards_with_a_split_of_their_own(tmp_path):
    shards(tmp_path, {"x-train-0": range(20), "x-train-1": range(20, 40), "x-val-0": range(100, 110)})
    train, val = both(f"wds:{tmp_path}/x-{{train-{{0,1}},val-0}}.tar")
    assert sorted(numbers(train)) == list(range(40))
    assert set(numbers(val)) <= set(range(100, 110))


@pytest.mark.parametrize("extra", [0, 100, 600])
def test_damaged_shards_are_named_and_the_rest_is_used(tmp_path, extra):
    shards(tmp_path, {f"p{k}": range(20 * k, 20 * k + 20) for k in range(3)})
    whole = (tmp_path / "p1.tar").read_bytes()
    (tmp_path / "p1.tar").write_bytes(whole[: len(whole) // 2 + extra])
    (tmp_path / "p2.tar").write_bytes(b"")
    train, val = both(f"wds:{tmp_path}/p{{0..3}}.tar")
    count, names = train.dropped["damaged shards"]
    assert [line.split(":")[0].rsplit("/")[-1] for line in names] == ["p1.tar", "p2.tar", "p3.tar"]
    assert count == 3
    assert "3 damaged shards" in train.describe()
    found = sorted(numbers(train) + numbers(val))
    assert found == list(range(31))  # a sample takes 3 KiB: the cut, at 35 KiB, is within the twelfth of that shard
    assert all(label == n % 3 for label, n in zip(train.labels.tolist(), numbers(train), strict=True))


@pytest.mark.parametrize(
    ("pattern", "needle"),
    [
        ("https://host/x-{0..3}.tar", "give their local path"),
        ("{dir}/x-{0..3.tar", "braces are not balanced"),
        ("{dir}/nowhere-{0..3}.tar", "there is no 'nowhere-0.tar'"),
        ("{dir}/*.tar", "no .tar file matches"),
    ],
)
def test_wrong_shard_patterns_are_one_clear_line(tmp_path, pattern, needle):
    with pytest.raises(DataError, match=needle) as caught:
        both("wds:" + pattern.replace("{dir}", str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_unreadable_members_are_named(tmp_path):
    members = [(f"a/{i:02}.jpg", png(i)) for i in range(20)] + [("a/99.jpg", b"junk")]
    shard(tmp_path / "x.tar", members)
    train, val = both(f"wds:{tmp_path}/x.tar")
    assert sorted({*numbers(train), *numbers(val)}) == list(range(20))
    assert (train.bad + val.bad)[0].startswith(f"{tmp_path}/x.tar/a/99.jpg: ")


def test_a_sample_without_the_label_that_others_have(tmp_path):
    shard(tmp_path / "x.tar", [("a.png", png(1)), ("a.cls", b"0"), ("b.png", png(2))])
    with pytest.raises(DataError, match=r"x\.tar/b\.png has no label, others have"):
        both(f"wds:{tmp_path}/x.tar")


def test_compressed_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match="1 of 1 shards"):
        both(f"wds:{tmp_path}/x.tar")


def test_split_names():
    assert split_names(["b-train-1", "a-train-0", "x-test", "x-valid"]) == {
        "train": ["b-train-1", "a-train-0"],
        "val": ["x-valid"],
    }
    assert split_names(["trainer", "testing2"]) == {"all": ["trainer", "testing2"]}
    assert split_names(["test-0", "test-1"]) == {"all": ["test-0", "test-1"]}
    assert split_names(["train", "unsupervised"]) == {"all": ["train"]}


@pytest.mark.parametrize("kind", ["folder", "parquet", "hf", "wds"])
def test_sources_travel_to_loader_processes(tmp_path, kind):
    """Where processes are spawned, not forked, the source is pickled."""
    if kind == "folder":
        fill(tmp_path / "d")
    elif kind == "parquet":
        table(tmp_path / "d/x.parquet", [png(i) for i in range(20)], [0] * 20)
    elif kind == "hf":
        datasets = pytest.importorskip("datasets")
        rows = {"image": [png(i) for i in range(20)], "label": [0] * 20}
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "d")
    else:
        (tmp_path / "d").mkdir()
        shards(tmp_path / "d", {"x": range(20)})
    source, _ = both(f"{kind}:{tmp_path / 'd'}")
    assert numbers(pickle.loads(pickle.dumps(source))) == numbers(source)


# ---- unreadable images


def spoil(root, names, content=b""):
    for name in names:
        (root / name).write_bytes(content)


def test_unreadable_images_are_skipped_counted_and_named(tmp_path):
    fill(tmp_path, each=50)
    spoil(tmp_path, ["cat/0003.png"])
    spoil(tmp_path, ["dog/0060.png", "dog/0061.png"], b"not an image")
    (tmp_path / "cat/0004.png").write_bytes(png(4)[:-30])
    (tmp_path / "cat/0005.png").unlink()
    (tmp_path / "cat/0005.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "cat/0006.png").unlink()
    (tmp_path / "cat/0006.png").mkdir()  # an empty folder with the name of an image is no image at all
    train, val = both(f"folder:{tmp_path}", val=10)
    assert len(train) + len(val) == 98
    assert train.dropped["not there or closed (No such file or directory)"] == [1, ["cat/0005.png"]]
    seen = numbers(train) + numbers(val)
    lost = {3, 4, 5, 6, 60, 61}
    assert set(seen) == set(range(100)) - lost
    named = train.bad + val.bad
    assert len(named) == 4
    for n in lost - {5, 6}:
        assert sum(f"{n:04}.png" in line for line in named) == 1
    assert any("zero bytes" in line for line in named)
    assert not any("\n" in line for line in named)
    train.batch(torch.arange(len(train)))
    assert len(train.bad + val.bad) == 4  # each is named once


def test_a_replacement_brings_its_own_label_and_index(tmp_path):
    fill(tmp_path / "train", each=10)
    fill(tmp_path / "val", each=2)
    whole = open_source(data(f"folder:{tmp_path}"), "train")
    order = numbers(whole)
    spoil(tmp_path / "train", [f"{'cat' if order[k] < 10 else 'dog'}/{order[k]:04}.png" for k in (4, 5, 19)])
    source = open_source(data(f"folder:{tmp_path}"), "train")
    index = torch.tensor([19, 5, 4, 0, 6])
    batch = source.batch(index)
    assert batch.indices.tolist() == [0, 6, 6, 0, 6]
    assert batch.labels.tolist() == [int(order[k] >= 10) for k in (0, 6, 6, 0, 6)]
    assert numbers(source, index) == [order[k] for k in (0, 6, 6, 0, 6)]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_wherever_it_starts_with_unreadable_images(tmp_path, monkeypatch, workers, cached):
    if not cached:
        monkeypatch.setattr("vfmlab.data.base.CACHE_BYTES", 0)
    fill(tmp_path, each=30)
    spoil(tmp_path, ["cat/0001.png", "dog/0041.png", "dog/0042.png"])

    def run(start, count):
        source = open_source(data(f"folder:{tmp_path}"), "train")
        stream = BatchStream(source, 16, seed=5, start_step=start, workers=workers)
        batches = [next(stream) for _ in range(count)]
        stream.close()
        return batches, source

    (whole, source), (later, _) = run(0, 9), run(4, 5)
    for a, b in zip(whole[4:], later, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices, b.indices)
    held = set(numbers(open_source(data(f"folder:{tmp_path}"), "val")))
    expected = {1, 41, 42} & ({int(line.split(".png")[0][-4:]) for line in source.bad} | held)
    assert len(source.bad) == len(set(source.bad)) == len(expected - held)
    assert source.bad


def test_too_many_unreadable_images_end_the_run(tmp_path):
    fill(tmp_path, each=100)
    spoil(tmp_path, [f"cat/{n:04}.png" for n in range(0, 100, 2)])
    source = open_source(data(f"folder:{tmp_path}"), "train")
    with pytest.raises(DataError, match=r"\d+ of \d+ images tried cannot be read, for example .*png: zero bytes$"):
        source.batch(torch.arange(len(source)))
    assert len(source.bad) > 10


@pytest.mark.parametrize("count", [3, 60])
def test_a_folder_without_one_readable_image(tmp_path, count):
    fill(tmp_path, classes=("cat",), each=count)
    spoil(tmp_path, [f"cat/{n:04}.png" for n in range(count)])
    line = rf"^folder:{tmp_path}: .* can(not)? be read, for example .*zero bytes$"
    with pytest.raises(DataError, match=line) as caught:
        open_source(data(f"folder:{tmp_path}"), "train")
    assert "\n" not in str(caught.value)


def test_unreadable_rows(tmp_path):
    rows = [png(i) for i in range(40)]
    rows[7], rows[8], rows[9] = b"", None, b"junk" * 20
    table(tmp_path / "x.parquet", rows, [0] * 40)
    train, val = both(f"parquet:{tmp_path / 'x.parquet'}")
    assert set(numbers(train) + numbers(val)) == set(range(40)) - {7, 8, 9}
    assert sorted(int(line.split(" row ")[1].split(":")[0]) for line in train.bad + val.bad) == [7, 8, 9]


def test_a_damaged_table_among_good_ones(tmp_path):
    table(tmp_path / "a.parquet", [png(i) for i in range(20)], [0] * 20)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing more")
    train, _ = both(f"parquet:{tmp_path}")
    count, (line,) = train.dropped["damaged files"]
    assert count == 1
    assert "b.parquet" in line
    with pytest.raises(DataError, match="no readable parquet file"):
        both(f"parquet:{tmp_path / 'b.parquet'}")


def test_a_folder_without_its_kind_is_named_with_it(tmp_path):
    with pytest.raises(ConfigError, match=rf"'{tmp_path}': not a known source \(write 'folder:{tmp_path}'\)$"):
        both(str(tmp_path))


@pytest.mark.parametrize("kind", ["folder", "parquet", "hf"])
def test_a_missing_path_names_its_nearest_neighbour(tmp_path, kind):
    (tmp_path / "clothing256").mkdir()
    with pytest.raises(DataError, match=r"there is no 'clothing265' in .*\(did you mean 'clothing256'\?\)$"):
        both(f"{kind}:{tmp_path}/clothing265/train")


@pytest.mark.parametrize(("kind", "needle"), [("folder", "no images found"), ("parquet", "no .parquet file")])
def test_an_empty_folder(tmp_path, kind, needle):
    with pytest.raises(DataError, match=needle):
        both(f"{kind}:{tmp_path}")
    (tmp_path / "x.png").write_bytes(png(1))
    with pytest.raises(DataError, match="one image cannot be split" if kind == "folder" else needle):
        both(f"{kind}:{tmp_path}")
    if kind == "folder":
        with pytest.raises(DataError, match="that is a file"):
            both(f"folder:{tmp_path}/x.png")


# ---- real images


def test_cifar10(shared_data):
    config = Data(source=f"parquet:{shared_data / 'cifar10'}", size=32, train=500, val=200)
    train, val = open_source(config, "train"), open_source(config, "val")
    assert train.class_names[:3] == ["airplane", "automobile", "bird"]
    assert (len(train), len(val)) == (500, 200)
    counts = torch.bincount(train.labels, minlength=10)
    assert counts.min() > 25  # a random subset, not a prefix of sorted rows
    images = train.batch(torch.arange(500)).images.float()
    assert 100 < images.mean() < 140
    assert images.std() > 40
    assert not train.bad
    raw = pq.read_table(shared_data / "cifar10/train-00000-of-00001.parquet", columns=["image"]).slice(
        int(train.picked[3]), 1
    )
    original = np.asarray(Image.open(io.BytesIO(raw["image"][0].as_py()["bytes"])).convert("RGB"))
    assert (images[3].permute(1, 2, 0).numpy() == original).all()


def test_clothing(shared_data):
    root = shared_data / "clothing256"
    own, val = both(f"folder:{root}", size=64, train=50, val=40)
    assert own.num_classes == val.num_classes == 10
    assert "t-shirt" in own.class_names
    assert own.batch(torch.arange(50)).images.shape == (50, 3, 64, 64)
    assert all(f"{'/val/'}" in val.records.name(int(i)) for i in val.picked)
    train, held = both(f"folder:{root / 'train'}", size=64, val=100)
    assert (len(train), len(held)) == (2968, 100)
    assert not set(train.picked.tolist()) & set(held.picked.tolist())
