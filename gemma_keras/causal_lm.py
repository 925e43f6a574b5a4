"""`GemmaCausalLM`: a Gemma that predicts the next token; `fit`, `generate`, `export`."""

# Keras's operations are typed as if they returned None or a PyTree.
# pyright: reportOptionalOperand=false, reportOptionalSubscript=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false
from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import keras
import keras_hub
from keras import ops

from gemma_keras.backbone import GemmaBackbone
from gemma_keras.checkpoints import Checkpoint, is_keras_preset, open_checkpoint
from gemma_keras.tokenizer import GemmaCausalLMPreprocessor, GemmaTokenizer

if TYPE_CHECKING:
    import numpy as np


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaCausalLM(keras_hub.models.CausalLM):
    """Next-token prediction on a `GemmaBackbone`: a `keras_hub.models.CausalLM`.

    Args:
        backbone: the model.
        preprocessor: packs text; `None` if the model is used on token ids only.
        instruction_tuned: whether it was tuned to follow Gemma's turn template.
        provenance: where its weights came from; export passes it on.
    """

    backbone_cls = GemmaBackbone
    preprocessor_cls = GemmaCausalLMPreprocessor

    def __init__(
        self,
        backbone,
        preprocessor=None,
        instruction_tuned: bool = False,
        provenance: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional model ===
        inputs = backbone.input
        super().__init__(
            inputs=inputs,
            outputs=backbone.token_embedding(backbone(inputs), reverse=True),
            **kwargs,
        )

        # === What a checkpoint adds ===
        self.instruction_tuned = instruction_tuned
        self.provenance = provenance or {"format": "keras", "name": self.name, "license": "gemma"}

    def compile(
        self, optimizer="auto", loss="auto", *, weighted_metrics="auto", sampler="greedy", **kwargs
    ) -> None:
        """As `keras_hub.models.CausalLM.compile`, with greedy sampling by default."""
        super().compile(
            optimizer=optimizer,
            loss=loss,
            weighted_metrics=weighted_metrics,
            sampler=sampler,
            **kwargs,
        )

    @classmethod
    def from_preset(cls, preset, load_weights=True, dtype=None, sequence_length=1024, **kwargs):
        """Load a checkpoint.

        Args:
            preset: `sample`, a `.gguf` file, a folder with `config.json` and safetensors, or what
                KerasHub takes (a folder written by `save_to_preset`).
            load_weights: if false, weights are random.
            dtype: Keras dtype policy.
            sequence_length: that `fit` and `generate` pad to, in tokens.

        Raises:
            CheckpointError: it is missing, damaged or of another shape than it declares.
            ConfigError: it is not a Gemma.
        """
        if is_keras_preset(preset):
            if dtype is not None:
                kwargs["dtype"] = dtype
            return super().from_preset(str(preset), load_weights=load_weights, **kwargs)
        return cls.from_checkpoint(
            open_checkpoint(preset), load_weights, dtype, sequence_length, **kwargs
        )

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, load_weights=True, dtype=None, sequence_length=1024, **kwargs
    ) -> GemmaCausalLM:
        """Build the model of an open checkpoint; arguments as `from_preset`."""
        initializer = "zeros" if load_weights else "glorot_uniform"
        backbone = GemmaBackbone(checkpoint.config, dtype=dtype, kernel_initializer=initializer)
        if load_weights:
            backbone.load_weight_source(checkpoint.weights)
        preprocessor = None
        if checkpoint.tokenizer_model is not None:
            preprocessor = GemmaCausalLMPreprocessor(
                GemmaTokenizer(proto=checkpoint.tokenizer_model), sequence_length=sequence_length
            )
        return cls(
            backbone,
            preprocessor,
            instruction_tuned=checkpoint.instruction_tuned,
            provenance=dict(checkpoint.provenance),
            **kwargs,
        )

    def get_config(self):
        return super().get_config() | {
            "instruction_tuned": self.instruction_tuned,
            "provenance": dict(self.provenance),
        }

    def get_quantization_layer_structure(self, mode):
        """What GPTQ and AWQ calibrate: the blocks, on embeddings scaled as Gemma scales them."""
        structure = super().get_quantization_layer_structure(mode)
        return structure and structure | {"pre_block_layers": [self.backbone.embed]}

    def as_checkpoint(self) -> Checkpoint:
        """This model as a `Checkpoint` whose weights are read from it, LoRA merged."""
        tokenizer = self.preprocessor.tokenizer if self.preprocessor else None
        return Checkpoint(
            config=self.backbone.config,
            weights=self.backbone.weight_source(),
            tokenizer_model=tokenizer.proto if tokenizer else None,
            instruction_tuned=self.instruction_tuned,
            provenance=dict(self.provenance),
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

    def generate_step(self, inputs, stop_token_ids=None):
        """Continue one batch; compiled by `keras_hub.models.CausalLM.generate`.

        Args:
            inputs: `token_ids` int `(batch, length)` and `padding_mask` bool or int of the same
                shape, padded on the right to the length to generate to.
            stop_token_ids: ids that end a row, or `None`.

        Returns:
            `token_ids` and `padding_mask` of the same shapes, filled in.
        """
        token_ids, padding_mask = inputs["token_ids"], inputs["padding_mask"]
        batch_size, length = ops.shape(token_ids)[0], ops.shape(token_ids)[1]
        cache = self.backbone.empty_cache(batch_size, length)
        hidden_states, cache = self.backbone.call_with_cache(token_ids, cache, 0)
        # Rows with longer prompts replay theirs: the sampler keeps what the mask marks as given.
        index = ops.min(ops.sum(ops.cast(padding_mask, "int32"), axis=-1))

        def next(prompt, cache, index):
            last = ops.slice(prompt, (0, index - 1), (batch_size, 1))
            hidden, cache = self.backbone.call_with_cache(last, cache, index - 1)
            logits = self.backbone.token_embedding(hidden, reverse=True)
            return ops.squeeze(logits, axis=1), ops.squeeze(hidden, axis=1), cache

        token_ids = self.sampler(
            next=next,
            prompt=token_ids,
            cache=cache,
            index=index,
            mask=padding_mask,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden_states,
            model=self,
        )
        return {
            "token_ids": token_ids,
            "padding_mask": _mask_until_stop(token_ids, padding_mask, stop_token_ids),
        }

    def export(self, filepath: str | os.PathLike[str], format: str = "tf_saved_model", **kwargs):
        """Write the model for another runtime.

        Args:
            filepath: the folder to write.
            format: `"onnx"` writes a bundle that `edge-demo` runs; other formats are Keras's own.
            **kwargs: for `"onnx"`, those of `export.export_onnx`, such as `recipe="int8"`.
        """
        if format != "onnx":
            return super().export(filepath, format=format, **kwargs)
        try:
            from export import export_onnx
        except ImportError as error:
            raise ImportError(
                "exporting to ONNX needs more packages; run: pip install gemma-keras[export]"
            ) from error
        return export_onnx(self, filepath, **kwargs)


def _mask_until_stop(token_ids, padding_mask, stop_token_ids):
    """True up to and including the first generated stop token of each row."""
    if stop_token_ids is None:
        return ops.ones_like(token_ids, dtype="bool")
    generated = ops.logical_not(ops.cast(padding_mask, "bool"))
    stops = ops.zeros_like(token_ids, dtype="bool")
    for stop in stop_token_ids:
        stops = ops.logical_or(stops, ops.equal(token_ids, stop))
    stops = ops.cast(ops.logical_and(stops, generated), "int32")
    return ops.equal(ops.cumsum(stops, axis=-1) - stops, 0)
