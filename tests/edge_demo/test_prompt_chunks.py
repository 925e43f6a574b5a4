"""What was run before makes no difference: to the bit, on few-bit weights, whatever is used again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_demo.bundle.reader import Bundle
from edge_demo.engine import cache_size, float_prompts, prompt_chunks
from edge_demo.engine.cache_size import SLACK
from edge_demo.engine.candidates import Candidates
from edge_demo.engine.prompt_chunks import UNIT, PromptRun, end_of_piece
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.text.generator import Generator
from edge_demo.text.prompt_cache import PromptCache
from edge_demo.text.sampling import Sampler
from edge_demo.text.tokenizer import Tokenizer
from tests.edge_demo.conftest import interrupted_runs
from tests.edge_demo.make_bundles import WIDE
from tests.models import VOCABULARY_SIZE

CONTEXT, WINDOW = (WIDE[n] for n in ("max_position_embeddings", "sliding_window"))
# Around units, the least prompt in float32, and where windows move.
LENGTHS = sorted({n + d for n in (1, UNIT, 97, 2 * UNIT, WINDOW + SLACK) for d in (0, 1, 2)})
KINDS = [("int8", False), ("int4", False), ("int4", True), ("int8-cache", True)]
LENGTH = st.one_of(st.sampled_from(LENGTHS), st.integers(1, 400))


@pytest.fixture(scope="module", params=KINDS, ids=str)
def pair(request, tiny_bundles):
    """A generator to be used again and again, one to begin afresh, which runs other pieces."""
    recipe, in_float = request.param
    bundle = Bundle.open(tiny_bundles / f"wide-{recipe}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(float_prompts.VARIABLE, str(int(in_float)))
        used, fresh = (Generator(Engine(bundle, threads=1), Tokenizer(bundle)) for _ in range(2))
    assert (used.engine._prompts is not None) is in_float
    used.engine._prefill_chunk = 2 * UNIT
    return used, fresh


@pytest.fixture
def used(pair):
    pair[0].engine.rewind(0)
    return pair[0]


@pytest.fixture
def fresh(pair):
    return pair[1]


class Script:
    """Chooses the tokens it was given, and keeps the logits it was shown."""

    def __init__(self, *tokens):
        self.tokens = list(tokens)
        self.logits = []

    def pick(self, logits, before=()):
        assert not isinstance(logits, Candidates)
        self.logits.append(logits.tobytes())
        return self.tokens[len(self.logits) - 1]


def text(length: int, *seed: int) -> list[int]:
    return np.random.default_rng(seed or 0).integers(4, VOCABULARY_SIZE - 4, length).tolist()


def answer(generator, prompt, count=4, seed=0, **options):
    """The logits before each token of an answer, to the bit, and how it was come by."""
    script = Script(*text(count, seed, 7))
    stream = generator.stream(prompt, script, count, **options)
    for _ in stream:
        pass
    assert len(script.logits) == count
    return script.logits, stream.completion


def alone(fresh, prompt, count=4, seed=0):
    fresh.engine.rewind(0)
    logits, completion = answer(fresh, prompt, count, seed)
    assert completion.reused_tokens == 0
    return logits


def holds(engine):
    return {name: array.tobytes() for name, array in engine.snapshot().filled.items()}


# --- any course of things ------------------------------------------------------------------------

SHARE = st.floats(0, 1)
STEPS = st.one_of(
    st.tuples(st.just("prompt"), SHARE, LENGTH),
    st.tuples(st.just("prompt"), st.just(1.0), st.integers(1, 90)),
    st.tuples(st.just("same"), SHARE, st.just(0)),
    st.tuples(st.just("decode"), SHARE, st.integers(1, 12)),
    st.tuples(st.just("extend"), SHARE, st.integers(2, 9)),
    st.tuples(st.just("add"), SHARE, st.integers(1, 70)),
    st.tuples(st.just("rewind"), SHARE, st.just(0)),
    st.tuples(st.just("interrupt"), SHARE, st.sampled_from([1, 2, 40])),
    st.tuples(st.just("file"), SHARE, st.just(0)),
)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEPS, min_size=4, max_size=9), seed=st.integers(0, 1000))
def test_a_prompt_leaves_what_it_leaves_on_a_fresh_engine(
    used, fresh, steps, seed, tmp_path_factory
):
    engine, other = used.engine, fresh.engine
    engine.rewind(0)
    prompt = text(100, seed)
    for number, (step, share, amount) in enumerate(steps):
        new = text(min(amount, CONTEXT - len(engine.tokens)), seed, number)
        if step in ("prompt", "same"):
            if step == "prompt":
                prompt = (engine.tokens[: round(share * len(engine.tokens))] + new)[:CONTEXT]
                prompt = prompt or new or text(1)
            engine.hold(prompt[:-1])
            logits = engine.decode(prompt[-1]).tobytes()
            other.rewind(0)
            other.hold(prompt[:-1])
            assert other.decode(prompt[-1]).tobytes() == logits
            assert holds(engine) == holds(other)
        elif step == "rewind":
            engine.rewind(round(share * len(engine.tokens)))
        elif step == "file" and engine.tokens:
            path = tmp_path_factory.getbasetemp() / "any.cache"
            PromptCache(path).save(engine)
            engine.rewind(0)
            PromptCache(path).load(engine)
        elif step == "decode":
            for token in new:
                engine.decode(token)
        elif new and step == "extend":
            engine.extend(new)
        elif new and step == "add":
            engine.add(new)
        elif new and step == "interrupt":
            with interrupted_runs():
                engine.prefill(new)


@pytest.mark.parametrize("length", LENGTHS)
def test_neither_what_was_held_nor_how_much_is_run_at_once_makes_a_difference(used, fresh, length):
    expected = alone(fresh, text(length))
    assert used.engine._prefill_chunk != fresh.engine._prefill_chunk
    for chunk, held in ((UNIT, 0), (3 * UNIT, UNIT), (2 * UNIT, length - 1)):
        used.engine._prefill_chunk = chunk
        used.engine.rewind(0)
        answer(used, [*text(length)[:held], *text(100, 1)], 2)
        assert answer(used, text(length))[0] == expected


# --- what is used again ---------------------------------------------------------------------------


def test_the_same_prompt_runs_its_last_token_and_a_longer_one_what_is_not_whole(used, fresh):
    prompt, longer, shorter = text(200), text(230), text(150)
    answer(used, prompt)
    logits, again = answer(used, prompt)
    assert again.reused_tokens == 199 and logits == alone(fresh, prompt)
    for other, reused in ((longer, 192), (prompt, 192), (shorter, 128), (longer, 128)):
        logits, found = answer(used, other)
        assert found.reused_tokens == reused and logits == alone(fresh, other)


def test_an_answer_is_not_taken_for_a_prompt(used, fresh):
    """A library's conversation, a prompt at a time: the answer was run one by one."""
    prompt = text(140)
    _, first = answer(used, prompt, 20)
    longer = [*prompt, *first.ids, *text(30, 3)]
    logits, second = answer(used, longer)
    assert second.reused_tokens == 128 and logits == alone(fresh, longer)


