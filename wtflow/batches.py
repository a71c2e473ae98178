"""What a step of training sees: a few whole maps, or many single places drawn from all maps of the line.

`images`: the maps of some images, each image once an epoch: {level: B x C x H x W} -> x0_BCHW.
`places`: a pool holds x0 at up to `pool` places of the training images; a step draws from it, and a place is a map of
1 x 1: x0_BC11. A place that is unlike most others is drawn more often (docs/equations.md, E4).

Both are functions of (seed, epoch, step) for the whole global batch, wherever it is computed.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.features.fusion import Fusion
from wtflow.params import Section
from wtflow.shapes import FeatureMap

READ_AT_ONCE = 32
Count = Annotated[int, Field(gt=0)]


class BatchParams(Section):
    """What a step is made of, over all workers together."""

    kind: Literal["images", "places"]
    """`images` is the paper's, and what a `unet` needs; `places` is for a field that sees a place by itself."""
    images: Count
    """Images a step of `images`, which alone reads it; an epoch is every image once."""
    places: Count
    """Places a step of `places`, which alone reads this and what follows."""
    steps: Count
    """Steps an epoch of `places`, however many images there are."""
    passes: Annotated[float, Field(gt=0)]
    """An epoch of `places` draws each place at most so often, on average: a small line gets fewer steps, or it would be
    learnt by heart."""
    rarity: Annotated[float, Field(ge=0)]
    """A place is drawn in proportion to (|x0|^2 / its mean)^rarity. 0: all alike. 1: what is twice as far from the mean
    of the line, in the square, is seen twice as often, so that the rare among the good is learnt too."""
    pool: Count
    """Places held in memory, 2 C bytes each; a line with more is represented by as many of each image, at random."""


@dataclass(frozen=True)
class Batch:
    """A global batch, the same on every worker."""

    x0_BCHW: FeatureMap
    place_B: Tensor | None
    """Which place of the map each is, if they are single places."""
    row_B: Tensor
    """The image of each: a row of the shards."""
    generator: torch.Generator
    """For what else is random in this step, on the CPU."""


class Batches(Protocol):
    """Where the loop gets its batches."""

    steps: int
    """Of an epoch."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch: the same ones whenever as much is drawn from their generators in between."""


class ImageBatches:
    """Whole maps, fused anew for each batch: nothing of the line is held in memory."""

    def __init__(
        self, params: BatchParams, shards: FeatureShards, fusion: Fusion, device: torch.device, seed: int
    ) -> None:
        self.params, self.shards, self.fusion, self.device, self.seed = params, shards, fusion, device, seed
        self.rows = shards.training_rows()
        self.steps = math.ceil(len(self.rows) / params.images)

    def epoch(self, number: int) -> Iterator[Batch]:
        """Every image once, in an order of its own each epoch."""
        generator = _generator(self.seed, number)
        order = torch.randperm(len(self.rows), generator=generator)
        for chosen in order.split(self.params.images):  # type: ignore[no-untyped-call]
            rows = [self.rows[index] for index in chosen.tolist()]
            x0_BCHW = self.fusion(moved(self.shards.batch(rows), self.device))
            yield Batch(x0_BCHW, None, torch.tensor(rows), generator)


