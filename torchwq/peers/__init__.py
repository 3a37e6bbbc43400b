"""Who is there: words and locks that processes share, and the table of those who have something open.

Nothing here knows what a queue, a channel or a block is."""
