"""Processes that stand for the ranks of a group, in which tests call functions."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 60  # in which a call must end: a test that hangs has failed


class Ranks:
    """``call`` runs a function of a module in all of them, and gives what each returned."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count, port), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        return [self._answer(rank) for rank in range(len(self.pipes))]

    def _answer(self, rank: int) -> Any:
        if not self.pipes[rank].poll(SECONDS):
            self.stop()
            raise TimeoutError(f"rank {rank} has not answered for {SECONDS} s")
        failed, result = self.pipes[rank].recv()
        if failed:
            raise AssertionError(f"rank {rank}: {result}")
        return result

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Any, rank: int, count: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    os.environ["DLATTN_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
    while True:
        function, args, kwargs = pipe.recv()
        try:
            pipe.send((False, function(*args, **kwargs)))
        except Exception:
            pipe.send((True, traceback.format_exc()))


@contextlib.contextmanager
def ranks(count: int) -> Iterator[Ranks]:
    found = Ranks(count)
    try:
        yield found
    finally:
        found.stop()
