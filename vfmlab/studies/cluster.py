"""Who works for a study: processes of this machine, a dask cluster, or one that a batch system starts."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vfmlab.config.files import read_mapping
from vfmlab.errors import ConfigError

if TYPE_CHECKING:
    from distributed import Client

SETTINGS = {
    "distributed.scheduler.worker-saturation": 1.0,  # a worker holds the node it runs, no second one
    "distributed.scheduler.worker-ttl": None,  # a long step is no dead worker
    "distributed.worker.daemon": False,  # a training may start loader processes
    "distributed.worker.profile.enabled": False,
    # dask's own without MALLOC_TRIM_THRESHOLD_, by which freed tensors go back to the system: to get the
    # pages again took three tenths of the CPU of two workers that trained, and two fifths of their time
    "distributed.nanny.pre-spawn-environ": dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "distributed.worker.http.routes": [],
    "distributed.scheduler.http.routes": [],
}


def gpus() -> list[str]:
    """What to put into CUDA_VISIBLE_DEVICES for each GPU that this process may use; empty without any."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    visible = map(str, range(count)) if named is None else filter(None, map(str.strip, named.split(",")))
    return list(visible)[:count]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def connect(cluster: str | None, jobs: int | None, most: int) -> Iterator[Client]:
    """A client of the workers that a study has.

    Args:
        cluster: address of a running dask scheduler (tcp://HOST:PORT), or a YAML file for dask-jobqueue;
        None: processes of this machine. jobs: how many of these, None: one per GPU, or core, but not above
        `most`; or jobs of the queue.

    Raises:
        ConfigError: no scheduler answers, the file does not describe a queue, `jobs` cannot be.
    """
    import dask
    from distributed import Client

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit("vfmlab: error: worker processes import the script that began the study, and began it "
                 "again; put what it does behind `if __name__ == \"__main__\":`")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs = {jobs}: at least one worker is needed")
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(SETTINGS))
        if cluster is None:
            devices = gpus()
            jobs = jobs or min(len(devices) or cores(), most or sys.maxsize)
            where = stack.enter_context(_local(jobs, devices))
        elif "://" not in cluster:
            where = stack.enter_context(_queue(Path(cluster).expanduser(), jobs))
        elif jobs is not None:
            raise ConfigError(f"jobs = {jobs}: the cluster at {cluster} has its own workers; leave it out")
        else:
            where = cluster
        try:
            client = stack.enter_context(Client(where))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"cluster '{cluster}': no dask scheduler answers there ({reason})") from None
        if cluster is None and jobs > 1:
            _begun(client, where)
            client.register_plugin(_plugin())
        yield client


def _local(jobs: int, devices: Sequence[str]) -> Any:
    """Processes of this machine, each with one thread and one GPU to see; one job works in this process."""
    from distributed import LocalCluster

    class Local(LocalCluster):
        def new_worker_spec(self) -> dict[Any, Any]:
            ((number, spec),) = super().new_worker_spec().items()
            if devices and jobs > 1:
                chosen = {"CUDA_VISIBLE_DEVICES": devices[number % len(devices)]}
                spec = spec | {"options": spec["options"] | {"env": chosen}}
            return {number: spec}

    status = dict.fromkeys(("dashboard_address", "worker_dashboard_address"), "127.0.0.1:0")  # not for others
    options = {"threads_per_worker": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL}
    local = Local(n_workers=0, processes=jobs > 1, **options, **status)
    local.scale(jobs)
    return local


def _begun(client: Client, local: Any) -> None:
    """Waits for the first worker. ConfigError: none can begin, of which dask itself says nothing."""
    while not client.nthreads():
        if local.workers and all(worker.status.name == "failed" for worker in local.workers.values()):
            raise ConfigError("no worker process could begin; what they wrote stands above. One job needs "
                              "none: jobs=1")
        time.sleep(0.1)


def _plugin() -> Any:
    """Ctrl-C in a terminal reaches every process there; it is for the study, which asks workers to save."""
    from distributed import WorkerPlugin

    class KeepRunning(WorkerPlugin):
        def setup(self, worker: object) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    return KeepRunning()


def _queue(path: Path, jobs: int | None) -> Any:
    """Workers that a batch system starts: `{slurm: {memory: 32GB, walltime: "24:00:00", jobs: 8}}`."""
    before = signal.getsignal(signal.SIGINT)
    import dask_jobqueue

    # its import alone makes Ctrl-C a `sys.exit`
    signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
    names = [name for name in dir(dask_jobqueue) if name.endswith("Cluster")]
    systems = {name.removesuffix("Cluster").lower(): name for name in names}
    try:
        ((system, options),) = read_mapping(path, "cluster").items()
        options = {"cores": 1, "processes": 1, "jobs": 1} | options
        number = int(options.pop("jobs"))
        queue = getattr(dask_jobqueue, systems[system])(**options)
    except (ValueError, TypeError, KeyError) as error:
        way = f"expected one of {', '.join(sorted(systems))} with its options, as slurm: {{memory: 32GB}}"
        raise ConfigError(f"cluster '{path}': {' '.join(repr(error).split())}; {way}") from None
    queue.scale(jobs=jobs or number)
    return queue
