"""A point of a sweep on disk.

    <out>/points/<key>/  point.json (the job)  notebook.ipynb (executed)  result.json  image.png

result.json is written last and at once: a point that has none is not done, however it ended.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfmlab import runs


@dataclass(frozen=True)
class Folder:
    """One point. Reading never fails on a file that is not there yet."""

    path: Path

    @property
    def image(self) -> Path:
        return self.path / "image.png"

    @property
    def notebook(self) -> Path:
        return self.path / "notebook.ipynb"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def outcome(self) -> dict[str, Any] | None:
        """{"state": "finished" | "failed", "numbers", "runs", "seconds", "error"}; None: not done."""
        try:
            result = json.loads(self.result.read_text())
            whole = (result["state"] in ("finished", "failed") and isinstance(result["seconds"], int | float)
                     and all(isinstance(run, str) for run in result["runs"])
                     and all({"value", "protocol"} <= entry.keys() for entry in result["numbers"].values()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return result if whole else None

    def begin(self, **job: Any) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        runs.write_json(self.path / "point.json", job)

    def job(self) -> dict[str, Any]:
        return json.loads((self.path / "point.json").read_text())

    def end(self, state: str, seconds: float, error: str | None = None, **result: Any) -> None:
        facts = {"state": state, "seconds": round(seconds, 2), "error": error}
        runs.write_json(self.result, {**facts, "numbers": {}, "runs": [], **result})
