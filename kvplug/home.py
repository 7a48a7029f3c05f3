"""Where this user's own folders are, by the XDG base directory specification, also where there is no home."""

from __future__ import annotations

import os

__all__ = ["xdg_folder"]

NOWHERE = "/nonexistent"
"""What Debian calls the home of users that have none. A user may have neither HOME nor a line in /etc/passwd."""


def xdg_folder(variable: str, below_home: str) -> str:
    """The folder that *variable* names, else *below_home* in the home. Always absolute; it need not exist.

    A relative path in the variable is to be ignored, the specification says. Nothing is ever put into a folder called
    ``~`` where the program happens to have been started.
    """
    base = os.environ.get(variable, "")
    if os.path.isabs(base):
        return base
    home = os.path.expanduser("~")
    return os.path.join(home if os.path.isabs(home) else NOWHERE, below_home)
