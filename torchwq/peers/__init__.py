"""Which processes have a thing open: words and locks that processes share, and the table of peers.

No module here knows what a queue, a channel or a block is."""
