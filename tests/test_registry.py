"""Parts from files outside the package: they are there wherever the variable is, and a bad file is one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from vfmlab import registry, runs
from vfmlab.errors import ConfigError

OWN = '''
from typing import Literal

from vfmlab.losses.base import Loss
from vfmlab.registry import LOSSES, TOKENIZERS
from vfmlab.tokenizers.plain_vae import PlainVAE


@LOSSES.register("edges")
class Edges(Loss):
    """L1 of horizontal differences."""

    def value(self, r):
        d = r.images[0] - r.target
        return (d[..., 1:] - d[..., :-1]).abs().mean()


@TOKENIZERS.register("mine")
class Mine(PlainVAE):
    """Of another name."""

    class Config(PlainVAE.Config):
        method: Literal["mine"] = "mine"
'''


def test_a_file_of_ones_own_trains_and_is_written_down(tmp_path):
    (tmp_path / "own_parts.py").write_text(OWN)
    small = ["tokenizer.method=mine", "losses.edges=0.5", "data.train=16", "data.val=8", "train.samples=8"]
    command = [sys.executable, "-m", "vfmlab", "train", "tiny_plain_vae", "--until", "tokenizer", "--root", tmp_path / "runs"]
    environment = os.environ | {"VFMLAB_PLUGINS": str(tmp_path / "own_parts.py")}
    done = subprocess.run([*command, "--set", *small], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = runs.scan(tmp_path / "runs")
    assert run.env()["plugins"].keys() == {"own_parts.py"}
    assert "edges" in run.metrics("step")[-1]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("own_missing.py", None, "there is no such file"),
        ("own_words.txt", "", "give a .py file with a name of its own"),
        ("json.py", "", "give a .py file with a name of its own"),
        ("own_broken.py", "import no_such_package", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("own_twice.py", "from vfmlab.registry import LOSSES\n@LOSSES.register('l1')\ndef f(): ...", "loss 'l1' is registered twice"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, monkeypatch, name, text, complaint):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert registry.LOSSES.get("l1"), "the whole table, before the file"
    monkeypatch.setenv("VFMLAB_PLUGINS", str(tmp_path / name))
    with pytest.raises(ConfigError, match=re.escape(complaint)):
        registry.Registry("loss", "vfmlab.losses").names()
