"""What two peers can give each other: whoever puts a message together asks for this, and not for who the peer is.

Each kind of peer that exists is one value, and an object that leads to a peer has it as ``peer``: a worker as its owner
sees it and the owner as a worker sees it, each side of a queue, each way of a channel. A message has what all who may
read it can take.

Invariant: each capability includes those after it. What is in the same process needs no sharing; memory that is shared
has no name, so its descriptor has to be passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a peer is capable of.

    Attributes:
        same_process: it is in this process: a message may carry the object itself.
        shares_memory: it is on this machine: a message may refer to memory that both sides see. Others get values.
        passes_descriptors: what leads to it carries file descriptors, and so handles on queues, channels and files.
    """

    same_process: bool
    shares_memory: bool
    passes_descriptors: bool


SAME_PROCESS: Final = Capabilities(True, True, True)
SAME_MACHINE: Final = Capabilities(False, True, True)
OTHER_MACHINE: Final = Capabilities(False, False, False)
