"""What two gloo processes find, each of which runs a function of a test file: `of_two(__file__, "function", folder)`.

`run(globals())` at the end of that file makes it a program, which calls the function with the folder and keeps, for
each process, the tensors that it returns.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def started(file: str, name: str, folder: Path, *args: str, n: int = 2) -> list[subprocess.Popen]:
    """`n` processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(n)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SELFSUP_CACHE": str(folder / "cache")}
    command = [sys.executable, file, name, str(folder), *args]
    pipe = {"stderr": subprocess.PIPE, "text": True, "cwd": folder}
    return [subprocess.Popen(command, env={**env, "RANK": str(k), "LOCAL_RANK": str(k)}, **pipe) for k in range(n)]


def of_two(file: str, name: str, folder: Path, *args: str) -> list[dict[str, torch.Tensor]]:
    """What the function returned in each of two processes."""
    runs = started(file, name, folder, *args)
    try:
        said = [run.communicate(timeout=900)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.communicate()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def run(functions: dict[str, Callable]) -> None:
    """For `if __name__ == "__main__"`."""
    name, folder, *args = sys.argv[1:]
    found = functions[name](Path(folder), *args)
    torch.save(found, Path(folder) / f"{name}-{os.environ['RANK']}.pt")
