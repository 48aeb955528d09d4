"""Two processes of one program on the CPU (gloo), as `accelerate launch` starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(script, options, launcher="--multi_gpu"):
    """`script` with `options` (a dict or a list of them) as JSON in its argument; a Popen with all output in one stream.

    accelerate's flag --cpu starts several processes through mpirun only; --multi_gpu and --use_fsdp take torchrun's launcher, and the
    variable keeps the processes on the CPU.
    """
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", launcher, "--num_processes", "2"]
    flags = ["--num_machines", "1", "--main_process_port", str(free_port()), "--mixed_precision", "no", "--dynamo_backend", "no"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    command = [*accelerate, *flags, str(script), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
