"""The channel: ``handle`` is what users hold, ``core`` what all handles of one process share, ``here`` and ``line`` the
two ways that items take: within this process, and between processes."""

from .handle import Channel, ChannelStatistics, channel
from .state import ChannelState

__all__ = ["Channel", "ChannelState", "ChannelStatistics", "channel"]
