"""Objects to messages and back: by value, tensors by reference, functions as code.

``codec`` is the way in; ``reducers`` says which type travels how; ``functions`` holds the closure rule; ``locate``
finds the place of what cannot travel; ``describe`` says in a few words what a message holds, without running any of it.
"""
