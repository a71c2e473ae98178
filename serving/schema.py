"""What the service says, field by field. The OpenAPI page is made from these."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

Line = Annotated[str, Field(description="Product line.", examples=["solar-mono"])]
ModelVersion = Annotated[int, Field(ge=1, description="Version of the line's model in the registry.")]
BundleDigest = Annotated[
    str, Field(description="SHA-256 that names the bundle: the same digest gives the same scores.")
]
Threshold = Annotated[float, Field(description="A score above it is anomalous.")]


class ScoreQuery(BaseModel, frozen=True, extra="forbid"):
    """What may follow the `?`."""

    heatmap: Annotated[
        Literal["png"] | None,
        Field(description="`png` adds a heat map over the photograph; none by default."),
    ] = None


class ScoreReply(BaseModel, frozen=True):
    """The verdict on one photograph. The same bytes and the same bundle give the same reply."""

    line: Line
    model_version: ModelVersion
    bundle_digest: BundleDigest
    score: Annotated[float, Field(description="Raw anomaly score, not normalised: compare it within a line only.")]
    p_value: Annotated[
        float,
        Field(gt=0, le=1, description="Share of calibration normals that score at least as high; small: odd."),
    ]
    threshold: Threshold
    is_anomalous: bool
    needs_review: Annotated[
        bool,
        Field(description="Not anomalous, but near it: a person should look. Never true unless the line asks for it."),
    ]
    heatmap: Annotated[
        str | None,
        Field(description="Base64 of a PNG as large as the upright photograph, or null if not asked for."),
    ]


class Provenance(BaseModel, frozen=True):
    """Where a bundle comes from; null where its training did not record it."""

    git_commit: Annotated[str | None, Field(description="Commit of the code that trained it.")]
    data_version: Annotated[str | None, Field(description="DVC hash of the raw images.")]
    seed: Annotated[int | None, Field(description="Seed of the training.")]


class LineInfo(BaseModel, frozen=True):
    """What a line is served with."""

    line: Line
    model: Annotated[str, Field(description="Name of the registered model.", examples=["wtflow-solar-mono"])]
    model_version: ModelVersion
    bundle_digest: BundleDigest
    threshold: Threshold
    target_fpr: Annotated[float, Field(description="Share of normal photographs that may be flagged.")]
    image_size: Annotated[
        tuple[int, int], Field(description="Height and width that photographs are resized to, pixels.")
    ]
    backbone: Annotated[str, Field(description="The feature network.", examples=["tf_efficientnet_lite0"])]
    provenance: Provenance


class LineList(BaseModel, frozen=True):
    """Every line of this service."""

    lines: Annotated[list[LineInfo], Field(description="Lines whose model is loaded.")]
    not_ready: Annotated[list[str], Field(description="Lines whose model is not loaded, or does not answer.")]


class Alive(BaseModel, frozen=True):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Ready(BaseModel, frozen=True):
    """Every line's model is loaded."""

    status: Literal["ready"] = "ready"
    lines: list[str]


class Problem(BaseModel, frozen=True):
    """Why a request was refused."""

    code: Annotated[str, Field(description="Stable word for programs.", examples=["unknown_line"])]
    message: Annotated[str, Field(description="What is wrong.")]
    remedy: Annotated[str, Field(description="What to do.")]


class ErrorReply(BaseModel, frozen=True):
    """The body of every reply that is not 2xx."""

    error: Problem
