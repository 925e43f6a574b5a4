"""Generation against a plain loop over the engine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.runner import Engine
from edge_demo.errors import RequestError
from edge_demo.text.generator import Generator
from edge_demo.text.sampling import Sampler
from tests.edge_demo.conftest import generator, short_boundaries
from tests.edge_demo.make_bundles import SHORT_CONTEXT
from tests.models import VOCABULARY_SIZE

EOS, BOS, FIRST_BYTE = 1, 2, 4
END_OF_TURN = VOCABULARY_SIZE - 2
GREEDY = Sampler()


class Script:
    """Chooses the tokens it was given, and keeps the logits it was shown."""

    def __init__(self, *tokens):
        self.tokens = list(tokens)
        self.logits = []

    def pick(self, logits, text):
        self.logits.append(logits.copy())
        return self.tokens[len(self.logits) - 1]


@pytest.fixture
def tiny(tiny_bundles):
    return generator(tiny_bundles / "gemma3-fp32")


@pytest.fixture
def short(tiny_bundles):
    return generator(tiny_bundles / "short")


@pytest.fixture(scope="module")
def pair(tiny_bundles):
    """One generator to use again and again, one to start afresh."""
    return [generator(tiny_bundles / "gemma3-fp32") for _ in range(2)]


def text(length, seed=0):
    return [BOS, *np.random.default_rng(seed).integers(4, 290, length - 1).tolist()]


def naive(engine, ids, count):
    """Greedy continuation with a whole pass for each token."""
    out = list(ids)
    for _ in range(count):
        engine.rewind(0)
        out.append(int(engine.prefill(out).argmax()))
    return out[len(ids) :]


@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_greedy_continuation_is_that_of_the_plain_loop(tiny, length):
    ids = text(length)
    expected = naive(tiny.engine, ids, 24)
    found = tiny.generate(ids, GREEDY, 24)
    assert EOS not in expected
    assert found.ids == expected and found.prompt_ids == ids
    assert found.text == tiny.tokenizer.decode(expected)
    assert found.finish_reason == "length"


def test_streamed_pieces_join_to_the_text(tiny):
    stream = tiny.stream(text(7), Sampler(1.0, seed=3), 40)
    pieces, completion = list(stream), stream.completion
    whole = "".join(piece.text for piece in pieces)
    assert whole == completion.text == tiny.tokenizer.decode(completion.ids)
    assert [piece.id for piece in pieces] == [*completion.ids, None]
    assert len(completion.ids) > 20


def test_a_seed_repeats_a_text_on_a_used_engine(tiny):
    first, again, other = (tiny.generate(text(7), Sampler(1.0, seed=s), 30).ids for s in (1, 1, 2))
    assert first == again != other


def test_a_split_character_comes_out_whole_and_an_unfinished_one_marked(tiny):
    emoji = [FIRST_BYTE + b for b in "😀".encode()]
    script = Script(*emoji, *emoji[:2])
    shown = [piece.text for piece in tiny.stream([BOS], script, 6)]
    assert shown == ["", "", "", "😀", "", "", "\ufffd\ufffd"]


# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, stop", [("gemma3-fp32", EOS), ("chat", EOS), ("chat", END_OF_TURN)]
)
def test_a_stop_token_ends_the_text_and_is_not_part_of_it(tiny_bundles, model, stop):
    tiny = generator(tiny_bundles / model)
    completion = tiny.generate(text(5), Script(7, 8, stop), 10)
    assert completion.ids == [7, 8] and completion.finish_reason == "stop"
    assert completion.text == tiny.tokenizer.decode([7, 8])
    assert tiny.generate(text(5), Script(stop), 10).ids == []


def test_a_base_model_does_not_stop_at_the_end_of_a_turn(tiny):
    assert tiny.generate(text(5), Script(END_OF_TURN, EOS), 10).ids == [END_OF_TURN]


@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_max_tokens_are_not_exceeded(tiny, max_tokens):
    completion = tiny.generate(text(5), GREEDY, max_tokens)
    assert len(completion.ids) == max_tokens and completion.finish_reason == "length"
    assert (completion.decode_tokens_per_s is None) == (max_tokens == 1)
    assert completion.prefill_s > 0


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_request_for_no_tokens_is_refused(tiny, max_tokens):
    with pytest.raises(RequestError, match=f"positive, not {max_tokens}"):
        tiny.generate(text(5), GREEDY, max_tokens)


@pytest.mark.parametrize("length", [1, 10, SHORT_CONTEXT - 1, SHORT_CONTEXT])
def test_the_end_of_the_context_ends_the_text(short, length):
    ids = text(length)
    completion = short.generate(ids, GREEDY, 100)
    # The token after the last that fits is still known: it needs no place itself.
    assert len(completion.ids) == SHORT_CONTEXT - length + 1
    assert completion.finish_reason == "context"
    expected = []
    for end in range(length, SHORT_CONTEXT + 1):
        short.engine.rewind(0)
        expected.append(int(short.engine.prefill((ids + expected)[:end]).argmax()))
    assert completion.ids == expected


def test_a_prompt_that_does_not_fit_is_refused_and_the_next_one_answered(short):
    expected = short.generate(text(10), GREEDY, 5).ids
    with pytest.raises(RequestError, match=r"17 tokens.*16"):
        short.generate(text(17), GREEDY, 5)
    with pytest.raises(RequestError, match="empty"):
        short.generate([], GREEDY, 5)
    assert short.generate(text(10), GREEDY, 5).ids == expected


# --- what is used again --------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 3), st.integers(1, 6)), min_size=2, max_size=5
    )
)
def test_a_used_engine_continues_any_prompt_as_a_fresh_one(pair, calls):
    """Each prompt is some beginning of the last text, answer included, and something new."""
    used, fresh = pair
    used.engine.rewind(0)
    tokens, prompt = [BOS], []
    for number, (kept, new, count) in enumerate(calls):
        before, prompt = prompt, tokens[: 1 + kept] + text(1 + new, number)[1:]
        fresh.engine.rewind(0)
        scripts = [Script(*range(20, 20 + count)) for _ in pair]
        found, expected = (
            g.generate(prompt, script, count) for g, script in zip(pair, scripts, strict=True)
        )
        np.testing.assert_array_equal(scripts[0].logits, scripts[1].logits)
        # fewer than a whole unit are used again for the same prompt alone
        assert found.reused_tokens in (0, len(prompt) - 1)
        if prompt == before:
            assert found.reused_tokens == len(prompt) - 1
        assert expected.reused_tokens == 0
        assert found.text == expected.text
        tokens = prompt + found.ids


class CountingEngine(Engine):
    """Keeps what it was asked to compute."""

    def add(self, ids, *told):
        self.computed = list(ids)
        return super().add(ids, *told)


def test_the_second_turn_of_a_conversation_computes_only_what_is_new(tiny, tiny_bundles):
    engine = CountingEngine(Bundle.open(tiny_bundles / "gemma3-fp32"), threads=1)
    used = Generator(engine, tiny.tokenizer)
    first = used.generate(text(20), GREEDY, 10)
    longer = [*first.prompt_ids, *first.ids, 9, 8, 7]
    stream = used.stream(longer, GREEDY, 5, goes_on=True)
    assert len(list(stream)) == 6
    second = stream.completion
    # The last token of the first answer was never run.
    assert second.reused_tokens == 29
    assert engine.computed == longer[29:-1]  # and then the last one
    assert second.ids == tiny.generate(longer, GREEDY, 5).ids


def test_the_same_prompt_again_computes_one_token(tiny):
    first = tiny.generate(text(20), GREEDY, 10)
    again = tiny.generate(text(20), GREEDY, 10)
    assert again.reused_tokens == 19 and again.ids == first.ids


@pytest.mark.parametrize("pieces", [0, 1, 5])
def test_a_stream_left_in_the_middle_leaves_the_engine_usable(tiny, pieces):
    expected = tiny.generate(text(9), GREEDY, 12).ids
    stream = tiny.stream(text(9), GREEDY, 12)
    completion = stream.completion
    for _ in range(pieces):
        next(stream)
    stream.close()
    assert completion.ids == expected[:pieces]
    assert completion.finish_reason == "interrupted"
    held = tiny.engine.tokens
    assert held == (text(9) + expected)[: len(held)]
    assert tiny.generate(text(9), GREEDY, 12).ids == expected


# --- the real model ------------------------------------------------------------------------------

# The greedy continuations of the float32 model by transformers; its least margins between the best
# and the second token are 2.7 and 1.8, int8 moves logits by tenths.
CONTINUED = {
    "1, 2, 3, 4, 5, 6,": " 7, 8, 9, 10, 11",
    "a b c d e f g h i j": " k l m n o p q r s t u v w x y z",
}


@pytest.mark.sample
@pytest.mark.parametrize("prompt", CONTINUED)
def test_the_real_model_knows_how_it_goes_on(sample_generator, prompt):
    ids = sample_generator.tokenizer.encode(prompt)
    completion = sample_generator.generate(ids, GREEDY, 16)
    assert completion.text == CONTINUED[prompt]


@pytest.mark.sample
def test_the_real_model_continues_as_the_plain_loop_where_its_margin_is_no_noise(sample_generator):
    engine = sample_generator.engine
    ids = sample_generator.tokenizer.encode("The capital of France is")
    found = sample_generator.generate(ids, GREEDY, 12).ids
    engine.rewind(0)
    rows = np.concatenate(list(engine.all_logits([*ids, *found])))[len(ids) - 1 : -1]
    second, best = np.sort(rows)[:, -2:].T
    clear = best - second > 0.1
    assert clear.sum() >= 8
    assert rows.argmax(axis=1)[clear].tolist() == np.array(found)[clear].tolist()


def test_a_long_prompt_tells_how_far_it_is(tiny_bundles):
    with short_boundaries(step=256, slack=255, chunk=8):
        one = generator(tiny_bundles / "gemma3-fp32")
        told = []
        ids = list(range(4, 34))
        for _ in one.stream(ids, Sampler(), 2, on_prefill=lambda *at: told.append(at)):
            pass
        assert told == [(8, 30), (16, 30), (24, 30), (29, 30), (30, 30)]
        del told[:]
        for _ in one.stream([*ids, 5, 6, 7], Sampler(), 2, on_prefill=lambda *at: told.append(at)):
            pass
        assert told == [(8, 9), (9, 9)]  # the beginning is there
