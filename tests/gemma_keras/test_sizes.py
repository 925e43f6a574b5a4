"""The table of published sizes, and what reads it."""

from __future__ import annotations

from collections import Counter

from edge_demo.engine import size_estimates as on_the_device
from gemma_keras.checkpoints.hf.config import named_config
from gemma_keras.sizes import SIZES, releases

OWN = [size for size in SIZES.values() if size.alias_of is None]


def test_a_repository_and_a_preset_stand_once():
    repositories = Counter(release.repository for _, release in releases())
    presets = Counter(release.preset for _, release in releases() if release.preset)
    assert max(repositories.values()) == max(presets.values()) == 1
    assert {"google/gemma-3-1b-it", "google/codegemma-2b", "google/gemma-1.1-2b-it"} <= set(
        repositories
    )


def test_an_alias_has_the_architecture_of_its_size_and_no_other_size_has_it():
    for size in SIZES.values():
        config = named_config(size.name)
        same = [s.name for s in OWN if named_config(s.name) == config]
        assert same == [size.alias_of or size.name]
        assert size.releases


def test_what_the_device_knows_of_sizes_is_this_table():
    ours = {}
    for size in OWN:
        if not size.causal:
            continue
        config = named_config(size.name)
        numbers: Counter[int | None] = Counter()
        for layer in config.layers:
            numbers[layer.sliding_window] += 2 * layer.num_kv_heads * layer.head_dim
        table = config.vocabulary_size * config.hidden_dim
        ours[size.title] = on_the_device.PublishedSize(
            name=size.title,
            blocks=size.parameters - table,
            table=table,
            vocabulary=config.vocabulary_size,
            ffw=max(layer.ffw_dim for layer in config.layers),
            whole=numbers.pop(None),
            windowed={length: count for length, count in numbers.items() if length},
        )
    assert {size.name: size for size in on_the_device.SIZES} == ours
