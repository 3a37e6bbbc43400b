"""What the handles that users hold have in common: how one is read, and how one travels.

Queues, channels, mutexes and the loader say here only in what they differ.
"""
