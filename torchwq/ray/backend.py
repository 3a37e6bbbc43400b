"""The backend whose workers are actors on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..marshalling.codec import Encoded
from ..marshalling.value_message import ValueMessage
from ..transport import local
from ..transport.capabilities import OTHER_MACHINE
from ..transport.local import LocalEndpoint
from ..transport.mailbox import Mailbox
from ..workers import backend
from ..workers.info import WorkerInfo
from ..workers.worker import OnEnd, OnMessage, Worker
from . import cluster, worker
from .transit import Shared, pack


@dataclass(frozen=True, eq=False)
class Backend(backend.Backend):
    """Workers that are actors on a Ray cluster, for the ``backend`` of ``map``, of the background classes and loaders.

    ``backend="ray"`` is the same as ``backend=torchwq.ray.Backend()``.

    Args:
        num_cpus: how many logical CPUs of its node each worker takes; 0.5 puts two workers on one.
        resources: further resources that a worker takes, for example ``{"decoder": 1}``.
        runtime_env: the worker's environment, as Ray has it: ``{"pip": [...], "env_vars": {...}}``. A folder of this
            machine goes to the others with ``ray.init(runtime_env={"working_dir": ...})``.
        scheduling_strategy: ``"SPREAD"`` spreads workers over nodes, ``"DEFAULT"`` packs them; or one of the objects of
            ``ray.util.scheduling_strategies``.
        address: of the cluster to join, if the program has not joined one already. None: the one that ``RAY_ADDRESS``
            names, or that runs on this machine, or else a new one on this machine, which ends with the program.

    Raises:
        ImportError: (by a use) Ray is not installed: ``pip install "torchwq[ray]"``.
        ConnectionError: (by a use) there is no cluster at ``address``.

    Source: the options of Ray's actors.
    """

    num_cpus: float = 1
    resources: Mapping[str, float] | None = None
    runtime_env: Mapping[str, Any] | None = None
    scheduling_strategy: Any = "SPREAD"
    address: str | None = None

    name = "ray"
    peer = OTHER_MACHINE
    can_be_killed = True
    options = frozenset()

    def prepare(self) -> None:
        cluster.join(self.address)  # Ray wants that from the main thread

    def start(self, info: WorkerInfo, entry: str, on_message: OnMessage, on_end: OnEnd, group: int) -> Worker:
        ray = cluster.join(self.address)
        options: dict[str, Any] = {
            "num_cpus": self.num_cpus,
            "scheduling_strategy": self.scheduling_strategy,
            "max_restarts": 0,  # whoever has started the worker decides whether another takes its place
            "max_task_retries": 0,  # no message is delivered twice
        }
        if self.resources:
            options["resources"] = dict(self.resources)
        if self.runtime_env:
            options["runtime_env"] = dict(self.runtime_env)
        return worker.RayWorker(ray, options, info, entry, on_message, on_end, group)

    def places(self) -> int:
        ray = cluster.join(self.address)
        return max(1, int(ray.cluster_resources().get("CPU", 1) / max(self.num_cpus, 0.01)))

    def connect(self) -> backend.Ends:
        ours, theirs = _OurEnd(), LocalEndpoint(Mailbox())
        local.connect(ours, theirs)
        return ours, theirs

    def attach(self, end: LocalEndpoint, worker: Worker) -> None:
        end.peer.worker = worker  # type: ignore[attr-defined]

    def share(self, payload: Encoded) -> Encoded:
        """Put a message that several workers get into the object store, once."""
        if isinstance(payload, ValueMessage) and payload.objects:
            return payload  # a handle is another object for each worker
        return Shared(cluster.join(self.address).put(pack(payload)))

    def warm_up(self, wait: bool) -> None:
        cluster.join(self.address)


class _OurEnd(LocalEndpoint):
    """The loader's end of a connection to its worker: messages go over the worker's own connection."""

    def __init__(self) -> None:
        super().__init__(Mailbox())
        self.worker: Worker | None = None

    def send(self, message: Any) -> None:
        if self._closed or self.worker is None or not self.worker.send(message):
            raise BrokenPipeError("the worker has ended")

    def take(self) -> tuple[Any, list[int]] | None:
        found = super().take()
        return None if found is None else (found[0], [])

    def close(self) -> None:
        super().close()
        if isinstance(self.worker, worker.RayWorker):
            self.worker.close_connection()
