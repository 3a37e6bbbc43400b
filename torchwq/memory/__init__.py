"""Shared memory: blocks for large payloads, the counters of a queue, and torch's shared storages."""
