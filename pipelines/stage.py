"""How a stage is started from the command line: one product line, errors for people."""

import resource
import time
from collections.abc import Callable

from pipelines.command import call, parser
from pipelines.environment import RunSettings, timings_file
from wtflow.artefact import write_json


def run(main: Callable[[str], None], description: str, example: str) -> None:
    """Parse `LINE` from the command line and call `main` with it.

    `example` is a whole command. Errors end as `call` has it. Seconds and peak memory are noted in the timings folder.
    """
    module = example.split()[-2]
    options = parser(module, description, f"example: {example}")
    options.add_argument("line", metavar="LINE", help="a product line: a key of `lines` in params.yaml")
    line = options.parse_args().line

    def timed() -> None:
        started = time.perf_counter()
        settings = RunSettings()
        main(line)
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        timing = {"seconds": time.perf_counter() - started, "peak_gib": peak / 2**20}
        write_json(timings_file(settings, module.rpartition(".")[2], line), timing)

    call(timed)
