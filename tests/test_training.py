import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipelines.lines import read_params
from tests.guards.closure import ROOT
from tests.tiny_line import train_params, trained
from wtflow.artefact import read_json, write_json
from wtflow.batches import Batch, PlaceBatches, build_batches
from wtflow.data.shards import FeatureShards
from wtflow.detector import Scorer
from wtflow.errors import DigestError, WTFlowError
from wtflow.flow.coupling import build_coupling
from wtflow.flow.loss import time_weight
from wtflow.params import merged
from wtflow.scoring.density import LEAST
from wtflow.training import (
    Epoch,
    Place,
    TrainingState,
    TrainParams,
    _share,
    _sum_y2,
    ahead,
    blank,
    finish,
    learning_rate,
    start,
    train,
)

PLACES = {"batches": {"kind": "places"}, "velocity": {"kind": "location"}}
SMALL = {
    "epochs": 4,
    "batches": {"places": 64, "steps": 5},
    "velocity": {"width": 8},
    "calibration": {"target_fpr": 0.2},
}


def shipped() -> TrainParams:
    """The settings of params.yaml, made small."""
    return TrainParams.parse(merged(read_params(ROOT / "params.yaml")["train"], SMALL), "tests")


SETTINGS = pytest.mark.parametrize("params", [train_params(epochs=4), shipped()], ids=["plain", "shipped"])


class Stop(Exception):
    """Ends a run as a kill would: nothing of the code under test handles it."""


class Watched(FeatureShards):
    """Notes which rows are read while it trains."""

    def batch(self, rows: Sequence[int]) -> dict[int, Tensor]:
        self.__dict__.setdefault("asked", []).append(list(rows))
        return super().batch(rows)


class Recorded(nn.Module):
    """Passes on to a network and keeps what it was asked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, x: Tensor, t: Tensor, *place: Tensor) -> Tensor:
        self.seen.append((x.detach().clone(), t.clone(), *place))
        return self.network(x, t, *place)


@pytest.fixture
def single_process_group() -> Iterator[None]:
    """torch.distributed with one member: a collective call returns what went in."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def weights(state: TrainingState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.scorer.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@SETTINGS
def test_the_same_seed_gives_the_same_bits_whatever_came_before(tiny_fit: FeatureShards, params: TrainParams) -> None:
    first = trained(tiny_fit, params)
    torch.randn(17)  # the global generator is somewhere else now
    again = trained(tiny_fit, params)
    other = trained(tiny_fit, params.model_copy(update={"seed": 1}))
    assert same(weights(first), weights(again))
    assert first.history == again.history
    assert not same(weights(first), weights(other))


def test_the_loss_falls(tiny_fit: FeatureShards) -> None:
    history = trained(tiny_fit, train_params(epochs=8)).history
    assert [epoch.epoch for epoch in history] == list(range(8))
    assert history[-1].loss < 0.85 * history[0].loss


def test_an_epoch_tells_how_the_training_stands(tiny_fit: FeatureShards) -> None:
    rows = tiny_fit.rows(split="train")
    state = trained(tiny_fit, train_params(epochs=3, batches={"images": len(rows)}))  # an epoch is one step
    scorer, last = state.scorer, state.history[-1]
    gradient = torch.cat([weight.grad.flatten() for weight in scorer.field.parameters() if weight.grad is not None])
    assert last.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-5)
    with torch.no_grad():
        y = scorer.transported(scorer.fusion(tiny_fit.batch(rows)), scorer.field)
    assert last.mean_y2 == pytest.approx(y.square().mean().item(), rel=1e-4)
    assert last.c == scorer.c.item()
    assert last.images_per_s > 0
    assert last.memory_gb > 0.01


def test_a_gradient_that_is_not_finite_ends_the_training(tiny_fit: FeatureShards) -> None:
    params = train_params(batches={"images": len(tiny_fit.rows(split="train"))})  # an epoch is one step
    state = start(tiny_fit, params)
    state.scorer.field.leave.bias.register_hook(lambda gradient: torch.full_like(gradient, math.inf))  # type: ignore[no-untyped-call]
    with pytest.raises(WTFlowError, match=r"gradient's norm of epoch 0 is inf\. Lower train\.learning_rate"):
        train(state, tiny_fit, params)


