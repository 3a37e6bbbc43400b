"""Benchmarks of torchwq against its peers: `make bench`, or `python -m benchmarks.queue`."""
