"""Encoders: sizes, weights, preprocessing, and what being frozen means."""

import pytest
import torch
import torchvision
from torch import nn

from captioner.attention import Annotations
from captioner.encoders import VGG16, ForeignEncoder, ResNet, SmallCNN, TorchvisionEncoder
from captioner.errors import InputError
from captioner.images import Preprocessing
from captioner.model import describe, rebuild


def images(count=2, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def on_meta(build, size=224):
    """The annotations' shape and grid, computed without computing anything."""
    with torch.device("meta"):
        encoder = build()
        annotations = encoder(torch.empty(2, 3, size, size))
    assert encoder.annotation_dim == annotations.values.size(-1)
    return tuple(annotations.values.shape), annotations.grid


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", "!")), message
    return message


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics of their own, which must be loaded, too
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


@pytest.fixture(scope="module")
def resnet18_file(resnet18, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return str(path)


# Sizes


def test_vgg16_gives_the_papers_regions():
    assert on_meta(VGG16) == ((2, 196, 512), (14, 14))


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_resnet_knows_its_annotation_size(depth):
    assert on_meta(lambda: ResNet(depth=depth, stage=4), 64)[0] == (2, 4, 512 if depth < 50 else 2048)


@pytest.mark.parametrize(
    ("depth", "stage", "shape", "grid"),
    [
        (18, 3, (2, 196, 256), (14, 14)),
        (18, 4, (2, 49, 512), (7, 7)),
        (50, 1, (2, 3136, 256), (56, 56)),
        (50, 3, (2, 196, 1024), (14, 14)),
        (50, 4, (2, 49, 2048), (7, 7)),
    ],
)
def test_a_resnets_stage_decides_the_regions(depth, stage, shape, grid):
    assert on_meta(lambda: ResNet(depth=depth, stage=stage)) == (shape, grid)


@pytest.mark.parametrize(("size", "region", "side"), [(64, 8, 8), (96, 12, 8), (96, 8, 12), (128, 16, 8)])
def test_small_cnn_tiles_the_image_with_regions(size, region, side):
    assert on_meta(lambda: SmallCNN(size=size, region=region, width=4), size) == ((2, side * side, 16), (side, side))


@pytest.mark.parametrize(("size", "region"), [(100, 8), (96, 6), (96, 0)])
def test_small_cnn_refuses_regions_that_do_not_tile(size, region):
    with pytest.raises(InputError, match="multiple of 4"):
        SmallCNN(size=size, region=region)


def test_regions_are_row_major():
    marked = torch.zeros(1, 3, 4, 6)
    marked[0, :, 1, 2] = 1
    annotations = ForeignEncoder(nn.Identity())(marked)
    assert annotations.grid == (4, 6) and annotations.values[0, :, 0].nonzero().tolist() == [[1 * 6 + 2]]


def test_grid_pools_to_averages():
    plain, pooled = (ForeignEncoder(nn.Conv2d(3, 5, 1), grid=grid) for grid in (None, 2))
    pooled.load_state_dict(plain.state_dict())
    picture = images(size=8)
    by_hand = plain(picture).values.view(2, 2, 4, 2, 4, 5).mean((2, 4)).flatten(1, 2)
    assert pooled(picture).grid == (2, 2)
    torch.testing.assert_close(pooled(picture).values, by_hand)


# Weights


def test_a_local_file_gives_torchvisions_own_features(resnet18, resnet18_file):
    encoder = ResNet(depth=18, stage=3, weights=resnet18_file)
    encoder.load_weights()
    picture = images()
    with torch.no_grad():
        features = resnet18.maxpool(resnet18.relu(resnet18.bn1(resnet18.conv1(picture))))
        features = resnet18.layer3(resnet18.layer2(resnet18.layer1(features)))
    assert torch.equal(encoder(picture).values, features.flatten(2).mT)


def test_a_local_vgg16_gives_torchvisions_own_features(tmp_path):
    with torch.device("meta"):
        layers = torchvision.models.vgg16(weights=None).features
    net = nn.Module()
    net.features = layers.to_empty(device="cpu")  # the classifier, half a gigabyte, is not needed
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02)
    torch.save(net.state_dict(), tmp_path / "vgg16.pth")
    encoder = VGG16(weights=str(tmp_path / "vgg16.pth"))
    encoder.load_weights()
    picture = images(1, 32)
    with torch.no_grad():
        assert torch.equal(encoder(picture).values, net.features[:-1](picture).flatten(2).mT)


def test_a_file_without_batch_norms_counts_is_read(resnet18, tmp_path):
    older = {key: value for key, value in resnet18.state_dict().items() if "num_batches_tracked" not in key}
    torch.save(older, tmp_path / "older.pth")
    encoder = ResNet(depth=18, weights=str(tmp_path / "older.pth"))
    encoder.load_weights()
    assert torch.equal(encoder.body.bn1.running_mean, resnet18.bn1.running_mean)


def test_a_published_name_loads_the_published_weights(resnet18, monkeypatch):
    asked = []

    def get_state_dict(weights, **_):
        asked.append(str(weights))
        return resnet18.state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    encoder = ResNet(depth=18, weights="imagenet1k_v1")
    assert not asked  # constructing alone downloads nothing
    encoder.load_weights()
    assert asked == ["ResNet18_Weights.IMAGENET1K_V1"]
    assert torch.equal(encoder.body.conv1.weight, resnet18.conv1.weight)


def test_a_failed_download_is_said(monkeypatch):
    def get_state_dict(weights, **_):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    with pytest.raises(InputError, match="no route to host") as error:
        ResNet(depth=18, weights="IMAGENET1K_V1").load_weights()
    one_sentence(error)


def test_without_weights_nothing_is_loaded():
    encoder = ResNet(depth=18, stage=1)
    before = encoder.body.conv1.weight.clone()
    encoder.load_weights()
    assert torch.equal(encoder.body.conv1.weight, before)


def test_unknown_weights_name_the_known_ones():
    with pytest.raises(InputError, match="IMAGENET1K_V1 or IMAGENET1K_V2") as error:
        ResNet(depth=50, weights="IMAGENET22K")
    one_sentence(error)


@pytest.mark.parametrize("other", ["resnet34", "resnet50", "wide", "list", "text"])
def test_weights_of_another_architecture_are_refused(other, resnet18, resnet18_file, tmp_path):
    path, depth = tmp_path / "weights.pth", 18
    if other == "resnet34":  # holds every tensor that a ResNet-18 has, in the same shape
        torch.save(torchvision.models.resnet34(weights=None).state_dict(), path)
    elif other == "resnet50":
        path, depth = resnet18_file, 50
    elif other == "wide":
        wide = {key: torch.cat((value, value)) for key, value in resnet18.state_dict().items() if value.dim()}
        torch.save(wide, path)
    elif other == "list":
        torch.save([1, 2], path)
    else:
        path.write_text("not weights")
    with pytest.raises(InputError, match=f"torchvision's resnet{depth}") as error:
        ResNet(depth=depth, weights=str(path)).load_weights()
    one_sentence(error)


def test_preprocessing_is_that_of_the_published_weights(resnet18_file):
    old, new = (ResNet(depth=50, weights=f"IMAGENET1K_V{version}").preprocessing for version in (1, 2))
    assert (old.fit, old.size, old.resize) == ("crop", 224, 256) and new.resize == 232
    chosen = Preprocessing("squash", 96)
    assert ResNet(depth=50, weights="IMAGENET1K_V2", preprocessing=chosen).preprocessing is chosen
    assert ResNet(depth=18, weights=resnet18_file).preprocessing == Preprocessing()


# Frozen


def test_a_pretrained_encoder_is_frozen_batch_norm_included(resnet18_file):
    encoder = ResNet(depth=18, stage=2, weights=resnet18_file)
    encoder.load_weights()
    outer = nn.Sequential(encoder).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    values = outer(images()).values
    assert not values.requires_grad and not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("encoder", ["scratch", "asked", "small"])
def test_an_encoder_without_weights_or_asked_to_learns(encoder, resnet18_file):
    build = {
        "scratch": lambda: ResNet(depth=18, stage=1),
        "asked": lambda: ResNet(depth=18, stage=1, weights=resnet18_file, learns=True),
        "small": lambda: SmallCNN(size=64, width=4),
    }
    learning = build[encoder]().train()
    assert learning.training and learning(images()).values.requires_grad
    assert not learning.eval()(images()).values.isnan().any()


def test_an_encoder_from_scratch_can_be_frozen():
    assert not ResNet(depth=18, stage=1, learns=False).train().training


# Learning from a part on


class Deep(nn.Module):
    """Parts within parts, with weights at every level."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, 1), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x):
        return self.head(self.blocks(self.stem(self.scale * x)))


def learning(encoder):
    """The names of the modules whose own weights learn, without what every name begins with."""
    names = {name.rpartition(".")[0] for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    return {name.partition(".")[2] for name in names}


def step(encoder, pictures):
    """One step of training, and the names of all tensors that it changed."""
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder(pictures).values.square().mean().backward()
    torch.optim.SGD([parameter for parameter in encoder.parameters() if parameter.requires_grad], lr=0.1).step()
    return {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("part", ["conv1", "layer2", "layer2.1", "layer3.0.conv2"])
def test_a_pretrained_encoder_learns_from_a_part_on_and_nothing_before_it(part, resnet18_file):
    encoder = ResNet(depth=18, stage=3, weights=resnet18_file, learns=part)
    encoder.load_weights()
    encoder.train()
    weights = [name for name, _ in encoder.named_parameters()]
    first = next(place for place, name in enumerate(weights) if name.startswith(f"body.{part}."))
    wanted = {name for name in weights[first:] if "bn" not in name and "downsample.1" not in name}
    assert learning(encoder) == {name.removeprefix("body.").removesuffix(".weight") for name in wanted}
    assert step(encoder, images()) == wanted  # no statistics of batch norm among them
    assert {name for name, parameter in encoder.named_parameters() if parameter.grad is not None} == wanted


def test_what_is_frozen_stays_in_evaluation_mode_and_so_does_batch_norm(resnet18_file):
    encoder = nn.Sequential(ResNet(depth=18, stage=2, weights=resnet18_file, learns="layer2")).train()[0]
    training = {name for name, module in encoder.body.named_modules() if module.training}
    assert training == {name for name, _ in encoder.body.named_modules() if name.startswith("layer2")} - {
        name for name, module in encoder.body.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    assert not any(module.training for module in encoder.eval().modules())


def test_batch_norm_of_pretrained_weights_is_frozen_and_from_scratch_it_learns(resnet18_file):
    pretrained = ResNet(depth=18, stage=1, weights=resnet18_file, learns=True)
    pretrained.load_weights()
    changed = step(pretrained.train(), images())
    assert changed == {name for name in pretrained.state_dict() if "conv" in name}
    scratch = ResNet(depth=18, stage=1).train()
    assert step(scratch, images()) == set(scratch.state_dict())
    part = ResNet(depth=18, stage=1, learns="layer1").train()
    assert step(part, images()) == {name for name in changed if "layer1" in name}


def test_a_part_of_a_foreign_module_learns():
    encoder = ForeignEncoder(Deep(), learns="blocks.2", preprocessing=Preprocessing("squash", 16)).train()
    wanted = {f"module.{name}.{kind}" for name in ("blocks.2", "head.0") for kind in ("weight", "bias")}
    assert step(encoder, images()) == wanted
    assert encoder.module.blocks[3].training and not encoder.module.head[1].training
    changed = step(ForeignEncoder(Deep(), learns=True).train(), images())
    assert changed > {"module.stem.0.weight", "module.stem.1.running_mean", "module.head.1.weight"}


def test_the_numbers_of_vgg16_are_names():
    with torch.device("meta"):
        assert learning(VGG16(learns="24")) == {"24", "26", "28"}


@pytest.mark.parametrize(
    ("build", "part", "said"),
    [
        (lambda part: ResNet(depth=18, stage=2, learns=part), "layer3", "conv1, layer1, layer2, true or false"),
        (lambda part: ResNet(depth=18, stage=2, learns=part), "relu", "conv1, layer1, layer2, true or false"),
        (lambda part: ResNet(depth=18, stage=2, learns=part), "", "conv1, layer1, layer2, true or false"),
        (lambda part: ResNet(depth=18, stage=2, learns=part), "layer2.2", "layer2.0, layer2.1, true or false"),
        (lambda part: VGG16(learns=part), "29", "0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, true or false"),
        (lambda part: ForeignEncoder(Deep(), learns=part), "stem.0.more", "stem.0, true or false"),
        (lambda part: ForeignEncoder(Tokens(), learns=part), "head", "learns to true or false"),
    ],
)
def test_a_wrong_part_names_the_right_ones(build, part, said):
    with torch.device("meta"), pytest.raises(InputError) as error:
        build(part)
    message = one_sentence(error)
    assert repr(part) in message and said in message


def saved(run):
    """The bytes that a forward pass keeps for the backward one, each tensor once."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    return sum(kept.values()), result


def test_nothing_is_kept_of_the_frozen_part(resnet18_file):
    encoder = ResNet(depth=18, stage=3, weights=resnet18_file, learns="layer3").train()
    with torch.no_grad():
        before = encoder.body[:6](images())
    alone, _ = saved(lambda: encoder.body[6:](before))
    whole, _ = saved(lambda: encoder(images()))
    assert whole == alone > 0


@pytest.mark.parametrize("learns", [False, True, "layer2"])
def test_the_weights_that_learn_lie_as_the_images_do(learns, resnet18):
    encoder = ResNet(depth=18, stage=2, learns=learns)
    weights = [parameter for parameter in encoder.parameters() if parameter.dim() == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights) == bool(learns)
    names = encoder.body.state_dict()
    encoder.body.load_state_dict({name: value for name, value in resnet18.state_dict().items() if name in names})
    again = ResNet(depth=18, stage=2, learns=not learns)
    again.load_state_dict(encoder.state_dict())
    # The layout decides which convolution is run, and so the last digits.
    torch.testing.assert_close(again.eval()(images()).values, encoder.eval()(images()).values, rtol=1e-4, atol=1e-4)


# Computing again instead of keeping


def like_vgg(learns, recompute=False):
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    body = nn.Sequential(*layers, nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True))
    settings = {"weights": None, "grid": None, "preprocessing": None}
    return TorchvisionEncoder("vgg16", body, 8, learns=learns, recompute=recompute, **settings)


