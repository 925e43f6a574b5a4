"""Defines `GemmaCausalLM`, a Gemma that predicts the next token, with `fit`, `generate` and
`export`."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import keras_hub
from keras import ops

from gemma_keras.adapting import Adapts
from gemma_keras.checkpoints.hub import is_own_preset, load_keras_hub_preset
from gemma_keras.checkpoints.opening.classify import Classified, Kind
from gemma_keras.checkpoints.opening.open_model import open_model
from gemma_keras.checkpoints.source import Checkpoint
from gemma_keras.generate.loop import GenerateFunction
from gemma_keras.keras_hub.convert import read_keras_hub, write_keras_hub
from gemma_keras.missing import check_export_is_ours, said_what_is_missing
from gemma_keras.model.backbone import GemmaBackbone
from gemma_keras.model.loading import FromWeights
from gemma_keras.model.quantizing import Quantizes
from gemma_keras.text.chat import GEMMA_TURNS, TurnTemplate, all_stops, encode_chat
from gemma_keras.text.stream import decode_stream
from gemma_keras.tokenizer import GemmaCausalLMPreprocessor, GemmaTokenizer

if TYPE_CHECKING:
    import numpy as np

_SEQUENCE_LENGTH = 1024  # unless it is given, or the context is shorter


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaCausalLM(Adapts, Quantizes, keras_hub.models.CausalLM):
    """Next-token prediction on a `GemmaBackbone`: a `keras_hub.models.CausalLM`.

    Args:
        backbone: the model.
        preprocessor: packs text; `None` if the model is used on token ids only.
        instruction_tuned: whether the model was tuned to follow `turns`.
        provenance: where its weights came from; an export records it.
        stop_token_ids: ids that end a text, beside the tokenizer's end of a text and of a turn.
        turns: the turn template, Gemma's by default; a `TurnTemplate`, or its fields.
        chat_template: the authors' Jinja template, for other runtimes.

    Raises:
        ConfigError: the backbone is bidirectional.
    """

    backbone_cls = GemmaBackbone
    preprocessor_cls = GemmaCausalLMPreprocessor

    def __init__(
        self,
        backbone,
        preprocessor=None,
        instruction_tuned: bool = False,
        provenance: dict[str, Any] | None = None,
        stop_token_ids: Sequence[int] = (),
        turns: TurnTemplate | Mapping[str, Any] = GEMMA_TURNS,
        chat_template: str | None = None,
        **kwargs,
    ) -> None:
        backbone.config.require_causal("GemmaCausalLM")

        # === Layers ===
        self.backbone = backbone
        self.preprocessor: Any = preprocessor

        # === Functional model ===
        inputs = backbone.input
        super().__init__(
            inputs=inputs,
            outputs=backbone.token_embedding(backbone(inputs), reverse=True),
            **kwargs,
        )

        # === What a checkpoint adds ===
        self.instruction_tuned = instruction_tuned
        self.stop_token_ids = tuple(int(i) for i in stop_token_ids)
        self.turns = turns if isinstance(turns, TurnTemplate) else TurnTemplate(**turns)
        self.chat_template = chat_template
        self.provenance = provenance or {"format": "keras", "name": self.name, "license": "gemma"}

    def compile(
        self, optimizer="auto", loss="auto", *, weighted_metrics="auto", sampler="greedy", **kwargs
    ) -> None:
        """Like `keras_hub.models.CausalLM.compile`, with greedy sampling by default, and with
        `gemma_keras.model.losses.TokenLoss`: nats per token that counts."""
        super().compile(
            optimizer=optimizer,
            loss=loss,
            weighted_metrics=weighted_metrics,
            sampler=sampler,
            **kwargs,
        )

    @classmethod
    def from_preset(
        cls,
        preset,
        load_weights=True,
        dtype=None,
        sequence_length=None,
        *,
        base=None,
        instruction_tuned=None,
        special_tokens_in_strings=None,
        **kwargs,
    ):
        """Load a checkpoint.

        Args:
            preset: what `gemma_keras.open_checkpoint` takes: `sample`, a `.gguf` file, a Hugging
                Face folder or name, a folder written by `save_to_preset`, a KerasHub preset.
            load_weights: if false, weights are random.
            dtype: Keras dtype policy.
            sequence_length: length in tokens that `fit` and `generate` pad to. By default that of a
                `save_to_preset` folder, else 1024 or the model's context, whichever is less.
            base: the base model of an adapter, if the adapter's folder does not name it.
            instruction_tuned: whether it follows a turn template; by default what its chat
                template says.
            special_tokens_in_strings: whether control tokens in a text are parsed as such, for text
                in the model's template; see `GemmaTokenizer`. By default false, or as it was saved.
            **kwargs: `gradient_checkpointing=True` for `fit` in less memory, and arguments of the
                class.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or does not match its
                configuration.
            ConfigError: it is not a Gemma.

        Warns:
            UserWarning: it has no tokenizer.
        """
        if not is_own_preset(preset) or base is not None:
            checkpoint = open_model(preset, base, instruction_tuned, open_with_keras)
            for remark in checkpoint.remarks:
                warnings.warn(remark, stacklevel=2)
            if checkpoint.tokenizer_model is None:
                warnings.warn(
                    f"{preset} has no tokenizer, so generate, stream, chat and fit accept "
                    "token ids only. To use text, put the model's tokenizer.model there, "
                    "or set model.preprocessor",
                    stacklevel=2,
                )
            return cls.from_checkpoint(
                checkpoint,
                load_weights,
                dtype,
                sequence_length,
                special_tokens_in_strings=bool(special_tokens_in_strings),
                **kwargs,
            )
        gradient_checkpointing = kwargs.pop("gradient_checkpointing", None)
        if dtype is not None:
            kwargs["dtype"] = dtype
        model = super().from_preset(str(preset), load_weights=load_weights, **kwargs)
        if gradient_checkpointing is not None:
            model.backbone.gradient_checkpointing = gradient_checkpointing
        if instruction_tuned is not None:
            model.instruction_tuned = instruction_tuned
        if model.preprocessor is not None:
            if sequence_length is not None:
                model.preprocessor.sequence_length = sequence_length
            if special_tokens_in_strings is not None:
                tokenizer = model.preprocessor.tokenizer
                tokenizer.special_tokens_in_strings = bool(special_tokens_in_strings)
        return model

    @classmethod
    def from_keras_hub(
        cls, model, instruction_tuned=False, dtype=None, sequence_length=None, **kwargs
    ) -> GemmaCausalLM:
        """Build from a KerasHub model in memory, for example after fine-tuning; LoRA is merged.

        Args:
            model: a `keras_hub.models.GemmaCausalLM` or `Gemma3CausalLM`, or its backbone.
            instruction_tuned: whether it follows a turn template; KerasHub's models do not record
                it.
            dtype: Keras dtype policy; Keras's default policy if not given.
            sequence_length: as for `from_preset`.

        Raises:
            ConfigError, CheckpointError: as `gemma_keras.keras_hub.convert.read_keras_hub`.
        """
        checkpoint = read_keras_hub(model, instruction_tuned=instruction_tuned)
        return cls.from_checkpoint(
            checkpoint, dtype=dtype, sequence_length=sequence_length, **kwargs
        )

    def to_keras_hub(self, dtype=None):
        """Convert this model to KerasHub's `GemmaCausalLM` or `Gemma3CausalLM`, with LoRA merged.

        Args:
            dtype: Keras dtype policy; Keras's default policy if not given.

        Raises:
            ConfigError: KerasHub cannot build this architecture.
        """
        return write_keras_hub(self.as_checkpoint(), dtype)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        load_weights=True,
        dtype=None,
        sequence_length=None,
        gradient_checkpointing=False,
        special_tokens_in_strings=False,
        **kwargs,
    ) -> GemmaCausalLM:
        """Build the model of an open checkpoint; arguments as `from_preset` and `GemmaBackbone`."""
        checkpoint.config.require_causal("GemmaCausalLM")  # before weights are read
        initializer = FromWeights(checkpoint.weights) if load_weights else "glorot_uniform"
        backbone = GemmaBackbone(
            checkpoint.config,
            dtype=dtype,
            kernel_initializer=initializer,
            gradient_checkpointing=gradient_checkpointing,
        )
        if sequence_length is None:
            sequence_length = min(_SEQUENCE_LENGTH, checkpoint.config.context_length)
        preprocessor = None
        if checkpoint.tokenizer_model is not None:
            preprocessor = GemmaCausalLMPreprocessor(
                GemmaTokenizer(
                    proto=checkpoint.tokenizer_model,
                    special_tokens_in_strings=special_tokens_in_strings,
                ),
                sequence_length=sequence_length,
            )
        return cls(
            backbone,
            preprocessor,
            **{
                "instruction_tuned": checkpoint.instruction_tuned,
                "provenance": dict(checkpoint.provenance),
                "stop_token_ids": checkpoint.stop,
                "turns": checkpoint.turns,
                "chat_template": checkpoint.chat_template,
                **kwargs,
            },
        )

    def get_config(self):
        return super().get_config() | {
            "instruction_tuned": self.instruction_tuned,
            "provenance": dict(self.provenance),
            "stop_token_ids": list(self.stop_token_ids),
            "turns": dataclasses.asdict(self.turns),
            "chat_template": self.chat_template,
        }

    def get_quantization_layer_structure(self, mode):
        """Returns what GPTQ and AWQ calibrate: the blocks, and the scaled embeddings as their
        input."""
        structure = super().get_quantization_layer_structure(mode)
        return structure and structure | {"pre_block_layers": [self.backbone.embed]}

    def as_checkpoint(self) -> Checkpoint:
        """Returns this model as a `Checkpoint` that reads its weights from it, with LoRA merged."""
        tokenizer = self.preprocessor.tokenizer if self.preprocessor else None
        return Checkpoint(
            config=self.backbone.config,
            weights=self.backbone.weight_source(),
            tokenizer_model=tokenizer.proto if tokenizer else None,
            instruction_tuned=self.instruction_tuned,
            provenance=self.provenance | {"through": "keras"},
            stop=self.stop_token_ids,
            turns=self.turns,
            chat_template=self.chat_template,
        )

    def logits(self, token_ids) -> np.ndarray:
        """Next-token scores at every position.

        Args:
            token_ids: int `(batch, length)`, without padding.

        Returns:
            float32 `(batch, length, vocabulary_size)`.
        """
        token_ids = ops.convert_to_tensor(token_ids, dtype="int32")
        outputs = self({"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids)})
        return ops.convert_to_numpy(ops.cast(outputs, "float32"))

    def make_generate_function(self):
        """Returns the function that `generate` runs, a
        `gemma_keras.generate.loop.GenerateFunction`."""
        variables = [id(variable) for variable in self.variables]
        # `enable_lora` and `quantize` change the model, so functions must be compiled again.
        if self.generate_function is None or variables != self._generates_with:
            self._generates_with = variables
            self.generate_function = GenerateFunction(self)
        return self.generate_function

    def generate(self, inputs, max_length=None, stop_token_ids="auto", strip_prompt=False):
        """Like `keras_hub.models.CausalLM.generate`. It also stops at the stop ids of the
        checkpoint, and an instruction-tuned model stops at the end of its turn.

        Raises:
            ValueError: `max_length`, by default the preprocessor's `sequence_length`, is more than
                the model's context, or a prompt leaves no room within it. Or the model has no
                preprocessor, and `max_length` is given or `stop_token_ids` is missing.
            NotFiniteError: logits are not finite.
        """
        if self.preprocessor is None and max_length is not None:
            raise ValueError(
                f"max_length={max_length} needs a preprocessor, and this model has none. "
                "Without one, pad token_ids to the length that you want"
            )
        if self.preprocessor is None and stop_token_ids == "auto":
            raise ValueError(
                "this model has no tokenizer: give generate a dictionary of token_ids and "
                "padding_mask, and stop_token_ids as a tuple of ids or None"
            )
        if self.preprocessor is not None:
            self._length(max_length)
        if isinstance(inputs, (list, tuple)) and not inputs:
            return []
        if stop_token_ids == "auto" and self.preprocessor is not None:
            stop_token_ids = self._stops()
        return super().generate(inputs, max_length, stop_token_ids, strip_prompt)

    def _length(self, max_length: int | None) -> int:
        """Returns the maximum length of prompt and continuation together, in tokens."""
        name, length = "max_length", max_length
        if length is None:
            name, length = "sequence_length", self.preprocessor.sequence_length
        context = self.backbone.config.context_length
        if length > context:
            raise ValueError(
                f"{name}={length:,} is more than the {context:,} tokens of the model's context"
            )
        return length

    def _stops(self) -> list[int]:
        turns = self.turns if self.instruction_tuned else None
        return list(all_stops(self.preprocessor.tokenizer.proto, self.stop_token_ids, turns))

    def stream(
        self, prompt: str, max_length: int | None = None, stop_token_ids="auto"
    ) -> Iterator[str]:
        """Generate a continuation and yield its text piece by piece. Together the pieces are the
        result of `generate` with `strip_prompt`.

        Args:
            prompt: one text.
            max_length: of prompt and continuation together, in tokens; by default the
                preprocessor's `sequence_length`.
            stop_token_ids: ids that end it; by default as for `generate`.

        Raises:
            ValueError: the model has no preprocessor, or the prompt leaves no room.
        """
        tokenizer = self._tokenizer("stream")
        stops: Any = self._stops() if stop_token_ids == "auto" else stop_token_ids
        ids = tokenizer.encode(prompt)
        if ids[:1] != [tokenizer.start_token_id]:
            ids.insert(0, tokenizer.start_token_id)
        return self._stream_ids(ids, max_length, stops or ())

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        max_length: int | None = None,
        stream: bool = False,
    ):
        """Answer a conversation in the model's turn template.

        Args:
            messages: the user's message as text, or the conversation so far, as for
                `gemma_keras.text.chat.encode_chat`.
            max_length: of conversation and answer together, in tokens; by default the
                preprocessor's `sequence_length`.
            stream: whether to return an iterator over pieces of the answer as they are generated.

        Returns:
            The answer; with `stream`, an iterator of its pieces.

        Raises:
            ValueError: the model has no preprocessor or is not instruction-tuned, the messages are
                not a conversation, or they leave no room for an answer.
        """
        tokenizer = self._tokenizer("chat")
        if not self.instruction_tuned:
            raise ValueError(
                "this model is not instruction-tuned; use generate, or create it with "
                "instruction_tuned=True"
            )
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        ids = encode_chat(tokenizer.proto, messages, self.turns)
        pieces = self._stream_ids(ids, max_length, self._stops())
        return pieces if stream else "".join(pieces)

    def _tokenizer(self, method: str) -> GemmaTokenizer:
        if self.preprocessor is None:
            raise ValueError(
                f"{method} needs a preprocessor, and this model has none; set model.preprocessor"
            )
        return self.preprocessor.tokenizer

    def _stream_ids(
        self, ids: list[int], max_length: int | None, stop_token_ids: Sequence[int]
    ) -> Iterator[str]:
        max_length = self._length(max_length)
        if len(ids) >= max_length:
            raise ValueError(
                f"the prompt has {len(ids):,} tokens, which leaves no room for an answer in "
                f"max_length={max_length:,}"
            )
        tokens = self.make_generate_function().stream(ids, max_length, stop_token_ids)
        return decode_stream(self.preprocessor.tokenizer.proto, tokens)

    def score(
        self,
        token_ids,
        padding_mask=None,
        scoring_mode="logits",
        layer_intercept_fn=None,
        target_ids=None,
    ):
        """Score a text, as `keras_hub.models.GemmaCausalLM.score` does.

        Args:
            token_ids: int `(batch, length)`.
            padding_mask: int or bool `(batch, length)`; by default nothing is padding.
            scoring_mode: `"logits"`, or `"loss"` of each token.
            layer_intercept_fn: called with hidden states `(batch, length, hidden_dim)` and a block
                index, -1 for the embeddings. Its return value replaces the hidden states.
            target_ids: int `(batch, length)`, the correct tokens; required for `"loss"`.

        Returns:
            float `(batch, length, vocabulary_size)`, or the losses `(batch, length)`.

        Raises:
            ValueError: an unknown mode, or `"loss"` without targets.
        """
        if scoring_mode not in ("logits", "loss"):
            raise ValueError(f"scoring_mode is {scoring_mode!r}; it must be 'logits' or 'loss'")
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("scoring_mode='loss' needs target_ids")
        intercept = layer_intercept_fn or (lambda x, index: x)
        token_ids = ops.convert_to_tensor(token_ids, dtype="int32")
        if padding_mask is None:
            padding_mask = ops.ones_like(token_ids)
        x = intercept(self.backbone.embed(token_ids), -1)
        for index, block in enumerate(self.backbone.transformer_layers):
            x = intercept(block(x, padding_mask=padding_mask), index)
        logits = self.backbone.token_embedding(self.backbone.layer_norm(x), reverse=True)
        if scoring_mode == "logits":
            return logits
        return keras.losses.sparse_categorical_crossentropy(target_ids, logits, from_logits=True)

    def export_to_transformers(self, path, **kwargs):
        """Write a folder that transformers loads: `export(path, format="safetensors")`."""
        return self.export(path, format="safetensors", **kwargs)

    def export(self, filepath: str | os.PathLike[str], format: str = "tf_saved_model", **kwargs):
        """Write the model for another runtime.

        Args:
            filepath: the folder to write.
            format: `"onnx"` writes a bundle that `edge-demo` runs, `"safetensors"` a folder that
                transformers loads, `"gguf"` a file that llama.cpp runs, all with LoRA merged; other
                formats are Keras's own.
            **kwargs: of `"onnx"`: those of `export.export_onnx`, such as `recipe="int8"`.
                `adapters="beside"` writes LoRA as files beside the base's bundle. Of
                `"safetensors"`: those of `write_safetensors_folder`, such as `dtype="bfloat16"`. By
                default it is the dtype of the model's variables. Of `"gguf"`: those of
                `write_gguf`, such as `tensor_type="q8_0"`.

        Raises:
            ValueError: the format is unknown.
        """
        if format == "safetensors":
            from gemma_keras.checkpoints.hf.writer import write_safetensors_folder

            kwargs.setdefault("dtype", self.backbone.dtype_policy.variable_dtype)
            return write_safetensors_folder(self.as_checkpoint(), filepath, **kwargs)
        if format == "gguf":
            from gemma_keras.checkpoints.gguf.writer import write_gguf

            return write_gguf(self.as_checkpoint(), filepath, **kwargs)
        if format != "onnx":
            try:
                return super().export(filepath, format=format, **kwargs)
            except ValueError as error:
                if "Supported formats" in str(error):  # Keras lists only its own formats
                    raise ValueError(
                        f"unknown export format {format!r}; Gemma Keras exports 'onnx', "
                        f"'safetensors' and 'gguf'. Keras says: {error}"
                    ) from error
                raise
        check_export_is_ours()
        with said_what_is_missing("exporting to ONNX", "export"):
            from export import export_onnx
        return export_onnx(self, filepath, **kwargs)


def open_with_keras(classified: Classified) -> Checkpoint:
    """Open a preset as a checkpoint: a KerasHub preset, or a folder of `save_to_preset`.

    Raises:
        CheckpointError: it cannot be loaded.
        ConfigError: it is not a Gemma.
    """
    if classified.kind is Kind.KERAS_HUB_PRESET:
        return read_keras_hub(load_keras_hub_preset(classified.source))
    return GemmaCausalLM.from_preset(classified.path).as_checkpoint()
