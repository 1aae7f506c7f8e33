"""Windowed attention on pruned grids: windows, rotary positions, schedules by sides, padding that goes first."""

import math
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

from cropr_hf import CroprViTBackbone, CroprViTConfig, CroprViTModel, schedule_from_sides
from cropr_hf.configuration_cropr_vit import WINDOW_ROPE_MODES
from cropr_hf.token_schedule import curriculum_schedule
from cropr_hf.vit_layers import merge_windows, partition_windows
from tests.common import (
    NUM_BLOCKS,
    NUM_PATCHES,
    PATCH_SIZE,
    assert_close_relative,
    full,
    make_identity_blocks,
    make_images,
    make_model,
    naive_forward,
    tiny_config,
)


WITHOUT_WINDOWS = {"window_size": 0, "window_block_indices": []}
GATHERING = {"use_cls_token": True, "num_register_tokens": 2, "pooling": "cls"}  # tokens that attend to all
assert_close = torch.testing.assert_close


def build(model_class=CroprViTModel, seed=0, **overrides):
    """With the windows of the shared suite, whose schedule leaves 16, 12, 8, 6 and, after fusion, 16 patches."""
    return make_model(model_class, tiny_config("windows", **overrides), seed)


def twin(model, **overrides):
    """Another configuration with the same weights."""
    other = type(model)(tiny_config("windows", **overrides)).eval()
    keys = other.load_state_dict(model.state_dict(), strict=False)
    assert keys.missing_keys == [] and all("token_reducers" in key for key in keys.unexpected_keys)
    return other


def tokens_of(model, images):
    with torch.no_grad():
        return model(images).last_hidden_state


def layer_inputs(model):
    """What each block gets, as the model runs: tokens, rotary positions, and the grid of windows if there is one."""
    inputs = []
    for layer in model.base_model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[:3]))
    return inputs


# Cutting into windows


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (2, 6), (5, 3), (7, 4), (3, 8), (1, 9)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_merging_undoes_partitioning(grid, size):
    tokens = torch.randn(2, grid[0] * grid[1], 3)
    windows = partition_windows(tokens, grid, size)
    down, across = (math.ceil(length / size) for length in grid)
    assert windows.shape == (2 * down * across, size**2, 3)
    assert torch.equal(merge_windows(windows, grid, size), tokens)


@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (2, 6)])
def test_windows_hold_squares_of_patches_in_raster_order_and_zeros_outside(grid):
    rows, columns = grid
    places = torch.arange(2 * rows * columns, dtype=torch.float32).view(2, rows * columns, 1) + 1
    found = partition_windows(places, grid, 2)[..., 0].tolist()
    expected = [
        [
            image * rows * columns + row * columns + column + 1 if row < rows and column < columns else 0
            for row in (top, top + 1)
            for column in (left, left + 1)
        ]
        for image in range(2)
        for top in range(0, rows, 2)
        for left in range(0, columns, 2)
    ]
    assert found == expected


@pytest.mark.parametrize("mode", WINDOW_ROPE_MODES)
@pytest.mark.parametrize("prefix", [{}, GATHERING], ids=["patches", "gathering"])
@pytest.mark.parametrize("coordinates", ["index", "centered"])
def test_one_window_over_the_whole_grid_is_global_attention(mode, prefix, coordinates):
    """Then the two rotary tables are the same."""
    overrides = {"token_reducer": None, "pruning_schedule": None, "rope_coordinates": coordinates, **prefix}
    model = build(window_size=4, window_block_indices=list(range(NUM_BLOCKS)), window_rope_mode=mode, **overrides)
    images = make_images()
    grids = layer_inputs(model)
    windowed = tokens_of(model, images)
    assert [grid for _, _, grid in grids] == [(4, 4)] * NUM_BLOCKS
    assert_close_relative(windowed, tokens_of(twin(model, **WITHOUT_WINDOWS, **overrides), images))


