"""EfficientAD-S (arXiv 2303.14535): anomalib's networks and maps, with two things missing that cannot be had offline.

* Its teacher was distilled from a WideResNet on ImageNet. Here a teacher of the same shape is distilled from the shared
  backbone's features, on the training images of the line.
* Its student is held back by a penalty on ImageNet images. Here there is none.

It takes 70,000 steps of one image in the paper; `steps` says how many here.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel
from torch import Tensor

from benchmarks.contest.contender import Inputs
from benchmarks.peers.shared import Images, Peer

HELD_OUT = 10
"""Every so many training images serve for the quantiles of the maps, as the paper's validation images do."""


class EfficientAd(Peer):
    """Settings: `teacher_steps`, `steps`, of one image each."""

    def embed(self, images_BYX3: Tensor) -> object:
        return None

    def score(self, images_BYX3: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(_unit(images_BYX3))
        return found.pred_score.flatten(), found.anomaly_map[:, 0]

    def fit(self) -> None:
        images = self.images.train_NYX3
        held_out = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
        self._distil_teacher(images)
        self._learn_statistics(images)
        self._learn(images[~held_out])
        self.model.eval()
        self._learn_quantiles(images[held_out])

    def _distil_teacher(self, images_NYX3: Tensor) -> None:
        levels = self.images.train_maps()
        moments = [(level.mean((0, 2, 3), keepdim=True), level.std((0, 2, 3), keepdim=True)) for level in levels]
        teacher, steps = self.model.teacher, self.settings["teacher_steps"]
        optimiser = torch.optim.Adam(teacher.parameters(), lr=1e-4, weight_decay=1e-5)
        for index in _order(len(images_NYX3), steps):
            seen = [(level[[index]] - mean) / std for level, (mean, std) in zip(levels, moments, strict=True)]
            wanted = torch.cat([F.interpolate(level, (64, 64), mode="bilinear") for level in seen], dim=1)
            # the network pads nothing, so 4 places are missing on each side
            loss = F.mse_loss(teacher(_unit(images_NYX3[[index]])), wanted[:, :, 4:-4, 4:-4])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        teacher.eval().requires_grad_(False)

    @torch.no_grad()
    def _learn_statistics(self, images_NYX3: Tensor) -> None:
        total, square, count = 0.0, 0.0, 0
        for batch_BYX3 in images_NYX3.split(4):
            seen = self.model.teacher(_unit(batch_BYX3)).double()
            total, square = total + seen.sum((0, 2, 3)), square + seen.square().sum((0, 2, 3))
            count += seen.numel() // seen.shape[1]
        mean = total / count
        std = (square / count - mean.square()).clamp_min(0).sqrt()
        self.model.mean_std.update({"mean": mean.float()[None, :, None, None], "std": std.float()[None, :, None, None]})

    def _learn(self, images_NYX3: Tensor) -> None:
        model, steps = self.model, self.settings["steps"]
        learnt = [*model.student.parameters(), *model.ae.parameters()]
        optimiser = torch.optim.Adam(learnt, lr=1e-4, weight_decay=1e-5)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, step_size=max(1, int(0.95 * steps)), gamma=0.1)
        model.train()
        for index in _order(len(images_NYX3), steps):
            loss = self._loss(_unit(images_NYX3[[index]]))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()

    def _loss(self, image_13YX: Tensor) -> Tensor:
        """Hard examples of student against teacher, autoencoder against teacher, student against autoencoder."""
        model, channels = self.model, self.model.teacher_out_channels
        _, distance = model.compute_student_teacher_distance(image_13YX)
        hard = distance[distance >= torch.quantile(distance.detach().flatten(), 0.999)].mean()
        changed = model.choose_random_aug_image(image_13YX)
        with torch.no_grad():
            teacher = (model.teacher(changed) - model.mean_std["mean"]) / model.mean_std["std"]
        copied = model.ae(changed, image_13YX.shape[-2:])
        return hard + F.mse_loss(copied, teacher) + F.mse_loss(model.student(changed)[:, channels:], copied)

    @torch.no_grad()
    def _learn_quantiles(self, images_NYX3: Tensor) -> None:
        maps = [self.model.get_maps(_unit(image_1YX3)) for image_1YX3 in images_NYX3.split(1)]
        for name, flat in zip(("st", "ae"), map(torch.cat, zip(*maps, strict=True)), strict=True):
            flat = flat.flatten()[:: max(1, flat.numel() // 2**23)]
            self.model.quantiles[f"qa_{name}"] = torch.quantile(flat, 0.9)
            self.model.quantiles[f"qb_{name}"] = torch.quantile(flat, 0.995)


def _unit(images_BYX3: Tensor) -> Tensor:
    return images_BYX3.permute(0, 3, 1, 2).float().div(255).contiguous()


def _order(count: int, steps: int) -> list[int]:
    """Every image once in each round, in an order of its own."""
    rounds = -(-steps // count)
    return torch.cat([torch.randperm(count) for _ in range(rounds)])[:steps].tolist()


def build(settings: dict[str, Any], seed: int, inputs: Inputs) -> EfficientAd:
    """See `benchmarks.contest.contender`."""
    images = Images(inputs)
    channels = sum(images.network.feature_info.channels())
    return EfficientAd(images, EfficientAdModel(teacher_out_channels=channels), settings)
