"""Training the field of one product line: a plain loop that knows no cluster.

Determinism: what a batch holds, its times and its noise are functions of (seed, epoch, step) for the whole global
batch, and every worker takes its own rows of it. Nothing random needs to be in a checkpoint, and a run that was
killed and resumed ends with the same weights as one that was not.
"""

import math
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Self, TypeVar

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from wtflow.artefact import read_json, save_tensors, sha256_file, write_json
from wtflow.batches import READ_AT_ONCE, Batch, Batches, BatchParams, build_batches
from wtflow.data.shards import FeatureShards
from wtflow.detector import Scorer
from wtflow.errors import DigestError, WTFlowError
from wtflow.features.fusion import FusionParams, build_fusion
from wtflow.flow.coupling import Coupling, CouplingParams, build_coupling, constant
from wtflow.flow.loss import LossParams, matching_loss, time_weight
from wtflow.flow.path import PathSample, TimeParams, interpolate, sample_times
from wtflow.flow.solver import SolverParams
from wtflow.flow.velocity import VelocityParams, build_field
from wtflow.params import Section
from wtflow.scoring.calibration import CalibrationParams
from wtflow.scoring.density import ScoreParams

IMAGES_NAMED = 20
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
T = TypeVar("T")


class TrainParams(Section):
    """Settings of the train stage."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Of the weights, the order of images, times and noise."""
    epochs: Count
    batches: BatchParams
    learning_rate: Positive
    """Of AdamW at its highest: it rises over `warmup_fraction` of the steps and falls to 0 on a half cosine."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    fusion: FusionParams
    coupling: CouplingParams
    time: TimeParams
    loss: LossParams
    velocity: VelocityParams
    solver: SolverParams
    score: ScoreParams
    calibration: CalibrationParams

    @model_validator(mode="after")
    def _places_suit_the_field(self) -> Self:
        if self.batches.kind == "places" and self.velocity.kind != "location":
            raise ValueError(
                "batches.kind places is for velocity.kind location; a unet needs whole maps: batches.kind images"
            )
        return self


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to."""

    epoch: int
    """From 0."""
    loss: float
    """Mean over the samples of the weighted matching loss; about 1 + var(x0) for a field that knows nothing."""
    learning_rate: float
    """At the epoch's last step."""
    gradient_norm: float
    """Of the last step, over all weights."""
    c: float
    """Constant of the coupling."""
    mean_y2: float
    """Mean of y^2 over the last step's samples: 0 in the well, about 1 for a field that knows nothing."""
    images_per_s: float = field(compare=False)
    """Of the global batch; as many single places as a map has count as an image."""
    memory_gb: float = field(compare=False)
    """Highest so far, of this process; on a GPU of its tensors there."""


@dataclass(frozen=True)
class Place:
    """Which share of each global batch this process works on, and where."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass
class TrainingState:
    """Everything a run needs to go on: head, optimiser, and the epochs behind it."""

    scorer: Scorer
    params: TrainParams
    history: list[Epoch]
    batches: Batches | None = None
    """Those that `start` had to fill to measure the coupling's constant; `train` takes them over."""
    moments: dict[str, Tensor] = field(default_factory=dict)
    """Of the optimiser that is not there yet."""

    @cached_property
    def optimiser(self) -> torch.optim.AdamW:
        """Made when it is asked for: torch imports for seconds before its first one, and a reader needs none."""
        rate, decay = self.params.learning_rate, self.params.weight_decay
        made = torch.optim.AdamW(self.scorer.field.parameters(), lr=rate, weight_decay=decay, betas=(0.9, 0.999))
        _unflatten(made, self.moments)
        self.moments = {}
        return made

    def save(self, folder: Path) -> None:
        """Write the state to `folder`: two safetensors files, and a JSON last that holds their digests."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "scorer.safetensors", self.scorer.state_dict())
        save_tensors(folder / "optimiser.safetensors", _flat(self.optimiser))
        files = {name: sha256_file(folder / name) for name in ("scorer.safetensors", "optimiser.safetensors")}
        write_json(folder / "state.json", {"history": [asdict(epoch) for epoch in self.history], "files": files})

    def load(self, folder: Path) -> None:
        """Continue from `folder`. A half-written or altered state raises `DigestError` and changes nothing."""
        try:
            header = read_json(folder / "state.json")
            for name, digest in header["files"].items():
                if sha256_file(folder / name) != digest:
                    raise DigestError(f"{folder / name}: not the bytes that were written.")
            weights = load_file(folder / "scorer.safetensors")
            moments = load_file(folder / "optimiser.safetensors")
            history = [Epoch(**epoch) for epoch in header["history"]]
        except (WTFlowError, OSError, KeyError, TypeError, SafetensorError) as error:
            raise DigestError(f"{folder}: this checkpoint is damaged ({error})") from error
        self.scorer.load_state_dict(weights)
        self.moments, self.history = moments, history
        self.__dict__.pop("optimiser", None)


def be_deterministic() -> None:
    """Have this process compute the same bits each time. Fresh memory is not filled first: it would cost time."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def start(shards: FeatureShards, params: TrainParams) -> TrainingState:
    """A head with fresh weights, the channel statistics of the `train` images and the constant of the coupling on them;
    the same for the same seed.

    Raises `WTFlowError` for a level that was not extracted.
    """
    state = blank(shards, params)
    state.scorer.fusion.learn_statistics(shards.batches(shards.training_rows(), READ_AT_ONCE))
    coupling = build_coupling(params.coupling)
    if coupling.c is None:  # depends on the data: measured over the batches of the first epoch
        state.batches = build_batches(params.batches, shards, state.scorer.fusion, torch.device("cpu"), params.seed)
        chosen = (batch.x0_BCHW for batch in state.batches.epoch(0))
        generator = torch.Generator().manual_seed(params.seed)
        with torch.no_grad():
            state.scorer.c.fill_(constant(coupling, chosen, generator))
    else:
        state.scorer.c.fill_(coupling.c)
    return state


