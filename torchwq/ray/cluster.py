"""Joins the running Ray cluster, or starts one on this machine."""

from __future__ import annotations

import importlib
import logging
import os
import threading
from types import ModuleType
from typing import Any, Final

from ..transport.waiting import cores

log = logging.getLogger("torchwq")

#: A cluster of this machine alone has so many places for workers, and four for each core if that is more. Ray counts
#: places; it does not keep a worker on a core. Workers that wait need more places than there are cores.
_MIN_PLACES: Final = 16

_lock = threading.Lock()


def ray() -> ModuleType:
    """The module. Raises ImportError, which names the extra, if Ray is not installed."""
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(f'backend="ray" needs Ray: pip install "torchwq[ray]" ({error})') from error


def join(address: str | None) -> Any:
    """Return the module ``ray``, connected to a cluster.

    A connection that the program has made already serves. Else this joins the cluster at ``address``, or, if that is
    None, the one that ``RAY_ADDRESS`` or the machine's running cluster gives. If there is none, it starts one on this
    machine, for this process, which only this machine can reach, and says so.

    Raises ImportError; ConnectionError if there is no cluster at ``address``, or at ``RAY_ADDRESS``.
    """
    module: Any = ray()
    with _lock:
        if module.is_initialized():
            return module
        address = address or os.environ.get("RAY_ADDRESS")
        try:
            module.init(address=address or "auto", logging_level="WARNING")
            return module
        except ConnectionError:
            if address is not None:
                raise
        places = max(_MIN_PLACES, 4 * cores())
        module.init(
            "local", num_cpus=places, include_dashboard=False, logging_level="WARNING", _node_ip_address="127.0.0.1"
        )
        log.warning(
            "torchwq: no Ray cluster is running, so one was started on this machine, with places for %d workers. "
            "It ends with this process. To use another: ray.init(address=...) first, or set RAY_ADDRESS.",
            places,
        )
        return module
