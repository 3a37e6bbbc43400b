"""Workers on a Ray cluster: ``backend="ray"``, or ``backend=torchwq.ray.Backend(...)`` where the defaults do not serve.

Ray finds the places, starts the workers there, carries the messages and notices deaths. Each worker is an actor, and
all messages between it and its owner are calls of that actor and their results, so torchwq opens no connection of its
own between machines. Tensors travel by value.

Needs the extra: ``pip install "torchwq[ray]"``.
"""

from .backend import Backend

__all__ = ["Backend"]
