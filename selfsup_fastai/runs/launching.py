"""Starting a command several times at once, so that the processes train one model together (`processes.join`)."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, NamedTuple

import torch
from fastcore.parallel import num_cpus

from selfsup_fastai.errors import LostProcessError, SelfsupError
from selfsup_fastai.messages import say
from selfsup_fastai.runs.folder import is_unfinished

LOOK, GRACE, STOPPING = 0.1, 3.0, 120.0  # Seconds: between looks; for those who lost one; for a stopped run to save


class Started(NamedTuple):
    process: subprocess.Popen
    said: IO | None  # What it wrote to stderr; None: it went to the screen


def launch(
    n: int,
    out: Path,  # Folder of the run
    mark: str,  # Environment variable that tells a process who started it: it is quiet about others then
    lost: int,  # Exit code of one that has only lost another
) -> int:
    """Runs this command in `n` processes on this machine, until all are done. The first one alone is heard.

    When one is killed or fails, the others are ended within seconds, and a `LostProcessError` says which and how; where
    it was the first, it has said why itself, and its exit code is returned (0 if all went well). Ctrl-C and a
    termination signal are passed on, once. Raises `SelfsupError` for more processes than GPUs.
    """
    _check(n)
    command = [sys.executable, "-m", "selfsup_fastai.cli", *sys.argv[1:]]
    command += ["--out", str(out)]  # the same for all, even if a folder of that name has been made meanwhile
    port, started = _free_port(), []
    try:
        for k in range(n):
            started.append(_start(command, k, n, port, mark))
        return _watch(started, out, lost)
    except KeyboardInterrupt as stop:
        _pass_on(started, signal.SIGINT if type(stop) is KeyboardInterrupt else signal.SIGTERM)
        raise
    finally:
        _end(started)


def end_with(
    starter: int,  # Id of the process that started this one
    code: int,
) -> None:
    """From now on this process ends, with that exit code, when the one that started it has been killed."""

    def look() -> None:
        while os.getppid() == starter:
            time.sleep(1)
        os._exit(code)

    threading.Thread(target=look, daemon=True).start()


def _check(n: int) -> None:
    gpus, cpus = torch.cuda.device_count(), num_cpus()
    if 0 < gpus < n:
        raise SelfsupError(f"--nproc {n} wants a GPU for each process, and there are {gpus}: take --nproc {gpus}.")
    if not gpus and n > cpus:
        say(f"{n} processes share {cpus} CPU core{'s' * (cpus > 1)}: that takes longer than {cpus} would.")


def _start(command: list[str], k: int, n: int, port: int, mark: str) -> Started:
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, num_cpus() // n)))
    env = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "RANK": k, "LOCAL_RANK": k, "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": port, "OMP_NUM_THREADS": threads, mark: os.getpid()}
    said = tempfile.TemporaryFile("w+") if k else None  # noqa: SIM115  (closed when all have ended)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL if k else None, "stderr": said}
    env = {**os.environ, **{name: str(value) for name, value in env.items()}}
    # In a session of its own: Ctrl-C comes from here, once
    return Started(subprocess.Popen(command, env=env, start_new_session=True, **streams), said)


def _watch(started: list[Started], out: Path, lost: int) -> int:
    """Until all have ended well, or one has not."""
    while any(one.process.poll() is None for one in started):
        time.sleep(LOOK)
        if any(one.process.poll() for one in started):
            break
    _wait(started, GRACE)  # who ended first may only have lost another one
    codes = [one.process.poll() for one in started]
    if not any(codes) or (codes[0] not in (None, 0, lost) and codes[0] > 0):
        return codes[0]
    raise LostProcessError(_what_happened(started, codes, out, lost))


def _what_happened(started: list[Started], codes: list[int | None], out: Path, lost: int) -> str:
    failed = [k for k, code in enumerate(codes) if code and code != lost]
    goes_on = "The same command with --resume goes on." if is_unfinished(out) else "Nothing was kept of the run yet."
    if not failed:
        return f"The processes lost each other. {goes_on}"
    k = next((k for k in failed if codes[k] < 0), failed[0])
    others = "the other was" if len(started) == 2 else "the others were"
    return f"Process {k + 1} of {len(started)} {_ended(codes[k], started[k].said)}; {others} ended. {goes_on}"


def _ended(code: int, said: IO | None) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps as memory ran out" if -code == signal.SIGKILL else ""
        return f"was killed ({name}{memory})"
    said.seek(0)
    lines = [line.strip() for line in said if line.strip()]
    return f"failed: {lines[-1].removeprefix('selfsup: ').rstrip('.')}" if lines else f"failed with exit code {code}"


def _pass_on(started: list[Started], number: signal.Signals) -> None:
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(number)
    _wait(started, STOPPING)


def _wait(started: list[Started], seconds: float) -> None:
    """Until all have ended, or for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(one.process.poll() is None for one in started):
        time.sleep(LOOK)


def _end(started: list[Started]) -> None:
    """Whoever is still there, and the workers of all."""
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        if one.said:
            one.said.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
