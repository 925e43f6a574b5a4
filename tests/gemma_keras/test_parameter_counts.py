"""Every size has as many parameters as was published, in the table and as a Keras model."""

from __future__ import annotations

import pytest

from gemma_keras.checkpoints.names import parameter_count
from gemma_keras.config import NAMED_SIZES, GemmaConfig

# Each size: its parameters, the KerasHub preset whose metadata state them (`params` in keras_hub/src/
# models/gemma/gemma_presets.py and gemma3/gemma3_presets.py), and how many rows its table has beyond
# that preset's.
PUBLISHED = {
    "gemma_2b": (2_506_172_416, "gemma_2b_en", 0),
    "gemma_7b": (8_537_680_896, "gemma_7b_en", 0),
    "codegemma_2b": (2_506_172_416, "code_gemma_2b_en", 0),
    "codegemma_7b": (8_537_680_896, "code_gemma_7b_en", 0),
    "gemma2_2b": (2_614_341_888, "gemma2_2b_en", 0),
    "gemma2_9b": (9_241_705_984, "gemma2_9b_en", 0),
    "gemma2_27b": (27_227_128_320, "gemma2_27b_en", 0),
    "shieldgemma_2b": (2_614_341_888, "shieldgemma_2b_en", 0),
    "shieldgemma_9b": (9_241_705_984, "shieldgemma_9b_en", 0),
    "shieldgemma_27b": (27_227_128_320, "shieldgemma_27b_en", 0),
    "gemma3_270m": (268_098_176, "gemma3_270m", 0),
    "gemma3_1b": (999_885_952, "gemma3_1b", 0),
    # Hugging Face's files of the larger have 262,208 rows, KerasHub's 262,144: see below.
    "gemma3_4b": (3_880_263_168, "gemma3_4b_text", 64),
    "gemma3_12b": (11_766_034_176, "gemma3_12b_text", 64),
    "gemma3_27b": (27_009_346_304, "gemma3_27b_text", 64),
    # of the Hugging Face Hub's model.safetensors; KerasHub's preset counts two projections too
    "embeddinggemma_300m": (302_863_104, None, 0),
}
EMBEDDINGGEMMA_PROJECTED = 307_581_696  # "308M" in the model card


def preset_parameters(preset):
    import keras_hub

    models = keras_hub.models
    presets = models.GemmaBackbone.presets | models.Gemma3Backbone.presets
    return presets[preset]["metadata"]["params"]


@pytest.mark.parametrize("name", NAMED_SIZES)
def test_published_parameter_counts(name):
    assert parameter_count(GemmaConfig.named(name)) == PUBLISHED[name][0]


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
    config = GemmaConfig.named(name)
    table = config.vocabulary_size * config.hidden_dim
    assert parameter_count(config) - table == without_table


@pytest.mark.keras
@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name, (_, preset, _) in PUBLISHED.items() if preset])
def test_the_published_counts_are_those_of_keras_hubs_presets(name):
    count, preset, more_rows = PUBLISHED[name]
    assert count == preset_parameters(preset) + more_rows * GemmaConfig.named(name).hidden_dim


@pytest.mark.keras
@pytest.mark.peer
@pytest.mark.parametrize(
    ("size", "with_rows"),
    [("gemma3_4b", "medgemma_4b"), ("gemma3_27b", "medgemma_instruct_27b")],
)
def test_the_larger_tables_of_gemma3_are_64_rows_longer_elsewhere(size, with_rows):
    """MedGemma's presets, made of Hugging Face's files, are the same models with their rows."""
    rows = 64 * GemmaConfig.named(size).hidden_dim
    assert preset_parameters(with_rows) - preset_parameters(size) == rows


@pytest.mark.keras
@pytest.mark.peer
def test_embeddinggemma_with_its_projections_counts_as_keras_hubs_preset():
    width = GemmaConfig.named("embeddinggemma_300m").hidden_dim
    projections = 2 * width * 4 * width  # 768 to 3072 and back
    assert PUBLISHED["embeddinggemma_300m"][0] + projections == EMBEDDINGGEMMA_PROJECTED
    assert preset_parameters("embedding_gemma3_300m") == EMBEDDINGGEMMA_PROJECTED


@pytest.mark.keras
def test_the_keras_model_of_every_size_has_as_many_parameters(record_property):
    """On every backend, and without memory for the numbers."""
    import keras
    from keras.src.backend.common import global_state

    from gemma_keras import GemmaBackbone

    before = peak_megabytes()
    sizes = {GemmaConfig.named(name): PUBLISHED[name][0] for name in NAMED_SIZES}
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
