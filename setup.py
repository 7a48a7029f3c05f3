"""What pyproject.toml can't say: on an index page README stands alone, so its links into the checkout become paths.

All else stands in pyproject.toml. When the sources have a public address, the links can lead there instead.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup


def without_relative_links(text: str) -> str:
    """``[docs/faq.md](docs/faq.md)`` becomes ```docs/faq.md```, and another text keeps its words before the path.

    A picture becomes its words and path, too: an index shows none that lies in the checkout.
    """

    def plain(link: re.Match[str]) -> str:
        words, path = link[1], link[2]
        return f"`{path}`" if words == path else f"{words} (`{path}`)"

    return re.sub(r"!?\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)", plain, text)


setup(
    long_description=without_relative_links((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
