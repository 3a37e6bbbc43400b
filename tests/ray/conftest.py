"""A real Ray cluster of several nodes in this machine. Every node binds to 127.0.0.1 and has a small object store."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

# Before Ray is imported: it would put the address of a network in the place of 127.0.0.1.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DISABLE_IMPORT_WARNING"] = "1"

ray: Any = pytest.importorskip("ray", reason="needs Ray")

from ray.cluster_utils import Cluster as RayCluster  # noqa: E402

from torchwq.workers.worker import active_workers  # noqa: E402

NODES = 3
PLACES = 4
_OPTIONS: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 << 20, "num_cpus": PLACES}


class Cluster:
    """The cluster, and what tests do with it."""

    def __init__(self) -> None:
        self._cluster = RayCluster(
            initialize_head=True,
            head_node_args={**_OPTIONS, "include_dashboard": False, "resources": {"head": 100}},
        )
        for _ in range(NODES - 1):
            self._cluster.add_node(**_OPTIONS)
        self.address: str = self._cluster.address

    def add_node(self, **resources: float) -> Any:
        """A further node, which has these resources."""
        node = self._cluster.add_node(**_OPTIONS, resources=resources)
        self._cluster.wait_for_nodes()
        return node

    def remove_node(self, node: Any) -> None:
        """Kill its processes."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    # Not in the tests' output: the cluster tells there which workers it sees die.
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(cluster: Cluster) -> Iterator[None]:
    """In place of the other one: this process has connections to Ray, which come and go, and its processes below it."""
    yield
    until = time.monotonic() + 20
    while True:
        threads = [each.name for each in threading.enumerate() if each.name.startswith("torchwq-ray")]
        # Of nodes that are gone, Ray counts on for a while.
        dead = not all(node["Alive"] for node in ray.nodes())
        busy = 0 if dead else ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
        if not threads and not active_workers() and not busy:
            return
        assert time.monotonic() < until, f"left behind: {threads}, {active_workers()}, {busy} places"
        time.sleep(0.05)
