import re

import pytest
import torch
from torch import nn
from variants import BRIDGES, D, more_regions, of_image, same, some_annotations

from captioner.attention import Annotations
from captioner.bridges import LinearBridge, NoBridge, RegionPositions, TransformerBridge
from captioner.errors import InputError

DIM = 5
GRID = (2, 2)
MASK = [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0]]

every_bridge = pytest.mark.parametrize("name", BRIDGES)
# What is not on a grid has no positions.
every_bridge_without_positions = pytest.mark.parametrize("name", [name for name in BRIDGES if "with" not in name])
# torch computes its Transformer layers otherwise where no gradient is asked for.
with_and_without_gradient = pytest.mark.parametrize("gradient", [True, False])
transformer_bridges = pytest.mark.parametrize("name", [name for name in BRIDGES if name.startswith("Transformer")])


def bridge_of(name):
    torch.manual_seed(0)
    return BRIDGES[name](D).double().eval()


def annotations_on_a_grid(images=3, mask=None):
    return some_annotations(images, mask=mask)._replace(grid=GRID)


@every_bridge
def test_the_same_regions_come_out_with_the_size_that_was_told(name):
    bridge, annotations = bridge_of(name), annotations_on_a_grid(mask=MASK)
    bridged = bridge(annotations)
    assert bridged.values.shape == (3, 4, bridge.annotation_dim)
    assert bridged.mask is annotations.mask and bridged.grid == GRID


@with_and_without_gradient
@every_bridge
def test_a_result_does_not_depend_on_what_else_is_in_the_batch(name, gradient):
    bridge, annotations = bridge_of(name), annotations_on_a_grid(mask=MASK)
    with torch.set_grad_enabled(gradient):
        together = bridge(annotations).values
        for image in range(3):
            alone = bridge(of_image(annotations, image)).values[0]
            assert same(alone[annotations.mask[image]], together[image, annotations.mask[image]])
            # Nor on whether others have regions that do not exist.
            if annotations.mask[image].all():
                unmasked = bridge(of_image(annotations._replace(mask=None), image)).values[0]
                assert same(unmasked, together[image])


@with_and_without_gradient
@every_bridge_without_positions
def test_regions_that_do_not_exist_change_nothing(name, gradient):
    bridge, annotations = bridge_of(name), some_annotations(3, mask=MASK)
    with torch.set_grad_enabled(gradient):
        plain, padded = bridge(annotations).values, bridge(more_regions(annotations)).values[:, :4]
    assert same(padded[annotations.mask], plain[annotations.mask])
    other = annotations.values.masked_fill(~annotations.mask[..., None], -5.0)
    assert same(bridge(annotations._replace(values=other)).values[annotations.mask], plain[annotations.mask])


@every_bridge_without_positions
def test_regions_have_no_order(name):
    bridge, annotations, order = bridge_of(name), some_annotations(3, mask=MASK), [2, 0, 3, 1]
    permuted = Annotations(annotations.values[:, order], annotations.mask[:, order])
    assert same(bridge(permuted).values[permuted.mask], bridge(annotations).values[:, order][permuted.mask])


@every_bridge
def test_no_gradient_changes_nothing(name):
    bridge, annotations = bridge_of(name), annotations_on_a_grid(mask=MASK)
    with torch.no_grad():
        bridged = bridge(annotations).values
    assert bridged.isfinite().all()
    assert same(bridged[annotations.mask], bridge(annotations).values[annotations.mask])


@every_bridge
def test_a_region_is_read_by_the_others_where_the_bridge_lets_them(name):
    bridge, annotations = bridge_of(name), annotations_on_a_grid(1)
    changed = annotations.values.clone()
    changed[0, 0, 0] += 1
    moved = (bridge(annotations._replace(values=changed)).values - bridge(annotations).values).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [True] + [name.startswith("Transformer")] * 3


@every_bridge
def test_a_gradient_reaches_every_parameter_and_no_region_that_does_not_exist(name):
    bridge, annotations = bridge_of(name), annotations_on_a_grid(mask=MASK)
    annotations.values.requires_grad_()
    values = bridge(annotations).values
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (values * weights)[annotations.mask].sum().backward()
    gradient = annotations.values.grad
    assert gradient.isfinite().all() and ((gradient != 0).any(-1) == annotations.mask).all()
    assert all(parameter.grad.abs().max() > 1e-9 for parameter in bridge.parameters())


@every_bridge
def test_float32_and_bfloat16_are_near_float64(name):
    bridge, annotations = bridge_of(name), annotations_on_a_grid(mask=MASK)
    exact = bridge(annotations).values
    bridge.float()
    annotations = annotations._replace(values=annotations.values.float())
    single = bridge(annotations).values
    assert single.dtype == torch.float32 and same(single.double(), exact, 1e-5)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient), torch.autocast("cpu", torch.bfloat16):
            half = bridge(annotations).values
        assert same(half.double()[annotations.mask], exact[annotations.mask], 0.1)


