"""What a peer can receive. The encoder of a message asks for this, and not who the peer is.

Each kind of peer is one value. An object that leads to a peer has it as ``peer``: a worker and its owner, each side of
a queue, each backend of a channel. A message contains only what all its possible readers can receive.

Invariant: each capability includes those after it. An object of the same process needs no sharing; shared memory has no
name, so its descriptor has to be passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a peer is capable of.

    Attributes:
        same_process: it is in this process, so a message may hold the object itself.
        shares_memory: it is on this machine, so a message may refer to memory that both sides see. Others get values.
        passes_descriptors: the connection to it carries file descriptors, and so handles on queues, channels and files.
    """

    same_process: bool
    shares_memory: bool
    passes_descriptors: bool


SAME_PROCESS: Final = Capabilities(True, True, True)
SAME_MACHINE: Final = Capabilities(False, True, True)
OTHER_MACHINE: Final = Capabilities(False, False, False)
