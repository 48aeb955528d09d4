"""The pictures that the app offers itself are called what they are."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("gradio")

from apps import pictures
from vfmlab.config import files
from vfmlab.weights import bundled


def test_examples_say_whose_they_are(tmp_path):
    root, out = tmp_path / "runs", tmp_path / "out"
    out.mkdir()
    assert pictures.examples(root, out)[1] == "drawn scenes"
    bundled.put(root)
    paths, whose = pictures.examples(root, out)
    assert (len(paths), whose) == (4, "held-out images of the newest tokenizer")
    newest = pictures.runs.scan(root)[-1]
    config = newest.raw_config
    config["data"]["source"] = f"folder:{tmp_path / 'gone'}"
    files.write_json(newest.path / "config.json", config)
    shutil.rmtree(out)
    out.mkdir()
    paths, whose = pictures.examples(root, out)
    assert len(paths) == 4
    assert whose == "drawn scenes; the images of the newest tokenizer cannot be read here"
