"""The one training loop: a generator of events over accelerate, resumable bit for bit.

The state of a run is a function of (config, step): data and random numbers of step k are made from (seed, k),
so a checkpoint holds weights, averages, optimiser, guards and running means, and no random state. Gradients
are means over the global batch, however it is cut into processes and accumulation steps.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object, recursively_apply
from torch import Tensor
from torch.nn.utils import get_total_norm
from torchvision.utils import save_image

from vfmlab.data import account
from vfmlab.errors import DataError, Stopped, TrainingError, VfmlabError
from vfmlab.runs import RunDir, beside
from vfmlab.seeding import derive
from vfmlab.training import checkpoint, dryrun, sharded
from vfmlab.training.events import Event
from vfmlab.training.schedule import Clock, rate
from vfmlab.training.state import State
from vfmlab.training.step import Prepared, backward, make_accelerator, make_optimizers, my_rows
from vfmlab.training.stop import REQUEST, Stop
from vfmlab.training.task import Task, indices, select

__all__ = ["Task", "fit"]
BEAT = 30.0  # seconds between signs of life in status.json


def fit(task: Task, run_dir: RunDir, until: int | None = None, device: str | None = None) -> Iterator[Event]:
    """Train `task` in `run_dir` from where it stands to its budget; yields
    :class:`vfmlab.training.events.Event`.

    Closing the generator, Ctrl-C, SIGTERM or a stop request saves the last completed step, marks the run
    interrupted and frees memory; the next `fit` goes on there. On several processes only the first one
    yields.

    Args:
        until: stop (interrupted, saved) once so many samples were seen. device: "cpu" keeps off accelerators.

    Raises:
        ConfigError: a batch that does not divide, globs that match nothing, an optional package that is
        missing.
        TrainingError: guards lost their patience, memory or disk is full. RunError: the run is being trained
        already.
        Stopped: on request.
    """
    stop = Stop()
    with stop.computing():
        loop = _Loop(task, run_dir, stop, device)
        with loop.locked():
            yield from loop.show(loop.warnings(account.changes(run_dir.path, task.images)))
            if run_dir.status().state == "finished":
                total = task.train.samples
                yield from loop.show([Event("skip", run_dir.id, task.name, total, total)])
                return
            with loop.life():
                yield from loop.show(loop.begin())
                yield from loop.show(loop.after_step())  # what an interrupted run had still to do
                while loop.step < loop.steps:
                    if until is not None and loop.samples >= until:
                        loop.leaving = True
                        loop.interrupt(f"stopped at {loop.samples} samples as asked")
                        return
                    loop.take_step()
                    yield from loop.show(loop.after_step())
                yield from loop.show(loop.end())


class _Loop:
    def __init__(self, task: Task, run_dir: RunDir, stop: Stop, device: str | None):
        self.task, self.run_dir, self.stop, self.train = task, run_dir, stop, task.train
        self.steps = -(-self.train.samples // self.train.batch)
        self.accelerator = make_accelerator(task, run_dir, device)
        self.main = self.accelerator.is_main_process
        self.state: State | None = None
        self.on: Prepared | None = None
        self.stream: Any = None
        self.ready = self.leaving = self.over = False  # state complete; all stop after this step; has ended
        self.clock, self.beat, self.unreadable = Clock(), 0.0, -1  # images, at the last account of them

    @property
    def step(self) -> int:
        return 0 if self.state is None else self.state.step

    @property
    def samples(self) -> int:
        return self.step * self.train.batch

    def event(self, kind: str, **data: Any) -> Event:
        left = self.clock.left(self.steps - self.step, self._extras_left())
        total = self.train.samples
        return Event(kind, self.run_dir.id, self.task.name, min(self.samples, total), total, left, data)

    def show(self, events: Iterable[Event]) -> Iterator[Event]:
        """Pass events on, from the first process; signals and randomness are the consumer's meanwhile."""
        for event in events:
            if self.main:
                with self.stop.away():
                    yield event

    def warnings(self, lines: Iterable[str]) -> list[Event]:
        return [self.event("warning", message=line) for line in lines if line]

    # -- around it all --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with self.run_dir.lock() if self.main else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()
            yield

    @contextlib.contextmanager
    def life(self) -> Iterator[None]:
        """However the run ends, its status says so, its state is saved where it is whole, memory is freed."""
        try:
            with dryrun.exhaustion(self.task.name, self.train):
                yield
        except (GeneratorExit, KeyboardInterrupt, SystemExit, Stopped):
            self.interrupt("stopped by hand")
            raise
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            if hasattr(self.stream, "close"):
                self.stream.close()
            for tracker in self.accelerator.trackers:  # end_training would close the group of processes, too
                tracker.finish()
            if self.on is not None:
                self.on.release()
            self.on = self.state = self.stream = self.buffers = None
            self.accelerator.free_memory()  # looks for garbage, which takes most of a second: once

    def begin(self) -> Iterator[Event]:
        """Everything on its device and prepared, as the checkpoint left it or at its start."""
        task, acc, train = self.task, self.accelerator, self.train
        self.stop.together = acc.num_processes > 1
        if self.main:
            checkpoint.recover(self.run_dir)
            self.run_dir.save_env(
                device=str(acc.device),
                device_name=torch.cuda.get_device_name() if acc.device.type == "cuda" else acc.device.type,
                processes=acc.num_processes,
                sharded=sharded.asked(task),
                threads=torch.get_num_threads(),
                precision=acc.mixed_precision,
            )
        acc.wait_for_everyone()
        self.state = State(task)
        self.state.load(self.run_dir)  # weights, before the optimisers take them up
        fresh = not self.state.resumed
        for module in task.modules:
            module.to(acc.device).train()
        images = task.images.get("train")
        data = "" if images is None else images.describe()
        self._status(state="running", message="", data=data)
        # refused here, before anything is computed
        my_rows(task, acc), make_optimizers(task, select(task), acc.device)
        yield from self._prepare(fresh)
        if sharded.asked(task):
            task.objective.cpu()  # from where it goes to the devices in shares
        self.state.restore()
        self.on = Prepared(task, acc, self.state.average)
        if train.logger != "none":
            acc.init_trackers("vfmlab", {"run": self.run_dir.id})
        facts = {"resumed": self.samples, "precision": acc.mixed_precision, **task.started}
        facts |= {"data": data} if data else {}
        if fresh and acc.device.type == "cuda" and not self.on.sharded:
            facts |= dryrun.measure_prepared(self.on)
        yield self.event("start", **facts)
        yield from self.warnings(() if images is None else images.notes)
        self.state.begin(self.on.optimizers, acc.scaler)
        self.buffers = self.state.buffers()
        if self.main:
            self.run_dir.truncate(self.step, self.state.records_done())
        self.stream = iter(task.stream(self.step, self.on.rows))
        self.stop.busy, self.ready = False, True

    def _prepare(self, fresh: bool) -> Iterator[Event]:
        """The task's own preparations, each bracketed by a "start" and a "finish" of its name."""
        phase = None
        with self._evaluating():
            for what, done, of in self.task.prepare(self.run_dir, fresh):
                if phase != what:
                    if phase is not None:
                        yield Event("finish", self.run_dir.id, phase)
                    yield Event("start", self.run_dir.id, what, 0, of)
                    phase = what
                yield Event("step", self.run_dir.id, what, done, of)
                if not self.stop.together:
                    self._look_for_request()
                    if self.stop.asked:
                        self.stop.raise_now()
                if time.time() - self.beat > BEAT:
                    self._status()
        if phase is not None:
            yield Event("finish", self.run_dir.id, phase)

    def end(self) -> Iterator[Event]:
        """The task's last act; refused where no step could be taken."""
        if not self.state.average.updates:
            raise TrainingError(f"none of the {self.steps} steps could be taken, so nothing was learned (see "
                                f"bad_steps.jsonl for why); lower {self.task.section}.lr (now "
                                f"{self.train.lr:g}) or set {self.task.section}.precision=fp32")
        remark = ""
        if self.main:
            with self._evaluating():
                self.task.finish(self.state.average.module, self.run_dir)
        if self.task.completes and (self.main or self.on.sharded):  # again, with what is filled in now
            self.state.save(self.run_dir)
        if self.main:
            remark = self.task.remark()
            self._status(state="finished", message=remark)
        self.over = True
        self.accelerator.wait_for_everyone()
        images = self.task.images.get("train")
        yield from self.warnings(() if images is None else [account.lost(images)])
        yield self.event("finish", seconds=self.state.seconds, **({"remark": remark} if remark else {}))

    # -- one step -------------------------------------------------------------------------------------------

    def take_step(self) -> None:
        """One global batch: forward, backward, and an update unless the guards refuse it."""
        task, acc, on, state, begin = self.task, self.accelerator, self.on, self.state, time.perf_counter()
        batch = next(self.stream, None)
        if batch is None:
            raise DataError(f"the data of the {task.name} ended at step {self.step}; a stream must go on for "
                            "ever")
        batch = recursively_apply(Tensor.to, batch, acc.device, non_blocking=True)
        self.stop.busy, state.done = True, []
        torch.manual_seed(derive("global", task.seed, self.step, acc.process_index))  # dropout draws from it
        learns = on.discriminators is not None and task.discriminators.learns(self.samples)
        optimizers = on.optimizers if learns else on.optimizers[:1]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate(self.train, self.samples)
        before = {name: buffer.clone() for name, buffer in self.buffers.items()}

        metrics = backward(on, batch, self.step, self.samples)

        clip = math.inf if self.train.clip is None else self.train.clip
        gradient = acc.clip_grad_norm_(on.parameters, clip)
        if learns:
            metrics["discriminator_grad_norm"] = acc.clip_grad_norm_(
                task.discriminators.parameters(), clip)
        numbers = self._agree(metrics, gradient)
        reason = state.guard.reason_to_skip(numbers, self._overflows())
        if reason is None:
            for optimizer in optimizers:
                optimizer.step()
            if math.isfinite(numbers["grad_norm"]):  # else the scaler of fp16 has skipped it
                state.average.update()
                state.add(numbers)
        else:
            self._skip(reason, batch, numbers, before)
        state.step += 1
        task.stepped(state.step, numbers)
        for optimizer in on.optimizers:  # before a checkpoint or an evaluation takes memory of its own
            optimizer.zero_grad(set_to_none=True)
        self.stop.busy = False
        elapsed = time.perf_counter() - begin
        state.seconds += elapsed
        self.clock.step(elapsed)
        if reason is not None:
            state.guard.check_patience(reason, "bad_steps.jsonl")
        if time.time() - self.beat > BEAT:
            self._status()
        if self.stop.asked and (self.leaving or not self.stop.together):
            self.stop.raise_now()

    def _look_for_request(self) -> None:
        if self.main and not self.stop.asked and self.run_dir.stop_requested:
            self.stop.asked = REQUEST

    def _agree(self, metrics: dict[str, Tensor], gradient: Tensor) -> dict[str, float]:
        """Means over all processes, in one exchange and one wait for the device; also who is to stop."""
        acc = self.accelerator
        self._look_for_request()
        numbers = torch.stack([*metrics.values(), torch.tensor(float(self.stop.asked), device=acc.device)])
        if acc.num_processes > 1:
            numbers = acc.reduce(numbers, "mean")
        norms = [sharded.whole(norm).float() for norm in (gradient, get_total_norm(self.on.parameters))]
        *values, asked, gradient, parameters = torch.cat([numbers, torch.stack(norms)]).tolist()
        self.leaving = bool(asked)
        if asked and not self.stop.asked:
            self.stop.asked = round(asked * acc.num_processes)
        return {**dict(zip(metrics, values, strict=True)), "grad_norm": gradient,
                "parameter_norm": parameters}

    def _overflows(self) -> bool:
        """fp16: overflows of scaled gradients are how the loss scaler finds its scale; it skips them."""
        return self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() > 1

    def _skip(self, reason: str, batch: Any, numbers: dict[str, float], before: dict[str, Tensor]) -> None:
        """The step does not happen: running statistics go back to what they were, and it is written down."""
        with torch.no_grad():
            for name, buffer in self.buffers.items():
                buffer.copy_(before[name])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        rows = indices(batch)
        if self.accelerator.num_processes > 1:
            rows = gather_object(rows)
        record = {"kind": "bad", "step": self.step + 1, "samples": self.samples, "seed": self.task.run.seed}
        if self.main:
            self.run_dir.log({**record, "reason": reason, **numbers, "indices": rows}, "bad_steps.jsonl")

    # -- between steps --------------------------------------------------------------------------------------

    def _due(self) -> list[str]:
        """What is to be done after the completed step; the checkpoint last, so that it covers the rest."""
        if self.step == 0:
            return []
        train, after, before = self.train, self.samples, self.samples - self.train.batch
        last = self.step == self.steps
        every = {"log": train.log_every, "preview": train.preview_every, "checkpoint": train.checkpoint_every}
        due = [name for name, n in every.items() if last or after // n > before // n]
        if any(before < n <= after for n in train.evaluate_at):
            due.insert(len(due) - ("checkpoint" in due), "evaluate")
        return due

    def _extras_left(self) -> dict[str, int]:
        train, rest = self.train, max(0, self.train.samples - self.samples)
        evaluations = sum(n > self.samples for n in train.evaluate_at)
        saves = rest // train.checkpoint_every
        return {"preview": rest // train.preview_every, "checkpoint": saves, "evaluate": evaluations}

    def after_step(self) -> Iterator[Event]:
        """Log, preview, evaluation and checkpoint, where they are due and not done yet."""
        done = self.state.done
        for name in self._due():
            if name in done:
                continue
            begin = time.perf_counter()
            if name == "checkpoint":
                done.append(name)  # the checkpoint says of itself that it was made
            self.stop.busy = name == "log"  # a log empties the running means: it happens whole
            together = self.on.sharded and name != "log"
            event = getattr(self, f"_{name}")() if self.main or together else None
            self.stop.busy = False
            if name in ("preview", "evaluate"):
                self.accelerator.wait_for_everyone()
            if name != "checkpoint":
                done.append(name)
            if self.stop.asked and not self.stop.together:
                self.stop.raise_now()
            elapsed = time.perf_counter() - begin
            self.state.seconds += elapsed
            self.clock.extra(name, elapsed)
            if event is not None:
                yield event

    def _log(self) -> Event:
        state, lr = self.state, self.on.optimizers[0].param_groups[0]["lr"]
        facts = {"step": self.step, "samples": self.samples, **state.means(), "lr": lr}
        facts |= {"bad_steps": state.guard.total, "ema_samples": state.average.samples}
        # Just resumed, this process has taken no step yet: the mean over the run's earlier ones.
        speed = self.train.batch / (self.clock.median or state.seconds / self.step)
        self.run_dir.log({"kind": "step", **facts, "seconds": state.seconds, "samples_per_second": speed})
        if self.train.logger != "none":
            self.accelerator.log({k: v for k, v in facts.items() if isinstance(v, float)}, step=self.samples)
        self._status()
        return self.event("step", **facts, samples_per_second=speed)

    def _preview(self) -> Event | None:
        shown: dict[str, Tensor | None] = {}
        for which, own in {"raw": self.task.weights, "ema": self.state.average.module}.items():
            with self._evaluating(), self.on.whole(own) as weights:
                shown[which] = None if weights is None else self.task.preview(weights)
        if any(images is None for images in shown.values()):
            return None
        for which, images in shown.items():
            shown[which] = images.detach().float().cpu().clamp(-1, 1)
            with beside(self.run_dir.images / f"{self.samples:010d}_{which}.png") as temporary:
                save_image(shown[which], temporary, "png", nrow=self.task.columns, normalize=True,
                           value_range=(-1, 1))
        return self.event("preview", images=shown["ema"], raw=shown["raw"], columns=self.task.columns)

    def _evaluate(self) -> Event | None:
        """Numbers that cannot be had (images alike, too few) are absent with their reason: a run goes on."""
        try:
            with self._evaluating(), self.on.whole(self.state.average.module) as weights:
                numbers = None if weights is None else self.task.evaluate(weights, self.samples)
        except (DataError, torch.linalg.LinAlgError) as error:
            reason = str(error).splitlines()[0]
            self.run_dir.log({"kind": "evaluation", "step": self.step, "samples": self.samples,
                              "reason": reason})
            return self.event("warning", message=f"no evaluation at {self.samples} images: {reason}")
        if numbers is None:
            return None
        self.run_dir.log({"kind": "evaluation", "step": self.step, "samples": self.samples, **numbers})
        return self.event("evaluation", **numbers)

    def _checkpoint(self) -> Event:
        self.state.save(self.run_dir)
        return self.event("checkpoint", step=self.step)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.task.objective.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.task.objective.train()

    # -- status ---------------------------------------------------------------------------------------------

    def _status(self, **changes: Any) -> None:
        self.beat = time.time()
        if self.main and not self.over:
            seen = min(self.samples, self.train.samples)
            seconds = 0.0 if self.state is None else self.state.seconds
            self.run_dir.set_status(samples=seen, total=self.train.samples, seconds=seconds, **changes)
            unreadable = sum(len(source.bad) for source in self.task.images.values())
            if self.unreadable != unreadable:
                self.unreadable = unreadable
                account.record(self.run_dir.path, self.task.images)

    def interrupt(self, why: str) -> None:
        """Save if the state is complete. Only the first process works here: the others may be gone. A sharded
        state is saved where all of them stop after the same step."""
        alone = self.on is None or not self.on.sharded
        if self.over or (not self.main and (alone or not self.leaving)):
            return
        if self.ready and not self.stop.busy and self.step and (alone or self.leaving):
            try:
                self.state.save(self.run_dir)
            except BaseException as error:
                self._fail(error)
                raise
            why += "; start the run again to go on"
        elif self.stop.busy or not alone:
            why += " in the middle of a step; goes on from the last checkpoint"
        self._status(state="interrupted", message=why)

    def _fail(self, error: BaseException) -> None:
        message = str(error).strip() or type(error).__name__
        text = message if isinstance(error, VfmlabError) else f"{type(error).__name__}: {message}"
        with contextlib.suppress(TrainingError):  # the disk may be full: the error itself matters more
            self._status(state="failed", message=text.splitlines()[0])