@pytest.mark.parametrize(
    "build",
    [
        lambda **settings: ResNet(depth=18, stage=2, learns=True, **settings),
        lambda **settings: ResNet(depth=18, stage=3, learns="layer2.1", **settings),
        lambda **settings: like_vgg(learns=True, **settings),
        lambda **settings: like_vgg(learns="2", **settings),
        lambda **settings: SmallCNN(size=64, width=4, **settings),
        lambda **settings: ForeignEncoder(Deep(), learns=True, **settings),
    ],
    ids=["ResNet", "ResNet from a part on", "VGG", "VGG from a part on", "SmallCNN", "foreign, with dropout"],
)
def test_computing_again_keeps_less_and_changes_nothing(build):
    plain, again = build().train(), build(recompute=True).train()
    again.load_state_dict(plain.state_dict())
    kept, values = {}, {}
    for encoder in (plain, again):
        torch.manual_seed(3)
        kept[encoder], annotations = saved(lambda encoder=encoder: encoder(images()))
        values[encoder] = annotations.values
        annotations.values.square().mean().backward()
    assert kept[again] < 0.7 * kept[plain]
    assert torch.equal(values[again], values[plain])
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert one.grad is None if other.grad is None else torch.equal(one.grad, other.grad), name
    for (name, one), other in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(one, other), name  # batch norm has counted the images once


