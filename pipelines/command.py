"""How a command is started: a parser with examples, errors for people."""

import argparse
import errno
import sys
from collections.abc import Callable
from typing import TypeVar

from wtflow.errors import WTFlowError

T = TypeVar("T")


def parser(name: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    """Of `python -m <name>`, its texts shown as they are written."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def call(work: Callable[[], T]) -> T:
    """What `work` returns. A `WTFlowError` or a full disk goes to stderr as `error: ...` with exit code 1; any other
    exception is a fault of the code and keeps its traceback."""
    try:
        return work()
    except WTFlowError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: no space left for {error.filename or 'the output'}. Free some, then type the same command.")
