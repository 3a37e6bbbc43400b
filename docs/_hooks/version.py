"""Says at the end of each page of which version of torchwq it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    package = Path(config.config_file_path).parent / "torchwq" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"$', package.read_text("utf-8"), re.MULTILINE)
    assert found is not None
    config.copyright = f"torchwq {found[1]}"
    return config
