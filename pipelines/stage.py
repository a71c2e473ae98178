"""How a stage is started from the command line: one product line, errors for people."""

import argparse
import errno
import resource
import sys
import time
from collections.abc import Callable

from pipelines.environment import RunSettings, timings_file
from wtflow.artefact import write_json
from wtflow.errors import WTFlowError


def run(main: Callable[[str], None], description: str, example: str) -> None:
    """Parse `LINE` from the command line and call `main` with it.

    `example` is a whole command. A `WTFlowError` or a full disk goes to stderr as `error: ...` with exit
    code 1; any other exception is a fault of the code and keeps its traceback. Seconds and peak memory are
    noted in the timings folder.
    """
    parser = argparse.ArgumentParser(
        prog=example.rpartition(" ")[0],
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("line", metavar="LINE", help="a product line: a key of `lines` in params.yaml")
    line = parser.parse_args().line
    started = time.perf_counter()
    try:
        settings = RunSettings()
        main(line)
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        timing = {"seconds": time.perf_counter() - started, "peak_gib": peak / 2**20}
        stage = example.split()[-2].rpartition(".")[2]
        write_json(timings_file(settings, stage, line), timing)
    except WTFlowError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"error: no space left for {error.filename or 'the output'}. Free some, then run the stage again.")
