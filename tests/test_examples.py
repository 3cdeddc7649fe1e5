"""The programs in docs/examples do what they say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfsup_fastai.encoders.checkpoint import read_card
from tests.conftest import ROOT, write_images


def shards_run(out: Path, **kwargs) -> subprocess.Popen:
    """The example of shards, on small images, with a state after each batch."""
    small = "--epochs 3 --size 32 --bs 9 --per-shard 7 --arch resnet10t --every 0 --workers 0".split()
    line = [sys.executable, "-W", "ignore", str(ROOT / "docs/examples/shards.py"), "photos", str(out), *small]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.slow
def test_a_killed_run_over_shards_ends_as_if_nothing_had_happened(tmp_path):
    write_images(tmp_path / "photos", 60, (40, 48))
    whole = shards_run(tmp_path / "whole")
    _, said = whole.communicate(timeout=300)
    assert whole.returncode == 0 and "goes on" not in said

    out = tmp_path / "killed"
    for _ in range(2):
        state = out / "state" / "state.safetensors"
        before = state.stat().st_mtime_ns if state.exists() else 0
        run, until = shards_run(out, start_new_session=True), time.monotonic() + 200
        while not (state.exists() and state.stat().st_mtime_ns > before) and time.monotonic() < until:
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGKILL)  # with its worker processes, as when a machine goes down
        run.communicate(timeout=30)
        assert run.returncode == -signal.SIGKILL and not (out / "encoder.safetensors").exists()

    last = shards_run(out)
    _, said = last.communicate(timeout=300)
    assert last.returncode == 0 and "The run goes on in epoch" in said
    one, other = (load_file(folder / "encoder.safetensors") for folder in (tmp_path / "whole", out))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    cards = [read_card(folder / "encoder.safetensors") for folder in (tmp_path / "whole", out)]
    assert cards[0]["data"] == cards[1]["data"] and cards[0]["data"]["images"] == [54, 6]
