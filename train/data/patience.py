"""Reading again what could not be read once: disks over a network fail for a moment now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

_LOG = logging.getLogger(__name__)
TRIES = 3
SECONDS = 1.0  # before the second try, doubled before each later one
T = TypeVar("T")


def patiently(what: str, read: Callable[[], T]) -> T:
    """What ``read`` returns; an OSError is logged and the reading tried again, `TRIES` times in all. Other errors pass at once.

    Args:
      what: for the messages.

    Raises:
      OSError: the last one.

    Example:
      >>> patiently("a number", lambda: 3)
      3
    """
    for attempt in range(1, TRIES):
        try:
            return read()
        except OSError as error:
            _LOG.warning("%s could not be read (%s); attempt %d of %d", what, error, attempt, TRIES)
            time.sleep(SECONDS * 2 ** (attempt - 1))
    return read()
