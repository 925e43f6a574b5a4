"""Has a guard judge what comes in and goes out, in a thread of its own.

Nothing of an answer is sent that has not been judged. A stream therefore comes in parts: each is
held back until the guard has judged the answer with it. The answer goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from collections.abc import Sequence

from edge_demo.guard.decisions import Guard, Verdict
from edge_demo.guard.held_back import HeldBack
from edge_demo.guard.judge import TooLongError
from edge_demo.server.protocol.errors import Refusal
from edge_demo.server.protocol.request import Prompt
from edge_demo.server.worker.job import Ended, Event, Piece
from edge_demo.text.tokenizer import Tokenizer

_WHOLE_EVERY = 512  # tokens of an answer that is not streamed: harm ends it before its end


class Guarding:
    """A guard, and what it judges.

    Args:
        guard: used by this alone.
        tokenizer: of the bundle that answers.
        on: `input`, `output` or `both`.
        every: tokens of a stream that are judged at once.
        most_waiting: requests that may wait for a judgment of their prompts.

    Attributes:
        guard: as it was given, to read its counts.
    """

    def __init__(
        self, guard: Guard, tokenizer: Tokenizer, on: str, every: int, most_waiting: int
    ) -> None:
        self.guard = guard
        self._tokenizer = tokenizer
        self._on = on
        self._every = every
        self._most_waiting = most_waiting
        self._waiting = 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "guard")

    def close(self) -> None:
        """End; judgments that wait are given up."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def admit(self, request: str, prompts: Sequence[Prompt], namespace: str) -> None:
        """Judge the prompts of a request, where the guard is on input.

        Args:
            request: its id.
            prompts: of which the last turn of the user is judged, or the text.
            namespace: of the request.

        Raises:
            Refusal: a prompt violates a policy, the guard cannot judge it, or too many wait.
        """
        if self._on == "output":
            return
        if self._waiting >= self._most_waiting:
            raise Refusal("too many requests are waiting; try again later", 429, "server_busy")
        self._waiting += 1
        try:
            for prompt in prompts:
                verdict = await self.decide(request, self._text(prompt), None, namespace)
                if verdict.violated:
                    raise Refusal(
                        f"the guard refused this prompt, because of {verdict.reasons}",
                        code="content_filter",
                        param="prompt",
                    )
        except TooLongError as error:
            raise Refusal(str(error), code="context_length_exceeded", param="prompt") from None
        finally:
            self._waiting -= 1

    def watch(self, request: str, prompts: Sequence[Prompt], namespace: str, stream: bool) -> Watch:
        """What judges the answers to a request, if the guard is on output.

        Args:
            request: its id.
            prompts: one for each answer.
            namespace: of the request.
            stream: whether answers are sent as they come.
        """
        every = self._every if stream else _WHOLE_EVERY
        texts = [self._text(prompt) for prompt in prompts] if self._on != "input" else None
        return Watch(self, request, texts, namespace, every)

    async def decide(
        self, request: str, prompt: str, response: str | None, namespace: str
    ) -> Verdict:
        """As `Guard.decide`, in the guard's thread."""
        decide = functools.partial(self.guard.decide, request, prompt, response, namespace)
        return await asyncio.get_running_loop().run_in_executor(self._thread, decide)

    def _text(self, prompt: Prompt) -> str:
        """The text that a user answers for: of a conversation, the last turn."""
        if prompt.turns:
            return prompt.turns[-1][1]
        return prompt.text or self._tokenizer.decode(prompt.ids)


class Watch:
    """Lets the events of answers pass when the guard has judged them.

    Args:
        guarding: that judges.
        request: its id.
        prompts: the text of each answer's prompt; `None` lets everything pass.
        namespace: of the request.
        every: tokens that are judged at once.
    """

    def __init__(
        self,
        guarding: Guarding,
        request: str,
        prompts: Sequence[str] | None,
        namespace: str,
        every: int,
    ) -> None:
        self._guarding = guarding
        self._request = request
        self._prompts = prompts
        self._namespace = namespace
        self._every = every
        self._held: dict[int, HeldBack[Event]] = {}
        self._cut: set[int] = set()

    async def passed(self, found: Sequence[tuple[int, Event]]) -> list[tuple[int, Event]]:
        """The events that may be shown now.

        An answer that violates a policy ends with its last judged text, and so does one that the
        guard's context does not hold.

        Args:
            found: events that came, with the number of the answer.

        Raises:
            Exception: the guard failed; such as `EdgeError`, or onnxruntime's.
        """
        if self._prompts is None:
            return list(found)
        passed: list[tuple[int, Event]] = []
        for index, event in found:
            if index in self._cut:
                continue
            held = self._held.setdefault(index, HeldBack(self._every))
            if isinstance(event, Piece):
                held.add(event, event.text)
            elif not isinstance(event, Ended) or await self._release(index, held, passed):
                passed.append((index, event))
        for index in dict.fromkeys(index for index, _ in found):
            if index not in self._cut and self._held[index].is_due:
                await self._release(index, self._held[index], passed)
        return passed

    async def _release(
        self, index: int, held: HeldBack[Event], passed: list[tuple[int, Event]]
    ) -> bool:
        """Judge an answer and let its pieces pass; `False` where it ends here."""
        reason = await self._judge(index, held.text) if held.has_news else None
        if reason is None:
            passed += [(index, piece) for piece in held.release()]
            return True
        self._cut.add(index)
        passed.append((index, Ended(reason)))
        return False

    async def _judge(self, index: int, text: str) -> str | None:
        """Why an answer must end before this text, if it must."""
        assert self._prompts is not None
        ask = (self._request, self._prompts[index], text, self._namespace)
        try:
            verdict = await self._guarding.decide(*ask)
        except TooLongError:
            return "length"
        return "content_filter" if verdict.violated else None
