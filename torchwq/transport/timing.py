"""How long the transport waits: each number once, with its reason. In seconds, unless a name says otherwise.

``*_TIMEOUT`` ends in an error or in going on without; ``*_INTERVAL`` is the pause of a loop that no event can wake.
None of them decides whether a message arrives, or in which order: a wrong one costs time only.
"""

from __future__ import annotations

from typing import Final

#: The longest sleep before a reader tries again. The kernel wakes one sleeper for a message, and that process may be
#: killed before it takes the message; half of the second within which users learn of a death.
MAX_SLEEP: Final = 0.5
#: The same in the native part, which looks each ``MAX_SLEEP`` whether a message is there, and wakes nobody if not.
MAX_NATIVE_SLEEP: Final = 10.0
#: The same for threads that wake each other. They lose no wake-up; this bounds what a fault of ours would cost.
MAX_PARKED: Final = 1.0
#: How long a reader tries again before it sleeps. Waking a sleeper costs tens of microseconds, so a longer spin wastes
#: more processor time than it saves; a spin below the minimum is none.
MAX_SPIN_NS: Final = 100_000
MIN_SPIN_NS: Final = 10_000
#: For how long a reader does not spin after another thread has taken its core: at first, and at most. A spin that finds
#: a message halves it.
MIN_SPIN_PAUSE_NS: Final = 1_000_000
MAX_SPIN_PAUSE_NS: Final = 100_000_000
#: A sleep shorter than this would have been better spent spinning.
SHORT_SLEEP_NS: Final = 400_000

#: The pause of loops that wait for another thread or process in a rare case: short for a person, long for a processor.
POLL_INTERVAL: Final = 0.001
#: The pause of a thread that submits messages faster than the sending thread sends them: it lets that one catch up.
SUBMIT_PAUSE: Final = 0.001
#: How long a close waits for the sending thread. Sending takes no time, so a thread that is at it for longer is stuck,
#: perhaps in a user's finalizer that waits for this very close.
CLAIM_TIMEOUT: Final = 2.0
#: How long ``send_with_timeout`` waits for room before its caller looks at the state of things again.
SEND_TIMEOUT: Final = 0.02

#: How long a process that opens a name waits for the reply of a living owner. An owner that takes longer is stopped, or
#: has no descriptor free.
REPLY_TIMEOUT: Final = 30.0
#: How long an owner without a free descriptor pauses before it accepts again: no event tells that one is free.
ACCEPT_INTERVAL: Final = 0.1
#: How long a process pauses that has connected to an owner and got no reply, before it connects again.
RECONNECT_INTERVAL: Final = 0.01
#: How long a process waits for the lock over a namespace's names. A holder that keeps it longer is stopped.
LOCK_TIMEOUT: Final = 10.0
#: A namespace folder younger than this may be one whose maker has not locked it yet, so it is not removed.
MIN_ORPHAN_AGE: Final = 10.0

#: How long an interrupted start of the reactor's thread waits to learn whether the thread runs.
THREAD_START_TIMEOUT: Final = 0.2
#: How long the end of the process waits for the cleanup that is under way: it must not hang in a user's code.
CLEANUP_TIMEOUT: Final = 1.0
