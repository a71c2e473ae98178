"""Who takes part: the peers, nearest neighbours, and the presets of WT-Flow."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.contest.trial import Method
from benchmarks.product_lines import PROJECT, ProductLine, laid_over
from pipelines.preset import DEFAULT
from pipelines.provenance import stage_sources
from wtflow.params import merged
from wtflow.training import TrainParams

SHARED = ("benchmarks/peers/shared.py",)

# Five minutes or more of processor time on solar-mono for whoever trains; the epochs follow from that.
PEERS = (
    Method(
        "patchcore",
        "benchmarks.peers.patchcore",
        {"coreset_ratio": 0.01},
        "one pass; coreset of 1 % (its default of 10 % takes hours on 2 cores), 9 neighbours",
        code=(*SHARED, "benchmarks/peers/coreset.py"),
    ),
    Method(
        "padim",
        "benchmarks.peers.padim",
        {"features": 152},
        "one pass; levels 2 and 3 (its default, 1 to 3, is no better here), all 152 channels, none dropped at random",
        seeds=(0,),
        code=SHARED,
    ),
    Method(
        "fastflow",
        "benchmarks.peers.fastflow",
        {"epochs": 20, "batch_size": 32},
        "20 epochs of batch 32 (the paper: 500); levels 2 and 3 (its default: 1 to 3)",
        code=SHARED,
    ),
    Method(
        "reverse-distillation",
        "benchmarks.peers.reverse_distillation",
        {"epochs": 5, "batch_size": 16},
        "5 epochs of batch 16 (the paper: 200); levels 1 to 3, ResNet-18 decoder between 1 x 1 convolutions",
        code=SHARED,
    ),
    Method(
        "efficientad-s",
        "benchmarks.peers.efficient_ad",
        {"teacher_steps": 100, "steps": 200},
        "200 steps (the paper: 70,000); teacher distilled from the shared backbone on the line's own images, no "
        "penalty on ImageNet images: shown for its size and speed, not compared",
        seeds=(0,),
        compared=False,
        code=SHARED,
    ),
)

PRESETS = (DEFAULT, "edge", "accurate")
"""`paper` is left out: its weights come from a hub and its field wants a GPU."""


def entrants(line: ProductLine) -> Iterator[tuple[Method, ProductLine]]:
    """All that take part on `line`, each with the line as it sees it: a preset may want other features."""
    yield from ((method, line) for method in (*PEERS, _neighbours(line)))
    for name in PRESETS:
        seen = line if name == DEFAULT else laid_over(line, name)
        yield preset(name, {}, seen), seen


def preset(name: str, changes: Mapping[str, Any], line: ProductLine) -> Method:
    """WT-Flow with the settings of `line`, changed."""
    values = merged(line.train_params.model_dump(mode="json"), changes)
    settings = TrainParams.parse(values, f"preset {name}").model_dump(mode="json", exclude={"seed"})
    return Method(
        f"wtflow-{name}",
        "benchmarks.contest.preset",
        settings,
        f"{settings['epochs']} epochs on cached features, extraction not counted",
        anomalib=False,
        ours=True,
        code=_train_code(),
    )


def _neighbours(line: ProductLine) -> Method:
    return Method(
        "neighbours",
        "benchmarks.contest.nearest",
        {"fusion": line.train_params.fusion.model_dump(mode="json")},
        "one pass; 8,000 random patches of the cached features of params.yaml, extraction not counted",
        anomalib=False,
        code=("benchmarks/neighbours.py", "wtflow/features/fusion.py"),
    )


def _train_code() -> list[str]:
    """The library's files behind the train stage."""
    return [path for path in stage_sources("train", PROJECT) if path.startswith("wtflow/")]
