"""Shared memory: blocks for tensors and large payloads, when they may be used again, and torch's shared storages."""
