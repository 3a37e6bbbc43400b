"""What the owner of a queue and its workers' handles say to each other over their links.

A link carries no questions and no answers: those go over the queue's own connection, which all workers share. It
carries what concerns one handle, and it is what tells that the process at its other end is gone.
"""

from __future__ import annotations

import struct
from typing import Final

#: From the owner, first of all: ``Q``, the handle's slot on the board, the queue's capacity (-1 for none), and as which
#: sender, and for how many blocks, it may make promises: see Note [in-band promises].
SLOT: Final = struct.Struct("=cQqQQ")
#: From a handle that came as a ticket: ``H`` and its process id.
HELLO: Final = struct.Struct("=cQ")
#: It is leaving, and has answers that the socket does not take: the owner makes room.
LEAVING: Final = b"L"
#: It has left; its last answer is in the socket.
GOODBYE: Final = b"B"
#: The function of its worker has failed; what follows is pickled: see ``failing``. The handle may still be open.
FAILED: Final = b"F"
#: It has left, as with ``GOODBYE``, but by an error that may yet turn out to be a failure of its worker's function.
IN_DOUBT: Final = b"D"
#: It has taken a question while the owner waits for that.
TOOK: Final = b"T"
#: With a descriptor: the link of another handle, which it passes on.
ADOPT: Final = b"A"
