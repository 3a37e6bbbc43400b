"""Objects to messages and back: by value, tensors by reference, functions as code.

Begin with ``codec``, the interface. ``reducers`` says which type travels how; ``closure_rule`` refuses functions that
drag data along; ``locate`` finds the place of an object that cannot travel; ``describe`` describes a message in a few
words, without running any of it.
"""
