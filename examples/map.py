"""`torchwq.map` runs one function in several worker processes and collects what they return.

Every worker gets the same arguments and, as the last one, its own number, the `mapid`. An error in a worker
keeps its type and brings the worker's traceback along: `join` raises it when all workers have ended,
`check_errors` as soon as it is there.

    python examples/map.py
"""

import os
import time
import traceback

import torch

import torchwq


def add_up(numbers: torch.Tensor, workers: int, mapid: int) -> int:
    """The sum of every `workers`-th number: each worker starts at its own."""
    return int(numbers[mapid::workers].sum())


def reciprocal(seconds: float, mapid: int) -> float:
    """1 / mapid. Worker 0 fails at once, the others take their time."""
    if mapid > 0:
        time.sleep(seconds)
    return 1 / mapid


def indented(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(f"    {line}" for line in lines)


# join returns one result per worker, in the order of their mapids.
numbers = torch.arange(1001)
sums = torchwq.map(4, add_up, numbers, 4).join()
print("sums of four workers:", sums, "together:", sum(sums))

# A function that takes no further argument is called without a mapid.
pids = torchwq.map(2, os.getpid).join()
print("two processes beside this one:", len({os.getpid(), *pids}) == 3)

# join waits for all workers and then raises the error of the first that failed.
try:
    torchwq.map(3, reciprocal, 0.1).join()
except ZeroDivisionError as error:
    print("join raised:")
    print(indented(error))

# check_errors does not wait. It hands an error out once; join then returns the results of the others.
workers = torchwq.map(3, reciprocal, 0.5)
failed = False
while not failed:
    try:
        workers.check_errors()
        time.sleep(0.01)  # whatever else there is to do
    except ZeroDivisionError as error:
        failed = True
        print(f"check_errors raised {error!r} while the others worked")
print(f"join then returned {workers.join()}")
