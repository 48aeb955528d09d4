"""A program that two processes run: measure a run, draw its samples, then try to with two different seeds."""

from __future__ import annotations

import json
import os
import sys

from accelerate import PartialState

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


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # threads of an open group may abort a process that ends
