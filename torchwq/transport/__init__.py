"""Moves messages (bytes and file descriptors) between processes; knows nothing of what is in them.

The bottom layer. ``seqpacket`` and ``stream`` are the two kinds of :class:`~torchwq.transport.endpoint.Endpoint`, and
``kinds`` chooses and makes them; ``outbox`` keeps what a full socket does not take; ``waiting`` is the one place where
a thread sleeps for a message; ``reactor`` is the one background thread of a process; ``namespace`` and ``directory``
let processes find each other by name.
"""