def test_the_backbone_s_statistics_normalise_the_training_images(tiny_fit: FeatureShards) -> None:
    state = start(tiny_fit, train_params())
    x0 = state.scorer.fusion(tiny_fit.batch(tiny_fit.rows(split="train"))).double()
    assert x0.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    std = x0.std(dim=(0, 2, 3))
    assert ((std - 1).abs() < 1e-2).all()


@SETTINGS
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    tiny_fit: FeatureShards, tmp_path: Path, params: TrainParams
) -> None:
    whole = trained(tiny_fit, params)

    def save_and_stop(state: TrainingState, epoch: Epoch) -> None:
        state.save(tmp_path)
        if epoch.epoch == 1:
            raise Stop

    with pytest.raises(Stop):
        train(start(tiny_fit, params), tiny_fit, params, on_epoch=save_and_stop)
    resumed = start(tiny_fit, params)
    resumed.load(tmp_path)
    assert [epoch.epoch for epoch in resumed.history] == [0, 1]
    train(resumed, tiny_fit, params)
    finish(resumed, tiny_fit)
    assert same(weights(resumed), weights(whole))
    assert resumed.history == whole.history


@pytest.mark.slow
def test_who_reads_a_state_does_not_wait_for_what_an_optimiser_imports(tiny_fit: FeatureShards, tmp_path: Path) -> None:
    trained(tiny_fit, train_params(epochs=1)).save(tmp_path)
    code = f"""
import sys
from pathlib import Path
from tests.tiny_line import train_params
from wtflow.data.shards import FeatureShards
from wtflow.training import blank, finish
shards = FeatureShards.open(Path({str(tiny_fit.folder)!r}))
state = blank(shards, train_params(epochs=1))
state.load(Path({str(tmp_path)!r}))
finish(state, shards)
print("torch._dynamo" in sys.modules, end=" ")
state.optimiser
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False True\n", done.stderr


@pytest.mark.parametrize("name", ["scorer.safetensors", "optimiser.safetensors", "state.json"])
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 0.99])
def test_a_half_written_checkpoint_is_refused_and_changes_nothing(
    tiny_fit: FeatureShards, tmp_path: Path, name: str, share: float | None
) -> None:
    """`share` of the file is left; None: the file is not there."""
    params = train_params(epochs=1)
    trained(tiny_fit, params).save(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if share is not None:
        (tmp_path / name).write_bytes(data[: int(share * len(data))])
    state = start(tiny_fit, params)
    before = weights(state)
    with pytest.raises(DigestError, match="checkpoint is damaged"):
        state.load(tmp_path)
    assert same(weights(state), before)
    assert (state.history, state.optimiser.state_dict()["state"]) == ([], {})
    train(state, tiny_fit, params)  # and it can be used
    (tmp_path / name).write_bytes(data)
    saved = start(tiny_fit, params)
    saved.load(tmp_path)
    assert same(weights(saved), weights(state))


@pytest.mark.parametrize("header", [[], {}, {"history": 1}, {"history": [{"epoch": 0}]}])
def test_a_checkpoint_without_its_history_is_refused_and_changes_nothing(
    tiny_fit: FeatureShards, tmp_path: Path, header: object
) -> None:
    trained(tiny_fit, train_params(epochs=1)).save(tmp_path)
    whole = read_json(tmp_path / "state.json")
    write_json(tmp_path / "state.json", {"files": whole["files"]} | header if isinstance(header, dict) else header)
    state = start(tiny_fit, train_params(epochs=1))
    before = weights(state)
    with pytest.raises(DigestError, match="checkpoint is damaged"):
        state.load(tmp_path)
    assert same(weights(state), before)


def test_a_seed_is_one_that_the_generators_take(tiny_fit: FeatureShards) -> None:
    params = train_params(seed=2**32 - 1, epochs=1)
    train(start(tiny_fit, params), tiny_fit, params)
    with pytest.raises(WTFlowError, match=r"seed: .* less than 4294967296"):
        train_params(seed=2**32)


def test_a_changed_byte_in_a_checkpoint_is_refused(tiny_fit: FeatureShards, tmp_path: Path) -> None:
    trained(tiny_fit, train_params(epochs=1)).save(tmp_path)
    data = bytearray((tmp_path / "scorer.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "scorer.safetensors").write_bytes(bytes(data))
    with pytest.raises(DigestError, match="not the bytes"):
        start(tiny_fit, train_params()).load(tmp_path)


def test_every_epoch_sees_every_training_image_once_and_no_other(tiny_fit: FeatureShards) -> None:
    params = train_params(epochs=3)
    watched = Watched(tiny_fit.folder, tiny_fit.header, tiny_fit.index)
    state = start(watched, params)
    watched.__dict__["asked"].clear()
    train(state, watched, params)
    rows, asked = tiny_fit.rows(split="train"), watched.__dict__["asked"]
    steps = -(-len(rows) // params.batches.images)
    epochs = [sum(asked[start : start + steps], []) for start in range(0, len(asked), steps)]
    assert len(epochs) == 3
    assert all(Counter(epoch) == Counter(rows) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("kind", ["images", "places"])
@pytest.mark.parametrize("coupling", ["independent", "location-wt", "batch-wt"])
def test_two_workers_share_every_batch_with_its_times_and_noise(
    tiny_fit: FeatureShards, coupling: str, kind: str
) -> None:
    """Each rank's points, put together, are those that a single worker works on."""
    params = train_params(
        epochs=1,
        coupling={"kind": coupling},
        time={"kind": "singular"},
        batches={"kind": kind},
        velocity={"kind": "location"},
    )
    seen = {}
    for place in (Place(), Place(0, 2), Place(1, 2)):
        recorded: list[Recorded] = []

        def wrap(network: nn.Module, kept: list[Recorded] = recorded) -> nn.Module:
            kept.append(Recorded(network))
            return kept[0]

        train(start(tiny_fit, params), tiny_fit, params, place, wrap)
        seen[place.rank, place.world_size] = recorded[0].seen
    assert len(seen[0, 1]) == len(seen[0, 2]) == len(seen[1, 2])
    for whole, *shares in zip(seen[0, 1], seen[0, 2], seen[1, 2], strict=True):
        for item in range(len(whole)):  # points, times, places
            for rank in (0, 1):
                assert torch.equal(shares[rank][item], whole[item][rank::2])
    samples = {"images": len(tiny_fit.rows(split="train")), "places": params.batches.steps * params.batches.places}
    assert sum(len(x) for x, *_ in seen[0, 1]) == samples[kind]


