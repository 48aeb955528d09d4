"""What a long job tells while it runs, for notebooks, the command line and the app."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["start", "step", "preview", "evaluation", "warning", "checkpoint", "skip", "finish"]


@dataclass(frozen=True)
class Event:
    """One thing that happened in a run.

    kind: "start" and "finish" bracket a phase ("skip": the phase was finished before); "step" carries running
    metrics; "preview" carries images [N 3 H W] in [-1, 1] under `data["images"]`; "evaluation" a dict of
    numbers with their protocol hash; "warning" one line under `data["message"]`.
    """

    kind: Kind
    run_id: str
    phase: str
    samples: int = 0
    total: int = 0
    seconds_left: float | None = None
    data: dict[str, Any] = field(default_factory=dict)
