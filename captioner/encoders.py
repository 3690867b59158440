"""Encoders: from images to annotations.

VGG-16 and the ResNets of torchvision, a small CNN that learns from scratch, and any other module through
:class:`ForeignEncoder`. Shapes: B images, C channels, N = h * w regions, D = C annotation size.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.attention import Annotations
from captioner.errors import InputError
from captioner.images import Preprocessing


class Encoder(nn.Module):
    """Turns normalised images (B, 3, S, S) into annotations.

    Parameters
    ----------
    annotation_dim : int
        D, size of an annotation vector.
    preprocessing : Preprocessing
        What an image goes through before it.
    learns : bool
        Whether it is trained with the captioner. If not it is frozen: its parameters take no gradient, and it stays in
        evaluation mode whatever mode the model around it is set to, so that batch norm's statistics cannot drift.
    grid : int, optional
        Pool its map to this many rows and columns (averages).
    """

    def __init__(
        self, annotation_dim: int, preprocessing: Preprocessing, *, learns: bool, grid: int | None = None
    ) -> None:
        super().__init__()
        self.annotation_dim, self.preprocessing, self.learns, self.grid = annotation_dim, preprocessing, learns, grid

    def features(self, images: Tensor) -> Tensor | Annotations:
        """Return a map (B, D, h, w), tokens (B, N, D), or annotations."""
        raise NotImplementedError

    def load_weights(self) -> None:
        """Load the pretrained weights that the settings name; a new model does so once, a checkpoint never."""

    def forward(self, images: Tensor) -> Annotations:
        """Return the annotations of normalised images (B, 3, S, S)."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            features = self.features(images)
            if not isinstance(features, Annotations):
                features = self._regions(features)
        return features

    def train(self, mode: bool = True) -> Encoder:
        """Set the training mode, which never reaches a frozen encoder."""
        return super().train(mode and self.learns)

    def _freeze(self) -> None:
        """Apply `learns` to the parameters; a subclass calls it when they exist."""
        self.requires_grad_(self.learns)
        self.train(self.learns)

    def _regions(self, features: Tensor) -> Annotations:
        if not isinstance(features, Tensor):
            raise InputError(
                f"{self._name} gives a {type(features).__name__}: an encoder gives a map (B, C, h, w), tokens "
                "(B, N, D) or captioner.attention.Annotations."
            )
        if features.dim() == 3:
            if self.grid is not None:
                raise InputError(
                    f"grid {self.grid} pools a map, but {self._name} gives tokens (B, N, D), which have no rows and "
                    "columns: leave the encoder's grid out."
                )
            return Annotations(features)
        if features.dim() != 4:
            raise InputError(
                f"{self._name} gives a tensor with {features.dim()} dimensions: an encoder gives a map (B, C, h, w) or "
                "tokens (B, N, D)."
            )
        if self.grid is not None:
            features = F.adaptive_avg_pool2d(features, self.grid)
        height, width = features.shape[-2:]
        return Annotations(features.flatten(2).mT, grid=(height, width))

    @property
    def _name(self) -> str:
        return type(self).__name__