def test_a_patch_reaches_its_window_alone():
    model = build(
        token_reducer=None, pruning_schedule=None, window_block_indices=list(range(NUM_BLOCKS)), pooling="patch_mean"
    )
    images = make_images(1, 48, 32)
    changed = images.clone()
    changed[..., 24:32, 8:16] += 1  # row 3, column 1
    difference = (tokens_of(model, changed) - tokens_of(model, images)).abs().amax(dim=(0, 2)).view(6, 4)
    assert (difference[2:4, :2] > 0).all()
    difference[2:4, :2] = 0
    assert (difference == 0).all()


def test_what_gathers_carries_a_patch_to_all_windows_one_block_later():
    fields = {"token_reducer": None, "pruning_schedule": None, "num_hidden_layers": 2, "window_block_indices": [0, 1]}
    model = build(**fields, **GATHERING)
    images = make_images(1, 48, 32)
    changed = images.clone()
    changed[..., 24:32, 8:16] += 1  # row 3, column 1
    with torch.no_grad():
        states = [model(pixels, output_hidden_states=True).hidden_states for pixels in (images, changed)]
    # The last state is normalised, which can hide no difference
    after_one, after_two = ((new - old).abs().amax(dim=(0, 2)) for old, new in list(zip(*states))[1:])
    reached = after_one[3:].view(6, 4) > 0
    assert (after_one[:3] > 0).all() and reached[2:4, :2].all() and reached.sum() == 4
    assert (after_two > 0).all()


# The model


@pytest.mark.parametrize("window_size", [2, *full(3)])
@pytest.mark.parametrize("prefix", [{}, GATHERING], ids=["patches", "gathering"])
@pytest.mark.parametrize("mode", WINDOW_ROPE_MODES)
def test_the_model_equals_a_naive_loop_over_windows(mode, prefix, window_size):
    """In float64, so that the order of sums decides between no two tokens."""
    images = {2: make_images(2, 48, 32), 3: make_images(2, 48, 72)}[window_size].double()
    overrides = {} if window_size == 2 else {"pruning_schedule": [45, 27, 20, 20, 20], "image_size": [48, 72]}
    model = build(window_rope_mode=mode, window_size=window_size, **overrides, **prefix).double()
    with torch.no_grad():
        outputs = model(images, output_pruning=True)
    for index in range(2):
        tokens, blocks, _ = naive_forward(model, images[index : index + 1])
        assert outputs.pruned_after_block[index].tolist() == blocks
        assert_close(outputs.last_hidden_state[index], tokens, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["origin", "slot"])
