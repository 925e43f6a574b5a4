"""Every size has as many parameters as was published, in the table and as a Keras model."""

from __future__ import annotations

import pytest

from gemma_keras.checkpoints.hf.config import named_config
from gemma_keras.checkpoints.names import parameter_count
from gemma_keras.sizes import SIZES, releases

# Rows that a table of Hugging Face's has beyond that of KerasHub's preset: see below.
MORE_ROWS = {"gemma3_4b": 64, "gemma3_12b": 64, "gemma3_27b": 64}
EMBEDDINGGEMMA_PROJECTED = 307_581_696  # "308M" in the model card


def preset_parameters(preset):
    import keras_hub

    models = keras_hub.models
    presets = models.GemmaBackbone.presets | models.Gemma3Backbone.presets
    return presets[preset]["metadata"]["params"]


@pytest.mark.parametrize("name", SIZES)
def test_published_parameter_counts(name):
    assert parameter_count(named_config(name)) == SIZES[name].parameters


@pytest.mark.parametrize(
    ("name", "without_table"),
    [  # Table 2 of the Gemma report (arXiv 2403.08295) and of Gemma 2's (arXiv 2408.00118)
        ("gemma_2b", 1_981_884_416),
        ("gemma_7b", 7_751_248_896),
        ("gemma2_2b", 2_024_517_888),
        ("gemma2_9b", 8_324_201_984),
        ("gemma2_27b", 26_047_480_320),
    ],
)
def test_parameters_beside_the_embedding_are_those_of_the_reports(name, without_table):
    """The tables there have 256,128 rows, those of the published files 256,000."""
    config = named_config(name)
    table = config.vocabulary_size * config.hidden_dim
    assert parameter_count(config) - table == without_table


@pytest.mark.keras
@pytest.mark.peer
@pytest.mark.parametrize(
    ("size", "release"),
    [pytest.param(s, r, id=r.preset) for s, r in releases() if r.preset],
)
def test_keras_hubs_presets_count_as_many_parameters(size, release):
    """Those of multimodal models count their vision encoder too."""
    rows = MORE_ROWS.get(size.alias_of or size.name, 0)
    text = size.parameters - rows * size.hf["hidden_size"]
    found = preset_parameters(release.preset)
    if found > size.parameters:
        found -= vision_parameters(size, found, rows)
    assert found == text


def vision_parameters(size, found, rows):
    """What Gemma 3's vision encoder has: the multimodal preset less the text one of its size."""
    encoder = 4_299_915_632 - 3_880_099_328  # gemma3_4b and gemma3_4b_text
    width = size.hf["hidden_size"]
    encoder += 1152 * (width - 2560)  # its projection to the model's width
    medgemma = size.name.startswith("medgemma")  # made of Hugging Face's files, with their rows
    return encoder + (rows * width if medgemma else 0)


@pytest.mark.keras
@pytest.mark.peer
@pytest.mark.parametrize(
    ("size", "with_rows"),
    [("gemma3_4b", "medgemma_4b"), ("gemma3_27b", "medgemma_instruct_27b")],
)
def test_the_larger_tables_of_gemma3_are_64_rows_longer_elsewhere(size, with_rows):
    """MedGemma's presets, made of Hugging Face's files, are the same models with their rows."""
    rows = 64 * named_config(size).hidden_dim
    assert preset_parameters(with_rows) - preset_parameters(size) == rows


@pytest.mark.keras
@pytest.mark.peer
def test_embeddinggemma_with_its_projections_counts_as_keras_hubs_preset():
    width = named_config("embeddinggemma_300m").hidden_dim
    projections = 2 * width * 4 * width  # 768 to 3072 and back
    assert SIZES["embeddinggemma_300m"].parameters + projections == EMBEDDINGGEMMA_PROJECTED
    assert preset_parameters("embedding_gemma3_300m") == EMBEDDINGGEMMA_PROJECTED


@pytest.mark.keras
def test_the_keras_model_of_every_size_has_as_many_parameters(record_property):
    """On every backend, and without memory for the numbers."""
    import keras
    from keras.src.backend.common import global_state

    from gemma_keras import GemmaBackbone

    before = peak_megabytes()
    sizes = {named_config(name): size.parameters for name, size in SIZES.items()}
    for config, count in sizes.items():
        with keras.StatelessScope():  # which leaves variables without values until it ends
            backbone = GemmaBackbone(config, kernel_initializer="zeros")
            global_state.set_global_attribute("uninitialized_variables", [])  # and now for good
        assert backbone.count_params() == count
    grown = peak_megabytes() - before
    record_property(f"{len(sizes)} sizes built", f"memory grew by {grown:.0f} MB")
    assert grown < 500  # one of 27B alone takes 108,000


def peak_megabytes():
    """The most memory that this process has had so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
