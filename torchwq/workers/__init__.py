"""Starts workers, watches them, and ends them: processes in a clean environment, or threads.

``backend`` says what a kind of workers has to offer, and has the table of them; ``processes`` and ``threads`` are two,
and ``starting`` starts workers of any. ``server`` is the program that forks processes, ``client`` the connection to it,
``worker`` a worker as its owner sees it, ``child`` what runs inside one, ``deaths`` whose end a table of peers shows,
``shutdown`` what happens at exit.
"""
