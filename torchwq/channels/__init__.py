"""The channel: ``handle`` is what users hold, ``core`` what all handles of one process share, ``local`` and ``socket``
the two backends: within this process, and between processes."""

from .handle import Channel, ChannelStatistics, channel
from .state import ChannelState

__all__ = ["Channel", "ChannelState", "ChannelStatistics", "channel"]
