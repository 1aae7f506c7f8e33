"""AiluRus against a loop over tokens, and against what its paper promises; its authors published no code."""

import math
from dataclasses import replace

import pytest
import torch

from cropr_hf import CroprViTBackbone, CroprViTConfig, CroprViTForImageClassification, CroprViTModel, TokenState
from cropr_hf.methods import ailurus
from cropr_hf.methods.ailurus import AiluRusConfig, AiluRusReducer, cluster_tokens, grid_neighbors
from tests.common import assert_close_relative, full, make_images, make_model, tiny_config


def ailurus_config(**overrides):
    return tiny_config("plain", **{"token_reducer": "ailurus", "pruning_rate": None, **overrides})


@pytest.mark.parametrize("grid_size", [(4, 4), (7, 12), (2, 40), (1, 30), (20, 20)])
@pytest.mark.parametrize("count", [2, 9, 50])
def test_neighbours_are_the_nearest_on_the_grid(grid_size, count):
    rows, columns = grid_size
    neighbors = grid_neighbors(grid_size, count)
    places = [(row, column) for row in range(rows) for column in range(columns)]
    for place, (row, column) in enumerate(places):
        away = [(row - other_row) ** 2 + (column - other_column) ** 2 for other_row, other_column in places]
        expected = sorted(range(len(places)), key=lambda other: (away[other], other))[:count]
        assert neighbors[place].tolist() == expected


def naive_clusters(features, grid_size, num_clusters, settings):
    """Representatives, and that of each token, of one image, in plain numbers."""
    neighbors = grid_neighbors(grid_size, settings.num_neighbors).tolist()
    count, size = len(neighbors[0]), features.shape[-1]
    weight = settings.spatial_weight
    distance = [
        {
            other: (1 - weight) * (features[i] - features[other]).norm().item() / size**0.5 + weight * rank / count
            for rank, other in enumerate(row)
        }
        for i, row in enumerate(neighbors)
    ]
    density = []
    for row in distance:
        nearest = sorted(row.values())
        nearest = nearest[1:2] if settings.density_neighbors == 1 else nearest[: settings.density_neighbors]
        density.append(math.exp(-sum(value**2 for value in nearest) / len(nearest)))
    largest = 2 * max(max(row.values()) for row in distance)
    scores = []
    for i, row in enumerate(distance):
        denser = [row[j] for j in row if density[j] > density[i] or (density[j] == density[i] and j < i)]
        scores.append(density[i] * min(denser, default=largest))
    peaks = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:num_clusters])
    belongs = []
    for i, row in enumerate(distance):
        near = [j for j in row if j in peaks]
        belongs.append(i if i in peaks else min(near, key=lambda j: row[j], default=None))
    return peaks, belongs


@pytest.mark.parametrize("spatial_weight", [0.9, *full(0.0, 0.5)])
@pytest.mark.parametrize(("num_neighbors", "density_neighbors"), [(30, 1), (9, 3), *full((70, 5))])
def test_clusters_are_those_of_a_loop(spatial_weight, num_neighbors, density_neighbors):
    torch.manual_seed(0)
    features = torch.randn(2, 70, 16, dtype=torch.float64)
    settings = AiluRusConfig(
        spatial_weight=spatial_weight, num_neighbors=num_neighbors, density_neighbors=density_neighbors
    )
    for num_clusters in (1, 10, 69):
        peaks, cluster = cluster_tokens(features, (7, 10), num_clusters, settings)
        for image in range(2):
            expected, belongs = naive_clusters(features[image], (7, 10), num_clusters, settings)
            assert peaks[image].tolist() == expected
            found = peaks[image][cluster[image]].tolist()
            assert all(own == right for own, right in zip(found, belongs) if right is not None)
            assert num_neighbors < 70 or None not in belongs


def test_chunks_change_nothing(monkeypatch):
    features = torch.randn(2, 140, 16, dtype=torch.float64)
    expected = cluster_tokens(features, (10, 14), 20, AiluRusConfig())
    monkeypatch.setattr(ailurus, "CHUNK", 2 * 50 * 16 * 9)
    found = cluster_tokens(features, (10, 14), 20, AiluRusConfig())
    assert all(torch.equal(*pair) for pair in zip(found, expected))


def test_no_cluster_crosses_a_border():
    torch.manual_seed(0)
    features = torch.zeros(1, 12, 12, 8)
    features[:, :, 6:] = 30.0  # ranks on the grid weigh nine times as much
    features = (features + 1e-3 * torch.randn(features.shape)).flatten(1, 2)
    for num_clusters in (8, 36, 72):
        peaks, cluster = cluster_tokens(features, (12, 12), num_clusters, AiluRusConfig(spatial_weight=0.9))
        right = torch.arange(144) % 12 >= 6
        assert torch.equal(right[peaks[0]][cluster[0]], right)


def test_images_of_a_batch_do_not_depend_on_each_other():
    torch.manual_seed(0)
    features, settings = torch.randn(3, 64, 8), AiluRusConfig(num_neighbors=20)
    expected = cluster_tokens(features, (8, 8), 16, settings)
    found = cluster_tokens(features.flip(0), (8, 8), 16, settings)
    assert all(torch.equal(one, other.flip(0)) for one, other in zip(expected, found))


def test_all_patches_as_representatives_are_the_plain_model():
    pixels = make_images(2)
    plain = make_model(CroprViTForImageClassification, ailurus_config(token_reducer=None)).eval()
    model = make_model(CroprViTForImageClassification, ailurus_config(reducer_config={"keep_rate": 1.0})).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, plain(pixels).logits)
    peaks, cluster = cluster_tokens(torch.randn(2, 64, 8), (8, 8), 64, AiluRusConfig())
    assert peaks.tolist() == cluster.tolist() == [[*range(64)]] * 2