def test_no_bridge_hands_the_annotations_on():
    annotations = annotations_on_a_grid()
    assert NoBridge(D)(annotations) is annotations and NoBridge(D).annotation_dim == D


def test_linear_is_normalise_project_rectify_written_as_a_loop():
    bridge, annotations = bridge_of("LinearBridge"), some_annotations(1)
    with torch.no_grad():
        bridge.norm.weight.normal_()
        bridge.norm.bias.normal_()
    for region, bridged in zip(annotations.values[0], bridge(annotations).values[0], strict=True):
        scaled = (region - region.mean()) / (region.var(correction=0) + 1e-5).sqrt()
        normalised = scaled * bridge.norm.weight + bridge.norm.bias
        assert same(bridged, (bridge.projection.weight @ normalised + bridge.projection.bias).clamp(min=0))


@pytest.mark.parametrize(
    "bridge", [LinearBridge(D, dim=DIM, dropout=0.5), TransformerBridge(D, dim=8, heads=2, positions=False)]
)
def test_dropout_is_for_training_only(bridge):
    bridge, annotations = bridge.double(), some_annotations(1)
    assert not torch.equal(bridge(annotations).values, bridge(annotations).values)
    bridge.eval()
    assert torch.equal(bridge(annotations).values, bridge(annotations).values)


def test_a_position_is_that_of_its_row_plus_that_of_its_column():
    position = RegionPositions(DIM)
    positions = position((2, 3))
    assert positions.shape == (6, DIM)
    for row in range(2):
        for column in range(3):
            assert torch.equal(positions[row * 3 + column], position.rows[row] + position.columns[column])


@pytest.mark.parametrize("name", [name for name in BRIDGES if "with" in name])
def test_positions_tell_equal_regions_apart(name):
    alike = Annotations(torch.ones(1, 4, D, dtype=torch.float64), grid=GRID)
    with_positions, without = (bridge_of(kind)(alike).values[0] for kind in (name, name.replace(" with positions", "")))
    assert same(without, without[:1].expand(4, -1))
    assert all((with_positions[i] - with_positions[j]).abs().max() > 1e-4 for i in range(4) for j in range(i))


@pytest.mark.parametrize(("grid", "complaint"), [(None, "not a grid"), ((33, 1), "33 x 1")])
@pytest.mark.parametrize("name", [name for name in BRIDGES if "with" in name])
def test_positions_of_no_grid_or_too_large_a_one_are_an_error(name, grid, complaint):
    regions = 4 if grid is None else 33
    with pytest.raises(InputError, match=complaint):
        bridge_of(name)(some_annotations(1, regions=regions)._replace(grid=grid))


# The Transformer


@with_and_without_gradient
@transformer_bridges
def test_a_transformer_bridge_is_torchs_encoder_behind_a_linear_bridge(name, gradient):
    bridge, annotations = bridge_of(name), annotations_on_a_grid(mask=MASK)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # norms and biases begin with ones and zeros
        for parameter in bridge.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    pre_norm = "post-norm" not in name
    layer = nn.TransformerEncoderLayer(8, 2, 10, norm_first=pre_norm, batch_first=True)
    norm = nn.LayerNorm(8) if pre_norm else None
    theirs = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False).double().eval()
    for own, their in zip(bridge.stack, theirs.layers, strict=True):
        their.load_state_dict(own.state_dict())
    if norm is not None:
        norm.load_state_dict(bridge.norm.state_dict())
    linear = LinearBridge(D, dim=8, positions="with" in name).double()
    linear.load_state_dict(bridge.projection.state_dict())
    expected = theirs(linear(annotations).values, src_key_padding_mask=~annotations.mask)
    with torch.set_grad_enabled(gradient):
        assert same(bridge(annotations).values[annotations.mask], expected[annotations.mask], 1e-10)


def test_layers_do_not_begin_alike():
    first, second = (dict(layer.named_parameters()) for layer in bridge_of("TransformerBridge").stack)
    assert all(not torch.equal(first[key], second[key]) for key in first if key.startswith("linear"))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"heads": 3}, "dim 8 into 3 heads"),
        ({"heads": 0}, "0 heads"),
        ({"layers": 0}, "0 layers"),
        ({"dim": 0}, "dim 0"),
        ({"feed_forward_dim": 0}, "feed_forward_dim 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"layer_dropout": -0.5}, "layer_dropout -0.5"),
    ],
)
def test_a_transformer_bridge_that_cannot_be_is_an_error(settings, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        TransformerBridge(D, **{"dim": 8, "heads": 2, **settings})
    assert not re.search(r"[.!?]\s|\n", str(error.value))
