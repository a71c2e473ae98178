"""Stage `register`: a line's bundle, metrics and report become an MLflow run and a model version.

models/<line>/ + metrics/<line>.json + reports/<line>/ -> MLflow: alias `challenger`, and `champion` if it is as good;
registry/<line>.json says what was registered
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from rich.console import Console

from pipelines.adapters import mlflow_registry as models
from pipelines.adapters.tracking import tracking, tracking_uri
from pipelines.comparison import image_auroc, test_set_digest
from pipelines.lines import line_params
from pipelines.stage import run
from wtflow.artefact import read_json, write_json
from wtflow.bundle import load_bundle
from wtflow.data.manifest import Manifest
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.params import Section

if TYPE_CHECKING:
    from mlflow import MlflowClient

FEWEST_NORMALS = 10
"""Of a test set, that a champion has to be compared on."""


class RegisterParams(Section):
    """When a challenger takes over."""

    margin: Annotated[float, Field(ge=0, le=1)]
    """A challenger becomes champion if its image AUROC is at most this much below the best that any champion had on
    the same test set, so that many small steps down do not add up."""


def main(line: str) -> None:
    """Register the bundle of `line`. Registering the same bundle again only sets the aliases again."""
    params = line_params(line, "register", RegisterParams)
    bundle = load_bundle(Path(f"models/{line}"))
    metrics = read_json(Path(f"metrics/{line}.json"))
    if metrics["bundle_digest"] != bundle.digest:
        raise WTFlowError(
            f"metrics/{line}.json is of another bundle than models/{line}. Type: dvc repro evaluate@{line}"
        )
    shards, manifest = FeatureShards.open(Path(f"data/features/{line}/test")), _manifest(line)
    tags = {
        "bundle_digest": bundle.digest,
        "git_commit": str(bundle.provenance["git_commit"]),
        "data_version": str(bundle.provenance["data_version"]),
        "test_set": test_set_digest(shards),
        "image_auroc": json.dumps(metrics["image_auroc"]),
        "sample_image": str(_sample(line, shards)),
    }
    with tracking() as (client, experiment):
        challenger = models.version_of(client, line, bundle.digest)
        if challenger is None:
            trained_on = [row["image_id"] for row in manifest.rows("train")]
            report = Path(f"reports/{line}/index.html")
            number = models.add_version(client, experiment, bundle, metrics, report, tags, trained_on)
            challenger = models.registered(client, line, number)
        name = models.model_name(line)
        client.set_registered_model_alias(name, models.CHALLENGER, str(challenger.version))
        verdict = promote(client, line, challenger, Trial(shards, manifest), params.margin)
    write_json(Path(f"registry/{line}.json"), {"model": name, "bundle_digest": bundle.digest})
    said = f"register {line}: {name} version {challenger.version}, {verdict}"
    Console().print(said, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Trial:
    """What a challenger and a champion are compared on."""

    shards: FeatureShards
    """Of the test split."""
    manifest: Manifest
    """Of all images of the line as they are split now."""

    def unseen_by(self, trained_on: Collection[str]) -> list[int]:
        """Rows of the test split without the normal images of parts that a model was trained on."""
        known = set(trained_on)
        rows = self.manifest.table.select(["image_id", "group"]).to_pylist()
        groups = {row["group"] for row in rows if row["image_id"] in known}
        images = self.shards.index.select(["label", "group"]).to_pylist()
        return [row for row, image in enumerate(images) if image["label"] != "normal" or image["group"] not in groups]


@dataclass(frozen=True)
class Match:
    """Image AUROC of a champion and a challenger on the same images."""

    champion: float
    challenger: float
    left_out: int = 0
    """Images of the challenger's test set that are not among these."""


def promote(client: "MlflowClient", line: str, challenger: models.Registered, trial: Trial, margin: float) -> str:
    """Move the alias `champion` if the challenger earns it; says what was decided and why."""
    number = models.aliases(client, line).get(models.CHAMPION)
    if number == challenger.version:
        return "already champion"
    best = models.best_champion(client, line, challenger.test_set)
    if number is not None:
        try:
            match = _match(client, line, number, challenger, trial)
        except WTFlowError as error:
            return (
                f"challenger: {error}, so version {number} stays champion. To change that, type:\n"
                f"python -c \"import mlflow; mlflow.MlflowClient('{tracking_uri()}').set_registered_model_alias("
                f"'{models.model_name(line)}', '{models.CHAMPION}', {challenger.version})\""
            )
        if match.left_out and match.challenger < match.champion - margin:
            return (
                f"challenger: image AUROC {match.challenger:.4f} is more than {margin} below {match.champion:.4f}, "
                f"that of version {number}, which stays. Both without the {match.left_out} normal test images of "
                f"parts that version {number} was trained on"
            )
        if not match.left_out:
            best = match.champion if best is None else max(best, match.champion)
        if best is not None and challenger.image_auroc is not None and challenger.image_auroc < best - margin:
            return (
                f"challenger: image AUROC {challenger.image_auroc:.4f} is more than {margin} below {best:.4f}, the "
                f"best that a champion had on this test set, so version {number} stays (now at {match.champion:.4f})"
            )
    if models.aliases(client, line).get(models.CHAMPION) != number:  # another process was faster
        return promote(client, line, challenger, trial, margin)
    models.crown(client, line, challenger, best)
    return "champion" if number is None else f"champion in place of version {number}"


def _match(client: "MlflowClient", line: str, number: int, challenger: models.Registered, trial: Trial) -> Match:
    """The champion, version `number`, against the challenger: as recorded when they have the same test set, else
    measured now, without what the champion was trained on. Raises `WTFlowError` if they cannot be compared."""
    champion, raw = models.registered(client, line, number), Path(f"data/raw/{line}")
    if champion.test_set == challenger.test_set:
        return _found(champion.image_auroc, challenger.image_auroc, 0)
    rows = trial.unseen_by(models.trained_on(client, line, number))
    left_out = len(trial.shards) - len(rows)
    with models.opened(line, number) as bundle:
        auroc = image_auroc(bundle, trial.shards, raw, rows)
    if not left_out:
        return _found(auroc, challenger.image_auroc, 0)
    normals = len(trial.shards.rows(label="normal")) - left_out
    if normals < FEWEST_NORMALS:
        raise WTFlowError(
            f"the test set has {normals} normal images of parts that version {number} was not trained on, and "
            f"{FEWEST_NORMALS} are needed to compare by"
        )
    with models.opened(line, challenger.version) as bundle:
        return _found(auroc, image_auroc(bundle, trial.shards, raw, rows), left_out)


def _found(champion: float | None, challenger: float | None, left_out: int) -> Match:
    if champion is None or challenger is None:
        raise WTFlowError("the test set has no anomalous images to compare by")
    return Match(champion, challenger, left_out)


def _manifest(line: str) -> Manifest:
    return Manifest.read(Path(f"data/prepared/{line}/manifest.parquet"))


def _sample(line: str, shards: FeatureShards) -> Path:
    """A photograph of the line to try the service with: the first anomalous test image, or the first of all."""
    row = (shards.rows(label="anomalous") or [0])[0]
    return Path(f"data/raw/{line}").resolve() / str(shards.index["path"][row])


if __name__ == "__main__":
    run(main, __doc__ or "", "python -m pipelines.register solar-mono")
