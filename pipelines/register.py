"""Stage `register`: a line's bundle, metrics and report become an MLflow run and a model version.

models/<line>/ + metrics/<line>.json + reports/<line>/ -> MLflow: alias `challenger`, and `champion` if it is as good;
registry/<line>.json says what was registered
"""

import json
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
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.params import Section

if TYPE_CHECKING:
    from mlflow import MlflowClient


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
    shards = FeatureShards.open(Path(f"data/features/{line}/test"))
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
            number = models.add_version(client, experiment, bundle, metrics, Path(f"reports/{line}/index.html"), tags)
            challenger = models.registered(client, line, number)
        name = models.model_name(line)
        client.set_registered_model_alias(name, models.CHALLENGER, str(challenger.version))
        verdict = promote(client, line, challenger, shards, params.margin)
    write_json(Path(f"registry/{line}.json"), {"model": name, "bundle_digest": bundle.digest})
    Console().print(f"register {line}: {name} version {challenger.version}, {verdict}", highlight=False)


def promote(
    client: "MlflowClient", line: str, challenger: models.Registered, shards: FeatureShards, margin: float
) -> str:
    """Move the alias `champion` if the challenger earns it; says what was decided and why."""
    number = models.aliases(client, line).get(models.CHAMPION)
    if number == challenger.version:
        return "already champion"
    best = models.best_champion(client, line, challenger.test_set)
    if number is not None:
        champion = _auroc_of_champion(client, line, number, challenger.test_set, shards)
        if champion is None or challenger.image_auroc is None:
            return (
                f"challenger: the test set has no anomalous images to compare by, so version {number} stays champion "
                "and is served. To change that, type:\n"
                f"python -c \"import mlflow; mlflow.MlflowClient('{tracking_uri()}').set_registered_model_alias("
                f"'{models.model_name(line)}', '{models.CHAMPION}', {challenger.version})\""
            )
        best = champion if best is None else max(best, champion)
        if challenger.image_auroc < best - margin:
            return (
                f"challenger: image AUROC {challenger.image_auroc:.4f} is more than {margin} below {best:.4f}, the "
                f"best that a champion had on this test set, so version {number} stays (now at {champion:.4f})"
            )
    if models.aliases(client, line).get(models.CHAMPION) != number:  # another process was faster
        return promote(client, line, challenger, shards, margin)
    models.crown(client, line, challenger, best)
    return "champion" if number is None else f"champion in place of version {number}"


def _auroc_of_champion(
    client: "MlflowClient", line: str, number: int, test_set: str, shards: FeatureShards
) -> float | None:
    """Of the champion on the challenger's test set: as recorded when it is the same set, else measured now."""
    champion = models.registered(client, line, number)
    if champion.test_set == test_set:
        return champion.image_auroc
    folder, bundle = models.load_version(line, number)
    with folder:
        return image_auroc(bundle, shards, Path(f"data/raw/{line}"))


def _sample(line: str, shards: FeatureShards) -> Path:
    """A photograph of the line to try the service with: the first anomalous test image, or the first of all."""
    row = (shards.rows(label="anomalous") or [0])[0]
    return Path(f"data/raw/{line}").resolve() / str(shards.index["path"][row])


if __name__ == "__main__":
    run(main, __doc__ or "", "python -m pipelines.register solar-mono")
