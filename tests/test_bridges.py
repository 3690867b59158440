import pytest
import torch
from variants import D, more_regions, of_image, same, some_annotations

from captioner.attention import Annotations
from captioner.bridges import LinearBridge, NoBridge, RegionPositions
from captioner.errors import InputError

DIM = 5
GRID = (2, 2)
MASK = [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0]]
BRIDGES = {
    "NoBridge": NoBridge,
    "LinearBridge": lambda size: LinearBridge(size, dim=DIM),
    "LinearBridge with positions": lambda size: LinearBridge(size, dim=DIM, positions=True),
}

every_bridge = pytest.mark.parametrize("name", BRIDGES)


def bridge_of(name):
    torch.manual_seed(0)
    return BRIDGES[name](D).double()


def annotations_on_a_grid(images=3, mask=None):
    return some_annotations(images, mask=mask)._replace(grid=GRID)


@every_bridge
def test_the_same_regions_come_out_with_the_size_that_was_told(name):
    bridge, annotations = bridge_of(name), annotations_on_a_grid(mask=MASK)
    bridged = bridge(annotations)
    assert bridged.values.shape == (3, 4, bridge.annotation_dim)
    assert bridged.mask is annotations.mask and bridged.grid == GRID


@every_bridge
def test_a_result_does_not_depend_on_what_else_is_in_the_batch(name):
    bridge, annotations = bridge_of(name), annotations_on_a_grid(mask=MASK)
    for image in range(3):
        alone = bridge(of_image(annotations, image))
        assert same(alone.values[0], bridge(annotations).values[image])


@pytest.mark.parametrize("name", ["NoBridge", "LinearBridge"])
def test_regions_that_do_not_exist_change_nothing(name):
    bridge, annotations = bridge_of(name), some_annotations(3, mask=MASK)
    assert same(bridge(more_regions(annotations)).values[:, :4], bridge(annotations).values)


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


def test_dropout_is_for_training_only():
    bridge, annotations = LinearBridge(D, dim=DIM, dropout=0.5).double(), some_annotations(1)
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


def test_positions_tell_equal_regions_apart():
    alike = Annotations(torch.ones(1, 4, D, dtype=torch.float64), grid=GRID)
    without, with_positions = (bridge_of(name)(alike).values[0] for name in list(BRIDGES)[1:])
    assert len(without.unique(dim=0)) == 1 and len(with_positions.unique(dim=0)) == 4


@pytest.mark.parametrize(("grid", "complaint"), [(None, "not a grid"), ((33, 1), "33 x 1")])
def test_positions_of_no_grid_or_too_large_a_one_are_an_error(grid, complaint):
    regions = 4 if grid is None else 33
    with pytest.raises(InputError, match=complaint):
        bridge_of("LinearBridge with positions")(some_annotations(1, regions=regions)._replace(grid=grid))
