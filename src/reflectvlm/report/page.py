"""The file itself: one HTML document with its style, script and data inside.

A content security policy allows exactly this style and this script and no request of any kind, so that
text which became markup by mistake could neither run nor call home. Data stand in a JSON element that no
text can close.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

STYLES = ("page.css", "answers.css")
SCRIPTS = (
    "dom.js",
    "data.js",
    "curves.js",
    "tables.js",
    "picture.js",
    "tokens.js",
    "answer.js",
    "list.js",
    "main.js",
)
"""Joined in this order, as one function."""

_UNSAFE = re.compile("[<>&\u2028\u2029\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def page(data: Mapping[str, Any]) -> str:
    """The whole document."""
    names = " against ".join(str(run["name"]) for run in data["runs"])
    style = "\n".join(map(_asset, STYLES))
    script = '"use strict";\n(() => {\n' + "\n".join(map(_asset, SCRIPTS)) + "\n})();"
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(_plain(names))} · reflectvlm</title>
<style>{style}</style>
</head>
<body>
<noscript><p>This report draws itself with a script that stands in this file; please allow it.</p></noscript>
<div id="page"></div>
<svg id="seed"></svg>
<script type="application/json" id="data">{as_script(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def as_script(data: Any) -> str:
    """JSON that can stand in a script element: no text in it can end the element or begin a comment, and
    every character may be written as UTF-8."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _plain(text: str) -> str:
    return _UNSAFE.sub(lambda match: match[0] if match[0] in "<>&" else "\ufffd", text)


def _asset(name: str) -> str:
    return (resources.files("reflectvlm.report") / "assets" / name).read_text(encoding="utf-8").strip("\n")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
