"""Programs under `torchrun`, as a user starts them, and how long a test waits for any program of its own."""

import os
import subprocess
import sys

DEADLINE_S = 900.0
"""Ends what hangs, and nothing else: beside other work, one process needs a minute before it has imported torch."""


def torchrun(*program: object, processes: int = 2, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run `program` (a file and its arguments) in `processes` processes on this machine; returns what they said."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, *options, *map(str, program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as launched:
        try:
            output, errors = launched.communicate(timeout=DEADLINE_S)
        except BaseException:
            launched.terminate()  # the launcher ends its processes; killed, it would leave them behind
            raise
    return subprocess.CompletedProcess(command, launched.returncode, output, errors)