def test_without_gradients_nothing_is_computed_again():
    encoder = ForeignEncoder(Deep(), learns=True, recompute=True).train()
    with torch.no_grad():
        assert saved(lambda: encoder(images()))[0] == 0


# Foreign


class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).mT[:, :7]


class Detector(nn.Module):
    annotation_dim = 5
    preprocessing = Preprocessing("squash", 16)

    def forward(self, x):
        return Annotations(torch.ones(len(x), 3, 5), torch.tensor([[True, True, False]]).expand(len(x), -1))


def test_a_foreign_map():
    encoder = ForeignEncoder(nn.Conv2d(3, 6, 4, 4), preprocessing=Preprocessing("squash", 16))
    annotations = encoder(images(2, 16))
    assert annotations.values.shape == (2, 16, 6) and annotations.grid == (4, 4)
    assert encoder.annotation_dim == 6 and not annotations.values.requires_grad


def test_foreign_tokens():
    encoder = ForeignEncoder(Tokens())
    annotations = encoder(images(2, 16))
    assert annotations.values.shape == (2, 7, 3) and annotations.grid is None and encoder.annotation_dim == 3


def test_foreign_annotations_and_what_the_module_declares():
    encoder = ForeignEncoder(Detector())
    assert encoder.annotation_dim == 5 and encoder.preprocessing == Preprocessing("squash", 16)
    assert encoder(images(2, 16)).mask.sum() == 4


