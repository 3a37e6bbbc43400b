"""Starts workers, watches them, and ends them: processes in a clean environment, or threads.

``backend`` defines the interface of a kind of workers; ``processes`` and ``threads`` implement it; ``starting`` starts
workers of either. ``server`` is the program that forks processes, ``client`` the connection to it, ``worker`` a worker
as its owner sees it, ``child`` runs inside a worker process, ``deaths`` raises the deaths that a table of peers shows,
``shutdown`` ends everything at exit.
"""