class PlaceBatches:
    """Single places from a pool that is filled once."""

    def __init__(
        self, params: BatchParams, shards: FeatureShards, fusion: Fusion, device: torch.device, seed: int
    ) -> None:
        self.params, self.device, self.seed = params, device, seed
        rows = shards.training_rows()
        places = fusion.size[0] * fusion.size[1]
        kept = min(places, max(1, params.pool // len(rows)))
        self.row_N = torch.tensor(rows).repeat_interleave(kept)
        self.pool_NC = torch.empty(len(self.row_N), fusion.channels, dtype=torch.float16)
        self.place_N = torch.empty(len(self.row_N), dtype=torch.int64)
        self.steps = min(params.steps, math.ceil(params.passes * len(self.pool_NC) / params.places))
        self._fill(shards.batches(rows, READ_AT_ONCE), fusion, kept)
        self._check(shards)
        self.pool_NC = self.pool_NC.to(device)

    @torch.no_grad()
    def _fill(self, batches: Iterable[dict[int, Tensor]], fusion: Fusion, kept: int) -> None:
        generator, filled, squares = torch.Generator().manual_seed(self.seed), 0, []
        for levels in batches:
            x0_BNC = fusion(moved(levels, self.device)).flatten(2).transpose(1, 2).cpu()
            place_BK = _some_places(x0_BNC.shape[0], x0_BNC.shape[1], kept, generator)
            if kept < x0_BNC.shape[1]:
                x0_BNC = x0_BNC.gather(1, place_BK[:, :, None].expand(-1, -1, x0_BNC.shape[2]))
            x0_MC = x0_BNC.flatten(0, 1)
            end = filled + len(x0_MC)
            self.pool_NC[filled:end], self.place_N[filled:end] = x0_MC, place_BK.flatten()
            squares.append(x0_MC.square().mean(dim=1))
            filled = end
        self._edges_N = shares(torch.cat(squares), self.params.rarity).cumsum(0)

    def _check(self, shards: FeatureShards) -> None:
        """A place that is not finite would spoil the shares of all."""
        finite_N = self.pool_NC.sum(dim=1, dtype=torch.float32).isfinite()  # a sum of halves cannot overflow
        broken = sorted(set(self.row_N[~finite_N].tolist()))
        if broken:
            images = shards.index.select(["image_id", "path"]).take(broken).to_pylist()
            named = "\n".join(f"  {image['image_id']}  {image['path']}" for image in images)
            raise WTFlowError(f"{shards.folder}: features that are not finite. Extract again, or look at:\n{named}")

    def epoch(self, number: int) -> Iterator[Batch]:
        """Draws with replacement."""
        generator = _generator(self.seed, number)
        for _ in range(self.steps):
            uniform_B = torch.rand(self.params.places, generator=generator, dtype=torch.float64)
            drawn_B = torch.searchsorted(self._edges_N, uniform_B).clamp_max(len(self.pool_NC) - 1)
            # index_select, not [drawn_B]: it copies whole places, three times as fast
            x0_BC = self.pool_NC.index_select(0, drawn_B.to(self.device)).float()
            place_B = self.place_N[drawn_B].to(self.device)
            yield Batch(x0_BC[:, :, None, None], place_B, self.row_N[drawn_B], generator)


def build_batches(
    params: BatchParams, shards: FeatureShards, fusion: Fusion, device: torch.device, seed: int
) -> Batches:
    """The batches that the settings ask for, from the `train` images."""
    kind = PlaceBatches if params.kind == "places" else ImageBatches
    return kind(params, shards, fusion, device, seed)


def shares(square_N: Tensor, rarity: float) -> Tensor:
    """Probability of each place to be drawn, float64, from the mean square of its x0; all alike if it is 0 at each."""
    weight_N = square_N.double().pow(rarity)
    total = weight_N.sum()
    return weight_N / total if total > 0 else torch.full_like(weight_N, 1 / len(weight_N))


def moved(levels: dict[int, Tensor], device: torch.device) -> dict[int, Tensor]:
    """The maps on `device`, through pinned memory if it is a GPU."""
    if device.type != "cuda":
        return levels
    return {level: maps.pin_memory().to(device, non_blocking=True) for level, maps in levels.items()}


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def _some_places(images: int, places: int, kept: int, generator: torch.Generator) -> Tensor:
    """images x kept indices of places; all of them, in order, if they are all kept."""
    if kept == places:
        return torch.arange(places).expand(images, places)
    return torch.rand(images, places, generator=generator).topk(kept, dim=1).indices
