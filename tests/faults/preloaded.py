"""What a fork server imports once, so that its children begin with all of it.

Lance is not fork-safe once it works: its threads do not come along. Here it is imported and nothing
else, and a child makes sure of that (`forked.check_parent`).
"""

from __future__ import annotations

import warnings

import s3fs  # noqa: F401

import tests.faults.commands  # noqa: F401

warnings.filterwarnings("ignore", message="lance is not fork-safe")
