"""The processes of an `accelerate launch` that evaluate together: each takes its share of every batch.

Sample and image i are functions of i, so that the numbers are those of one process (up to rounding, since
batches are cut in another way). All processes join their shares and count the same numbers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from accelerate.utils import gather, gather_object
from torch import Tensor

from vfmlab.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """One of `count` processes, the one of number `index`; by default the only one."""

    index: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.index == 0

    def share(self, ids: Tensor) -> Tensor:
        """This process's rows of a batch of N ids (or images): as many on every process, the last one again
        where N does not divide."""
        each = -(-len(ids) // self.count)
        padded = torch.cat([ids, ids[-1:].expand(each * self.count - len(ids), *ids.shape[1:])])
        return padded[self.index * each : (self.index + 1) * each]

    def join(self, n: int, *shares: Tensor | None) -> list[Tensor | None]:
        """The rows of all processes for a batch of n ids, in the order of the ids; None stays None."""
        if self.count == 1:
            return list(shares)
        return [None if rows is None else _gathered(rows)[:n].to(rows.device) for rows in shares]

    def agree(self, what: str, value: object) -> None:
        """Go on where every process has the same value.

        Raises:
            ConfigError: they have not; raised on all of them.
        """
        if self.count == 1:
            return
        values = gather_object([str(value)])
        other = next((i for i, each in enumerate(values) if each != values[0]), None)
        if other is not None:
            raise ConfigError(f"{what}: process 0 has {values[0]}, process {other} has {values[other]}; "
                              "start all with one command, one root and the same files")

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()


ALONE = Ranks()


def launched() -> Ranks:
    """This process among those that a launcher started; alone without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from vfmlab.training.step import open_processes

    state = open_processes()
    return Ranks(state.process_index, state.num_processes)


def _gathered(rows: Tensor) -> Tensor:
    from accelerate import PartialState

    return gather(rows.to(PartialState().device).contiguous())
