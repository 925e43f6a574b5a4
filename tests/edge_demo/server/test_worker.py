"""The worker against a generator that answers one prompt alone."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import threading
import time

import numpy as np
import pytest

from edge_demo.bundle.reader import Bundle
from edge_demo.engine.binding import Binding
from edge_demo.engine.prefixes import PrefixStore
from edge_demo.engine.prompt_chunks import UNIT
from edge_demo.engine.runner import CandidateEngine, Engine
from edge_demo.errors import EdgeError, RequestError
from edge_demo.server.http import generating
from edge_demo.server.protocol.answer import Answer, Choice
from edge_demo.server.protocol.chat import ChatForm
from edge_demo.server.worker.job import Ended, Failed, Job, Piece, Reading
from edge_demo.server.worker.owner import BusyError, ClosedError
from edge_demo.server.worker.worker import Worker
from edge_demo.text.generator import Generator
from edge_demo.text.grammar import Grammars, GrammarSource
from edge_demo.text.logit_bias import LogitBias
from edge_demo.text.sampling import Sampler
from edge_demo.text.tokenizer import Tokenizer
from tests.models import VOCABULARY_SIZE

PLENTY = 1 << 28


class Told:
    """What a job has told, and waiting for its end."""

    def __init__(self):
        self.events = []
        self.first, self.end = threading.Event(), threading.Event()

    def __call__(self, event):
        self.events.append(event)
        self.first.set()
        if isinstance(event, Ended | Failed):
            self.end.set()

    @property
    def text(self):
        return "".join(e.text for e in self.events if isinstance(e, Piece))


def job(ids, seed=0, tokens=12, **more):
    settings = {"temperature": 0.9, "top_k": 20, "seed": seed}
    sampler = more.pop("sampler", None) or Sampler(**settings)
    return Job(list(ids), sampler, tokens, Told(), **more)


def finish(*jobs):
    for one in jobs:
        assert one.tell.end.wait(60)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def text(length, seed=0):
    return np.random.default_rng(seed).integers(4, VOCABULARY_SIZE, length).tolist()


@pytest.fixture
def started():
    """Make workers, which end with the test."""
    workers = []

    def start(path, rows=4, queue=64, cache=PLENTY, kind=CandidateEngine):
        bundle = Bundle.open(path)
        worker = Worker(kind(bundle, threads=1), Tokenizer(bundle), rows, queue, cache, 1)
        worker.start()
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.close()


def alone(path, one, kind=CandidateEngine):
    bundle = Bundle.open(path)
    generator = Generator(kind(bundle, threads=1), Tokenizer(bundle))
    sampler = Sampler(temperature=0.9, top_k=20, seed=one.sampler.seed)
    return generator.generate(one.ids, sampler, one.max_tokens, stop=one.stop)


@pytest.mark.parametrize("recipe", ["wide-int8", "gemma3-fp32", "gemma2-fp32", "gemma-int8"])
def test_each_request_gets_the_tokens_that_it_would_get_alone(tiny_bundles, started, recipe):
    path = tiny_bundles / recipe
    worker = started(path)
    lengths = (1, 2, 90, 17, 95, 64, 65, 33, 5, 70)
    jobs = [job(text(n, i), seed=i, tokens=5 + 7 * (i % 4)) for i, n in enumerate(lengths)]
    jobs += [job(jobs[2].ids, seed=2, tokens=jobs[2].max_tokens)]  # which is in memory now
    for one in jobs:
        worker.submit(one)
    finish(*jobs)
    for one in jobs:
        expected = alone(path, one)
        assert one.completion.ids == expected.ids
        assert (one.tell.text, one.completion.finish_reason) == (
            expected.text, expected.finish_reason,
        )  # fmt: skip
    assert worker.counts["completion_tokens"] >= sum(len(one.completion.ids) for one in jobs)
    assert worker.state["answering"] == worker.state["waiting"] == worker.state["reading"] == 0


def test_a_shared_beginning_is_run_once_and_not_for_others(tiny_bundles, started):
    worker = started(tiny_bundles / "wide-int8")
    beginning = text(3 * UNIT + 9)
    first = job([*beginning, *text(20, 1)], shared=len(beginning))
    worker.submit(first)
    finish(first)
    assert first.completion.reused_tokens == 0
    again = job([*beginning, *text(200, 2)])
    other = job([*beginning, *text(20, 3)], namespace="another key")
    worker.submit(other, again)
    finish(other, again)
    assert again.completion.reused_tokens == 3 * UNIT
    assert other.completion.reused_tokens == 0
    assert worker.state["cache_bytes"] > 0


def test_the_next_turn_runs_only_what_is_new(tiny_bundles, started):
    worker = started(tiny_bundles / "wide-int8")
    turn, before = text(150), 0
    for number in range(4):
        one = job(turn, seed=number)
        worker.submit(one)
        finish(one)
        assert one.completion.reused_tokens == before // UNIT * UNIT
        assert one.completion.ids == alone(tiny_bundles / "wide-int8", one).ids
        before = len(turn) - 1
        turn = [*turn, *one.completion.ids, *text(40, 9 + number)]


def test_what_comes_next_is_run_while_nothing_else_is_to_do(tiny_bundles, started):
    path = tiny_bundles / "wide-int8"
    worker = started(path)
    said = []

    def beginning(answer):
        said.append(answer)
        return [*first.ids, *first.completion.ids, *text(60, 7)]

    first = job(text(150), tokens=40, next_beginning=beginning)
    worker.submit(first)
    finish(first)
    long = len(beginning("")) // UNIT * UNIT
    wait_for(lambda: worker.counts["requests"] == 1 and worker.state["cache_entries"] == 1)
    wait_for(lambda: worker.stalled_s == 0 and len(said) == 2)
    assert said[-1] == first.completion.text or said[0] == first.completion.text
    again = job([*beginning(""), *text(5, 8)])
    other = job([*beginning(""), *text(5, 8)], namespace="another key")
    worker.submit(again, other)
    finish(again, other)
    assert again.completion.reused_tokens == long and other.completion.reused_tokens == 0
    assert again.completion.ids == alone(path, again).ids


def test_a_request_does_not_wait_for_what_may_come_next(tiny_bundles, started):
    worker = started(tiny_bundles / "wide-int8")
    first = job(text(20), tokens=4, next_beginning=lambda _: text(600, 3))
    second = job(text(9, 5))
    worker.submit(first)
    finish(first)
    worker.submit(second)
    finish(second)
    assert second.completion.ids == alone(tiny_bundles / "wide-int8", second).ids
    failing = job(text(20), tokens=4, next_beginning=lambda _: 1 / 0)
    worker.submit(failing)
    finish(failing)
    third = job(text(9, 5))
    worker.submit(third)
    finish(third)
    assert third.completion.ids == second.completion.ids


def test_what_is_kept_is_bounded_and_the_oldest_goes(tiny_bundles):
    engine = CandidateEngine(Bundle.open(tiny_bundles / "gemma3-fp32"), threads=1)
    engine.hold(text(70))
    size = sum(a.nbytes for a in engine.snapshot().filled.values())
    store = PrefixStore(2 * size + 10)
    for seed in (1, 2, 3):
        engine.hold(text(70, seed))
        store.keep("", engine)
        assert store.num_bytes <= 2 * size + 10
    saved = [store.best("", engine, text(70, seed))[0] for seed in (1, 2, 3)]
    assert saved == [0, 70, 70] and len(store) == 2
    store.best("", engine, text(70, 2))  # the one used last stays
    engine.hold(text(70, 4))
    store.keep("", engine)
    saved = [store.best("", engine, text(70, seed))[0] for seed in (2, 3, 4)]
    assert saved == [70, 0, 70]


def test_a_longer_prompt_stands_for_those_it_begins_with(tiny_bundles):
    engine = CandidateEngine(Bundle.open(tiny_bundles / "gemma-fp32"), threads=1)
    store = PrefixStore(PLENTY)
    for length in (64, 90, 128):
        engine.hold(text(128)[:length])
        store.keep("", engine)
    assert len(store) == 1


def test_a_request_that_is_given_up_leaves_its_row_to_another(tiny_bundles, started):
    worker = started(tiny_bundles / "gemma3-fp32", rows=1)
    endless = job(text(5), tokens=10**6)
    waiting = job(text(6))
    worker.submit(endless, waiting)
    assert endless.tell.first.wait(60)
    assert not waiting.tell.first.is_set()
    worker.cancel(endless)
    finish(waiting)
    assert not endless.tell.end.is_set() and worker.state["answering"] == 0


def test_a_long_prompt_runs_between_the_tokens_of_others(tiny_bundles, started):
    worker = started(tiny_bundles / "wide-int8")
    happened = queue.Queue()
    talking = job(text(5), tokens=400)
    reading = job(text(8 * UNIT), seed=1)
    for name, one in (("talking", talking), ("reading", reading)):
        before = one.tell
        one.tell = lambda e, n=name, b=before: (happened.put((n, type(e))), b(e))
        one.told = before
    worker.submit(talking)
    assert talking.told.first.wait(60)
    worker.submit(reading)
    assert reading.told.end.wait(60)
    worker.cancel(talking)
    order = [happened.get() for _ in range(happened.qsize())]
    pieces = [i for i, found in enumerate(order) if found == ("reading", Reading)]
    assert len(pieces) >= 7
    for one, next_ in itertools.pairwise(pieces):
        assert ("talking", Piece) in order[one:next_]


def test_too_many_wait(tiny_bundles, started):
    worker = started(tiny_bundles / "gemma3-fp32", rows=1, queue=2)
    endless = job(text(5), tokens=10**6)
    worker.submit(endless)
    assert endless.tell.first.wait(60)
    waiting = [job(text(5)), job(text(5))]
    worker.submit(*waiting)
    with pytest.raises(BusyError):
        worker.submit(job(text(5)))
    assert worker.counts["refused"] == 1
    worker.cancel(endless, *waiting)


def test_a_prompt_that_does_not_fit_is_refused_at_once(tiny_bundles, started):
    worker = started(tiny_bundles / "short")
    with pytest.raises(RequestError, match="context"):
        worker.submit(job(text(17)))
    full = job(text(16), tokens=9)
    worker.submit(full)
    finish(full)
    assert len(full.completion.ids) == 1 and full.completion.finish_reason == "context"


def test_what_was_run_for_a_form_is_of_its_namespace(tiny_bundles, started):
    path = tiny_bundles / "long-chat"
    worker, bundle = started(path, rows=2, cache=0), Bundle.open(path)
    grammars = Grammars(Tokenizer(bundle), bundle.vocabulary_size)
    grammar = grammars.compile(GrammarSource("regex", "[a-z]{60}" + "X" * 300 + "[a-z]{5}"))
    secret = job(text(200), tokens=600, grammar=grammar, sampler=Sampler(1.0, seed=1))
    secret.namespace = "one key"
    worker.submit(secret)
    assert secret.tell.first.wait(60)
    other = job(text(3, 1), tokens=2, namespace="another key")
    worker.submit(other)  # now the engine is the other's
    finish(secret, other)
    assert "X" * 300 in secret.completion.text
    assert worker._engine.snapshot().tokens[: len(secret.ids)] != secret.ids
    curious = job([*secret.ids, *secret.completion.ids], tokens=2, namespace="another key")
    worker.submit(curious)
    finish(curious)
    assert curious.completion.reused_tokens == 0


def test_all_logits_are_read_where_candidates_do_not_suffice(tiny_bundles, started):
    path = tiny_bundles / "gemma3-fp32"
    worker = started(path)
    told = job(text(9), top=3)
    wide = job(text(9), sampler=Sampler(temperature=1, seed=5))
    forced = job(text(9), bias=LogitBias({77: 100.0}))
    worker.submit(told, wide, forced, plain := job(text(9)))
    finish(told, wide, forced, plain)
    assert forced.completion.ids == [77] * 12
    assert told.completion.ids == plain.completion.ids
    engine = Engine(Bundle.open(path), threads=1)
    logits = engine.prefill(told.ids)
    pieces = [e for e in told.tell.events if isinstance(e, Piece) and e.logprob]
    assert len(pieces) == len(told.completion.ids)
    for piece, token in zip(pieces, told.completion.ids, strict=True):
        known = logits[: Tokenizer(engine.bundle).num_pieces].astype(np.float64)
        expected = known - np.log(np.exp(known).sum())
        assert piece.logprob.id == token
        assert abs(piece.logprob.logprob - expected[token]) < 1e-4
        best = np.argsort(-expected)[:3]
        assert [i for i, _ in piece.logprob.top] == best.tolist()
        np.testing.assert_allclose([v for _, v in piece.logprob.top], expected[best], atol=1e-4)
        logits = engine.decode(token)
    alone_ = Generator(engine, Tokenizer(engine.bundle))
    expected = alone_.generate(wide.ids, Sampler(temperature=1, seed=5), 12)
    assert wide.completion.ids == expected.ids


def test_a_banned_token_never_comes(tiny_bundles, started):
    worker = started(tiny_bundles / "gemma3-fp32")
    free = job(text(9), sampler=Sampler())
    worker.submit(free)
    finish(free)
    banned = job(text(9), sampler=Sampler(), bias=LogitBias({free.completion.ids[0]: -100.0}))
    worker.submit(banned)
    finish(banned)
    assert free.completion.ids[0] not in banned.completion.ids


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "is it open": {"type": "boolean"}},
    "required": ["name", "is it open"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("rows", [1, 4])
def test_answers_of_promised_forms_grow_beside_others(tiny_bundles, started, rows):
    path = tiny_bundles / "chat"
    worker, bundle = started(path, rows=rows), Bundle.open(path)
    grammars = Grammars(Tokenizer(bundle), bundle.vocabulary_size)
    source = GrammarSource("json_schema", json.dumps(SCHEMA))
    promised = [
        job(text(9, i), tokens=200, grammar=grammars.compile(source), sampler=Sampler(1.0, seed=i))
        for i in range(6)
    ]
    free = [job(text(70, i), seed=i, tokens=30) for i in range(3)]
    worker.submit(*promised[:3], *free, *promised[3:])
    finish(*promised, *free)
    for one in promised:
        found = json.loads(one.tell.text)
        assert set(found) == set(SCHEMA["required"]) and len(found["name"]) <= 6
        assert one.completion.finish_reason == "stop"
    for one in free:
        assert one.completion.ids == alone(path, one).ids


def test_all_logits_are_read_where_no_candidate_is_allowed(tiny_bundles, started):
    path = tiny_bundles / "chat"
    worker, bundle = started(path), Bundle.open(path)
    tokenizer = Tokenizer(bundle)
    ids = text(40)
    engine = CandidateEngine(bundle, threads=1)
    likely = {tokenizer.piece_bytes(int(i)) for i in engine.prefill(ids).ids}
    letters = [bytes([c]) for c in b"abcdefghijklmnopqrstuvwxyz"]
    unlikely = [c for c in letters if c not in likely][:2]
    assert unlikely
    grammar = Grammars(tokenizer, bundle.vocabulary_size).compile(
        GrammarSource("regex", f"[{b''.join(unlikely).decode()}]")
    )
    one = job(ids, sampler=Sampler(), grammar=grammar)
    worker.submit(one)
    finish(one)
    logits = Engine(bundle, threads=1).prefill(ids)
    pieces = {tokenizer.encode(c.decode(), bos=False)[-1] for c in unlikely}
    assert one.completion.ids == [max(pieces, key=lambda i: logits[i])]


def test_a_reader_who_is_too_slow_gets_an_error_and_the_row_is_free(
    tiny_bundles, started, monkeypatch
):
    monkeypatch.setattr(generating, "_MOST_PENDING", 5)
    worker = started(tiny_bundles / "chat")

    async def stream():
        answer = Answer("1", 0, "chat", "fp", [Choice(0)])
        run = generating._Run(answer, False, worker, Tokenizer(worker._engine.bundle), [])
        run.jobs.append(Job(text(9), Sampler(), 200, run.teller(0)))
        worker.submit(*run.jobs)
        while not run.jobs[0].cancelled:  # nobody reads
            await asyncio.sleep(0.01)
        return [part async for part in run.stream(ChatForm(), False)]

    parts = asyncio.run(stream())
    assert b"slow_reader" in parts[-1] and b"[DONE]" not in parts[-1]
    wait_for(lambda: worker.state["answering"] == 0)


def test_what_nobody_expected_is_logged_and_its_words_are_not_sent(caplog):
    refusal = generating.refusal_of(ZeroDivisionError("of the secret"))
    assert refusal.status == 500 and "secret" not in str(refusal)
    assert "ZeroDivisionError" in caplog.text


def test_an_engine_that_fails_fails_its_requests_and_no_others(tiny_bundles, started, monkeypatch):
    path = tiny_bundles / "gemma3-fp32"
    worker = started(path)
    run, failing = Binding.run, threading.Event()

    def fails(binding):
        if failing.is_set():
            raise EdgeError("onnxruntime could not run the model")
        return run(binding)

    monkeypatch.setattr(Binding, "run", fails)
    first = job(text(80), tokens=10**6)
    worker.submit(first)
    assert first.tell.first.wait(60)
    failing.set()
    finish(first)
    assert isinstance(first.tell.events[-1], Failed) and worker.counts["failures"] >= 1
    failing.clear()
    second = job(text(80))
    worker.submit(second)
    finish(second)
    assert second.completion.ids == alone(path, second).ids


def test_it_ends_when_all_have_their_answers(tiny_bundles, started):
    worker = started(tiny_bundles / "gemma3-fp32", rows=1)
    jobs = [job(text(5, i)) for i in range(3)]
    worker.submit(*jobs)
    worker.close()
    assert all(one.tell.end.is_set() for one in jobs) and not worker.alive
    with pytest.raises(ClosedError):
        worker.submit(job(text(5)))
