import os

# Before anything of torchwq is imported. The path of a file comes in its place, in ``conftest``.
os.environ["TORCHWQ_DEBUG"] = "1"
