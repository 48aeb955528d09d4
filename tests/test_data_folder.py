"""Folders as people have them: links, loops, pipes, odd names, what is no image."""

from __future__ import annotations

import json
import os

import pytest
import torch
from data_files import both, data, fill, numbers, png

from vfmlab.data import open_source, read_image
from vfmlab.errors import DataError


def test_links_are_followed_once_and_never_in_a_loop(tmp_path):
    pool = fill(tmp_path / "pool", classes=("x",), each=6, first=100)
    root = fill(tmp_path / "d", each=6)
    (root / "cat/loop").symlink_to(root)  # the whole, again and again
    (root / "again").symlink_to(root / "cat")  # before the folder it means, in the order of names
    (root / "dog/same.png").symlink_to(root / "dog/0006.png")
    (root / "owl").symlink_to(pool / "x")
    os.link(root / "cat/0000.png", root / "dog/hard.png")
    train, val = both(f"folder:{root}", val=3)
    assert sorted(numbers(train) + numbers(val)) == [*range(12), *range(100, 106)]
    assert train.class_names == ["cat", "dog", "owl"]
    assert train.dropped["folders linked twice"][0] == 2
    assert train.dropped["linked twice"][0] == 2


def test_only_regular_files_of_some_size_are_read(tmp_path, monkeypatch):
    fill(tmp_path, each=6)
    os.mkfifo(tmp_path / "cat/pipe.png")
    (tmp_path / "cat/endless.png").symlink_to("/dev/zero")
    (tmp_path / "cat/self.png").symlink_to(tmp_path / "cat/self.png")
    with open(tmp_path / "cat/huge.png", "wb") as file:
        file.truncate(2**29)
    train, val = both(f"folder:{tmp_path}", val=2)
    assert len(train) + len(val) == 12
    assert train.dropped["not regular files"][0] == 2
    assert train.dropped["larger than 256 MiB"] == [1, ["cat/huge.png"]]
    assert any(reason.startswith("not there or closed") for reason in train.dropped)
    for name in ("pipe", "endless", "self", "huge"):
        with pytest.raises(DataError, match=f"{name}.png' cannot be read: "):
            read_image(tmp_path / f"cat/{name}.png", 8)


def test_a_folder_that_holds_nearly_no_images_is_not_listed_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("vfmlab.data.folder.LOOKED", 200)
    fill(tmp_path / "d", each=1)
    for k in range(300):
        (tmp_path / f"d/{k}.txt").write_text("")
    with pytest.raises(DataError, match=r"201 entries hold \d images; name the folder of the classes"):
        both(f"folder:{tmp_path / 'd'}")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_names_that_are_not_utf8(tmp_path):
    root = os.fsencode(tmp_path)
    for name in (b"caf\xe9", b"new\nline", "größe".encode()):
        os.mkdir(root + b"/" + name)
        for k in range(5):
            with open(root + b"/" + name + b"/%d\xff.png" % k, "wb") as file:
                file.write(png(k))
    with open(root + b"/caf\xe9/bad\xfe.png", "wb") as file:
        file.write(b"no image")
    train, val = both(f"folder:{tmp_path}")
    assert train.class_names == ["caf\\udce9", "größe", "new\\nline"]
    for source in (train, val):
        source.batch(torch.arange(len(source)))
        text = json.dumps([source.class_names, source.bad, source.notes, source.dropped, source.describe()], ensure_ascii=False)
        assert text.encode("utf-8")
    assert any("bad\\udcfe.png" in line for line in train.bad + val.bad)


def test_split_folders_of_the_same_odd_name(tmp_path):
    root = os.fsencode(tmp_path)
    for part in (b"train", b"val"):
        for name in (b"caf\xe9", b"tea"):
            os.makedirs(root + b"/" + part + b"/" + name)
            with open(root + b"/" + part + b"/" + name + b"/1.png", "wb") as file:
                file.write(png(1))
    assert both(f"folder:{tmp_path}")[1].class_names == ["caf\\udce9", "tea"]


@pytest.mark.parametrize("kind", ["folder", "parquet", "wds", "hf"])
@pytest.mark.parametrize("path", ["/" + "x" * 5000, "/tmp/" + "y" * 300, "/tmp/\0"])
def test_what_the_file_system_refuses_is_one_line(kind, path):
    with pytest.raises(DataError) as caught:
        open_source(data(f"{kind}:{path}"), "train")
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_loop_of_links_as_root_is_one_line(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for kind in ("folder", "parquet", "wds"):
        with pytest.raises(DataError, match="loop"):
            open_source(data(f"{kind}:{tmp_path / 'loop'}"), "train")


def test_a_relative_source_in_overrides_is_the_data_of_that_folder(tmp_path, monkeypatch):
    from vfmlab import api

    preset, ids = "tiny_plain_vae", []
    for name in "ab":
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for kind in ("folder", "parquet", "wds"):
            changed = api.resolve(preset, {"data.source": f"{kind}:pets"})
            assert changed.data.source == f"{kind}:{tmp_path / name / 'pets'}"
        ids.append(api.resolve(preset, {"data": {"source": "folder:./pets/", "train": 9}}).id)
    assert ids[0] != ids[1]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert api.resolve(preset, {"data.source": "folder:~/x"}).data.source == f"folder:{tmp_path}/x"
    for same in ("hf:owner/name", "scenes:easy", "wds:https://host/x.tar", f"folder:{tmp_path}"):
        assert api.resolve(preset, {"data.source": same}).data.source == same
    assert api.resolve(preset, {"train.samples": 64}).data == api.resolve(preset).data