class TorchvisionEncoder(Encoder):
    """The convolutional part of a torchvision classifier; see :class:`VGG16` and :class:`ResNet`."""

    def __init__(
        self,
        architecture: str,
        body: nn.Sequential,
        annotation_dim: int,
        *,
        weights: str | None,
        grid: int | None,
        preprocessing: Preprocessing | None,
        learns: bool | None,
    ) -> None:
        self_preprocessing = preprocessing or _published_preprocessing(architecture, weights)
        super().__init__(
            annotation_dim, self_preprocessing, learns=weights is None if learns is None else learns, grid=grid
        )
        self.architecture, self.weights, self.body = architecture, weights, body
        self._freeze()

    def features(self, images: Tensor) -> Tensor:
        """Return the last map of the body, (B, D, h, w)."""
        features: Tensor = self.body(images)
        return features

    def load_weights(self) -> None:
        """Load the named torchvision weights, or the local file's.

        Raises
        ------
        InputError
            Where the download fails, or the file holds no weights of this architecture.
        """
        if self.weights is None:
            return
        name = _published_name(self.architecture, self.weights)
        if name is not None:
            try:
                tensors = torchvision.models.get_weight(name).get_state_dict(progress=True, check_hash=True)
            except OSError as error:
                raise InputError(
                    f"The weights {name} could not be downloaded ({error}): download them elsewhere and give the "
                    "file's path as the encoder's weights."
                ) from error
        else:
            try:
                tensors = torch.load(self.weights, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises a dozen kinds for a file that is none of its own
                raise InputError(
                    f"The encoder's weights {self.weights} are no file that torch can read ({type(error).__name__}): "
                    f"give a state dict of torchvision's {self.architecture}."
                ) from error
        prefix = "features." if self.architecture.startswith("vgg") else ""
        counts = "num_batches_tracked"  # which older files do not hold, and no evaluation needs
        wanted = {prefix + key: value for key, value in self.body.state_dict().items() if not key.endswith(counts)}
        parts = {key.partition(".")[0] for key in wanted}  # what lies behind the body is not of interest
        found = {
            key: value
            for key, value in (tensors.items() if isinstance(tensors, dict) else ())
            if isinstance(value, Tensor) and key.partition(".")[0] in parts and not key.endswith(counts)
        }
        # Also what is too much is wrong: a ResNet-34 holds all that a ResNet-18 asks for.
        wrong = [
            key
            for key in wanted.keys() | found.keys()
            if key not in wanted or key not in found or wanted[key].shape != found[key].shape
        ]
        if wrong:
            raise InputError(
                f"The encoder's weights {self.weights} are not {self.architecture}'s ({len(wrong)} tensors differ, "
                f"{min(wrong)} among them): give a state dict of torchvision's {self.architecture}."
            )
        self.body.load_state_dict({key.removeprefix(prefix): value for key, value in found.items()})


class VGG16(TorchvisionEncoder):
    """VGG-16 up to conv5_3, before the last pooling: 14 x 14 regions of 512 values at 224 pixels (Xu et al., 2015).

    Parameters
    ----------
    weights : str, optional
        A name of torchvision's (such as IMAGENET1K_V1), the path of a local state dict, or nothing: from scratch.
    grid : int, optional
        Pool the map to grid x grid regions.
    preprocessing : Preprocessing, optional
        By default what the weights were published with.
    learns : bool, optional
        By default it is frozen with pretrained weights and learns without.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        grid: int | None = None,
        preprocessing: Preprocessing | None = None,
        learns: bool | None = None,
    ) -> None:
        body = torchvision.models.vgg16(weights=None).features[:-1]
        super().__init__("vgg16", body, 512, weights=weights, grid=grid, preprocessing=preprocessing, learns=learns)


class ResNet(TorchvisionEncoder):
    """A ResNet up to the end of one of its stages (He et al., 2016).

    Parameters
    ----------
    depth : {18, 34, 50, 101, 152}
        Number of layers.
    stage : {1, 2, 3, 4}
        Stage whose map is taken: at 224 pixels the third gives 14 x 14 regions, the fourth 7 x 7.
    weights : str, optional
        A name of torchvision's (such as IMAGENET1K_V2), the path of a local state dict, or nothing: from scratch.
    grid : int, optional
        Pool the map to grid x grid regions.
    preprocessing : Preprocessing, optional
        By default what the weights were published with.
    learns : bool, optional
        By default it is frozen with pretrained weights and learns without.
    """

    def __init__(
        self,
        *,
        depth: Literal[18, 34, 50, 101, 152] = 50,
        stage: Literal[1, 2, 3, 4] = 4,
        weights: str | None = None,
        grid: int | None = None,
        preprocessing: Preprocessing | None = None,
        learns: bool | None = None,
    ) -> None:
        net = torchvision.models.get_model(f"resnet{depth}", weights=None)
        names = ("conv1", "bn1", "relu", "maxpool", *(f"layer{number}" for number in range(1, stage + 1)))
        body = nn.Sequential(OrderedDict((name, net.get_submodule(name)) for name in names))
        last_block = net.get_submodule(f"layer{stage}")[-1]
        annotation_dim = (last_block.conv3 if depth >= 50 else last_block.conv2).out_channels
        super().__init__(
            f"resnet{depth}",
            body,
            annotation_dim,
            weights=weights,
            grid=grid,
            preprocessing=preprocessing,
            learns=learns,
        )
        self.depth, self.stage = depth, stage


def _published_name(architecture: str, weights: str) -> str | None:
    """Return torchvision's full name of the weights, or None where `weights` is a local file."""
    names = {weight.name: str(weight) for weight in torchvision.models.get_model_weights(architecture)}
    if weights.upper() in (*names, "DEFAULT"):
        return str(torchvision.models.get_model_weights(architecture)[weights.upper()])
    if not Path(weights).is_file():
        raise InputError(
            f"There are no weights {weights!r} for {architecture}, neither a file nor a name of torchvision's: "
            f"choose {' or '.join(names)}, or give the path of a state dict."
        )
    return None


def _published_preprocessing(architecture: str, weights: str | None) -> Preprocessing:
    name = None if weights is None else _published_name(architecture, weights)
    if name is None:
        return Preprocessing()
    return Preprocessing.from_transforms(torchvision.models.get_weight(name).transforms())


class SmallCNN(Encoder):
    """A small residual CNN for images of 64 to 128 pixels that learns from scratch.

    Parameters
    ----------
    size : int
        Side of the images in pixels.
    region : int
        Side of a region in pixels: a multiple of 4 that divides `size`.
    width : int
        Channels of the first stage; the annotations have four times as many.

    Raises
    ------
    InputError
        Where the regions do not tile the image.
    """

    def __init__(self, *, size: int = 96, region: int = 8, width: int = 32) -> None:
        if region < 4 or region % 4 or size % region:
            raise InputError(
                f"SmallCNN cannot tile images of {size} pixels with regions of {region}: give a region that is a "
                "multiple of 4 and divides the size."
            )
        super().__init__(
            4 * width,
            Preprocessing(fit="squash", size=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
            learns=True,
        )
        self.size, self.region, self.width = size, region, width
        self.body = nn.Sequential(
            _convolution(3, width, 4, stride=4),  # a patch per 4 x 4 pixels: most of the cost of a deep stem saved
            _Residual(width),
            _convolution(width, 4 * width, region // 4, stride=region // 4),
            _Residual(4 * width),
            _Residual(4 * width),
        )

    def features(self, images: Tensor) -> Tensor:
        """Return the map (B, 4 * width, size / region, size / region)."""
        features: Tensor = self.body(images)
        return features


def _convolution(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    padding = kernel // 2 if stride == 1 else 0
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, 3)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))


class ForeignEncoder(Encoder):
    """Any module that turns normalised images (B, 3, S, S) into a map (B, C, h, w), tokens (B, N, D) or annotations.

    The module may declare `annotation_dim` and `preprocessing`; what it does not declare is measured on one blank image
    and taken as ImageNet's at 224 pixels.

    Parameters
    ----------
    module : nn.Module
        The encoder, with its weights. A checkpoint stores its tensors and its class's name, never its code.
    grid : int, optional
        Pool its map to grid x grid regions.
    preprocessing : Preprocessing, optional
        What an image goes through before it.
    learns : bool
        Train it with the captioner instead of keeping it frozen.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        grid: int | None = None,
        preprocessing: Preprocessing | None = None,
        learns: bool = False,
    ) -> None:
        chosen = preprocessing or getattr(module, "preprocessing", None) or Preprocessing()
        super().__init__(getattr(module, "annotation_dim", 0), chosen, learns=learns, grid=grid)
        self.module = module
        self._freeze()
        if not self.annotation_dim:
            self.annotation_dim = self._measure()

    @property
    def module_name(self) -> str:
        """The module's class as package:Class, the form in which a command line names it."""
        return f"{type(self.module).__module__}:{type(self.module).__qualname__}"

    def features(self, images: Tensor) -> Tensor | Annotations:
        """Return what the module gives."""
        features: Tensor | Annotations = self.module(images)
        return features

    def _measure(self) -> int:
        size = self.preprocessing.size
        training = self.module.training
        self.module.eval()  # a blank image must not reach batch norm's statistics
        with torch.no_grad():
            annotations: Annotations = self(torch.zeros(1, 3, size, size))
        self.module.train(training)
        return annotations.values.size(-1)

    @property
    def _name(self) -> str:
        return self.module_name
