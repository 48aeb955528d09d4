"""A program that two processes run: measure a run, draw its samples, then try to with two different seeds."""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path

import torch

from vfmlab import api
from vfmlab.errors import ConfigError


def main():
    options = json.loads(sys.argv[1])
    root, protocol, rank = options["root"], options["protocol"], int(os.environ["RANK"])
    seen = []
    report = api.evaluate(options["tokenizer"], root, protocol, again=True)
    both = {"tokenizer": report.record(), "generator": api.evaluate(options["generator"], root, protocol, again=True).record()}
    api.sample_npz(options["generator"], options["n"], options["out"], root, protocol, lambda *x: seen.append(x))
    try:
        api.sample_npz(options["generator"], options["n"], options["out"], root, protocol | {"seed": rank})
        line = ""
    except ConfigError as error:
        line = str(error)
    with open(f"{options['out']}.{rank}.json", "w") as file:
        json.dump({**both, "line": line, "progress": seen}, file)


def say_whether_open():
    out = json.loads(sys.argv[1])["out"]
    Path(f"{out}.{os.environ['RANK']}.open").write_text(str(torch.distributed.is_initialized()))


if __name__ == "__main__":
    atexit.register(say_whether_open)  # before the library registers its own, so that it is called after it
    main()
