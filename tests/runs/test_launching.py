"""`selfsup pretrain --nproc`: what becomes of all processes when one ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from selfsup_fastai.callbacks.state import State, StateFolder
from selfsup_fastai.cli import app
from selfsup_fastai.errors import LostProcessError, SelfsupError
from selfsup_fastai.runs import launching
from selfsup_fastai.runs.folder import STATE
from selfsup_fastai.runs.launching import launch
from tests.conftest import write_images

LOST = 75


@pytest.fixture
def stands_in(tmp_path, monkeypatch):
    """Lets a shell script stand for the command; it is told its arguments and its place among the processes."""

    def put(script: str) -> None:
        file = tmp_path / "program"
        file.write_text("#!/bin/sh\n" + script)
        file.chmod(0o755)
        monkeypatch.setattr(launching.sys, "executable", str(file))
        monkeypatch.setattr(launching.sys, "argv", ["selfsup", "pretrain", "images", "--nproc", "3"])

    return put


def start(tmp_path: Path, n: int = 3) -> int:
    return launch(n, tmp_path / "out", "MARK", LOST)


def test_what_cannot_be_is_said_before_anything_is_started(tmp_path, monkeypatch):
    monkeypatch.setattr("selfsup_fastai.runs.launching.launch", lambda *args: pytest.fail("started"))
    write_images(tmp_path / "images", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "encoder.safetensors").touch()
    line = ["pretrain", str(tmp_path / "images"), "--nproc", "2"]
    for more, said in (
        (["--out", str(tmp_path / "new"), "--precision", "fp16"], "fp16 needs a GPU"),
        (["--out", str(tmp_path / "out")], "holds an encoder of an earlier run"),
    ):
        done = CliRunner().invoke(app, [*line, *more])
        assert done.exit_code == 1 and said in done.output
    assert not (tmp_path / "new").exists()


def test_each_is_told_its_place_and_all_the_same_folder(stands_in, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launching, "num_cpus", lambda: 7)
    stands_in(f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MARK $OMP_NUM_THREADS $MASTER_PORT $*" > {tmp_path}/$RANK')
    assert start(tmp_path) == 0
    told = [(tmp_path / str(k)).read_text().split() for k in range(3)]
    assert [line[:5] for line in told] == [[str(k), str(k), "3", str(os.getpid()), "2"] for k in range(3)]
    assert len({line[5] for line in told}) == 1
    command = f"-m selfsup_fastai.cli pretrain images --nproc 3 --out {tmp_path}/out".split()
    assert all(line[6:] == command for line in told)


def test_one_killed_ends_the_others_with_one_line(stands_in, tmp_path):
    stands_in(f'[ "$RANK" = 1 ] && kill -9 $$; echo $$ > {tmp_path}/pid-$RANK; exec sleep 300')
    begun = time.monotonic()
    said = r"Process 2 of 3 was killed \(SIGKILL, perhaps as memory ran out\); the others were ended. Nothing was kept"
    with pytest.raises(LostProcessError, match=said):
        start(tmp_path)
    assert time.monotonic() - begun < 60
    for rank in (0, 2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid-{rank}").read_text()), 0)


def test_the_one_that_failed_is_named_and_not_those_that_lost_it(stands_in, tmp_path):
    StateFolder(tmp_path / "out" / STATE).write(State({}, {}))
    stands_in('[ "$RANK" = 2 ] || exit 75; sleep 0.5; echo some line >&2; echo "selfsup: No space left." >&2; exit 1')
    said = "^Process 3 of 3 failed: No space left; the others were ended. The same command with --resume goes on.$"
    with pytest.raises(LostProcessError, match=said):
        start(tmp_path)


def test_the_first_one_has_said_itself_why_it_failed(stands_in, tmp_path):
    stands_in('[ "$RANK" = 0 ] && exit 1; sleep 300')
    assert start(tmp_path) == 1


@pytest.mark.parametrize("stop, number", [(KeyboardInterrupt, "INT"), (type("T", (KeyboardInterrupt,), {}), "TERM")])
def test_a_signal_is_passed_on_and_waited_for(stop, number, stands_in, tmp_path, monkeypatch):
    stands_in(
        f'trap "sleep 0.5; echo saved > {tmp_path}/$RANK; exit" {number}; touch {tmp_path}/on-$RANK; sleep 9 & wait'
    )

    def stopped(*_):
        while len([*tmp_path.glob("on-*")]) < 3:
            time.sleep(0.05)
        raise stop

    monkeypatch.setattr(launching, "_watch", stopped)
    with pytest.raises(stop):
        start(tmp_path)
    assert [(tmp_path / str(k)).read_text() for k in range(3)] == ["saved\n"] * 3


def test_gpus_and_cores_are_counted_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SelfsupError, match="--nproc 3 wants a GPU for each process, and there are 2: take --nproc 2"):
        start(tmp_path)
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(launching, "num_cpus", lambda: 2)
    launching._check(3)
    assert "3 processes share 2 CPU cores" in capsys.readouterr().err
    launching._check(2)
    assert not capsys.readouterr().err


def command(folder: Path, out: str, *more: str) -> list[str]:
    words = f"pretrain images --task simclr --arch resnet10t --size 24 --bs 4 --epochs 12 --nproc 2 --out {out}"
    return [sys.executable, "-m", "selfsup_fastai.cli", *words.split(), *more]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_who_was_started_ends_with_the_one_that_started_it(tmp_path):
    program = "import os, sys, time; from selfsup_fastai.runs.launching import end_with; end_with(os.getppid(), 75); "
    program += f"open({str(tmp_path / 'on')!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    starter = subprocess.Popen(["sh", "-c", '"$0" -c "$1"; true', sys.executable, program])
    while not ((tmp_path / "on").exists() and (tmp_path / "on").read_text()):
        time.sleep(0.1)
    child = int((tmp_path / "on").read_text())
    os.kill(child, 0)
    starter.kill()
    starter.wait()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("it is still there")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_a_killed_run_of_two_goes_on_and_ends_bit_for_bit(tmp_path):
    write_images(tmp_path / "images", 30, (24, 24))  # 3 to validate with, one and two of each
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    kwargs = {"cwd": tmp_path, "env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    whole = subprocess.run(command(tmp_path, "whole"), timeout=900, **kwargs)
    assert whole.returncode == 0 and whole.stdout == "whole/encoder.safetensors\n", whole.stderr
    run, metrics = subprocess.Popen(command(tmp_path, "out"), **kwargs), tmp_path / "out" / "metrics.csv"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert run.poll() is None
        time.sleep(0.02)
    others = children(run.pid)
    os.kill(others[1], signal.SIGKILL)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 1
    assert said.splitlines()[-1] == (
        "selfsup: Process 2 of 2 was killed (SIGKILL, perhaps as memory ran out); the other was ended. The same "
        "command with --resume goes on."
    )
    assert not any(Path(f"/proc/{pid}").exists() for pid in others)
    assert not (tmp_path / "out" / "encoder.safetensors").exists()
    again = subprocess.run(command(tmp_path, "out", "--resume"), timeout=900, **kwargs)
    assert again.returncode == 0 and "The run goes on in epoch" in again.stderr
    for name in ("encoder.safetensors", "metrics.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
