"""What reuse of an encoder saves: gFD against evaluations and seconds, and seconds at equal quality.

A split diffusion network draws with its encoder at every step, at every so many-th, at key steps dense at
noise (Faster Diffusion, arXiv 2312.09608), one by one and as one batch; beside it stands the same network
with fewer steps, which is what anybody would try first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmlab import api, config
from vfmlab.diffusion import path, reuse, sampling
from vfmlab.errors import ConfigError
from vfmlab.plots import figures, primitives
from vfmlab.seeding import SampleRandom
from vfmlab.studies.compare import writable
from vfmlab.studies.page import Page, definitions

QUESTION = "Is it better to reuse the encoder of a split network, or to take fewer steps?"
Record = Mapping[str, Any]


class Counted:
    """A split network that counts the rows which its encoder and its head see."""

    def __init__(self, network: Any):
        self.network, self.encoded, self.read = network, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def encode(self, x: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
        self.encoded += len(x)
        return self.network.encode(x, t, y)

    def head(self, x: Tensor, t: Tensor, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        self.read += len(x)
        return self.network.head(x, t, tokens)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.head(x, t, self.encode(x, t, y)[-1])[0]


def plans(steps: int, every: Sequence[int] = (2, 3, 4)) -> dict[str, config.Sampler]:
    """Ways to draw, by name: all encodings, every so many-th, key steps, these in parallel; then fewer
    steps."""
    keys = reuse.scaled_keys(steps)
    rows = {"every step": {}}
    rows |= {f"every {k} steps": {"reuse": k} for k in every if k < steps}
    if len(keys) < steps:
        rows |= {"key steps": {"reuse": keys}, "key steps, parallel": {"reuse": keys, "parallel": True}}
    fewer = sorted({max(1, round(steps / k)) for k in (*every, 1.5)} - {steps}, reverse=True)
    rows |= {f"{n} steps": {"steps": n} for n in fewer}
    return {name: config.Sampler(**{"steps": steps, **fields}) for name, fields in rows.items()}


@torch.no_grad()
def records(run: str, root: str | Path, every: Sequence[int] = (2, 3, 4), n: int = 500, batch: int = 64,
            repeats: int = 3) -> list[dict[str, Any]]:
    """One row a way of drawing: encodings and evaluations of the head an image, seconds, gFD.

    gFD by the run's protocol, with solver euler and at most n samples; seconds an image: of network and
    sampler alone on this machine, the least of `repeats` batches. Counts and seconds are those of unguided or
    guided sampling, as the protocol has it: guidance doubles both counts. Guidance of a kind (`internal`,
    `auto`) needs the whole network at every step, so such a run is drawn unguided. Steps run in parallel on
    the straight path only: elsewhere that row is not there.

    Raises:
        ConfigError: a network that is not split into encoder and head, numbers that cannot be.
    """
    if not every or min(every) < 2 or n < 2 or batch < 1:
        given = ", ".join(map(str, every)) or "nothing"
        raise ConfigError(f"every = {given}, n = {n}, batch = {batch}: give steps from 2 on, at least 2 "
                          "samples, and 1 in a batch")
    loaded = api.load_diffusion(run, root)
    reuse.Reused(loaded.network, every[0])  # refuses what is not split
    protocol = loaded.run.protocol
    n, table = min(n, protocol.n), []
    guidance = protocol.guidance if protocol.guidance.kind is None else config.Guidance()
    led = {f"guidance.{k}": v for k, v in guidance.model_dump(mode="json").items()}
    ways = {name: plan.model_copy(update={"shift": protocol.sampler.shift})
            for name, plan in plans(protocol.sampler.steps, every).items()
            if not plan.parallel or path.of(loaded.network).config.kind == "linear"}
    # in turn: what else the machine does in these seconds meets all of them
    costs = [{name: cost(loaded, plan, guidance, batch) for name, plan in ways.items()}
             for _ in range(repeats)]
    for name, plan in ways.items():
        changes = {"n": n, **led, **{f"sampler.{k}": v for k, v in plan.model_dump(mode="json").items()}}
        report = api.evaluate(run, root, changes)
        encoded, read, seconds = min((turn[name] for turn in costs), key=lambda one: one[2])
        table.append({
            "encoder": name, "steps": plan.steps, "encodings": encoded, "head": read,
            "seconds an image": seconds, "gFD": report.value("gfd"),
            "class accuracy": report.value("class_accuracy"), "N": n, "protocol": report.hash,
        })
    return table


def cost(loaded: api.LoadedDiffusion, sampler: config.Sampler, guidance: config.Guidance,
         batch: int) -> tuple[float, float, float]:
    """Encodings, evaluations of the head and seconds an image."""
    labels = torch.arange(batch, device=loaded.device) % loaded.num_classes
    network, random = Counted(loaded.network), SampleRandom(0, range(batch), loaded.device)
    begin = time.perf_counter()
    z = sampling.sample(network, labels, random, sampler, guidance, loaded.tokenizer.latent_shape,
                        loaded.num_classes)
    z.sum().item()  # waits for the device
    return network.encoded / batch, network.read / batch, (time.perf_counter() - begin) / batch


def equal_quality(table: Sequence[Record]) -> list[dict[str, Any]]:
    """For each way that reuses encodings: what the network without reuse needs for the same gFD.

    Its seconds are read off the line through its numbers of steps, between the two neighbouring points whose
    gFD encloses the value; None where no two do. Speed-up: these seconds over the reusing way's.
    """
    plain = sorted((r for r in table if r["encodings"] == r["head"]), key=lambda r: r["steps"])
    rows = []
    for row in table:
        if row["encodings"] == row["head"]:
            continue
        same = next((s for a, b in pairwise(plain) if (s := _between(a, b, row["gFD"]))), None)
        rows.append({
            "encoder": row["encoder"], "gFD": row["gFD"], "seconds an image": row["seconds an image"],
            "seconds without reuse": same, "speed-up": same and same / row["seconds an image"],
        })
    return rows


def _between(a: Record, b: Record, gfd: float) -> float | None:
    low, high = sorted((a["gFD"], b["gFD"]))
    if not low <= gfd <= high or low == high:
        return None
    share = (gfd - a["gFD"]) / (b["gFD"] - a["gFD"])
    return a["seconds an image"] + share * (b["seconds an image"] - a["seconds an image"])


def page(run: str, root: str | Path, out: Path, command: str, every: Sequence[int] = (2, 3, 4),
         n: int = 500, batch: int = 64) -> Path:
    """Measure, write `out`.html, .md and .json; returns the page."""
    out, table = writable(out), records(run, root, every, n, batch)
    same = equal_quality(table)
    made = Page("Reuse of an encoder", QUESTION, command=command, definitions=definitions(("gfd",)))
    made.add("All ways", "One run and one set of noises: differences smaller than between two seeds of the "
             "protocol are none. Counts are rows of encoder and head an image. A run guided by a second "
             "read-out or a weaker model is drawn unguided here. On a sphere steps cannot run in parallel.",
             primitives.table(table), figures.reuse_figure(table))
    made.add("At equal quality", "What the network without reuse needs for the same gFD, read off the line "
             "through its numbers of steps; empty: its line does not pass there.", primitives.table(same))
    return made.publish(out, {"run": run, "records": table, "equal_quality": same})
