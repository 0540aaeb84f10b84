"""The page at `/`: one file without outside resources, and the headers that keep it to that."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path


@cache
def page() -> str:
    """The HTML file."""
    return (Path(__file__).resolve().parent / "page.html").read_text(encoding="utf-8")


@cache
def page_headers() -> dict[str, str]:
    """A browser runs the page's own script and style and nothing else, and talks to this server alone."""
    script, style = (_source("script"), _source("style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _source(tag: str) -> str:
    """The hash by which a browser knows the page's only element of a kind."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page(), flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
