from __future__ import annotations

import os
import signal
import threading
import time

import torch

import torchwq


def pid_and_wait(queue: torchwq.WorkQueue) -> None:
    queue.write((os.getpid(), os.getppid()))
    queue.read()


def map_and_wait(queue: torchwq.WorkQueue) -> None:
    """A worker that is an owner: its own worker reports too."""
    queue.write((os.getpid(), os.getppid()))
    torchwq.map(1, pid_and_wait, queue)
    queue.read()
    time.sleep(60)


def chaos(queue: torchwq.WorkQueue) -> None:
    """Answer, and die now and then in every way there is."""
    import random

    for question in queue:
        fate = random.random()
        if fate < 0.01:
            os.kill(os.getpid(), random.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM]))
        elif fate < 0.015:
            os._exit(7)
        elif fate < 0.02:
            raise RuntimeError("chaos")
        queue.write(question)


def is_a_thread() -> bool:
    """Whether this worker is a thread of the process that has started it."""
    return threading.current_thread() is not threading.main_thread()


def fill_and_sum(tensor: torch.Tensor, mapid: int) -> float:
    return float(tensor.fill_(mapid + 1).sum())