class Repeats:
    """Guesses the tokens that will be chosen, and others."""

    def __init__(self, tokens):
        self.tokens, self.guesses = tokens, 0

    def draft(self, tokens, most):
        self.guesses += 1
        right = self.tokens[len(tokens) :][:most]
        return right[:1] + [5] * len(right[1:])


@pytest.mark.parametrize("left", ["a whole answer", "guesses", "part of an answer", "part of it"])
def test_whatever_is_left_the_next_prompt_does_not_know(used, fresh, left):
    prompt = text(150)
    longer = prompt + text(20, 0, 7) + text(9, 4)
    if left == "part of it":
        with interrupted_runs():
            used.engine.hold(prompt)
    elif left == "part of an answer":
        stream = used.stream(prompt, Script(*text(20, 0, 7)), 20)
        for _ in range(7):
            next(stream)
        stream.close()
    else:
        drafter = Repeats(prompt + text(20, 0, 7)) if left == "guesses" else None
        answer(used, prompt, 20, drafter=drafter)
        assert drafter is None or drafter.guesses
    for other in (longer, prompt):
        assert answer(used, other)[0] == alone(fresh, other)


# --- a prompt cache -------------------------------------------------------------------------------


def run_with(generator, path, prompt, keep=True):
    """As `generate --prompt-cache` does it, in a process of its own."""
    generator.engine.rewind(0)
    cache = PromptCache(path)
    cache.load(generator.engine)
    save = (lambda _: cache.save(generator.engine)) if keep else None
    logits, found = answer(generator, prompt, on_held=save)
    return logits, found.reused_tokens


