"""Shows the Sphinx roles of docstrings as MkDocs would: ``:func:`torchwq.map` `` becomes a link to its entry.

Editors and ``help()`` know these roles; mkdocstrings does not.
"""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|attr|mod|data|exc):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    def shown(role: re.Match[str]) -> str:
        name = role[1]
        for target in (name, f"torchwq.{name}"):
            if f'id="{target}"' in html:
                return f'<a href="#{target}"><code>{name.removeprefix("torchwq.")}</code></a>'
        return f"<code>{name}</code>"

    return _ROLE.sub(shown, html)
