"""Kernels of a study's notebooks, each a fork of one process that has the library imported already.

Imports are most of what a short notebook costs (ten seconds of a core for torch, timm, torchmetrics and
jupyter). On Linux a study pays for them once per worker; elsewhere, for a kernel of another environment, or
where a notebook does not import the library, a kernel starts as jupyter starts it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from typing import Any

import psutil
from jupyter_client.manager import AsyncKernelManager
from traitlets import Bool

from vfmlab.studies import executor

IMPORTED = (
    "ipykernel.kernelapp", "ipykernel.zmqshell", "ipywidgets", "nbformat", "plotly.graph_objects", "plotly.io",
    "torch._dynamo", "timm", "torchvision", "torchmetrics.functional.image", "torchmetrics.image.lpip",
    "vfmlab.widgets", "vfmlab.tokenizers", "vfmlab.decoders", "vfmlab.plots.figures", "vfmlab.training.loop",
    "vfmlab.evaluation.evaluate", "vfmlab.studies.show", "vfmlab.studies.compare", "vfmlab.studies.probing",
)  # fmt: skip
READ_BY_IMPORTS = ("PYTHON", "OMP_", "MKL_", "CUDA", "TORCH_", "PYTORCH", "HF_")  # variables that begin so


class _Fork:
    """A kernel as jupyter looks at its processes (`subprocess.Popen`); it is the child of another process."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = psutil.Process(pid)

    def poll(self) -> int | None:
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
                return None
        return 0

    def wait(self, timeout: float | None = None) -> int:
        self._process.wait(timeout)
        return 0

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    kill = functools.partialmethod(send_signal, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    terminate = functools.partialmethod(send_signal, signal.SIGTERM)


class Kernels(AsyncKernelManager):
    """Starts a kernel, as a fork where it is to be one and that can be, and lets a study interrupt it."""

    forks = Bool(False, config=True, help="whether the notebook needs what is imported for it")

    async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
        own = kernel_cmd[0] == sys.executable and "ipykernel_launcher" in kernel_cmd
        arguments = kernel_cmd[kernel_cmd.index("ipykernel_launcher") + 1 :] if own else []
        can = own and sys.platform == "linux"
        if not (self.forks and can and self._forked(arguments, **options)):
            await super()._async_launch_kernel(kernel_cmd, **options)
        executor.interruptible(self.provisioner.process)

    def _forked(self, arguments: list[str], env: dict[str, str], cwd: str | None = None, **_: Any) -> bool:
        """Whether the kernel is there; not where the imports fail, which the notebook will say."""
        read = (item for item in os.environ.items() if item[0].startswith(READ_BY_IMPORTS))
        origin = _origin(tuple(sorted(read)))
        job = {"arguments": arguments, "environment": env, "cwd": cwd or os.getcwd()}
        pid = ""
        with contextlib.suppress(BrokenPipeError):
            origin.stdin.write(json.dumps(job) + "\n")
            origin.stdin.flush()
            pid = origin.stdout.readline()
        if not pid:
            _origin.cache_clear()
            return False
        self.provisioner.process = _Fork(int(pid))
        self.provisioner.pid = self.provisioner.pgid = int(pid)
        self._reconcile_connection_info(self.provisioner.connection_info)
        return True


@functools.lru_cache(maxsize=1)
def _origin(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """The process that kernels fork from. It ends with this one, and its kernels with it."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-P", "-m", __name__], **options)


def serve() -> None:
    """Import, then fork a kernel for every line of the input: {"arguments", "environment", "cwd"}."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who asked for a kernel looks whether it lives
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _become_kernel(**json.loads(line))
            gc.collect()  # files that the notebook left open are written
            os._exit(0)  # the destructors of libraries wait for threads that a fork does not have
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
    os._exit(0)  # who had asked is gone, and its kernels look for their parent


def _become_kernel(arguments: list[str], environment: dict[str, str], cwd: str) -> None:
    import numpy
    from ipykernel import kernelapp

    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    numpy.random.seed()  # else the same numbers in every kernel
    sys.argv[1:] = arguments
    quiet = "--log-level=CRITICAL"  # a kernel's end begins with an interrupt, which it logs as an error
    kernelapp.launch_new_instance(argv=[*arguments, quiet, f"--IPKernelApp.parent_handle={os.getppid()}"])
    atexit.unregister(kernelapp.IPKernelApp.instance().close)  # waits for seconds on a stream that is closed
    atexit._run_exitfuncs()


if __name__ == "__main__":
    serve()
