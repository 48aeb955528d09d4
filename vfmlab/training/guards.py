"""Guards: a step that would spoil the weights is skipped and written down; a few in a row end the run.

Nothing is repaired or replaced by zero: a bad step simply does not happen, and the run goes on with the next
batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from vfmlab.config import Train
from vfmlab.errors import TrainingError

EXPLODE = 1e3  # a loss this many times its running median is a bad step
WINDOW, ENOUGH = 101, 8  # losses the running median is taken over, and from how many on it is trusted


class Guard:
    """Checks each step by numbers that are equal on all ranks, so that all skip together.

    Its state is part of the checkpoint: a resumed run decides as the uninterrupted one would.

    at: where `train` stands in the recipe, for messages.
    """

    def __init__(self, train: Train, at: str = "train"):
        self.at = at
        self.patience, self.explode = train.guard_patience, EXPLODE
        self.clip, self.lr, self.precision = train.clip, train.lr, train.precision
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0
        self.total = 0

    def reason_to_skip(self, numbers: Mapping[str, float], overflows: bool = False) -> str | None:
        """Why the step must be skipped, or None; counts it.

        Args:
            numbers: `loss`, a mean over the global batch; `grad_norm` and `parameter_norm` over everything
                that trains, before the step; `discriminator_grad_norm` where discriminators learn.
            overflows: an infinite gradient is no fault (the loss scaler of fp16 skips it by itself).
        """
        reason = self._reason(numbers, overflows)
        if reason is None:
            self.losses.append(abs(numbers["loss"]))
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self.total += 1
        return reason

    def _reason(self, numbers: Mapping[str, float], overflows: bool) -> str | None:
        loss, gradient = numbers["loss"], numbers["grad_norm"]
        if not math.isfinite(numbers["parameter_norm"]):
            return "parameters are not finite"
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if len(self.losses) >= ENOUGH and abs(loss) > self.explode * median(self.losses):
            middle = median(self.losses)
            return f"loss {loss:.4g} is more than {self.explode:g} times its running median {middle:.4g}"
        if not math.isfinite(gradient) and not overflows:
            return f"gradient norm is {gradient}"
        if gradient == 0:
            return "all gradients are zero"
        other = numbers.get("discriminator_grad_norm", 0.0)
        return None if math.isfinite(other) else f"gradient norm of the discriminators is {other}"

    def check_patience(self, reason: str, where: str) -> None:
        """Raise :class:`TrainingError` when patience is lost. where: the file that lists the bad steps."""
        if self.in_a_row >= self.patience:
            bad = f"{self.in_a_row} bad steps in a row, last: {reason}"
            raise TrainingError(f"{bad}; {self._advice(reason)} (see {where})")

    def _advice(self, reason: str) -> str:
        if "parameters" in reason:
            return f"start from an earlier checkpoint with a lower {self.at}.lr (now {self.lr:g})"
        if "zero" in reason:
            return ("check that 'trains' and the loss weights leave something to learn, "
                    f"or set {self.at}.precision=fp32")
        fp32 = "" if self.precision == "fp32" else f"{self.at}.precision=fp32, "
        lower = f"try a lower {self.at}.lr (now {self.lr:g}), "
        clip = "none" if self.clip is None else f"{self.clip:g}"
        return f"{lower}{fp32}{self.at}.clip (now {clip}) or more {self.at}.warmup"

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.in_a_row, self.total = state["in_a_row"], state["total"]
