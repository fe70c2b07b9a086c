"""Real processes that train together: a test's function in several, and scripts that are killed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.torch_version import TorchVersion

from dynalora_optim._base.packages import installed

TIMEOUT = timedelta(seconds=60)
# Ranks are forked from a server that has imported these, and has done nothing else: importing takes
# a new process far longer than all that the tests do in it.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
if METHOD == "forkserver":
    multiprocessing.set_forkserver_preload(
        [
            *("torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch.testing"),
            *("dynalora_optim", "dynalora_adapters", "transformers.trainer"),
        ]
    )


# docs/versions.md says so too. Older ones do not take these options, or cannot load the state.
ACCELERATE = TorchVersion(installed("accelerate").replace("not installed", "0"))
NEEDS_NEW_ACCELERATE = pytest.mark.skipif(
    ACCELERATE < "1.15" or torch.__version__ < (2, 11),
    reason="FSDP2 through Accelerate needs accelerate 1.15 and torch 2.11",
)

# torch 2.8 clips the gradients of sharded parameters by a factor that it has rounded to float32,
# whatever the optimizer.
CLIPPED_SHARDS = 1e-9 if torch.__version__ >= (2, 11) else 1e-6


def on_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[Any]:
    """Return what ``function(rank, *arguments)`` returns, or the exception it raises, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _run, (folder, ranks, function, arguments), nprocs=ranks, start_method=METHOD
        )
        return [pickle.loads(Path(folder, f"{rank}").read_bytes()) for rank in range(ranks)]


def returned_on_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what ``function(rank, *arguments)`` returns, by rank, or raise what it raises."""
    found = on_ranks(function, *arguments)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def _run(rank: int, folder: str, ranks: int, function: Callable[..., Any], arguments: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=TIMEOUT,
    )
    try:
        assert torch.distributed.get_world_size() == ranks
        result: Any = function(rank, *arguments)
    except Exception as error:
        traceback.print_exc()
        result = type(error)(str(error))
    Path(folder, f"{rank}").write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()


def environment() -> dict[str, str]:
    """What the examples run in here: offline, on the CPU, one thread to a process."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def start(script: Path, *arguments: object, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start ``script`` as a user would, by itself or by what stands before it on a command line."""
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, (script, *arguments))],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def accelerate_launch(processes: int) -> list[str]:
    """The launcher of accelerate, for so many processes on the CPU."""
    # `--cpu --num_processes 2` alone silently runs a single process (accelerate 1.15).
    return [
        *("-m", "accelerate.commands.launch", "--multi_gpu" if processes > 1 else "--cpu"),
        *("--num_processes", str(processes), "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", _free_port()),
    ]


def torchrun(processes: int) -> list[str]:
    """The launcher of torch, for so many processes."""
    port = ["--master_port", _free_port()]
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *port]


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def finished(process: subprocess.Popen[str]) -> str:
    """Return what ``process`` printed, when it has succeeded."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_when(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """SIGKILL ``process`` and all that it started as soon as ``ready()``, or when time is up."""
    end = time.monotonic() + 300
    try:
        while not ready():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end, "it is not ready after five minutes"
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            _kill_all(process)
    assert process.returncode == -signal.SIGKILL


def _kill_all(process: subprocess.Popen[str]) -> None:
    import psutil

    launcher = psutil.Process(process.pid)
    workers = launcher.children(recursive=True)  # in sessions of their own: killed one by one
    for victim in [launcher, *workers]:
        victim.send_signal(signal.SIGKILL)
    psutil.wait_procs(workers, timeout=30)
    process.communicate()
