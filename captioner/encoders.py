"""Encoders: from images to annotations.

VGG-16 and the ResNets of torchvision, a small CNN that learns from scratch, and any other module through
:class:`ForeignEncoder`. Shapes: B images, C channels, N = h * w regions, D = C annotation size.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.utils.checkpoint import checkpoint

from captioner.attention import Annotations
from captioner.checkpoint import load
from captioner.errors import InputError
from captioner.images import Preprocessing

LARGEST_GRID = 256  # rows and columns that a map may be pooled to


class Encoder(nn.Module):
    """Turns normalised images (B, 3, S, S) into annotations.

    Parameters
    ----------
    annotation_dim : int
        D, size of an annotation vector.
    preprocessing : Preprocessing
        What an image goes through before it.
    learns : bool or str
        Whether it is trained with the captioner, or the name of the part from which on it is: what is registered before
        that part is frozen. What is frozen takes no gradient, and stays in evaluation mode whatever mode the model
        around it is set to.
    grid : int, optional
        Pool its map to this many rows and columns (averages).
    recompute : bool
        Compute what the learning stages have computed again in the backward pass, instead of keeping it in memory.
    pretrained : bool
        Its weights were learnt elsewhere. Batch norm then stays frozen, as it does wherever `learns` is a name: the few
        images of a batch would spoil the statistics of many.

    Raises
    ------
    InputError
        Where there is no such grid.
    """

    def __init__(
        self,
        annotation_dim: int,
        preprocessing: Preprocessing,
        *,
        learns: bool | str,
        grid: int | None = None,
        recompute: bool = False,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if grid is not None and not 1 <= grid <= LARGEST_GRID:
            raise InputError(f"The encoder's grid is {grid}: it must be from 1 to {LARGEST_GRID}.")
        self.annotation_dim, self.preprocessing, self.learns, self.grid = annotation_dim, preprocessing, learns, grid
        self.recompute, self.pretrained = recompute, pretrained

    def features(self, images: Tensor) -> Tensor | Annotations:
        """Return a map (B, D, h, w), tokens (B, N, D), or annotations."""
        raise NotImplementedError

    def load_weights(self) -> None:
        """Load the pretrained weights that the settings name; a new model does so once, a checkpoint never."""

    def forward(self, images: Tensor) -> Annotations:
        """Return the annotations of normalised images (B, 3, S, S)."""
        with torch.set_grad_enabled(bool(self.learns) and torch.is_grad_enabled()):
            features = self.features(images)
            if not isinstance(features, Annotations):
                features = self._regions(features)
        return features

    def train(self, mode: bool = True) -> Encoder:
        """Set the training mode, which never reaches what is frozen."""
        super().train(mode and bool(self.learns))
        for module in self._frozen():
            module.training = False
        return self

    def _freeze(self) -> None:
        """Apply `learns` to the parameters; a subclass calls it when they exist.

        Raises
        ------
        InputError
            Where `learns` names no part with weights to learn.
        """
        if isinstance(self.learns, str):
            self._check_name(self.learns)
        self.requires_grad_(bool(self.learns))
        for module in self._frozen():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self.train(bool(self.learns))

    def _check_name(self, name: str) -> None:
        names = [part for part, module in self._body().named_modules() if any(p.dim() > 1 for p in module.parameters())]
        if name and name in names:
            return
        way = name.split(".")
        within = (".".join(way[:depth]) for depth in reversed(range(len(way))))
        beside = ([part for part in names if part and part.rpartition(".")[0] == parent] for parent in within)
        choices = next(filter(None, beside), [])  # what stands where the name went wrong
        raise InputError(
            f"{self._name} has no part {name!r} with weights to learn: set the encoder's learns to "
            f"{', '.join([*choices, 'true'])} or false."
        )

    def _frozen(self) -> Iterator[nn.Module]:
        """Give the modules, each without those inside it, that stay as they are in an encoder that learns."""
        before = part = isinstance(self.learns, str)
        for name, module in self._body().named_modules():  # in the order in which they were registered
            before = before and name != self.learns
            if before or ((part or self.pretrained) and isinstance(module, _BatchNorm)):
                yield module

    def _body(self) -> nn.Module:
        """Return the module whose parts `learns` names."""
        return self

    def _run(self, stages: Iterable[nn.Module], images: Tensor) -> Any:
        """Run one stage after another; with `recompute`, the learning ones keep nothing but what they start from."""
        features: Any = images
        for stage in stages:
            if (
                self.recompute
                and torch.is_grad_enabled()
                and (features.requires_grad or any(parameter.requires_grad for parameter in stage.parameters()))
            ):
                again = partial(_first_and_again, stage)
                features = checkpoint(stage, features, use_reentrant=False, context_fn=again)
            else:
                features = stage(features)
        return features

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


def _first_and_again(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what surrounds a stage's computation for the first and for the second time."""
    return nullcontext(), _buffers_kept(stage)


