"""The process behind one row of a comparison: train its phases and evaluate each. `python -m vfmlab.studies.lane JOB.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vfmlab import config
from vfmlab.errors import VfmlabError
from vfmlab.studies.lanes import work
from vfmlab.training.progress import watch


def main(argv: list[str]) -> int:
    job = json.loads(Path(argv[0]).read_text())
    try:
        for _ in watch(work([config.parse(phase) for phase in job["phases"]], job["root"]), "plain"):
            pass
    except VfmlabError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