@pytest.mark.parametrize("prefix", [{}, GATHERING], ids=["patches", "gathering"])
@pytest.mark.parametrize(("height", "width"), [(40, 48), *full((24, 56))])
def test_windows_over_the_edge_of_the_grid_are_filled_up_with_zeros(mode, prefix, height, width):
    model, images = build(window_rope_mode=mode, **prefix).double(), make_images(1, height, width).double()
    assert_close(tokens_of(model, images)[0], naive_forward(model, images)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", WINDOW_ROPE_MODES)
def test_images_of_a_batch_do_not_influence_each_other(mode):
    model, images = build(window_rope_mode=mode), make_images(3, 40, 32)
    together = tokens_of(model, images)
    for index in range(3):
        assert_close_relative(tokens_of(model, images[index : index + 1])[0], together[index])


def test_the_modes_differ_after_pruning_alone():
    images, model = make_images(), build()
    modes = ("slot", "global")
    for mode in modes:
        assert not torch.allclose(tokens_of(model, images), tokens_of(twin(model, window_rope_mode=mode), images))
    model.set_pruning([NUM_PATCHES] * NUM_BLOCKS)
    for mode in modes:
        other = twin(model, window_rope_mode=mode)
        other.set_pruning([NUM_PATCHES] * NUM_BLOCKS)
        assert torch.equal(tokens_of(model, images), tokens_of(other, images))


def by_hand(row, column, rows, columns, num_frequencies, theta=100.0, span=16):
    """Angles of a place in a grid: half of them turn with the row, half with the column."""
    angles = [row / rows * span / theta ** (k / num_frequencies) for k in range(num_frequencies)]
    angles += [column / columns * span / theta ** (k / num_frequencies) for k in range(num_frequencies)]
    return torch.tensor(angles, dtype=torch.float64)


@pytest.mark.parametrize("mode", WINDOW_ROPE_MODES)
@torch.no_grad()
def test_rotary_positions_of_every_token_by_hand(mode):
    """All but the last two patches of a 4 x 6 grid, shuffled places: 12 patches form 2 x 6 or 4 x 4 cells."""
    config = {"image_size": [32, 48], "pruning_schedule": [16, 16, 8, 8, 8], "window_rope_mode": mode}
    model = build(window_block_indices=[0, 1, 2, 3, 4], **config)
    make_identity_blocks(model)
    images, inputs = make_images(3, 32, 48), layer_inputs(model)
    embedded, _ = model.embeddings(images)
    model(images)
    frequencies = model.rotary_embedding.num_frequencies
    grids = [(4, 6), (4, 4), (4, 4), (2, 4), (4, 6)]
    assert [arguments[2] for arguments in inputs] == grids
    for tokens, (cos, sin), (_, columns) in inputs:
        for image in range(3):
            places = (tokens[image][:, None] == embedded[image]).all(dim=-1).int().argmax(dim=1).tolist()
            assert places == sorted(set(places))  # raster order
            pruned = len(places) < 24
            for index, place in enumerate(places):
                at_slot = (index // columns, index % columns)
                in_image = (place // 6, place % 6)
                if mode == "global" and pruned:
                    expected = by_hand(*in_image, 4, 6, frequencies)
                else:
                    row, column = in_image if mode == "origin" and pruned else at_slot
                    expected = by_hand(row % 2, column % 2, 2, 2, frequencies)
                window = at_slot[0] // 2 * (columns // 2) + at_slot[1] // 2
                slot = at_slot[0] % 2 * 2 + at_slot[1] % 2
                if len(cos) > 1:
                    window += image * len(places) // 4
                found = (0 if len(cos) == 1 else window, slot)
                assert_close(cos[found].double(), expected.cos(), rtol=0, atol=1e-5)
                assert_close(sin[found].double(), expected.sin(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", WINDOW_ROPE_MODES)
@pytest.mark.parametrize("reducer", ["cropr", "itpn"])
@torch.no_grad()
def test_tokens_stay_in_raster_order_and_fusion_returns_each_once(mode, reducer):
    model = build(window_rope_mode=mode, token_reducer=reducer, last_layer_fusion=True)
    make_identity_blocks(model)
    images, inputs = make_images(3), layer_inputs(model)
    embedded, _ = model.embeddings(images)
    assert torch.equal(model(images).last_hidden_state, embedded)
    assert [tokens.shape[1] for tokens, _, _ in inputs] == [16, 12, 8, 6, 16]
    assert [grid for _, _, grid in inputs] == [(4, 4), (2, 6), None, None, (4, 4)]
    for tokens, _, _ in inputs:
        for image in range(3):
            places = (tokens[image][:, None] == embedded[image]).all(dim=-1).int().argmax(dim=1)
            assert (places.diff() > 0).all()
    assert torch.equal(inputs[-1][0], embedded)


@pytest.mark.parametrize("mode", WINDOW_ROPE_MODES)
def test_attention_is_global_where_the_patches_do_not_tile(mode):
    """6 patches reach the fourth block, so that it might as well not be windowed."""
    model, images = build(window_rope_mode=mode), make_images()
    inputs = layer_inputs(model)
    tokens = tokens_of(model, images)
    assert [grid for _, _, grid in inputs] == [(4, 4), (2, 6), None, None, (4, 4)]
    assert torch.equal(tokens, tokens_of(twin(model, window_rope_mode=mode, window_block_indices=[0, 1, 4]), images))


@pytest.mark.parametrize("mode", WINDOW_ROPE_MODES)
@pytest.mark.parametrize("reducer", ["cropr", "random"])
def test_a_schedule_that_keeps_all_patches_equals_the_dense_model(mode, reducer):
    model = build(window_rope_mode=mode, token_reducer=reducer)
    dense = twin(model, window_rope_mode=mode, token_reducer=None, pruning_schedule=None)
    for height, width in ((32, 32), (40, 48)):
        images = make_images(2, height, width)
        model.set_pruning([height * width // PATCH_SIZE**2] * NUM_BLOCKS)
        assert torch.equal(tokens_of(model, images), tokens_of(dense, images))


def test_feature_maps_are_those_of_the_blocks():
    model = build(CroprViTBackbone, out_indices=list(range(NUM_BLOCKS + 1)), apply_layernorm=False)
    images = make_images(2, 48, 32)
    with torch.no_grad():
        maps = model(images).feature_maps
        outputs = model.cropr_vit(images, output_hidden_states=True, output_pruning=True)
    for stage in (0, 1, NUM_BLOCKS):  # where no patch is missing
        assert torch.equal(maps[stage].flatten(2).transpose(1, 2), outputs.hidden_states[stage])
    for stage in range(1, NUM_BLOCKS - 1):
        here = outputs.pruned_after_block <= stage
        assert torch.equal(maps[stage + 1].flatten(2).transpose(1, 2)[here], maps[stage].flatten(2).mT[here])


@pytest.mark.full
@pytest.mark.parametrize("prefix", [{}, GATHERING], ids=["patches", "gathering"])
@pytest.mark.parametrize("mode", WINDOW_ROPE_MODES)
@torch.no_grad()
def test_graph_has_no_break(mode, prefix):
    torch._dynamo.reset()
    fields = {"num_hidden_layers": 3, "window_block_indices": [0, 1, 2], "pruning_schedule": [12, 12, 12]}
    model, images = build(window_rope_mode=mode, **fields, **prefix), make_images(2, 32, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if mode == "origin" else "eager")
    assert_close_relative(compiled(images).last_hidden_state, tokens_of(model, images))


@pytest.mark.full
@pytest.mark.parametrize("prefix", [{}, GATHERING], ids=["patches", "gathering"])
@torch.no_grad()
def test_exported_program_equals_the_model(prefix):
    model, images = build(**prefix), make_images(2, 32, 40)
    program = torch.export.export(model, (images,), strict=False)
    assert_close_relative(program.module()(images).last_hidden_state, tokens_of(model, images))


@pytest.mark.full
@pytest.mark.parametrize("prefix", [{}, GATHERING], ids=["patches", "gathering"])
@torch.no_grad()
def test_a_program_can_leave_every_dimension_free(prefix):
    fields = {"num_hidden_layers": 2, "pruning_schedule": [12, 12], "window_block_indices": [1]}
    model = build(last_layer_fusion=False, **fields, **prefix)
    free = (dict.fromkeys(range(4), torch.export.Dim.AUTO),)
    program = torch.export.export(model, (make_images(3),), dynamic_shapes=free, strict=False).module()
    assert_close_relative(program(make_images(2)).last_hidden_state, tokens_of(model, make_images(2)))


# The grid of what is left


@pytest.mark.parametrize(
    ("num_patches", "grid_size", "expected"),
    [
        (96, (8, 12), (8, 12)),  # nothing is pruned
        (77, (7, 11), (7, 11)),  # also if that does not tile
        (64, (12, 12), (8, 8)),
        (36, (12, 12), (6, 6)),
        (32, (8, 16), (4, 8)),
        (32, (16, 8), (8, 4)),
        (24, (6, 9), (4, 6)),
        (48, (4, 16), (4, 12)),
        (12, (12, 12), (2, 6)),  # 3 windows form nothing better
        (20, (12, 12), None),  # 5 windows would be strips
        (4, (12, 12), (2, 2)),
        (30, (12, 12), None),
        (3, (12, 12), None),
    ],
)
def test_window_grid(num_patches, grid_size, expected):
    config = tiny_config("windows")
    assert config.window_grid(1, num_patches, grid_size) == expected
    assert config.window_grid(3, num_patches, grid_size) is None  # a global block


@pytest.mark.parametrize("grid_size", [(24, 24), (7, 9), (9, 7), (3, 40), (32, 24)])
def test_the_shape_of_the_window_grid_is_nearest_to_that_of_the_image(grid_size):
    """Of two that are as near, the flatter one: rounding, which is not the same everywhere, must not decide."""
    config = tiny_config("windows", window_size=3)
    rows, columns = grid_size

    def distance(down, across):
        ratio = Fraction(down * columns, across * rows)
        return max(ratio, 1 / ratio), down

    for windows in range(1, rows * columns // 9):
        shapes = [(count, windows // count) for count in range(1, windows + 1) if windows % count == 0]
        down, across = min(shapes, key=lambda shape: distance(*shape))
        expected = (3 * down, 3 * across) if distance(down, across)[0] <= 4 else None
        assert config.window_grid(1, 9 * windows, grid_size) == expected


def test_a_configuration_without_windows_has_no_window_grid():
    assert tiny_config().window_grid(1, NUM_PATCHES, (4, 4)) is None


# Schedules by sides


def test_the_schedule_of_the_paper():
    schedule = schedule_from_sides(24, 96 * 96)
    assert schedule == [9216] * 4 + [6400] * 3 + [4096] * 3 + [2304] * 3 + [1024] * 6 + [256] * 5
    config = CroprViTConfig.from_size("eva02_large_detection")
    assert config.kept_patches() == schedule and config.pruning_blocks == [5, 8, 11, 14, 20]
    before = [9216, *schedule]
    assert [before[block - 1] - schedule[block - 1] for block in (5, 8, 11, 14, 20)] == [2816, 2304, 1792, 1280, 768]
    grids = [config.window_grid(block, 9216 if block == 24 else before[block - 1], (96, 96)) for block in range(1, 25)]
    sides = [96] * 5 + [80] * 3 + [64] * 3 + [48] * 3 + [32] * 6 + [16] * 3 + [96]
    assert grids == [None if block % 3 == 0 else (side, side) for block, side in enumerate(sides, start=1)]


def test_linear_operations_of_the_paper():
    """2790 and 1273 billion multiply-adds, without the products of attention."""
    sizes, config = {}, CroprViTConfig.from_size("eva02_large_detection")
    block = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    for name, counts in (("dense", [9216] * 24), ("pruned", [9216, *config.kept_patches()[:-2], 9216])):
        embedding = 9216 * 3 * config.patch_size**2 * config.hidden_size
        sizes[name] = (sum(counts) * block + embedding) / 1e9
    assert sizes == {"dense": pytest.approx(2789.9, abs=0.05), "pruned": pytest.approx(1273.0, abs=0.05)}


@pytest.mark.parametrize(
    ("blocks", "sides", "expected"),
    [
        ((1,), (2,), [4, 4, 4, 4, 4]),
        ((2, 3), (3, 1), [16, 9, 1, 1, 1]),
        ((5,), (3,), [16, 16, 16, 16, 9]),
        ((), (), [16] * 5),
    ],
)
def test_schedule_from_sides(blocks, sides, expected):
    assert schedule_from_sides(5, 16, blocks, sides) == expected


@pytest.mark.parametrize(
    ("blocks", "sides", "message"),
    [
        ((1, 2), (3,), r"There are 2 blocks but 1 sides; give one side per block"),
        ((2, 1), (3, 2), r"The blocks are \[2, 1\]; they must ascend within 1 to 5"),
        ((2, 2), (3, 2), r"The blocks are \[2, 2\]"),
        ((0, 2), (3, 2), r"The blocks are \[0, 2\]"),
        ((2, 6), (3, 2), r"The blocks are \[2, 6\]"),
    ],
)
def test_schedules_by_sides_that_cannot_be(blocks, sides, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_sides(5, 16, blocks, sides)


# Padding


def padding_mask():
    """Images of 4 x 4, 3 x 2 and, with broken patches, 2 x 3 patches."""
    mask = torch.zeros(3, 32, 32, dtype=torch.long)
    for image, (height, width) in enumerate(((32, 32), (24, 16), (9, 23))):
        mask[image, :height, :width] = 1
    return mask


@pytest.mark.parametrize("schedule", [[12, 8, 6, 6, 6], [6, 4, 2, 2, 2], [15, 14, 13, 13, 13]])
@pytest.mark.parametrize("seed", [0, *full(1, 2)])
@pytest.mark.parametrize("name", ["windows", "plain"])
@pytest.mark.parametrize("reducer", ["cropr", "random"])
@torch.no_grad()
def test_padding_is_pruned_before_any_patch_of_the_image(reducer, name, seed, schedule):
    pruning = {"pruning_rate": None, "pruning_schedule": schedule}
    config = tiny_config(name, token_reducer=reducer, prune_padding_first=True, **pruning)
    model, images, mask = make_model(CroprViTModel, config, seed), make_images(3, seed=seed), padding_mask()
    blocks = model(images, mask, output_pruning=True).pruned_after_block
    inside = F.max_pool2d(mask.float()[:, None], PATCH_SIZE).flatten(1).bool()
    assert inside.sum(dim=1).tolist() == [16, 6, 6]
    for image in (1, 2):
        assert blocks[image][~inside[image]].max() <= blocks[image][inside[image]].min()
    assert ((blocks == NUM_BLOCKS).sum(dim=1) == schedule[-1]).all()


@torch.no_grad()
def test_padding_does_not_matter_unless_it_is_to_go_first():
    images, mask = make_images(3), padding_mask()
    model = build()
    assert torch.equal(model(images, mask).last_hidden_state, tokens_of(model, images))
    first = twin(model, prune_padding_first=True)
    first.load_state_dict(model.state_dict())
    assert torch.equal(tokens_of(first, images), tokens_of(model, images))  # without a mask
    assert torch.equal(first(images, torch.ones_like(mask)).last_hidden_state, tokens_of(model, images))
    same = [torch.equal(*pair) for pair in zip(first(images, mask).last_hidden_state, tokens_of(model, images))]
    assert same == [True, False, False]


@torch.no_grad()
def test_the_ranking_among_the_patches_of_the_image_stays():
    """The schedule prunes all padding at once, and as many patches of the image as it does without padding."""
    fields = {"pruning_schedule": [16, 16, 5, 5, 5], "prune_padding_first": True}
    model, images, mask = build(**fields), make_images(1), padding_mask()[1:2]
    blocks = model(images, mask, output_pruning=True).pruned_after_block[0]
    seen = layer_inputs(model)
    model(images, mask)
    scores = model.layers[2](*seen[2]) @ model.token_reducers["3"].router.scorer()
    inside = F.max_pool2d(mask.float()[:, None], PATCH_SIZE).flatten().bool()
    worst = scores[0].masked_fill(~inside, torch.inf).argmin()
    assert (blocks == 3).nonzero().flatten().tolist() == sorted(
        [*(~inside).nonzero().flatten().tolist(), worst.item()]
    )


@pytest.mark.parametrize("progress", [0.2, 0.5, 0.9])
def test_a_curriculum_goes_through_squares_of_windows_whatever_gathers(progress):
    fields = {"image_size": 64, "pruning_schedule": [36, 16, 16, 16, 16]}
    expected = curriculum_schedule(tiny_config("windows", **fields), progress)
    assert curriculum_schedule(tiny_config("windows", **fields, **GATHERING), progress) == expected
    assert all(math.isqrt(kept) % 2 == 0 for kept in expected)