def test_tokens_have_no_grid():
    with pytest.raises(InputError, match="Tokens gives tokens") as error:
        ForeignEncoder(Tokens(), grid=7)
    one_sentence(error)


@pytest.mark.parametrize(("output", "said"), [(lambda x: x.mean((2, 3)), "2 dim"), (lambda x: (x, x), "a tuple")])
def test_what_is_neither_map_nor_tokens_is_refused(output, said):
    class Other(nn.Module):
        def forward(self, x):
            return output(x)

    with pytest.raises(InputError, match=said) as error:
        ForeignEncoder(Other())
    one_sentence(error)


@pytest.mark.parametrize("learns", [False, True])
def test_measuring_leaves_batch_norm_untouched(learns):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    encoder = ForeignEncoder(module, learns=learns)
    assert encoder.annotation_dim == 4 and encoder.module.training is learns
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


# Settings


@pytest.mark.parametrize(
    "build",
    [
        lambda: SmallCNN(size=64, width=8),
        lambda: ResNet(depth=34, stage=2, grid=3, preprocessing=Preprocessing("squash", 64)),
        lambda: ResNet(depth=50, stage=1, weights="IMAGENET1K_V2", learns=True),
        lambda: VGG16(grid=7),
        lambda: VGG16(learns="24"),
        lambda: ResNet(depth=18, stage=2, learns="layer2", recompute=True),
        lambda: SmallCNN(size=64, width=8, recompute=True),
    ],
)
def test_settings_rebuild_the_same_encoder(build):
    with torch.device("meta"):
        encoder = build()
        settings = describe(encoder)
        again = rebuild(settings)
    assert type(again) is type(encoder) and describe(again) == settings
    assert (again.annotation_dim, again.learns) == (encoder.annotation_dim, encoder.learns)


def test_a_rebuilt_encoder_asks_for_no_weights_file(resnet18_file, tmp_path):
    settings = describe(ResNet(depth=18, stage=1, weights=resnet18_file)) | {"weights": str(tmp_path / "gone.pth")}
    assert rebuild(settings).learns is False