@contextmanager
def _buffers_kept(stage: nn.Module) -> Iterator[None]:
    """Put the buffers back at the end: batch norm's statistics have counted the images once already."""
    before = [buffer.clone() for buffer in stage.buffers()]
    try:
        yield
    finally:  # torch breaks off when it has what it needs
        for buffer, value in zip(stage.buffers(), before, strict=True):
            buffer.copy_(value)


def _stages(body: nn.Sequential) -> Iterator[nn.Sequential]:
    """Cut a body behind its poolings and around its stages, so that no piece begins by changing its input in place."""
    first = 0
    for end, module in enumerate(body, start=1):
        if end == len(body) or isinstance(module, nn.MaxPool2d) or any(True for _ in module.children()):
            yield body[first:end]
            first = end


def _lay_out_as_images(body: nn.Module) -> None:
    """Put the convolutions' weights in the images' memory format, so that no step converts them or their gradients."""
    convert_conv2d_weight_memory_format(body, torch.channels_last)


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
        learns: bool | str | None,
        recompute: bool,
    ) -> None:
        super().__init__(
            annotation_dim,
            preprocessing or _published_preprocessing(architecture, weights),
            learns=weights is None if learns is None else learns,
            grid=grid,
            recompute=recompute,
            pretrained=weights is not None,
        )
        self.architecture, self.weights, self.body = architecture, weights, body
        if self.learns:
            _lay_out_as_images(self.body)
        self._freeze()

    def features(self, images: Tensor) -> Tensor:
        """Return the last map of the body, (B, D, h, w)."""
        features: Tensor = self._run(_stages(self.body), images)
        return features

    def _body(self) -> nn.Module:
        return self.body

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
            tensors = _published(name)
        else:
            try:
                # The oldest weights of torchvision are in the form that was before the zip archives.
                tensors = (
                    load(self.weights)
                    if zipfile.is_zipfile(self.weights)
                    else torch.load(self.weights, map_location="cpu", weights_only=True)
                )
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
    learns : bool or str, optional
        By default it is frozen with pretrained weights and learns without. A convolution's number in torchvision, such
        as "24" of conv5_1, stands for all from it on.
    recompute : bool
        Compute the learning layers' maps again in the backward pass instead of keeping them in memory.

    Raises
    ------
    InputError
        Where there are no such weights, or no such convolution.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        grid: int | None = None,
        preprocessing: Preprocessing | None = None,
        learns: bool | str | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            "vgg16",
            torchvision.models.vgg16(weights=None).features[:-1],
            512,
            weights=weights,
            grid=grid,
            preprocessing=preprocessing,
            learns=learns,
            recompute=recompute,
        )


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
    learns : bool or str, optional
        By default it is frozen with pretrained weights and learns without. A stage's name, such as "layer3", stands for
        all from it on. Batch norm of pretrained weights stays frozen.
    recompute : bool
        Compute the learning stages' maps again in the backward pass instead of keeping them in memory.

    Raises
    ------
    InputError
        Where there are no such weights, or no such stage.
    """

    def __init__(
        self,
        *,
        depth: Literal[18, 34, 50, 101, 152] = 50,
        stage: Literal[1, 2, 3, 4] = 4,
        weights: str | None = None,
        grid: int | None = None,
        preprocessing: Preprocessing | None = None,
        learns: bool | str | None = None,
        recompute: bool = False,
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
            recompute=recompute,
        )
        self.depth, self.stage = depth, stage


def _published(name: str) -> Any:
    """Return torchvision's weights, downloaded once; the hash of the file is in its name.

    Raises
    ------
    InputError
        Where the download fails, or the file is another than was published.
    """
    weights = torchvision.models.get_weight(name)
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if file.is_file():  # torch looks at the hash of what it downloads, and never again
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if not digest.startswith(file.stem.rpartition("-")[2]):
            raise InputError(
                f"{file} is not what was published as {name}, by its hash: delete it, and it is downloaded again."
            )
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"The weights {name} could not be downloaded ({error}): download them elsewhere and give the file's path "
            "as the encoder's weights."
        ) from error


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
    recompute : bool
        Compute its maps again in the backward pass instead of keeping them in memory.

    Raises
    ------
    InputError
        Where the regions do not tile the image.
    """

    def __init__(self, *, size: int = 96, region: int = 8, width: int = 32, recompute: bool = False) -> None:
        if region < 4 or region % 4 or size % region:
            raise InputError(
                f"SmallCNN cannot tile images of {size} pixels with regions of {region}: give a region that is a "
                "multiple of 4 and divides the size."
            )
        super().__init__(
            4 * width,
            Preprocessing(fit="squash", size=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
            learns=True,
            recompute=recompute,
        )
        self.size, self.region, self.width = size, region, width
        self.body = nn.Sequential(
            _convolution(3, width, 4, stride=4),  # a patch per 4 x 4 pixels: most of the cost of a deep stem saved
            _Residual(width),
            _convolution(width, 4 * width, region // 4, stride=region // 4),
            _Residual(4 * width),
            _Residual(4 * width),
        )
        _lay_out_as_images(self.body)

    def features(self, images: Tensor) -> Tensor:
        """Return the map (B, 4 * width, size / region, size / region)."""
        features: Tensor = self._run(_stages(self.body), images)
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


class PrecomputedRegions(Encoder):
    """Stands where a detector ran beforehand: the annotations of each image are read from the files of `data.regions`.

    Parameters
    ----------
    dim : int
        D, values of a region.
    """

    def __init__(self, *, dim: int = 2048) -> None:
        super().__init__(dim, Preprocessing(), learns=False)  # which no image goes through
        self.dim = dim

    def features(self, images: Tensor) -> Tensor:
        """Refuse images.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError(
            f"This model sees regions that were computed beforehand, and no images: give .npy or .npz files of "
            f"N x {self.dim} values, one for each image."
        )


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
    learns : bool or str
        Train it with the captioner instead of keeping it frozen. The dotted name of a part inside the module stands for
        all that is registered from it on; batch norm then stays frozen, which with true it does not.
    recompute : bool
        Compute all inside the module again in the backward pass instead of keeping it in memory.

    Raises
    ------
    InputError
        Where the module has no such part, or gives what is no annotation.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        grid: int | None = None,
        preprocessing: Preprocessing | None = None,
        learns: bool | str = False,
        recompute: bool = False,
    ) -> None:
        chosen = preprocessing or getattr(module, "preprocessing", None) or Preprocessing()
        annotation_dim = getattr(module, "annotation_dim", 0)
        super().__init__(annotation_dim, chosen, learns=learns, grid=grid, recompute=recompute)
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
        features: Tensor | Annotations = self._run([self.module], images)
        return features

    def _body(self) -> nn.Module:
        return self.module

    def _measure(self) -> int:
        size = self.preprocessing.size
        self.module.eval()  # a blank image must not reach batch norm's statistics
        with torch.no_grad():
            annotations: Annotations = self(torch.zeros(1, 3, size, size))
        self.train(self.training)
        return annotations.values.size(-1)

    @property
    def _name(self) -> str:
        return self.module_name
