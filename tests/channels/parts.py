"""Parts of other processes in a channel, as it were."""

from __future__ import annotations

import os

from torchwq.channels.line import SENT, Line, open_lines


def another(line: Line) -> Line:
    """A second part, which would normally be another process's."""
    fds = [*line._connection.handover(), *line.table.handover()]
    if line._room >= 0:
        fds.append(line._room)
    return Line(line.name, [os.dup(fd) for fd in fds], line.capacity)


def write_and_die(line: Line) -> None:
    """What a process leaves that is killed after it has written."""
    part = another(line)
    part.table.add(SENT, 1)
    part.table.abandon()
    part.left = True
    open_lines.discard(part)
    part._connection.close()
