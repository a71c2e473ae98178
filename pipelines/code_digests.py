"""Stages `code-*`: SHA-256 of each source file behind a stage, in a small file that this stage of all lines depends on.

dvc.yaml, stage code-<stage> -> data/code/<stage>.json
"""

from pathlib import Path

from pipelines.command import call, parser
from pipelines.lines import LINE_STAGES
from pipelines.provenance import stage_code
from wtflow.artefact import write_json


def main(stage: str) -> None:
    """Write the digests of `stage`."""
    write_json(Path(f"data/code/{stage}.json"), stage_code(stage))


if __name__ == "__main__":
    options = parser("pipelines.code_digests", __doc__, "example: python -m pipelines.code_digests train")
    options.add_argument(
        "stage", metavar="STAGE", choices=("fetch", *LINE_STAGES), help="fetch, prepare, ..., register"
    )
    arguments = options.parse_args()
    call(lambda: main(arguments.stage))
