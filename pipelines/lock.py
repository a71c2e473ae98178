"""What one process does at a time."""

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wtflow.errors import WTFlowError

logger = logging.getLogger(__name__)


@contextmanager
def alone(path: Path, busy: str | None = None) -> Iterator[None]:
    """This process alone is inside; the system lets go when it ends, however it ends. While another one is, raises
    `WTFlowError` with the text `busy`, or waits if there is none. Warns where the file system of `path` has no
    locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if busy is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WTFlowError(busy) from None
        except OSError as error:
            logger.warning("%s: not locked (%s). Run one process at a time", path, error.strerror)
        yield
