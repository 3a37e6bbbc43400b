import os

# Before anything of torchwq is imported. The path of a file comes in its place, in ``conftest``.
os.environ["TORCHWQ_DEBUG"] = "1"
# More test processes than cores, and perhaps other programs: what takes five times as long is a fault on any machine.
os.environ["TORCHWQ_DEBUG_PATIENCE"] = "5"
# Before torch is: its threads sleep while they wait for each other. Where several programs share the cores, threads
# that spin cost many times what they compute.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Programs of the tests compile torchwq once, not each for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
