"""Moves messages (bytes and file descriptors) between processes, without a look at their content.

Begin with ``connection``: it puts an endpoint (``seqpacket`` or ``stream``, made by ``kinds``), an ``outbox`` and a
``waiting.Waiter`` together. ``reactor`` is the one background thread of a process; ``namespace`` and ``directory`` let
processes find each other by name.
"""
