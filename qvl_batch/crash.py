"""Named places at which a fault test kills the process; nothing happens unless it asks for it.

``QVL_CRASH=NAME:NTH:TOKEN`` kills the process that reaches the place NAME for the NTH time, if it
can remove the file TOKEN: so it happens once, in one process, however many inherit the setting.

``QVL_CRASH=stop:NAME:NTH:TOKEN`` stops the process instead (SIGSTOP), and
``QVL_CRASH=count:FILE`` kills nothing and appends a line to FILE for each
place that is reached.
"""

from __future__ import annotations

import collections
import os
import signal

ENVIRONMENT = "QVL_CRASH"
COUNT = "count:"
STOP = "stop:"

# In the order of a run. README, "What happens when", has a paragraph for each.
PLACES = (
    "lease-acquire",
    "lease-renewal",
    "after-plan",
    "create-table",
    "mid-decode",
    "mid-embed",
    "after-fragment-write",
    "before-commit",
    "after-commit",
    "between-partitions",
    "before-failures",
    "replace-begin",
    "replace-record",
    "replace-publish",
    "replace-close",
    "catalog-update",
    "index-build",
    "index-publish",
    "compaction",
    "delete",
)

_reached: collections.Counter[str] = collections.Counter()


def reached(place: str) -> None:
    """Die, or stand still, here if a fault test says so."""
    asked = os.environ.get(ENVIRONMENT)
    if asked is None:
        return
    if asked.startswith(COUNT):
        with open(asked.removeprefix(COUNT), "a") as file:
            file.write(f"{place}\n")
        return
    number = signal.SIGSTOP if asked.startswith(STOP) else signal.SIGKILL
    name, nth, token = asked.removeprefix(STOP).split(":", 2)
    if name != place:
        return
    _reached[place] += 1
    if _reached[place] != int(nth):
        return
    try:
        os.unlink(token)
    except FileNotFoundError:
        return
    os.kill(os.getpid(), number)
