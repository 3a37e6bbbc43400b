"""Starts worker processes in a clean environment, watches them, and ends them.

``server`` is the program that forks them, ``client`` the connection to it, ``worker`` a worker as its owner sees it,
``child`` what runs inside one, ``deaths`` how an end is put into words, ``shutdown`` what happens at exit.
"""
