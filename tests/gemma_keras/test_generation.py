"""`generate`, `stream`, `chat` and `score`: windows, buckets, samplers, templates."""

from __future__ import annotations

import dataclasses

import keras
import keras_hub
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from gemma_keras import GemmaCausalLM
from gemma_keras.generate.loop import GenerateFunction, bucket
from gemma_keras.text.chat import encode_chat
from gemma_keras.text.stream import decode_stream, encode, processor
from gemma_keras.tokenizer import GemmaCausalLMPreprocessor, GemmaTokenizer
from tests.models import GENERATIONS, TEXT, WINDOW, chat_tokenizer_model, shallow, write_tiny_hf

pytestmark = pytest.mark.keras

LENGTH, END_OF_TURN = 24, 298
each_generation = pytest.mark.parametrize("generation", GENERATIONS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Generation to our model of it, each made once."""
    made = {}

    def get(generation="gemma3"):
        if generation not in made:
            folder = tmp_path_factory.mktemp(generation)
            write_tiny_hf(folder, generation, **shallow(generation))
            made[generation] = GemmaCausalLM.from_preset(
                folder, dtype="float32", sequence_length=48
            )
        made[generation].compile(sampler="greedy")
        return made[generation]

    return get


def random_ids(batch_size=3, length=LENGTH, seed=1):
    return np.random.default_rng(seed).integers(4, 300, (batch_size, length)).astype("int32")


def prompts(lengths, length):
    ids = random_ids(len(lengths), length)
    mask = np.arange(length) < np.asarray(lengths)[:, None]
    return {"token_ids": np.where(mask, ids, 0), "padding_mask": mask.astype("int32")}


# --- the cache of whole prompts ------------------------------------------------------------------


@each_generation
@pytest.mark.parametrize("shortest", [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
def test_prompts_of_unequal_length_then_tokens_equal_the_whole_call(tiny, generation, shortest):
    backbone = tiny(generation).backbone
    ids = random_ids()
    lengths = np.array([shortest, shortest + 1, 2 * WINDOW + 2], "int32")
    padded = ids[:, : lengths.max()].copy()
    hidden, cache = backbone.prefill(padded, ops.convert_to_tensor(lengths), LENGTH)
    found = [ops.convert_to_numpy(hidden)]
    for step in range(3):
        tokens = ids[np.arange(len(ids)), lengths + step][:, None]
        hidden, cache = backbone.call_with_cache(tokens, cache, lengths + step)
        found.append(ops.convert_to_numpy(hidden))
    whole = ops.convert_to_numpy(backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
    expected = np.stack([whole[i, n - 1 : n + 3] for i, n in enumerate(lengths)])
    difference = np.abs(np.concatenate(found, axis=1) - expected).max() / expected.std()
    assert difference < 1e-4


@each_generation
def test_layers_with_a_window_keep_no_more_than_it(tiny, generation):
    backbone = tiny(generation).backbone
    _, cache = backbone.prefill(random_ids(), ops.convert_to_tensor([24, 20, 3]), 40)
    for (key, value), spec in zip(cache, backbone.config.layers, strict=True):
        slots = 40 if spec.sliding_window is None else WINDOW
        assert tuple(key.shape) == tuple(value.shape) == (3, 2, slots, 32)


# --- generate ------------------------------------------------------------------------------------


@given(st.integers(1, 100_000))
def test_a_bucket_is_an_eighth_or_fifteen_tokens_longer_at_most(length):
    assert length <= bucket(length) <= length + max(15, length / 8)
    assert bucket(bucket(length)) == bucket(length)


@pytest.mark.backends("jax", "tensorflow")  # PyTorch compiles nothing for prompts
def test_prompts_of_about_the_same_length_share_what_is_compiled(tiny, monkeypatch):
    model = tiny()
    calls = []
    prefill = model.backbone.prefill
    monkeypatch.setattr(
        model.backbone, "prefill", lambda *args, **kw: calls.append(1) or prefill(*args, **kw)
    )
    model.compile(sampler="greedy")
    for length in (17, 30, 24):
        model.make_generate_function()(prompts([length], 48), None)
    assert bucket(500) == bucket(510)
    assert len(calls) == 1  # traced once


@pytest.mark.spread
@each_generation
def test_rows_end_where_they_end_alone(tiny, generation):
    model = tiny(generation)
    inputs = prompts([3, 9, 20, 30], 30)
    together = model.make_generate_function()(inputs, None)["token_ids"]
    stop = [int(together[0, 8]), int(together[1, 20])]
    together = model.make_generate_function()(inputs, stop)
    for row in range(4):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = model.make_generate_function()(alone, stop)
        np.testing.assert_array_equal(together["token_ids"][row], alone["token_ids"][0])
        np.testing.assert_array_equal(together["padding_mask"][row], alone["padding_mask"][0])
    np.testing.assert_array_equal(together["token_ids"][3], inputs["token_ids"][3])  # no room


def test_samplers_that_leave_no_choice_are_greedy(tiny):
    model = tiny("gemma")
    inputs = prompts([5, 9], 20)
    greedy = model.make_generate_function()(inputs, None)["token_ids"]
    for sampler in (
        keras_hub.samplers.BeamSampler(num_beams=1),
        keras_hub.samplers.TopKSampler(k=1),
        keras_hub.samplers.TopPSampler(p=1e-6),
        keras_hub.samplers.RandomSampler(temperature=1e-4),
    ):
        model.compile(sampler=sampler)
        found = model.make_generate_function()(inputs, None)["token_ids"]
        np.testing.assert_array_equal(found, greedy, err_msg=type(sampler).__name__)


def test_lora_that_is_enabled_later_counts(tmp_path):
    write_tiny_hf(tmp_path, "gemma", **shallow("gemma"))
    model = GemmaCausalLM.from_preset(tmp_path, dtype="float32")
    model.compile(sampler="greedy")
    inputs = prompts([9], LENGTH)
    before = model.make_generate_function()(inputs, None)["token_ids"]
    model.backbone.enable_lora(2)
    rng = np.random.default_rng(0)
    for block in model.backbone.transformer_layers:
        kernel = block.attention.value.lora_kernel_b
        kernel.assign(3 * rng.standard_normal(kernel.shape))
    after = model.make_generate_function()(inputs, None)["token_ids"]
    logits = model.logits(after[:, :-1])[0, 8:]
    np.testing.assert_array_equal(after[0, 9:], logits.argmax(-1))
    assert (after != before).any()


def test_what_fit_has_changed_counts(tmp_path):
    write_tiny_hf(tmp_path, "gemma", **shallow("gemma"))
    model = GemmaCausalLM.from_preset(tmp_path, dtype="float32", sequence_length=LENGTH)
    model.compile(optimizer=keras.optimizers.Adam(0.03), sampler="greedy")
    inputs = prompts([9], LENGTH)
    before = model.make_generate_function()(inputs, None)["token_ids"]
    model.fit(TEXT.splitlines(), batch_size=4, shuffle=False, verbose=0)
    after = model.make_generate_function()(inputs, None)["token_ids"]
    logits = model.logits(after[:, :-1])[0, 8:]
    np.testing.assert_array_equal(after[0, 9:], logits.argmax(-1))
    assert (after != before).any()


@pytest.mark.parametrize(
    ("mask", "message"),
    [([[1, 1, 0], [0, 0, 0]], "is empty"), ([[1, 1, 0], [0, 1, 1]], "padded on the right")],
)
def test_prompts_that_cannot_be_continued_are_refused(tiny, mask, message):
    inputs = {"token_ids": random_ids(2, 3), "padding_mask": np.array(mask)}
    with pytest.raises(ValueError, match=message):
        tiny().make_generate_function()(inputs, None)


# --- stream and chat -----------------------------------------------------------------------------


@pytest.mark.spread
@each_generation
def test_a_stream_is_what_generate_returns(tiny, generation):
    model = tiny(generation)
    prompt = "Bread rises"
    whole = model.generate(prompt, max_length=40, strip_prompt=True)
    assert "".join(model.stream(prompt, max_length=40)).strip() == whole.strip()
    assert len(list(model.stream(prompt, max_length=40))) > 3


def test_a_stream_ends_before_its_stop_token_and_at_the_length(tiny):
    model = tiny()
    ids = random_ids(1, 5)[0]
    whole = list(model.make_generate_function().stream(ids, 20))
    assert len(whole) == 15
    stop = whole[6]
    found = list(model.make_generate_function().stream(ids, 20, [stop]))
    assert found == whole[: whole.index(stop)]


def test_one_beam_is_greedy_and_more_find_what_is_no_less_likely(tiny):
    model = tiny()
    inputs = prompts([6, 6], 16)

    def found(sampler):
        model.compile(sampler=sampler)
        return model.make_generate_function()(inputs, None)["token_ids"]

    def likelihood(ids):
        scores = ops.convert_to_numpy(ops.log_softmax(model.logits(ids[:, :-1])))
        chosen = np.take_along_axis(scores, ids[:, 1:, None], axis=-1)[:, 5:, 0]
        return chosen.sum(axis=1)

    greedy = found("greedy")
    np.testing.assert_array_equal(found(keras_hub.samplers.BeamSampler(num_beams=1)), greedy)
    beams = found(keras_hub.samplers.BeamSampler(num_beams=4))
    assert likelihood(beams).sum() >= likelihood(greedy).sum() - 1e-3


def test_a_stream_of_beams_is_refused(tiny):
    model = tiny()
    model.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=2))
    with pytest.raises(ValueError, match="BeamSampler cannot stream"):
        list(model.stream("Bread"))


def test_a_prompt_that_leaves_no_room_is_told_with_both_counts(tiny):
    with pytest.raises(ValueError, match=r"has \d+ tokens.*max_length=10"):
        tiny().stream(TEXT, max_length=10)


def test_more_than_the_context_is_refused(tmp_path):
    write_tiny_hf(tmp_path / "hf", "gemma", **shallow("gemma"))
    model = GemmaCausalLM.from_preset(tmp_path / "hf", dtype="float32")
    most = model.backbone.config.context_length
    assert model.preprocessor.sequence_length == most < 1024
    longer = GemmaCausalLM.from_preset(tmp_path / "hf", sequence_length=most + 1)
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match=f"^max_length={most + 1} is more than the {most}"):
            call("a", max_length=most + 1)
    for call in (longer.generate, longer.stream):
        with pytest.raises(
            ValueError, match=f"^sequence_length={most + 1} is more than the {most}"
        ):
            call("a")


def test_no_prompts_give_no_texts(tiny):
    assert tiny().generate([]) == []


def test_a_model_without_a_tokenizer_says_what_generate_takes(tiny):
    model = GemmaCausalLM(tiny("gemma").backbone)
    with pytest.raises(ValueError, match="no tokenizer: give generate a dictionary of token_ids"):
        model.generate({"token_ids": np.ones((1, 4)), "padding_mask": np.ones((1, 4))})


def test_the_same_lora_again_changes_nothing_and_another_is_refused(tmp_path):
    write_tiny_hf(tmp_path / "hf", "gemma", **shallow("gemma"))
    model = GemmaCausalLM.from_preset(tmp_path / "hf", dtype="float32")
    model.backbone.enable_lora(2, ["query"])
    assert len(model.trainable_variables) == 2 * len(model.backbone.config.layers)
    assert {min(v.shape) for v in model.trainable_variables} == {2}
    model = GemmaCausalLM.from_preset(tmp_path / "hf", dtype="float32")
    model.backbone.enable_lora(2)
    trained = [id(variable) for variable in model.trainable_variables]
    assert trained
    model.backbone.enable_lora(2)
    for rank, names in ((3, None), (2, ["query"]), (2, ["query", "value", "down"])):
        with pytest.raises(ValueError, match="LoRA of rank 2 is already enabled in"):
            model.backbone.enable_lora(rank, names)
    assert [id(variable) for variable in model.trainable_variables] == trained


def test_bytes_are_given_out_as_characters(tiny):
    proto = tiny().preprocessor.tokenizer.proto
    text = "Bread — é€𝄞 and a boat"
    ids = encode(proto, text)
    pieces = list(decode_stream(proto, ids))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    cut = next(i for i, token in enumerate(ids) if processor(proto).is_byte(token)) + 1
    assert "".join(decode_stream(proto, ids[:cut])).endswith("\ufffd")
    unknown = processor(proto).unk_id()
    assert "".join(decode_stream(proto, [2, ids[0], unknown, 1])) == f"{pieces[0]}\u2047"


def with_turns(model):
    """Instruction-tuned, its tokenizer with the turn template's tokens."""
    tokenizer = GemmaTokenizer(proto=chat_tokenizer_model())
    preprocessor = GemmaCausalLMPreprocessor(tokenizer, sequence_length=48)
    tuned = GemmaCausalLM(model.backbone, preprocessor, instruction_tuned=True)
    tuned.compile(sampler="greedy")
    return tuned


def test_a_tuned_model_stops_where_it_ends_its_turn(tiny, monkeypatch):
    tuned = with_turns(tiny())
    given = []
    monkeypatch.setattr(
        GenerateFunction,
        "__call__",
        lambda self, inputs, stop_token_ids: given.append(stop_token_ids) or inputs,
    )
    tuned.generate("Bread rises")
    tiny().generate("Bread rises")
    assert given == [[1, END_OF_TURN], [1]]


def test_a_tokenizer_without_turns_is_told(tiny):
    model = tiny()
    tuned = GemmaCausalLM(model.backbone, model.preprocessor, instruction_tuned=True)
    tuned.compile(sampler="greedy")
    with pytest.raises(ValueError, match="lacks the tokens of the turn template"):
        tuned.chat("Is it open?")


def test_chat_answers_what_the_template_asks(tiny):
    model = tiny()
    with pytest.raises(ValueError, match="not instruction-tuned"):
        model.chat("Is the shop open?")
    tuned = with_turns(model)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it open?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": " And now? "},
    ]
    proto = tuned.preprocessor.tokenizer.proto
    ids = encode_chat(proto, messages)
    limit = len(ids) + 12
    answer = tuned.chat(messages, max_length=limit)
    expected = list(tuned.make_generate_function().stream(ids, limit, [1, END_OF_TURN]))
    assert answer == "".join(decode_stream(proto, expected))
    assert "".join(tuned.chat(messages, max_length=limit, stream=True)) == answer