def test_the_constant_of_the_coupling_is_measured_on_the_training_images(tiny_fit: FeatureShards) -> None:
    """sign-wt: c = -sqrt(2/pi) E|x0| / E[x0^2]; the step of the scorer follows it."""
    params = train_params(coupling={"kind": "sign-wt"})
    scorer = start(tiny_fit, params).scorer.eval()
    x0 = scorer.fusion(tiny_fit.batch(tiny_fit.rows(split="train")))
    wanted = -math.sqrt(2 / math.pi) * x0.abs().mean().item() / x0.square().mean().item()
    assert -0.75 < wanted < -0.4
    assert scorer.c.item() == pytest.approx(wanted, abs=0.01)
    levels = tiny_fit.batch(tiny_fit.rows(split="calibrate"))
    with torch.no_grad():
        x0 = scorer.fusion(levels)
        y = x0 + scorer.field(x0, torch.zeros(len(x0))) / (1 - scorer.c)
    torch.testing.assert_close(scorer(levels)[0], 0.5 * y.square().mean(1), rtol=1e-5, atol=1e-6)
    unmeasured = Scorer(scorer.fusion, scorer.field, params.coupling, params.solver, params.score).eval()
    assert unmeasured(levels)[1].isnan().all()


def test_a_pool_that_was_filled_for_the_constant_is_trained_on(tiny_fit: FeatureShards, tmp_path: Path) -> None:
    """Places are read twice, for the statistics and for the pool, and not a third time; the bits are those of a pool
    of its own, as a run that goes on behind a checkpoint fills it."""
    changes = {"coupling": {"kind": "sign-wt"}, "velocity": {"kind": "location"}, "batches": {"kind": "places"}}
    params = train_params(**changes)
    watched = Watched(tiny_fit.folder, tiny_fit.header, tiny_fit.index)
    state = start(watched, params)
    state.save(tmp_path)
    train(state, watched, params)
    read = Counter(row for rows in watched.__dict__["asked"] for row in rows)
    first = tiny_fit.rows(split="train")[0]  # also looked at for the shapes
    assert read == {row: 3 if row == first else 2 for row in tiny_fit.rows(split="train")}
    again = blank(tiny_fit, params)
    again.load(tmp_path)
    assert again.batches is None
    train(again, tiny_fit, params)
    assert same(weights(again), weights(state))