def blank(shards: FeatureShards, params: TrainParams) -> TrainingState:
    """As `start`, before it has looked at the images: what a checkpoint is loaded into."""
    torch.manual_seed(params.seed)
    first = shards.batch(shards.rows(split="train")[:1])
    fusion = build_fusion(params.fusion, first, tuple(shards.header["backbone"]["image_size"]))
    network = build_field(params.velocity, fusion.channels, fusion.size)
    scorer = Scorer(fusion, network, params.coupling, params.solver, params.score)
    return TrainingState(scorer, params, [])


def train(
    state: TrainingState,
    shards: FeatureShards,
    params: TrainParams,
    place: Place = Place(),
    wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
    on_epoch: Callable[[TrainingState, Epoch], None] = lambda state, epoch: None,
) -> None:
    """Run the epochs over the `train` images that `state` has not seen.

    `wrap` may distribute the network; `on_epoch` may keep the state.

    Raises `WTFlowError` when the loss stops being finite, and for maps whose sides the field cannot halve twice.
    """
    state.scorer.to(place.device)
    if place.device.type != "cpu":  # the moments of a checkpoint follow their weights
        state.optimiser.load_state_dict(state.optimiser.state_dict())
    network = wrap(state.scorer.field)
    batches, state.batches = state.batches, None
    if batches is None or place.device.type != "cpu":
        batches = build_batches(params.batches, shards, state.scorer.fusion, place.device, params.seed)
    coupling = build_coupling(params.coupling)
    for epoch in range(len(state.history), params.epochs):
        network.train()
        began = time.perf_counter()
        total, samples = torch.zeros((), device=place.device), 0
        first = torch.full(
            (), batches.steps, device=place.device
        )  # step whose loss was not finite; asked once an epoch
        for step, (batch, sample) in enumerate(ahead(_samples(batches, epoch, coupling, params.time, place))):
            size = len(batch.x0_BCHW)
            rate = learning_rate(params, epoch * batches.steps + step, params.epochs * batches.steps)
            for group in state.optimiser.param_groups:
                group["lr"] = rate
            with torch.autocast(place.device.type, torch.bfloat16, enabled=place.device.type == "cuda"):
                loss_B = time_weight(sample.t_B, params.loss) * matching_loss(network, sample)
            state.optimiser.zero_grad(set_to_none=True)
            # the mean over the global batch, whatever the workers' shares: DDP averages over workers
            (loss_B.sum() * (place.world_size / size)).backward()  # type: ignore[no-untyped-call]
            state.optimiser.step()
            total += loss_B.detach().sum()
            samples += size
            first = torch.where(loss_B.detach().sum().isfinite(), first, first.clamp(max=step))
        loss = _over_workers(total, place, torch.distributed.ReduceOp.SUM) / samples
        norm = get_total_norm(weight.grad for weight in network.parameters() if weight.grad is not None).item()
        for what, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                broken = min(int(_over_workers(first, place, torch.distributed.ReduceOp.MIN)), batches.steps - 1)
                again = _samples(batches, epoch, coupling, params.time, place)  # draws what training drew
                rows = next((batch.row_B for batch, _ in islice(again, broken, None)), torch.tensor([]))
                raise WTFlowError(_diverged(f"the {what} of epoch {epoch} is {value}", broken, rows, shards))
        images = samples * sample.x_BCHW.shape[2:].numel() / math.prod(state.scorer.fusion.size)
        images_per_s = images / (time.perf_counter() - began)
        mean_y2 = _over_workers(_sum_y2(state.scorer, sample), place, torch.distributed.ReduceOp.SUM) / size
        c = state.scorer.c.item()
        done = Epoch(epoch, loss, rate, norm, c, mean_y2, images_per_s, _memory_gb(place.device))
        state.history.append(done)
        on_epoch(state, done)
    state.scorer.eval()


