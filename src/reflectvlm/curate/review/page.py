"""The document: style and script inside, no row in it. Rows come as JSON and become text nodes.

The policy allows exactly this style and this script, images and requests of this server, and with trusted
types no text can become markup, not even by a mistake in the script.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
from importlib import resources

STYLES = ("page.css", "row.css")
SCRIPTS = ("dom.js", "server.js", "tags.js", "zoom.js", "row.js", "edit.js", "walk.js", "keys.js", "main.js")
"""Joined in this order, as one function."""


def page(name: str) -> str:
    """The document for a file of this name."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{html.escape(name)} · review</title>
<style>{_style()}</style>
</head>
<body>
<noscript><p>This page draws itself with a script of its own; please allow it.</p></noscript>
<div id="page"></div>
<script>{_script()}</script>
</body>
</html>
"""


@functools.cache
def policy() -> str:
    return (
        f"default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src '{_digest(_style())}'; "
        f"script-src '{_digest(_script())}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


@functools.cache
def _style() -> str:
    return "\n".join(map(_asset, STYLES))


@functools.cache
def _script() -> str:
    return '"use strict";\n(() => {\n' + "\n".join(map(_asset, SCRIPTS)) + "\n})();"


def _asset(name: str) -> str:
    return (
        (resources.files("reflectvlm.curate.review") / "assets" / name)
        .read_text(encoding="utf-8")
        .strip("\n")
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
