"""Puts the end of a worker into words: who, by what, with what in hand, and what to look at."""

from __future__ import annotations

import signal

from ..errors import WorkerDied

_MEMORY_HINT = (
    "SIGKILL is what the kernel sends when memory runs out: look at its log (dmesg) and at the memory limit of the "
    "machine, container or cgroup"
)


def signal_of(exitcode: int | None) -> signal.Signals | None:
    if exitcode is None or exitcode >= 0:
        return None
    try:
        return signal.Signals(-exitcode)
    except ValueError:
        return None


def died(
    *,
    mapid: int | None = None,
    pid: int | None = None,
    exitcode: int | None = None,
    reason: str = "",
    in_hand: str = "",
) -> WorkerDied:
    """The error for a worker that ended without having finished."""
    who = f"worker {mapid}" if mapid is not None else "a worker"
    if pid is not None:
        who += f" (pid {pid})"
    number = signal_of(exitcode)
    if reason:
        how = f"died: {reason}"
    elif number is not None:
        how = f"was killed by {number.name}"
    elif exitcode is not None and exitcode < 0:
        how = f"was killed by signal {-exitcode}"
    elif exitcode == 0:
        how = "ended before it had answered, by sys.exit or os._exit, with exit status 0"
    elif exitcode is not None:
        how = f"ended with exit status {exitcode}, by sys.exit or os._exit, before it had finished"
    else:
        how = "died"
    text = f"{who} {how}" + (f", with {in_hand} in hand" if in_hand else "")
    if number is signal.SIGKILL:
        text += f". {_MEMORY_HINT}"
    return WorkerDied(text, mapid=mapid, pid=pid, signal=number, exitcode=exitcode)
