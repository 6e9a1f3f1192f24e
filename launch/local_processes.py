"""Several processes on this machine that train as one, as the hosts of a pod do.

    python -m launch.local_processes --processes=2 --devices=4 -- \\
        train --config=configs/motion.py:tiny --workdir=runs/two

The way to try a multi-host run without a pod: real `jax.distributed` over loopback, on CPU devices.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

RESUME_ME = 75  # train.RESUME_ME, without the import of JAX


def main() -> int:
    """Starts the processes, waits for all, ends the others when one fails; the first bad code is ours.

    As in a shell, 128 and the signal's number say that a process was killed.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=2, help="how many (default: %(default)s)")
    parser.add_argument(
        "--devices", type=int, default=1, help="CPU devices of each (default: %(default)s)"
    )
    parser.add_argument(
        "job", nargs=argparse.REMAINDER, help="-- and a dexportrait job with its flags"
    )
    arguments = parser.parse_args()
    job = arguments.job[1:] if arguments.job[:1] == ["--"] else arguments.job
    if not job:
        parser.error("say what to run, for instance: -- train --config=... --workdir=...")

    address = f"127.0.0.1:{free_port()}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={arguments.devices}"
    processes: list[subprocess.Popen] = []
    asked = []

    def end(*_) -> None:
        asked.append(True)
        for process in processes:
            process.terminate()

    signal.signal(signal.SIGTERM, end)
    for index in range(arguments.processes):
        ours = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(arguments.processes),
            "JAX_PROCESS_ID": str(index),
            "XLA_FLAGS": flags.strip(),
        }
        command = [sys.executable, "-m", "dexportrait_jax", *job]
        processes.append(subprocess.Popen(command, env=os.environ | ours))
    if asked:  # while they were started: some did not hear of it
        end()
    while True:
        codes = [process.poll() for process in processes]
        failed = [code for code in codes if code]
        if failed or all(code == 0 for code in codes):
            break
        time.sleep(0.2)
    # After SIGTERM all save together and end one by one; those that lost one in any other way wait for it in vain.
    deadline = time.monotonic() + (60 if failed[:1] in ([], [RESUME_ME]) else 10)
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return next((code if code > 0 else 128 - code for code in failed), 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    raise SystemExit(main())
