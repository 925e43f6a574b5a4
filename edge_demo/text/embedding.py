"""Texts become vectors: prompts, tokens, and vectors that are cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_demo.bundle.manifest import EmbedderSpec
from edge_demo.errors import RequestError, brief
from edge_demo.text.tokenizer import Tokenizer

_SHORTEST = 1e-12  # length of a vector, which divides it


class EmbeddingTokens:
    """Makes the tokens that an embedder takes: `<bos>`, the text's, `<eos>`.

    Args:
        spec: what the bundle says.
        tokenizer: of it.
        longest: the most tokens of a text, those of its beginning and end included.
    """

    def __init__(self, spec: EmbedderSpec, tokenizer: Tokenizer, longest: int) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._longest = longest

    def prompt(self, name: str | None) -> str:
        """What is put before each text of a task; the default one without a name.

        Raises:
            RequestError: there is no such prompt.
        """
        name = self._spec.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self._spec.prompts:
            known = ", ".join(sorted(self._spec.prompts)) or "none"
            raise RequestError(f"there is no prompt {brief(name, 80)!r}; this model has: {known}")
        return self._spec.prompts[name]

    def of_texts(
        self, texts: Sequence[str], prompt_name: str | None = None, truncate: bool = False
    ) -> list[list[int]]:
        """The token ids of each text. White space around prompt and text together is left out.

        Args:
            texts: any number.
            prompt_name: of a task.
            truncate: whether the end of a text that is too long is left out.

        Raises:
            RequestError: there is no such prompt, or a text is too long.
        """
        prompt = self.prompt(prompt_name)
        rows = [self._tokenizer.encode((prompt + text).strip(), bos=False) for text in texts]
        return self._whole(rows, truncate)

    def of_ids(self, rows: Sequence[Sequence[int]], truncate: bool = False) -> list[list[int]]:
        """The token ids of texts that are tokens already; the first and the last may be there.

        Args:
            rows: ids of each text.
            truncate: as for `of_texts`.

        Raises:
            RequestError: a text is too long.
        """
        bare = []
        for ids in rows:
            first = 1 if ids[:1] == [self._tokenizer.spec.bos] else 0
            end = len(ids) - 1 if ids[first:][-1:] == [self._spec.eos] else len(ids)
            bare.append(list(ids[first:end]))
        return self._whole(bare, truncate)

    def _whole(self, rows: list[list[int]], truncate: bool) -> list[list[int]]:
        room = self._longest - 2
        too_long = [i for i, ids in enumerate(rows) if len(ids) > room]
        if too_long and not truncate:
            first = too_long[0]
            others = f", and {len(too_long) - 1:,} more are too long" if len(too_long) > 1 else ""
            raise RequestError(
                f"text {first + 1:,} of {len(rows):,} has {len(rows[first]) + 2:,} tokens with its "
                f"prompt, beginning and end, but the model takes {self._longest:,}{others}; "
                "shorten it, or ask to truncate"
            )
        bos, eos = self._tokenizer.spec.bos, self._spec.eos
        return [[bos, *ids[:room], eos] for ids in rows]


def check_dimensions(spec: EmbedderSpec, dimensions: int | None) -> None:
    """Refuse a length that vectors cannot be cut to.

    Raises:
        RequestError: it is out of range.
    """
    if dimensions is not None and not 1 <= dimensions <= spec.dimensions:
        raise RequestError(
            f"dimensions must be 1 to {spec.dimensions:,}, not {brief(f'{dimensions:,}')}"
        )


def cut(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Vectors of fewer numbers, again of length 1.

    Matryoshka representation learning: Kusupati et al., 2022, arXiv:2205.13147.

    Args:
        vectors: float32 `(texts, dim)`.
        dimensions: how many first numbers stay; `None` for all.
    """
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    vectors = vectors[:, :dimensions]
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, _SHORTEST)
