"""Optuna decides on the points. The study is rebuilt from the points on disk for every trial.

Trial k is drawn with a seed made of (seed, k) from the results known by then: with one job, a search that was
interrupted goes on exactly as it would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from vfmlab import config, runs
from vfmlab.errors import ConfigError
from vfmlab.seeding import derive
from vfmlab.studies.sweep import grid as grids
from vfmlab.studies.sweep.grid import Grid, Point, Range

optuna.logging.set_verbosity(optuna.logging.WARNING)
Outcome = dict[str, Any]


class Study:
    """The points of a search, one after the other.

    Args:
        outcome: of a point on disk, or None. refuse: records why a point cannot be. check: raises ConfigError
        for such a point. direction: "minimize" or "maximize".
    """

    def __init__(self, grid: Grid, code: str, out: Path, direction: str,
                 outcome: Callable[[Point], Outcome | None], check: Callable[[Point], object],
                 refuse: Callable[[Point, str], object]):
        self.code, self.search, self.direction = code, grid.search, direction
        self.outcome, self.check, self.refuse = outcome, check, refuse
        (self.setting,) = grids.settings(grid)
        self.axes = grid.axes()
        self.space = {".".join(place): _distribution(values) for place, values in self.axes.items()}
        axes = [[*place, v.model_dump() if isinstance(v, Range) else v] for place, v in self.axes.items()]
        search = self.search.model_dump(exclude={"trials"})
        definition = [code, self.setting.model_dump(), axes, search, direction]
        self.file = out / f"search-{config.digest(definition)}.json"
        self.trials: list[dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else []
        self.running: set[str] = set()
        for p in self.points:
            self.ended(p, self.outcome(p))

    @property
    def points(self) -> list[Point]:
        """Of the trials drawn so far; different trials may have the same."""
        return [self._point(params) for params in self.trials[: self.search.trials]]

    @property
    def left(self) -> int:
        return len(self._undecided()) + max(self.search.trials - len(self.trials), 0)

    def _undecided(self) -> list[Point]:
        return [p for p in self.points if self.outcome(p) is None and p.key not in self.running]

    def take(self) -> Point | None:
        """The next point to run, or None when there is no further one."""
        while True:
            if waiting := self._undecided():  # first those of an interrupted search, and failed ones again
                try:
                    self.check(waiting[0])
                except ConfigError as error:  # a combination that cannot be is a failed trial
                    self.refuse(waiting[0], str(error))
                    continue
                self.running.add(waiting[0].key)
                return waiting[0]
            if len(self.trials) >= self.search.trials:
                return None
            self._draw()

    def ended(self, point: Point, outcome: Outcome | None) -> None:
        """Raises ConfigError when the objective is not among the numbers, or not measured as before."""
        self.running.discard(point.key)
        if outcome is None or outcome["state"] != "finished":
            return
        name, numbers = self.search.objective, outcome["numbers"]
        if name not in numbers:
            raise ConfigError(f"search: the notebook hands out no '{name}', only: "
                              f"{', '.join(numbers) or 'nothing'}; see vfmlab.studies.sweep.result")
        done = [(p, o["numbers"]) for p in self.points if (o := self.outcome(p))]
        ways = {numbers[name]["protocol"]: p for p, numbers in done if name in numbers}
        if len(ways) > 1:
            (one, first), (other, second) = list(ways.items())[:2]
            raise ConfigError(f"search: '{name}' of the points {first.key} and {second.key} was measured "
                              f"under different protocols ({one}, {other}); they cannot be ranked: keep data "
                              "and protocol fixed")

    def value(self, point: Point) -> float | None:
        """The objective of a point that is finished and has it."""
        outcome = self.outcome(point) or {"state": "open"}
        finished = outcome["state"] == "finished"
        return outcome["numbers"][self.search.objective]["value"] if finished else None

    def _draw(self) -> None:
        seed = derive("search", self.search.seed, len(self.trials)) % 2**32
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
        if self.search.sampler == "tpe":
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.search.startup)
        study = optuna.create_study(direction=self.direction, sampler=sampler)
        for params in self.trials:
            p = self._point(params)
            value = self.value(p)
            state = TrialState.RUNNING if self.outcome(p) is None else TrialState.FAIL
            state = state if value is None else TrialState.COMPLETE
            study.add_trial(create_trial(state=state, value=value, params=params, distributions=self.space))
        params = study.ask(self.space).params
        self.trials.append(params)
        runs.write_json(self.file, self.trials)  # before it is run, so that it is not drawn again

    def _point(self, params: dict[str, Any]) -> Point:
        chosen = {}
        for place, values in self.axes.items():
            value = params[".".join(place)]
            chosen[place] = value if isinstance(values, Range) else json.loads(value)
        return grids.place(self.setting, chosen, self.code)


def _distribution(values: list[Any] | Range) -> BaseDistribution:
    """Choices go through Optuna as JSON, because it knows no lists."""
    if not isinstance(values, Range):
        return CategoricalDistribution([json.dumps(v) for v in values])
    if values.whole:
        return IntDistribution(values.low, values.high, log=values.log, step=values.step or 1)
    return FloatDistribution(values.low, values.high, log=values.log, step=values.step)
