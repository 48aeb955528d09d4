"""A program: processes that build one latent cache together, of which one may be killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import tiny

from vfmlab.data import open_source
from vfmlab.diffusion import latents, shards

BATCH, SHARD = 3, 8


def build(job, rank):
    """Process `rank` of job["world"]; at its batch of number job["kill"] the last process gets signal 9."""
    run = tiny.tiny_run("diffusion")
    source, tokenizer = open_source(run.data, "train"), tiny.untrained(run).eval()
    calls = {"encode": 0}
    encode = tokenizer.encode

    def counted(*args):
        calls["encode"] += 1
        if rank == job["world"] - 1 and calls["encode"] == job.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*args)

    tokenizer.encode = counted
    latents.SHARD, shards.PATIENCE = SHARD, job.get("patience", shards.PATIENCE)
    for _ in latents.build(job["folder"], tokenizer, source, batch=BATCH, rank=rank, world=job["world"]):
        pass
    Path(job["folder"], f"calls.{rank}").write_text(str(calls["encode"]))


def main():
    """argv: JSON of a list of jobs, which follow each other. Writes the exit codes of each one's processes."""
    ends = []
    for job in json.loads(sys.argv[1]):
        processes = []
        for rank in range(job["world"]):
            if (process := os.fork()) == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                try:
                    build(job, rank)
                    os._exit(0)
                finally:
                    os._exit(1)
            processes.append(process)
        ends.append([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes])
    sys.stdout.write(json.dumps(ends))


if __name__ == "__main__":
    main()