@pytest.mark.parametrize("length", [60, 66, WINDOW + SLACK + 1, 257, 320])
def test_a_prompt_cache_changes_nothing_but_time(used, fresh, tmp_path, length):
    path, whole = tmp_path / "p", (length - 1) // UNIT * UNIT
    prompt, longer, shorter = text(length), text(length + 40), text(length - 20)
    crossing = [*prompt[:-5], *text(20, 1)]
    same_path = length > float_prompts.FEWEST or used.engine._prompts is None
    expected = {len(p): alone(fresh, p) for p in (prompt, longer, shorter)}
    assert run_with(used, path, prompt) == (expected[length], 0)
    before = path.read_bytes()
    assert run_with(used, path, prompt) == (expected[length], length - 1)
    for other in (longer, shorter, crossing):
        logits, reused = run_with(used, path, other, keep=False)
        assert logits == alone(fresh, other)
        assert reused >= (min(whole, (len(other) - 20) // UNIT * UNIT) if same_path else 0)
    assert path.read_bytes() == before
    assert run_with(used, path, longer)[0] == expected[length + 40]
    assert run_with(used, path, shorter)[0] == expected[length - 20]
    assert run_with(used, path, prompt)[0] == expected[length]


def test_both_kinds_of_engine_leave_the_same(pair):
    used, _ = pair
    bundle = used.engine.bundle
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(float_prompts.VARIABLE, str(int(used.engine._prompts is not None)))
        other = CandidateEngine(bundle, threads=1)
    used.engine.rewind(0)
    for length in (90, 200):
        used.engine.hold(text(length))
        other.hold(text(length))
        assert holds(used.engine) == holds(other)


# --- conversations --------------------------------------------------------------------------------


def conversation(generator, system, turns=3, load=None, keep=None, rude=None):
    """Logits of the answers to some messages; `rude` interrupts one of them."""
    generator.engine.rewind(0)
    if load is not None:
        PromptCache(load).load(generator.engine)
    generator.prepare(system)
    if keep is not None:
        PromptCache(keep).save(generator.engine)
    found, prompt = [], list(system)
    for turn in range(turns):
        prompt = [*prompt, *text(25 + turn, turn, 1)]
        if turn == rude:
            stream = generator.stream(prompt, Script(*text(9, turn, 7)), 9, goes_on=True)
            for _ in range(5):
                next(stream)
            stream.close()
            prompt = prompt + text(9, turn, 7)[:5]
            continue
        logits, completion = answer(generator, prompt, 9, turn, goes_on=True)
        found.append((logits, completion.reused_tokens))
        prompt = prompt + completion.ids
    return found


@pytest.mark.parametrize("length", [0, 30, 150])
def test_a_conversation_runs_what_is_new_and_depends_on_its_turns_alone(
    used, fresh, tmp_path, length
):
    system = text(length, 9)
    expected = conversation(fresh, system)
    assert [reused for _, reused in expected] == [
        length, length + 25 + 8, length + 25 + 26 + 9 + 8,
    ]  # fmt: skip
    answer(used, [*system, *text(70, 8)], 12)  # something else was there
    assert conversation(used, system) == expected
    conversation(used, system, 0, keep=tmp_path / "system") if length else None
    if length:
        assert conversation(used, system, load=tmp_path / "system") == expected
        answer(used, [*system, *text(70, 8)])
        PromptCache(tmp_path / "more").save(used.engine)
        assert conversation(used, system, load=tmp_path / "more") == expected


@pytest.mark.parametrize("rude", [0, 1])
def test_an_answer_that_was_given_up_leaves_no_trace_but_its_text(used, fresh, rude):
    """How far the engine was when Ctrl-C came, nobody knows."""
    found = conversation(used, text(80, 9), rude=rude)
    assert found == conversation(fresh, text(80, 9), rude=rude)
    turns = [text(25 + turn, turn, 1) for turn in range(3)]
    said = text(9, 0, 7)[:5] if rude == 0 else text(9, 0, 7)
    prompt = [*text(80, 9), *turns[0], *said, *turns[1]]
    prompt = [*prompt, *text(9, 1, 7)[:5], *turns[2]] if rude == 1 else prompt
    logits = found[rude][0]
    assert logits == alone(fresh, prompt, 9, 1 + rude)


def test_another_conversation_is_a_new_one(used, fresh):
    conversation(used, text(30))
    prompt = text(50)
    logits, _ = answer(used, prompt, goes_on=True)
    assert logits == alone(fresh, prompt)


# --- arithmetic -----------------------------------------------------------------------------------


@given(held=st.integers(0, 700), new=st.integers(1, 700), most=st.integers(1, 9))
def test_pieces_end_at_units_and_no_row_is_left_over(held, new, most):
    end, most, pieces = held + new, most * UNIT, []
    while held < end:
        border = end_of_piece(held, end, most)
        assert held < border <= min(end, held + most)
        assert border % UNIT == 0 or border >= end - 1
        pieces.append(border - held)
        held = border
    if end % UNIT == 1:
        assert pieces[-1] == 1
    assert max(pieces) <= most


@given(
    length=st.integers(0, 300), left=st.integers(0, 300), wanted=st.integers(0, 300),
    same=st.integers(0, 300), floats=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
def test_what_two_prompts_share_is_whole_or_all(length, left, wanted, same, floats):
    held = PromptRun(length, floats[0], length).cut(left)
    shared = held.shared(PromptRun(wanted, floats[1]), same)
    assert shared <= min(length, left, wanted, same)
    if floats[0] != floats[1]:
        assert shared == 0
    elif length == wanted <= min(left, same):
        assert shared == length
    else:
        assert shared == min(length, left, wanted, same) // prompt_chunks.UNIT * prompt_chunks.UNIT


def test_windows_move_by_whole_units():
    assert (cache_size.SLACK + 1) % (4 * prompt_chunks.UNIT) == 0


# --- the real model -------------------------------------------------------------------------------


@pytest.mark.sample
def test_the_real_model_says_the_same_again(sample_bundle):
    """Past its window, so that this has moved; a seed is repeated whatever was held before."""
    bundle = Bundle.open(sample_bundle)
    used, fresh = (Generator(CandidateEngine(bundle), Tokenizer(bundle)) for _ in range(2))
    ids = np.random.default_rng(0).integers(1000, 20_000, 900).tolist()
    for prompt in ([*ids[:840], *ids[:30]], ids, ids[:700]):
        sampler = {"temperature": 1.0, "top_k": 64, "seed": 3}
        found = used.generate(prompt, Sampler(**sampler), 12)
        fresh.engine.rewind(0)
        expected = fresh.generate(prompt, Sampler(**sampler), 12)
        assert found.ids == expected.ids
        assert holds(used.engine) == holds(fresh.engine)
    assert found.reused_tokens == 0  # its window has moved on
