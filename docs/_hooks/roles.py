"""Shows what Sphinx would show in docstrings: ``:func:`torchwq.map` `` becomes a link, and ``::`` before code goes.

Editors and ``help()`` know these; mkdocstrings does not.
"""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|attr|mod|data|exc):<code>~?([\w.]+)</code>")
_CODE_FOLLOWS = re.compile(r"\s*::</p>")


def on_page_content(html: str, **_: Any) -> str:
    def shown(role: re.Match[str]) -> str:
        name = role[1]
        for target in (name, f"torchwq.{name}"):
            if f'id="{target}"' in html:
                return f'<a href="#{target}"><code>{name.removeprefix("torchwq.")}</code></a>'
        return f"<code>{name}</code>"

    return _CODE_FOLLOWS.sub("</p>", _ROLE.sub(shown, html))
