"""One direction of messages, and the room that it has. See :mod:`torchwq.pipe.pipe`."""
