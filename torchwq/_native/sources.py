"""What the extension was built from. In a checkout, its sources may have changed since: a ``git pull`` builds nothing.

setup.py runs this file by itself, so it imports nothing of the package.
"""

from __future__ import annotations

import zlib
from pathlib import Path


def digest() -> str:
    """Stands for the sources beside this file; empty where there are none, as in a wheel."""
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    return f"{zlib.crc32(b''.join(path.read_bytes() for path in sources)):08x}" if sources else ""
