"""Defines `GemmaTextEmbedder`, a Gemma that embeds texts as vectors, such as EmbeddingGemma."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence

import keras
import keras_hub
import numpy as np
from keras import ops

from gemma_keras.checkpoints.hub import is_own_preset
from gemma_keras.checkpoints.opening.sentence_transformers import EmbedderCheckpoint, open_embedder
from gemma_keras.checkpoints.source import Checkpoint, finite
from gemma_keras.errors import CheckpointError
from gemma_keras.generate.compiled import compiled
from gemma_keras.generate.loop import bucket
from gemma_keras.missing import check_export_is_ours, said_what_is_missing
from gemma_keras.model.backbone import GemmaBackbone
from gemma_keras.model.loading import FromWeights
from gemma_keras.model.quantizing import Quantizes
from gemma_keras.model.training import TrainsOn
from gemma_keras.text.stream import encode
from gemma_keras.tokenizer import GemmaTokenizer

_NEEDS_PREPROCESSOR = "{} needs a preprocessor, and this model has none; set model.preprocessor"


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaTextEmbedderPreprocessor(keras_hub.models.TextEmbedderPreprocessor):
    """Packs texts into `token_ids` and `padding_mask`: `<bos>`, the text's tokens, `<eos>`.

    See `keras_hub.models.TextEmbedderPreprocessor`. It is what `fit` and `predict` use, and puts no
    prompt before a text; `GemmaTextEmbedder.encode` packs its batches itself.
    """

    backbone_cls = GemmaBackbone
    tokenizer_cls = GemmaTokenizer

    def _format_output(self, token_ids, segment_ids):
        return {"token_ids": token_ids, "padding_mask": token_ids != self.tokenizer.pad_token_id}


@keras.saving.register_keras_serializable(package="gemma_keras")
class MeanPooling(keras.layers.Layer):
    """The mean of the hidden states of a text's tokens, in float32; padding is left out."""

    def call(self, hidden, padding_mask):
        """From float `(batch, length, width)` and int or bool `(batch, length)` to float32
        `(batch, width)`; a row that is all padding gives zeros."""
        real = ops.expand_dims(ops.cast(padding_mask, "bool"), -1)
        total = ops.sum(ops.where(real, ops.cast(hidden, "float32"), 0.0), axis=1)
        return total / ops.maximum(ops.sum(ops.cast(real, "float32"), axis=1), 1.0)

    def compute_output_spec(self, hidden, padding_mask):
        return keras.KerasTensor((hidden.shape[0], hidden.shape[-1]), dtype="float32")


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaTextEmbedder(TrainsOn, Quantizes, keras_hub.models.TextEmbedder):
    """One vector for a text: the mean of a `GemmaBackbone`'s hidden states, projected.

    EmbeddingGemma (Schechter Vera et al., 2025, arXiv:2509.20354) has a bidirectional backbone, two
    projections without bias or activation, and vectors of length 1. Called on `token_ids` and
    `padding_mask` it returns float `(batch, dim)`; `encode` takes texts.

    Args:
        backbone: the model below the pooling.
        preprocessor: packs text; `None` if the model is used on token ids only.
        projection_dims: widths of the projections, first to last; the last is the vector's.
        normalize: whether the model's output has length 1.
        prompts: name of a task to the prefix that `encode` adds to its texts.
        default_prompt_name: of the prompt that `encode` uses by default.
    """

    backbone_cls = GemmaBackbone
    preprocessor_cls = GemmaTextEmbedderPreprocessor

    def __init__(
        self,
        backbone,
        preprocessor=None,
        projection_dims: Sequence[int] = (3072, 768),
        normalize: bool = True,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        **kwargs,
    ) -> None:
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.pooling = MeanPooling(dtype=backbone.dtype_policy, name="mean_pooling")
        self.projections = [
            keras.layers.Dense(
                units, use_bias=False, dtype=backbone.dtype_policy, name=f"projection_{i}"
            )
            for i, units in enumerate(projection_dims)
        ]

        # === Functional model ===
        inputs = backbone.input
        outputs = self._projected(backbone(inputs), inputs["padding_mask"])
        if normalize:
            unit = keras.layers.UnitNormalization(dtype="float32", name="unit_normalization")
            outputs = unit(outputs)
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

        # === Config ===
        self.projection_dims = tuple(int(units) for units in projection_dims)
        self.normalize = normalize
        self.prompts = dict(prompts or {})
        self.default_prompt_name = default_prompt_name
        self._vectors, self._vectors_of = None, None

    def _projected(self, hidden, padding_mask):
        x = self.pooling(hidden, padding_mask)
        for projection in self.projections:
            x = projection(x)
        return x

    @classmethod
    def from_preset(cls, preset, load_weights=True, dtype=None, sequence_length=None, **kwargs):
        """Load a text embedder.

        Args:
            preset: a folder as sentence-transformers writes it, the name of one on the Hugging Face
                Hub, such as `google/embeddinggemma-300m`, or a folder of `save_to_preset`.
            load_weights: if false, weights are random.
            dtype: Keras dtype policy.
            sequence_length: the longest text, in tokens; by default the checkpoint's.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, does not match its configuration,
                or is another kind of embedder.
            ConfigError: it is not a Gemma.
        """
        if is_own_preset(preset):
            if dtype is not None:
                kwargs["dtype"] = dtype
            model = super().from_preset(str(preset), load_weights=load_weights, **kwargs)
            if sequence_length is not None and model.preprocessor is not None:
                model.preprocessor.sequence_length = sequence_length
            return model
        return cls.from_checkpoint(
            open_embedder(preset), load_weights, dtype, sequence_length, **kwargs
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: EmbedderCheckpoint,
        load_weights=True,
        dtype=None,
        sequence_length=None,
        **kwargs,
    ) -> GemmaTextEmbedder:
        """Build the model of an open checkpoint; arguments as `from_preset`."""
        tokenizer = checkpoint.transformer.tokenizer_model
        if tokenizer is None:
            raise CheckpointError("the text embedder's folder lacks tokenizer.model")
        backbone = GemmaBackbone(
            checkpoint.transformer.config,
            dtype=dtype,
            kernel_initializer=(
                FromWeights(checkpoint.transformer.weights) if load_weights else "glorot_uniform"
            ),
        )
        model = cls(
            backbone,
            GemmaTextEmbedderPreprocessor(
                GemmaTokenizer(proto=tokenizer),
                sequence_length=sequence_length or checkpoint.max_tokens,
            ),
            projection_dims=[matrix.shape[1] for matrix in checkpoint.projections],
            normalize=checkpoint.normalize,
            prompts=checkpoint.prompts,
            default_prompt_name=checkpoint.default_prompt_name,
            **kwargs,
        )
        if load_weights:
            for layer, matrix in zip(model.projections, checkpoint.projections, strict=True):
                layer.kernel.assign(matrix)
        return model

    def get_config(self):
        return super().get_config() | {
            "projection_dims": list(self.projection_dims),
            "normalize": self.normalize,
            "prompts": dict(self.prompts),
            "default_prompt_name": self.default_prompt_name,
        }

    def as_checkpoint(self) -> EmbedderCheckpoint:
        """Returns this model as a checkpoint that reads its weights from it, with LoRA merged.

        Raises:
            ValueError: the model has no preprocessor.
        """
        if self.preprocessor is None:
            raise ValueError(_NEEDS_PREPROCESSOR.format("as_checkpoint"))
        name = self.backbone.name
        transformer = Checkpoint(
            config=self.backbone.config,
            weights=self.backbone.weight_source(),
            tokenizer_model=self.preprocessor.tokenizer.proto,
            instruction_tuned=False,
            provenance={"format": "keras", "name": name, "license": "gemma", "through": "keras"},
        )
        return EmbedderCheckpoint(
            transformer=transformer,
            projections=tuple(_matrix(layer) for layer in self.projections),
            normalize=self.normalize,
            max_tokens=self.preprocessor.sequence_length,
            prompts=dict(self.prompts),
            default_prompt_name=self.default_prompt_name,
        )

    def export(self, filepath: str | os.PathLike[str], format: str = "tf_saved_model", **kwargs):
        """Write the model for another runtime.

        Args:
            filepath: the folder to write.
            format: `"onnx"` writes a bundle that `edge-demo embed` and `edge-demo serve` run, with
                LoRA merged; other formats are Keras's own.
            **kwargs: of `"onnx"`: those of `export.export_onnx`, such as `recipe="int8"`.

        Raises:
            ValueError: the format is unknown.
        """
        if format != "onnx":
            return super().export(filepath, format=format, **kwargs)
        check_export_is_ours()
        with said_what_is_missing("exporting to ONNX", "export"):
            from export import export_onnx
        return export_onnx(self, filepath, **kwargs)

    @property
    def dim(self) -> int:
        """Returns the length of a vector that is not truncated."""
        return (self.backbone.config.hidden_dim, *self.projection_dims)[-1]

    # --- texts ---

    def encode(
        self,
        texts: str | Sequence[str],
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool = True,
        truncate_dim: int | None = None,
        batch_size: int = 32,
    ) -> np.ndarray:
        """The vectors of texts.

        White space around prompt and text together is left out, as sentence-transformers does. A
        control token in a text is text: `"<eos>"` becomes the tokens of its five characters.

        Args:
            texts: any number of texts; a string is one text.
            prompt: what is put before each text.
            prompt_name: of one of the checkpoint's prompts, such as `query` or `document`, instead
                of `prompt`. With neither, the checkpoint's default prompt is used; EmbeddingGemma
                has none.
            normalize: whether each vector is divided by its length.
            truncate_dim: keeps only this many first numbers of each vector, before it is
                normalized. EmbeddingGemma was trained for 768, 512, 256 and 128 (Matryoshka
                representation learning, Kusupati et al., 2022, arXiv:2205.13147).
            batch_size: texts that are run at once.

        Returns:
            float32 `(texts, dim)`.

        Raises:
            ValueError: the model has no preprocessor, there is no such prompt, or a number is out
                of range.

        Warns:
            UserWarning: a text is longer than `preprocessor.sequence_length` and is truncated.
        """
        dim = self.dim if truncate_dim is None else truncate_dim
        for name, value, most in (
            ("truncate_dim", dim, self.dim),
            ("batch_size", batch_size, None),
        ):
            if not isinstance(value, int) or value < 1 or (most and value > most):
                allowed = f"1 to {most}" if most else "1 or more"
                raise ValueError(f"{name} is {value!r}; it must be {allowed}")
        texts = [texts] if isinstance(texts, str) else texts
        rows = self._token_rows(self._prompt(prompt, prompt_name), texts)
        vectors = np.empty((len(rows), self.dim), np.float32)
        run = self._compiled_vectors()
        for members, token_ids, padding_mask in _batches(rows, batch_size):
            outputs = ops.convert_to_numpy(run(token_ids, padding_mask))
            vectors[members] = outputs[: len(members)]
        vectors = vectors[:, :dim]
        return _unit(vectors) if normalize else vectors

    def _compiled_vectors(self):
        variables = [id(variable) for variable in self.variables]
        # `enable_lora` and `quantize` change the model, so functions must be compiled again.
        if self._vectors is None or variables != self._vectors_of:
            self._vectors_of = variables
            self._vectors = compiled(self, self._run_vectors, lambda: ())
        return self._vectors

    def _run_vectors(self, token_ids, padding_mask):
        hidden = self.backbone({"token_ids": token_ids, "padding_mask": padding_mask})
        return ops.cast(self._projected(hidden, padding_mask), "float32")

    def _prompt(self, prompt: str | None, name: str | None) -> str:
        if prompt is not None and name is not None:
            raise ValueError("encode takes a prompt or a prompt_name, not both")
        name = self.default_prompt_name if prompt is None and name is None else name
        if name is None:
            return prompt or ""
        if name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise ValueError(f"there is no prompt {name!r}; this model has: {known}")
        return self.prompts[name]

    def _token_rows(self, prompt: str, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        if self.preprocessor is None:
            raise ValueError(_NEEDS_PREPROCESSOR.format("encode"))
        tokenizer = self.preprocessor.tokenizer
        room = self.preprocessor.sequence_length - 2
        rows, too_long = [], 0
        for text in texts:
            ids = encode(tokenizer.proto, (prompt + text).strip())
            too_long += len(ids) > room
            rows.append([tokenizer.start_token_id, *ids[:room], tokenizer.end_token_id])
        if too_long:
            warnings.warn(
                f"{too_long} of {len(rows)} texts have over {room + 2:,} tokens; they are "
                "truncated",
                stacklevel=3,
            )
        return rows


def _matrix(layer: keras.layers.Dense) -> np.ndarray:
    """The matrix of a projection, float32 `(in, out)`, whether or not it is quantized."""
    if layer.quantization_mode is None:
        kernel = layer.kernel  # with LoRA
    else:
        kernel = layer(ops.eye(layer.input_spec.axes[-1], dtype=layer.compute_dtype))
    return finite(layer.name, ops.convert_to_numpy(ops.cast(kernel, "float32")))


def _batches(
    rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Rows of about the same length together: their indices, `token_ids` and `padding_mask`.

    Lengths are rounded up, and numbers of rows to a power of two, because each shape is compiled. A
    batch is filled up with copies of its first row.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(order), batch_size):
        members = order[first : first + batch_size]
        count = min(batch_size, 1 << (len(members) - 1).bit_length())
        filled = members + members[:1] * (count - len(members))
        length = bucket(len(rows[members[-1]]))
        token_ids = np.zeros((count, length), "int32")
        padding_mask = np.zeros((count, length), "int32")
        for row, index in enumerate(filled):
            token_ids[row, : len(rows[index])] = rows[index]
            padding_mask[row, : len(rows[index])] = 1
        yield members, token_ids, padding_mask


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Each row divided by its Euclidean length; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)
