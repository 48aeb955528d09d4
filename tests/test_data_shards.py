"""Shards as people write them: names with dots, several images a sample, patterns and members of absurd size."""

from __future__ import annotations

import tarfile
from contextlib import closing
from itertools import islice

import pytest
import torch
from data_files import both, numbers, png, shard, shards

from vfmlab.data import BatchStream
from vfmlab.errors import DataError


@pytest.mark.parametrize("suffix", ["jpg", "jfif", "JPEG", "webp", "apng", "tif"])
@pytest.mark.parametrize("key", ["{:02}", "img.{:02}", "a.b/{:02}.v1", "v1.0.{:02}"])
def test_every_sample_is_read_whatever_its_key_and_type(tmp_path, key, suffix):
    members = [(f"{key.format(i)}.{kind}", c) for i in range(24) for kind, c in ((suffix, png(i)), ("cls", b"%d" % (i % 3)))]
    shard(tmp_path / "x.tar", members)
    train, val = both(f"wds:{tmp_path}")
    assert sorted(numbers(train) + numbers(val)) == list(range(24))
    assert train.labels.tolist() == [n % 3 for n in numbers(train)]
    assert not train.dropped


def test_what_is_not_read_is_counted_and_named(tmp_path):
    members = [(f"{i:02}.{kind}", png(i)) for i in range(12) for kind in ("jpg", "seg.png", "heic", "txt")]
    shard(tmp_path / "x.tar", members)
    train, val = both(f"wds:{tmp_path}")
    assert sorted(numbers(train) + numbers(val)) == list(range(12))
    assert {reason: count for reason, (count, _) in train.dropped.items()} == {
        ".heic not read": 12, ".txt not read": 12, "further images of a sample": 12,
    }  # fmt: skip
    assert train.dropped[".heic not read"][1][:2] == ["x.tar/00.heic", "x.tar/01.heic"]


@pytest.mark.parametrize(
    "pattern", ["{0..99999999999}.tar", "{0..9999}{0..9999}.tar", "{a,b}" * 30 + ".tar", "{000000..999999}.tar"]
)
def test_patterns_are_counted_before_they_are_expanded(tmp_path, pattern):
    with pytest.raises(DataError, match="the pattern means more than 100,000 shards"):
        both(f"wds:{tmp_path}/{pattern}")


def test_ranges_in_brackets_choose_shards(tmp_path):
    shards(tmp_path, {f"x-{k}": range(10 * k, 10 * k + 10) for k in range(3)})
    assert sum(map(len, both(f"wds:{tmp_path}/x-[01].tar"))) == 20


def test_members_that_are_no_regular_files_or_too_large_are_not_read(tmp_path):
    shard(tmp_path / "x.tar", [(f"{i}.png", png(i)) for i in range(12)])
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        for name, kind, link in (("l.png", tarfile.SYMTYPE, "/etc/passwd"), ("f.png", tarfile.FIFOTYPE, "")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    # a sparse label of 8 GiB, as GNU tar writes it: one block of map, no data
    info = tarfile.TarInfo("3.cls")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"%011o\0" % 2**33
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    whole = (tmp_path / "x.tar").read_bytes().rstrip(b"\0")
    whole += b"\0" * (-len(whole) % 512)
    (tmp_path / "x.tar").write_bytes(whole + bytes(header) + b"\0" * 1024)
    train, val = both(f"wds:{tmp_path}")
    assert sorted(numbers(train) + numbers(val)) == list(range(12))
    assert train.dropped["not regular, or too large"] == [3, ["x.tar/l.png", "x.tar/f.png", "x.tar/3.cls"]]


def test_labels_of_several_types_in_json(tmp_path):
    for k, values in enumerate((["3", "1", "2"], ["true", "false"], ["1.0", "0.0"], ['"a"', '"7"'])):
        members = [(f"{i:02}.{kind}", c) for i in range(12) for kind, c in (
            ("png", png(i)), ("json", b"\xef\xbb\xbf" * (k == 3) + b'{"label": %s}' % values[i % len(values)].encode()))]  # fmt: skip
        (tmp_path / f"{k}").mkdir()
        shard(tmp_path / f"{k}/x.tar", members)
    names = [both(f"wds:{tmp_path}/{k}")[0].class_names for k in range(4)]
    assert names == [["0", "1", "2", "3"], ["False", "True"], ["0", "1"], ["7", "a"]]
    assert both(f"wds:{tmp_path}/0", label_column="")[0].class_names == ["all"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_goes_on_in_the_middle_of_an_epoch_with_any_number_of_processes(tmp_path, workers):
    """Stopped after step 4 of 7 a pass, it is opened anew by two processes, each with its half of every batch."""
    shards(tmp_path, {f"train-{k:02}": range(10 * k, 10 * k + 10) for k in range(4)} | {"val-00": range(90, 98)})
    shard(tmp_path / "train-04.tar", [("bad.png", b"no image"), ("bad.cls", b"1"), ("s0040.png", png(40)), ("s0040.cls", b"1")])
    pattern, batch = f"wds:{tmp_path}/{{train-{{00..04}},val-00}}.tar", 6

    def steps(start, count, rows=None):
        train = both(pattern)[0]  # its headers read again, as by a process that starts
        with closing(BatchStream(train, batch, seed=5, start_step=start, rows=rows, workers=workers)) as stream:
            return list(islice(stream, count))

    whole = steps(0, 12)
    halves = [steps(5, 7, rows) for rows in (slice(0, 3), slice(3, 6))]
    for step, parts in enumerate(zip(*halves, strict=True), 5):
        for field in ("images", "labels", "indices"):
            joined = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(joined, getattr(whole[step], field)), (step, field)
    epoch = torch.cat([each.indices for each in whole])[:42]
    missing = set(range(42)) - set(epoch.tolist())
    assert len(missing) == 1, "a pass has every image once, but for the damaged one, in whose place stands the next"


@pytest.mark.parametrize("label", ["[1, 2]", '[["a"], 1]', '{"a": 1}', "0.5"])
def test_labels_that_cannot_be_classes_are_named(tmp_path, label):
    shard(tmp_path / "x.tar", [(f"{i:02}.{kind}", c) for i in range(12) for kind, c in (
        ("png", png(i)), ("json", b'{"label": %s}' % label.encode()))])
    with pytest.raises(DataError, match=r"00\.png has the label .*data\.label_column"):
        both(f"wds:{tmp_path}")
