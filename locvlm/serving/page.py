"""The web page as one file without outside references, and the policy that lets a browser run its own script only."""

import base64
import hashlib
import re

from locvlm.data.pages import environment


def render_page(model: str, version: str) -> tuple[str, str]:
    """(HTML, Content-Security-Policy). The policy names the hashes of the page's style and script."""
    html = environment().get_template("serve.html.jinja").render(model=model, version=version)
    policy = {
        "default-src": "'none'",
        "style-src": _hashes(html, "style"),
        "script-src": _hashes(html, "script"),
        "img-src": "blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return html, "; ".join(f"{name} {value}" for name, value in policy.items())


def _hashes(html: str, tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