class Off(nn.Module):
    """For data at rest in the sink: the velocity -x0 = -x_t / (1 - t), and 1 too much."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.weight, self.times = next(network.parameters()), []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(t)
        return -x / (1 - t).view(-1, 1, 1, 1) + 1 + 0 * self.weight.sum()


@pytest.mark.parametrize("weight", ["uniform", "near-data", "far-from-data"])
def test_an_image_weighs_what_its_time_says(tiny_fit: FeatureShards, weight: str) -> None:
    params = train_params(epochs=1, coupling={"kind": "sink"}, loss={"weight": weight}, time={"kind": "singular"})
    off: list[Off] = []
    state = start(tiny_fit, params)
    train(state, tiny_fit, params, wrap=lambda network: off.append(Off(network)) or off[0])  # type: ignore[func-returns-value]
    t = torch.cat(off[0].times)
    assert (t < 0.25).double().mean() > 0.3  # P = 1/2
    assert state.history[0].loss == pytest.approx(time_weight(t, params.loss).mean().item(), rel=1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_fit: FeatureShards) -> None:
    params = train_params()
    state = start(tiny_fit, params)
    with torch.no_grad():
        state.scorer.field.leave.bias.fill_(float("nan"))
    epochs: list[Epoch] = []
    with pytest.raises(WTFlowError, match=r"loss of epoch 0 is nan. Lower train\.learning_rate"):
        train(state, tiny_fit, params, on_epoch=lambda state, epoch: epochs.append(epoch))
    assert epochs == []


class BreaksAt(nn.Module):
    """Answers NaN for one image of one step."""

    def __init__(self, network: nn.Module, step: int) -> None:
        super().__init__()
        self.network, self.left = network, step

    def forward(self, x: Tensor, t: Tensor, *place: Tensor) -> Tensor:
        velocity: Tensor = self.network(x, t, *place)
        self.left -= 1
        return velocity + (
            torch.tensor([float("nan")] + [0.0] * (len(x) - 1)).view(-1, 1, 1, 1) if self.left < 0 else 0
        )


@pytest.mark.usefixtures("single_process_group")
@pytest.mark.parametrize("place", [Place(), Place(1, 2)])
def test_a_loss_that_is_not_finite_names_the_images_of_its_batch(tiny_fit: FeatureShards, place: Place) -> None:
    params, step = train_params(), 1
    watched = Watched(tiny_fit.folder, tiny_fit.header, tiny_fit.index)
    state = start(watched, params)
    watched.__dict__["asked"].clear()
    with pytest.raises(WTFlowError, match=rf"loss of epoch 0 is nan.* images of step {step}") as raised:
        train(state, watched, params, place, wrap=lambda network: BreaksAt(network, step))
    batch = watched.__dict__["asked"][step]
    assert len(batch) == params.batches.images
    named = [line.split()[0] for line in str(raised.value).splitlines()[1:]]
    assert named == [tiny_fit.index["image_id"][row].as_py() for row in sorted(batch)]


def test_a_loss_that_is_not_finite_names_the_images_of_its_places(
    tiny_fit: FeatureShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, step, drawn, epoch = train_params(**PLACES), 2, list[Tensor](), PlaceBatches.epoch

    def watched(self: PlaceBatches, number: int) -> Iterator[Batch]:
        for batch in epoch(self, number):
            drawn.append(batch.row_B)
            yield batch

    monkeypatch.setattr(PlaceBatches, "epoch", watched)
    with pytest.raises(WTFlowError, match=rf"loss of epoch 0 is nan.* images of step {step}") as raised:
        train(start(tiny_fit, params), tiny_fit, params, wrap=lambda network: BreaksAt(network, step))
    named = [line.split()[0] for line in str(raised.value).splitlines()[1:] if "more" not in line]
    rows = sorted(set(drawn[step].tolist()))
    assert named == [tiny_fit.index["image_id"][row].as_py() for row in rows[: len(named)]]
    assert len(named) >= 4


def test_a_worker_without_a_sample_of_the_last_batch_adds_nothing(tiny_fit: FeatureShards) -> None:
    params = train_params()
    state = start(tiny_fit, params)
    batches = build_batches(params.batches, tiny_fit, state.scorer.fusion, torch.device("cpu"), 0)
    batch = next(batches.epoch(0))
    alone = Batch(batch.x0_BCHW[:1], None, batch.row_B[:1], batch.generator)
    coupling = build_coupling(params.coupling)
    first, second = (_share(alone, coupling, params.time, Place(rank, 2)) for rank in range(2))
    assert (len(first.x_BCHW), len(second.x_BCHW)) == (1, 0)
    assert _sum_y2(state.scorer, first) > 0
    assert _sum_y2(state.scorer, second) == 0


def test_a_level_that_was_not_extracted_is_named(tiny_fit: FeatureShards) -> None:
    with pytest.raises(WTFlowError, match=r"train\.fusion\.levels: \[4\] were not extracted"):
        start(tiny_fit, train_params(fusion={"levels": [3, 4]}))


def test_the_rate_rises_and_falls_to_nearly_nothing() -> None:
    params = train_params(warmup_fraction=0.1, learning_rate=0.5)
    rates = [learning_rate(params, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.5 * (step + 1) / 11 for step in range(10)])
    assert max(rates) == rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert 0 < rates[-1] < 1e-3


def test_a_saved_folder_may_be_saved_over(tiny_fit: FeatureShards, tmp_path: Path) -> None:
    params = train_params(epochs=2)
    keep: Callable[[TrainingState, Epoch], None] = lambda state, epoch: state.save(tmp_path / "c")  # noqa: E731
    state = start(tiny_fit, params)
    train(state, tiny_fit, params, on_epoch=keep)
    moved = shutil.copytree(tmp_path / "c", tmp_path / "moved")
    again = start(tiny_fit, params)
    again.load(Path(moved))
    assert same(weights(again), weights(state))


def test_a_balanced_score_measures_y_by_what_training_images_leave_of_it(tiny_fit: FeatureShards) -> None:
    params = train_params(score={"balance": "covariance"})
    scorer = finish(trained(tiny_fit, params), tiny_fit)
    plain = finish(trained(tiny_fit, train_params()), tiny_fit)
    assert torch.equal(plain.usual_CC, torch.eye(len(plain.usual_CC)))
    levels = tiny_fit.batch(tiny_fit.rows(split="train"))
    # measured by its own second moments y' y has the mean C, so the energies' mean, places weighted, is a half, less
    # what is added along axes along which hardly anything is left
    usual_CC = scorer.usual_CC.double()
    least = LEAST / (1 + LEAST) * usual_CC.diagonal().mean()
    half = 0.5 * (1 - least * torch.linalg.inv(usual_CC).diagonal().mean())
    weight_BHW = scorer.fusion(levels).square().mean(dim=1)
    mean, of_plain = ((one(levels)[0] * weight_BHW).sum() / weight_BHW.sum() for one in (scorer, plain))
    assert mean.item() == pytest.approx(half.item(), abs=1e-4)
    assert of_plain.item() != pytest.approx(half.item(), rel=1e-1)
    assert scorer.usual_CC.diagonal().std() > 0.01
    off_diagonal = scorer.usual_CC - torch.diag(scorer.usual_CC.diagonal())
    assert off_diagonal.abs().max() > 0.01


def test_a_scorer_measures_y_by_what_is_usual_before_and_after_it_is_frozen(tiny_fit: FeatureShards) -> None:
    state = trained(tiny_fit, train_params(score={"balance": "covariance"}))
    state.scorer.eval().learn_usual([tiny_fit.batch(tiny_fit.training_rows())])
    levels = tiny_fit.batch(tiny_fit.rows(split="train")[:2])
    before = state.scorer(levels)[0]
    torch.testing.assert_close(state.scorer.freeze()(levels)[0], before, rtol=1e-4, atol=1e-5)


def test_items_are_made_one_ahead_in_order() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    items = ahead(numbers())
    assert [next(items), next(items)] == [0, 1]
    items.close()
    assert made == [0, 1, 2]
    assert list(ahead(numbers())) == [0, 1, 2, 3, 4]
    assert list(ahead(iter(()))) == []


def test_an_error_on_the_way_to_a_batch_ends_the_training() -> None:
    def broken() -> Iterator[int]:
        yield 0
        raise WTFlowError("no such image")

    items = ahead(broken())
    assert next(items) == 0
    with pytest.raises(WTFlowError, match="no such image"):
        next(items)
