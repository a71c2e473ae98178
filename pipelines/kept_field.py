"""The field that a line was trained to last: other settings of solver, score or calibration ask it anew, and train
nothing. The bundle that comes out is the one that a training would end with, byte for byte.

$WTFLOW_WORK/fields/<line>/: scorer.safetensors (the bundle's own), field.json (digests, epochs)
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pipelines.provenance import library_versions
from wtflow.artefact import digest_of, read_json, replacing, sha256_file, write_json
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.features.backbone import load_weights
from wtflow.features.links import link
from wtflow.training import Epoch, TrainingState, TrainParams, blank

NOT_TRAINED_WITH = {"solver", "score", "calibration"}
"""Sections of `train` that no weight depends on."""
WEIGHTS = "scorer.safetensors"
logger = logging.getLogger(__name__)


def field_digest(params: TrainParams, shards: FeatureShards, code: Mapping[str, str], workers: int) -> str:
    """Identity of a field: settings, features, source files and libraries that decide its weights, and the number of
    workers where it changes more than rounding: a `norm: batch` is over the share of a batch that a worker has."""
    settings = params.model_dump(mode="json", exclude=NOT_TRAINED_WITH)
    shares = workers if params.velocity.kind == "unet" and params.velocity.norm == "batch" else 1
    return digest_of([settings, shards.digest, code, library_versions(), shares])


def keep_field(folder: Path, digest: str, bundle: Path, bundle_digest: str, history: Sequence[Epoch]) -> None:
    """Keep the field of a bundle, in place of the line's last one. Warns if there is no space for it, or if the folder
    `bundle` holds another one by now."""
    try:
        with replacing(folder) as draft:
            draft.mkdir(parents=True)
            link(bundle / WEIGHTS, draft / WEIGHTS)
            header, sha256 = read_json(bundle / "bundle.json"), sha256_file(draft / WEIGHTS)
            if header["digest"] != bundle_digest or header["files"][WEIGHTS] != sha256:
                raise WTFlowError(f"{bundle} was replaced meanwhile")
            facts = {"digest": digest, "sha256": sha256}
            write_json(draft / "field.json", {**facts, "history": [asdict(epoch) for epoch in history]})
    except (OSError, WTFlowError) as error:
        logger.warning("%s: not kept (%s), so that any other setting trains the line anew", folder, error)


def kept_field(folder: Path, digest: str, shards: FeatureShards, params: TrainParams) -> TrainingState | None:
    """The trained state, if it is the field of this digest that is kept, and whole; its optimiser begins anew."""
    path = folder / "field.json"
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        if found["digest"] != digest:
            return None
        if sha256_file(folder / WEIGHTS) != found["sha256"]:
            raise WTFlowError(f"{WEIGHTS}: not the bytes that were written")
        history = [Epoch(**epoch) for epoch in found["history"]]
    except (WTFlowError, OSError, KeyError, TypeError) as error:
        logger.warning("%s: damaged (%s). The line is trained anew", folder, error)
        return None
    state = blank(shards, params)
    usual_CC = state.scorer.usual_CC  # `finish` learns it, or leaves it as it is
    state.scorer.load_state_dict({**load_weights(folder / WEIGHTS), "usual_CC": usual_CC})
    state.history = history
    state.scorer.eval()
    return state
