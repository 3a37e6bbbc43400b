"""What the handles that users hold have in common: how a handle is read, and how it travels.

Queues, channels, mutexes and the loader add only what is their own.
"""