def finish(state: TrainingState, shards: FeatureShards) -> Scorer:
    """The trained head, frozen, with what its score learns from the `train` images once the field is fixed."""
    if state.scorer.params.balance == "covariance":
        state.scorer.eval().learn_usual(shards.batches(shards.training_rows(), READ_AT_ONCE))
    return state.scorer.freeze()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while its predecessor is used: a second core, or a worker that waits for
    the others, draws the next batch and its noise on the side."""
    threads, end = torch.get_num_threads(), object()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def _samples(
    batches: Batches, epoch: int, coupling: Coupling, times: TimeParams, place: Place
) -> Iterator[tuple[Batch, PathSample]]:
    """The steps of an epoch: the global batch, and this worker's share of it on the path."""
    for batch in batches.epoch(epoch):
        yield batch, _share(batch, coupling, times, place)


def _share(batch: Batch, coupling: Coupling, times: TimeParams, place: Place) -> PathSample:
    """This worker's rows of a global batch on the path: noise and times are drawn for all of it, on the CPU."""
    x1_BCHW = coupling.draw(batch.x0_BCHW.cpu(), batch.generator).to(place.device)
    t_B = sample_times(len(x1_BCHW), times, batch.generator).to(place.device)
    share = slice(place.rank, None, place.world_size)
    place_B = None if batch.place_B is None else batch.place_B[share]
    return interpolate(batch.x0_BCHW[share], x1_BCHW[share], t_B[share], place_B)


@torch.no_grad()
def _sum_y2(scorer: Scorer, sample: PathSample) -> Tensor:
    """Mean y² of each of this worker's samples, summed, by the field as it is scored; 0 for an empty share."""
    x0_BCHW = sample.x_BCHW - sample.t_B.view(-1, 1, 1, 1) * sample.velocity_BCHW
    places, scored = () if sample.place_B is None else (sample.place_B,), scorer.field.eval()
    y_BCHW = scorer.transported(x0_BCHW, lambda x_BCHW, t_B: scored(x_BCHW, t_B, *places))
    return y_BCHW.square().mean(dim=(1, 2, 3)).sum()


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _over_workers(value: Tensor, place: Place, how: "torch.distributed.ReduceOp.RedOpType") -> float:
    if place.world_size > 1:
        torch.distributed.all_reduce(value, op=how)
    return value.item()


def _diverged(what: str, step: int, row_B: Tensor, shards: FeatureShards) -> str:
    """What to say, with some images of the batch where it began: their features, or the rate, are the cause."""
    rows = sorted(set(row_B.tolist()))
    images = shards.index.select(["image_id", "path"]).take(rows[:IMAGES_NAMED]).to_pylist()
    return "\n".join(
        [
            f"training: {what}. Lower train.learning_rate, or look at the images of step {step}, where it began:",
            *(f"  {image['image_id']}  {image['path']}" for image in images),
            *([f"  and {len(rows) - IMAGES_NAMED} more"] if len(rows) > IMAGES_NAMED else []),
        ]
    )


def learning_rate(params: TrainParams, step: int, steps: int) -> float:
    """Rate of a step: linear rise over the warm-up, then half a cosine to 0."""
    warmup = params.warmup_fraction * steps
    if step < warmup:
        return params.learning_rate * (step + 1) / (warmup + 1)
    return params.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _flat(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def _unflatten(optimiser: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