@pytest.mark.parametrize("roles", [[], ["model"], ["user", "user"], ["user", "model"], ["cook"]])
def test_what_is_no_conversation_is_refused(roles):
    messages = [{"role": role, "content": "yes"} for role in roles]
    with pytest.raises(ValueError, match="in turn"):
        encode_chat(chat_tokenizer_model(), messages)


# --- score ---------------------------------------------------------------------------------------


@each_generation
def test_scores_are_the_models_logits_and_their_losses(tiny, generation):
    model = tiny(generation)
    ids = random_ids(2)
    seen = []

    def intercept(x, index):
        seen.append(index)
        return x

    logits = ops.convert_to_numpy(ops.stop_gradient(model.score(ids, layer_intercept_fn=intercept)))
    np.testing.assert_allclose(logits, model.logits(ids), rtol=1e-4, atol=1e-4)
    assert seen == list(range(-1, len(model.backbone.config.layers)))
    targets = np.roll(ids, -1, axis=1)
    loss = model.score(ids, scoring_mode="loss", target_ids=targets)
    shifted = logits - logits.max(-1, keepdims=True)
    expected = (
        np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, targets[..., None], 2)[..., 0]
    )
    found = ops.convert_to_numpy(ops.stop_gradient(loss))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"scoring_mode": "rank"}, "rank"), ({"scoring_mode": "loss"}, "target")],
)
def test_scores_that_cannot_be_given_are_refused(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny().score(random_ids(), **arguments)


# --- KerasHub ------------------------------------------------------------------------------------


@pytest.mark.spread
@each_generation
def test_a_model_of_keras_hub_comes_in_and_goes_out(tmp_path, generation):
    write_tiny_hf(tmp_path, generation)
    model = GemmaCausalLM.from_preset(tmp_path, dtype="float32")
    config = dataclasses.replace(
        model.backbone.config,
        norm_epsilon=1e-6,
        layers=tuple(
            dataclasses.replace(
                spec,
                query_scale=spec.head_dim**-0.5,
                rope_theta=(
                    1e6 if generation == "gemma3" and spec.sliding_window is None else 10_000.0
                ),
            )
            for spec in model.backbone.config.layers
        ),
    )
    checkpoint = dataclasses.replace(model.as_checkpoint(), config=config)
    ours = GemmaCausalLM.from_checkpoint(checkpoint, dtype="float32")
    theirs = ours.to_keras_hub(dtype="float32")
    back = GemmaCausalLM.from_keras_hub(theirs, dtype="float32")
    ids = random_ids()
    np.testing.assert_array_equal(back.logits(ids), ours.logits(ids))
    assert back.preprocessor.tokenizer.proto == ours.preprocessor.tokenizer.proto