def make_state(config, states):
    return TokenState(
        states,
        token_indices=torch.arange(states.shape[1])[None],
        num_prefix_tokens=config.num_prefix_tokens,
        grid_size=config.grid_size,
    )


def test_tokens_are_means_and_sizes_count_them():
    config = ailurus_config(num_register_tokens=2)
    torch.manual_seed(0)
    states = torch.randn(2, 19, 32, dtype=torch.float64)
    state = AiluRusReducer(config, block=2).after_block(make_state(config, states), 5)
    peaks, cluster = cluster_tokens(states[:, 3:], (4, 4), 5, AiluRusConfig())
    assert torch.equal(state.hidden_states[:, :3], states[:, :3])
    assert state.sizes.sum(dim=1).tolist() == [19.0] * 2 and torch.equal(state.key_bias, state.sizes.log())
    whole = state.restore()
    for image in range(2):
        assert state.token_indices[image, 3:].tolist() == (3 + peaks[image]).tolist()
        for number in range(5):
            members = states[image, 3:][cluster[image] == number]
            torch.testing.assert_close(state.hidden_states[image, 3 + number], members.mean(dim=0))
            assert state.sizes[image, 3 + number] == len(members)
        copies = state.hidden_states[image, 3:][cluster[image]]
        assert torch.equal(whole.hidden_states[image, 3:], copies)
    assert torch.equal(whole.token_indices, torch.arange(19)[None])


@pytest.mark.parametrize("proportional_attention", [True, False])
def test_a_representative_of_equal_tokens_attends_as_they_do(proportional_attention):
    """Clusters of equal tokens: later blocks compute what they would have, if sizes count."""
    settings = {"proportional_attention": proportional_attention, "spatial_weight": 0.0, "num_neighbors": 16}
    config = ailurus_config(reducer_config=settings, pruning_rate=12)
    model = make_model(CroprViTModel, config).double().eval()
    groups = torch.arange(16) // 8 * 2 + torch.arange(16) % 4 // 2  # squares of 2 x 2
    states = torch.randn(2, 17, 32, dtype=torch.float64)
    states[:, 1:] = torch.randn(2, 4, 32, dtype=torch.float64)[:, groups]
    state = make_state(config, states)
    reduced = model.token_reducers["2"].after_block(state, 4)
    assert reduced.sizes.tolist() == [[1, 4, 4, 4, 4]] * 2
    with torch.no_grad():
        expected, found = (model.run_block(3, each, None) for each in (state, reduced))
    equal = (found.restore().hidden_states - expected.hidden_states).abs().max() < 1e-9
    assert equal == proportional_attention


def test_every_feature_map_has_copies():
    stages = ["stage1", "stage3", "stage5"]
    model = make_model(CroprViTBackbone, ailurus_config(out_features=stages, apply_layernorm=False)).eval()
    with torch.no_grad():
        first, third, last = model(make_images(2)).feature_maps
        state, _ = model.base_model.embed(make_images(2))
        for block in (1, 2):
            state = model.base_model.run_block(block, state, None)
        _, cluster = cluster_tokens(state.hidden_states[:, 1:], (4, 4), 8, AiluRusConfig())
    for features in (third, last):
        for image in range(2):
            patches = features[image].flatten(1).T
            assert len(patches.unique(dim=0)) == 8
            for number in range(8):
                assert len(patches[cluster[image] == number].unique(dim=0)) == 1
    assert len(first[0].flatten(1).T.unique(dim=0)) == 16


def test_half_precision_clusters_as_float32_does():
    config = ailurus_config()
    states = torch.randn(2, 17, 32).bfloat16()
    narrow = AiluRusReducer(config, block=2).after_block(make_state(config, states), 6)
    wide = AiluRusReducer(config, block=2).after_block(make_state(config, states.float()), 6)
    assert narrow.hidden_states.dtype == torch.bfloat16 and torch.equal(narrow.slots, wide.slots)
    assert_close_relative(narrow.hidden_states.float(), wide.hidden_states, 5e-3)


def test_token_counts():
    config = CroprViTConfig.from_size("large", token_reducer="ailurus", image_size=512)
    assert config.kept_patches() == [1024] + 23 * [512] and config.pruning_blocks == [2]
    config = replace(config, pruning_rate=600)
    assert config.kept_patches() == [1024] + 23 * [424]
    assert config.kept_patches(num_patches=700) == [700] + 23 * [100]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reducer_config": {"keep_rate": 1.5}}, "`keep_rate` is 1.5"),
        ({"reducer_config": {"keep_rate": 0.5}, "pruning_rate": 2}, "has a `keep_rate`, and the configuration"),
        ({"reducer_config": {"block": 5}}, "`block` of AiluRus is 5; with 5 blocks it must be in 1 to 4"),
        ({"reducer_config": {"spatial_weight": 2.0}}, "`spatial_weight` is 2.0"),
        ({"reducer_config": {"num_neighbors": 5, "density_neighbors": 5}}, "has 4 other neighbours"),
        ({"pruning_schedule": [16, 8, 4, 4, 4]}, "falls more than once"),
        ({"num_hidden_layers": 1}, "1 blocks leave no block to prune after"),
        ({"pruning_rate": 16}, "leaves none of 16 patch tokens"),
        ({"window_size": 2, "window_block_indices": [0], "use_cls_token": False, "pooling": "mean"}, "windowed"),
    ],
)
def test_what_it_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        CroprViTModel(ailurus_config(**fields))
