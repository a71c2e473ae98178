"""From the registry's alias to a detector: resolved once, pinned, checked.

    alias `champion` of wtflow-<line> --champions()--> Champion(line, version, digest) --load()--> LoadedLine

Replicas get the pin: one that starts later, or again, loads the same version, wherever the alias is by then.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wtflow.errors import DigestError, WTFlowError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from serving.scorer import LoadedLine
    from wtflow.bundle import Bundle

MODEL_PREFIX = "wtflow-"
ALIAS = "champion"
DEFAULT_URI = "sqlite:///mlflow.db"
MAKE_ONE = "Train and register the lines first: make repro"


@dataclass(frozen=True)
class Champion:
    """The model version that serves a line."""

    registry: str
    line: str
    model: str
    version: int
    digest: str | None
    """Tag `bundle_digest` of the version: what its bundle has to be."""
    sample_image: str | None
    """Tag `sample_image`: path of a photograph to try."""

    def __str__(self) -> str:
        return f"{self.model} version {self.version}"


def registry_uri() -> str:
    """`MLFLOW_TRACKING_URI`, else mlflow.db in the current folder; relative SQLite paths made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    scheme, separator, path = uri.partition("sqlite:///")
    if separator and not scheme and not path.startswith("/"):
        return f"sqlite:///{Path(path).resolve()}"
    return uri


def champions(uri: str) -> list[Champion]:
    """Every line with a champion, by name. Raises `WTFlowError` without a registry or a champion."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    _check_file(uri)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        names = _model_names(client)
        found = [champion for name in names if (champion := _champion(client, uri, name)) is not None]
    except (MlflowException, SQLAlchemyError, ImportError) as error:  # ImportError: a database without its driver
        said = str(error).partition("\n")[0].rstrip(".")
        raise WTFlowError(
            f"registry {uri}: {said}. Is the server up, and MLFLOW_TRACKING_URI right? "
            "Without that variable the registry is mlflow.db in this folder."
        ) from error
    if not found:
        seen = f"models without alias `{ALIAS}`: {', '.join(names)}" if names else f"no model {MODEL_PREFIX}<line>"
        raise WTFlowError(f"registry {uri}: nothing to serve ({seen}). {MAKE_ONE}")
    return found


def load(champion: Champion) -> "LoadedLine":
    """Download the pinned version's bundle, check every byte of it and build its detector."""
    from serving.scorer import loaded_line

    with tempfile.TemporaryDirectory(prefix="wtflow-bundle-") as folder:
        bundle = _checked_bundle(champion, _downloaded(champion, folder))
        return loaded_line(bundle, champion.line, champion.model, champion.version)


def _downloaded(champion: Champion, folder: str) -> Path:
    """The one bundle among the version's files, copied below `folder`."""
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    uris = {"tracking_uri": champion.registry, "registry_uri": champion.registry}
    try:
        # not models:/<model>/<version>, which MLflow looks up in the registry of the process, whatever it is told
        source = MlflowClient(**uris).get_model_version_download_uri(champion.model, str(champion.version))
        download_artifacts(source, dst_path=folder, **uris)
    except (MlflowException, OSError) as error:
        raise WTFlowError(
            f"registry {champion.registry}: the files of {champion} did not come: {error}. "
            "Are the artifacts where the registry says, and readable from here?"
        ) from error
    bundles = sorted(Path(folder).rglob("bundle.json"))
    if len(bundles) != 1:
        raise WTFlowError(f"{champion}: holds {len(bundles)} bundles, one is needed. Register it again: make repro")
    return bundles[0].parent


def _checked_bundle(champion: Champion, path: Path) -> "Bundle":
    from wtflow.bundle import load_bundle

    try:
        bundle = load_bundle(path)
    except DigestError as error:
        raise DigestError(f"{champion}: {error}") from error
    if champion.digest is not None and bundle.digest != champion.digest:
        raise DigestError(
            f"{champion}: its bundle is {bundle.digest[:12]}, its tag says {champion.digest[:12]}. "
            "Register the line again: make repro"
        )
    return bundle


def _check_file(uri: str) -> None:
    """Connecting to a SQLite file that is not there would create an empty registry."""
    path = uri.removeprefix("sqlite:///")
    if path != uri and not Path(path).is_file():
        raise WTFlowError(f"registry {path}: no such file. {MAKE_ONE} (or set MLFLOW_TRACKING_URI).")


def _model_names(client: "MlflowClient") -> list[str]:
    names: list[str] = []
    token: str | None = ""
    while token is not None:
        page = client.search_registered_models(f"name LIKE '{MODEL_PREFIX}%'", page_token=token or None)
        names += [model.name for model in page]
        token = page.token or None
    return sorted(names)


def _champion(client: "MlflowClient", uri: str, name: str) -> Champion | None:
    # search results carry no aliases; the model itself does
    version = client.get_registered_model(name).aliases.get(ALIAS)
    if version is None:
        return None
    tags = client.get_model_version(name, str(version)).tags
    line = name.removeprefix(MODEL_PREFIX)
    return Champion(uri, line, name, int(version), tags.get("bundle_digest"), tags.get("sample_image"))
