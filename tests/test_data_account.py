"""What a run writes down about its images, and says when they are no longer the same."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from data_files import data, fill, png

from vfmlab import api
from vfmlab.cli import doctor, listing
from vfmlab.data import account, open_source
from vfmlab.training.events import Event
from vfmlab.training.progress import describe

CHANGES = {"data.size": 16, "data.train": None, "data.val": 8, "train.samples": 64, "train.batch": 16}


def start(root, source, changes=CHANGES):
    events = list(api.train("tiny_plain_vae", root / "runs", {**changes, "data.source": source}, until="tokenizer"))
    return events, [event.data["message"] for event in events if event.kind == "warning"]


def test_a_run_says_and_writes_what_its_images_are(tmp_path, capsys):
    fill(tmp_path / "pets", each=25)
    fill(tmp_path / "pets", classes=("owl",), each=3, first=90)
    (tmp_path / "pets/cat/0001.png").write_bytes(b"")
    (tmp_path / "pets/cat/photo.heic").write_bytes(b"x")
    events, warnings = start(tmp_path, f"folder:{tmp_path / 'pets'}")
    line = next(describe(event) for event in events if event.data.get("data"))
    assert "3 classes, 45 images, 8 held out (" in line
    assert "1 .heic not read" in line
    assert any("classes have fewer than 5 training images: 'owl'" in text for text in warnings)
    assert events[-1].kind == "finish"
    written = account.read(next((tmp_path / "runs").glob("tiny*")))
    assert written["train"]["class_names"] == ["cat", "dog", "owl"]
    assert written["train"]["not used"][".heic not read"] == {"count": 1, "names": ["cat/photo.heic"]}
    lost = written["train"]["unreadable"] + written["val"]["unreadable"]
    assert len(lost) == 1
    assert "cat/0001.png: zero bytes" in lost[0]
    if written["train"]["unreadable"]:
        assert any("1 images could not be read" in text and "0001.png" in text for text in warnings)
    described = f"folder:{tmp_path / 'pets'}, 3 classes, 45 images, 8 held out ("
    listing.runs(tmp_path / "runs")
    assert described in capsys.readouterr().out
    assert [check for check in doctor.run_checks(tmp_path / "runs") if f"images: {described}" in check.detail]


@pytest.mark.parametrize("what", ["pixels", "labels", "nothing"])
def test_a_run_whose_data_changed_says_so(tmp_path, what):
    def write(folder, pixels, labels):
        shutil.rmtree(folder, ignore_errors=True)
        for i in range(40):
            (folder / f"{(i + labels) % 2}").mkdir(parents=True, exist_ok=True)
            (folder / f"{(i + labels) % 2}" / f"{i}.png").write_bytes(png(i + pixels))

    folder, config = tmp_path / "run", data(f"folder:{tmp_path / 'd'}")
    folder.mkdir()
    write(tmp_path / "d", 0, 0)
    account.record(folder, {part: open_source(config, part) for part in ("train", "val")})
    write(tmp_path / "d", what == "pixels", what == "labels")
    lines = account.revisit(folder, config)
    assert len(lines) == (0 if what == "nothing" else 2)
    assert all("have changed since this run began" in line and "\n" not in line for line in lines)
    now = open_source(config, "train")
    account.record(folder, {"train": now})  # a later start keeps the first fingerprint, so it is said again
    assert bool(account.changes(folder, {"train": now})) == (what != "nothing")
    shutil.rmtree(tmp_path / "d")
    (line,) = account.revisit(folder, config)
    assert line.startswith("the images of this run cannot be opened now: ")


def test_captions_that_changed_are_said_where_they_are_read(tmp_path):
    from vfmlab import presets
    from vfmlab.diffusion.captions import Captioned

    def opened(text):
        for path in fill(tmp_path / "d").rglob("*.png"):
            path.with_suffix(".txt").write_text(text)
        source = open_source(data(f"folder:{tmp_path / 'd'}"), "train")
        assert account.changes(tmp_path, {"train": source}) == [], "of a run that reads none"
        Captioned(presets.get("tiny_t2i_plain_vae").diffusion, source)
        return {"train": source}

    first = opened("a plain red disc")
    account.record(tmp_path, first)
    assert account.changes(tmp_path, first) == account.changes(tmp_path, opened("a plain red disc")) == []
    changed = opened("a plain red ring")
    account.record(tmp_path, changed)  # the first ones stay on record
    (line,) = account.changes(tmp_path, changed)
    assert line.startswith("the captions of the train images of 'folder:")


def test_finished_and_interrupted_runs_say_that_their_data_changed(tmp_path):
    fill(tmp_path / "pets", each=25)
    source = f"folder:{tmp_path / 'pets'}"
    events = api.train("tiny_plain_vae", tmp_path / "runs", {**CHANGES, "data.source": source}, until="tokenizer")
    for event in events:
        if event.kind == "start" and event.data.get("data"):
            events.close()
    for k in range(25):
        (tmp_path / f"pets/dog/{25 + k:04}.png").write_bytes(png(100 + k))
    for kind in ("finish", "skip"):  # goes on, then finds itself finished
        events, warnings = start(tmp_path, source)
        assert any("train images" in text and "have changed" in text for text in warnings)
        assert events[-1].kind == kind


def test_an_account_that_is_damaged_is_none(tmp_path):
    for text in ("", "[", "[1]", '{"train": 3}', json.dumps({"train": {}})):
        (tmp_path / account.FILE).write_text(text)
        source = open_source(data("scenes:easy", train=8), "train")
        assert account.changes(tmp_path, {"train": source}) == []
        account.record(tmp_path, {"train": source})
        assert account.read(tmp_path)["train"]["fingerprint"] == source.fingerprint
    assert torch.equal(source.labels, torch.arange(8))


def test_lines_of_a_training_name_their_phase():
    assert describe(Event("finish", "run-1", "latents")) == "run-1 finished: latents"
    step = describe(Event("step", "run-1", "diffusion", 640, 1280, 3.0, {"samples": 640, "loss": 0.5}))
    assert step == "diffusion  640/1,280 images  loss 0.5  0:03 left"
