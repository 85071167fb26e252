"""Processes that stand for the ranks of a group, in which tests call functions."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

START_SECONDS, SECONDS = 300, 120  # in which ranks must be there, and calls must end


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
        self._answers(START_SECONDS)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        return self._answers(SECONDS)

    def _answers(self, seconds: int) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(seconds):
                self.stop()
                raise TimeoutError(f"rank {rank} has not answered for {seconds} s")
            answers.append(pipe.recv())
        for rank, (failed, result) in enumerate(answers):
            if failed:
                raise AssertionError(f"rank {rank}: {result}")
        return [result for _, result in answers]

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
    pipe.send((False, None))
    while True:
        function, args, kwargs = pipe.recv()
        try:
            pipe.send((False, function(*args, **kwargs)))
        except BaseException:  # pytest's failures are no Exception
            pipe.send((True, traceback.format_exc()))


_running: dict[int, Ranks] = {}


def ranks(count: int) -> Ranks:
    """So many, which all tests share: to start them takes longer than most tests."""
    if count not in _running or not all(p.is_alive() for p in _running[count].processes):
        _running[count] = Ranks(count)
    return _running[count]
