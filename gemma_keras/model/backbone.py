"""Defines `GemmaBackbone`: token ids to hidden states, for every Gemma that a `GemmaConfig`
describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from gemma_keras.checkpoints.hf.config import named_config
from gemma_keras.checkpoints.names import WeightSpec, weight_specs
from gemma_keras.checkpoints.quantized_grid import QuantizedGrid
from gemma_keras.checkpoints.source import NamedWeights, finite, row_chunks
from gemma_keras.config import GemmaConfig
from gemma_keras.errors import CheckpointError
from gemma_keras.model.cache import place
from gemma_keras.model.chunked import fill, variable_chunks
from gemma_keras.model.embedding import ReversibleEmbedding
from gemma_keras.model.layers import GemmaDecoderBlock, RMSNorm
from gemma_keras.model.loading import FromWeights, initialized_from, weight_chunks
from gemma_keras.model.quantized import QuantizedWeight, quantized_weight


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaBackbone(keras_hub.models.Backbone):
    """A Gemma without its task: a `keras_hub.models.Backbone`.

    Called on `{"token_ids": int (batch, length), "padding_mask": int (batch, length)}` it returns
    the normed hidden states, float `(batch, length, hidden_dim)`. The mask is 0 at padding, else 1;
    or, where a row holds several examples, 1 plus the place where a token's example begins.

    Args:
        config: a `GemmaConfig`, its `to_dict()`, or the name of a published size.
        dtype: Keras dtype policy of computations and weights.
        kernel_initializer: of every matrix and the embedding; `"zeros"` is quick when weights are
            loaded next. `gemma_keras.model.loading.FromWeights(checkpoint.weights)` makes every
            variable of a weight, in the memory of the variables and a few chunks of a weight.
        gradient_checkpointing: whether `fit` stores only the input of each block, and recomputes
            the rest for the gradients: less memory, a third more time.

    Raises:
        CheckpointError: a weight is missing, of another shape, or not finite.
    """

    def __init__(
        self,
        config: GemmaConfig | Mapping[str, Any] | str,
        dtype=None,
        kernel_initializer="glorot_uniform",
        gradient_checkpointing: bool = False,
        **kwargs,
    ) -> None:
        weights = None
        if isinstance(kernel_initializer, FromWeights):
            weights, kernel_initializer = kernel_initializer.weights, "zeros"
        # Keras creates large variables on several devices inside compiled functions, where no
        # weight can be read. So they start as zeros, with each device allocating only its part, and
        # are filled afterwards.
        fills = weights is not None and keras.distribution.distribution() is not None
        if isinstance(config, str):
            config = named_config(config)
        elif not isinstance(config, GemmaConfig):
            config = GemmaConfig.from_dict(config)

        # === Layers ===
        self.token_embedding = ReversibleEmbedding(
            config.vocabulary_size,
            config.hidden_dim,
            tie_weights=config.tied_head,
            embeddings_initializer=(
                keras.initializers.RandomNormal(stddev=0.02)
                if kernel_initializer == "glorot_uniform"
                else kernel_initializer
            ),
            logit_soft_cap=config.final_soft_cap,
            dtype=dtype,
            name="token_embedding",
        )
        self.transformer_layers = [
            GemmaDecoderBlock(
                spec,
                config.hidden_dim,
                config.norm_epsilon,
                kernel_initializer,
                dtype=dtype,
                name=f"decoder_block_{i}",
            )
            for i, spec in enumerate(config.layers)
        ]
        self.layer_norm = RMSNorm(config.norm_epsilon, dtype=dtype, name="final_norm")
        if weights is not None and not fills:
            self._build_from(weights, config)

        # === Functional model ===
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        x = self._embed(config, token_ids)
        for block in self.transformer_layers:
            x = block(x, padding_mask=padding_mask)
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=self.layer_norm(x),
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.config = config
        self.gradient_checkpointing = gradient_checkpointing
        if weights is not None and fills:
            self.load_weight_source(weights)

    def _build_from(self, weights: Mapping[str, np.ndarray], config: GemmaConfig) -> None:
        """Make the variables of weights: the tables, which are the largest, first."""
        specs = weight_specs(config)
        places = {name: self._initializer(name) for name in specs}
        with initialized_from(weights, specs, places):
            self.token_embedding.build()
            for layer in (*self.transformer_layers, self.layer_norm):
                layer.build((None, None, config.hidden_dim))

    def _initializer(self, name: str) -> tuple[keras.layers.Layer, str]:
        """The layer that makes the variable of a canonical name, and the attribute that holds its
        initializer; `ReversibleEmbedding` makes both tables with one, the head last."""
        if name in ("token_embedding", "head"):
            return self.token_embedding, "embeddings_initializer"
        if name == "final_norm":
            return self.layer_norm, "scale_initializer"
        _, index, within = name.split(".", 2)
        layer = self.transformer_layers[int(index)].sublayer(within)
        is_norm = isinstance(layer, RMSNorm)
        return layer, "scale_initializer" if is_norm else "kernel_initializer"

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training computes what is within each block again for the gradients; may be set,
        and counts for what is compiled from then on."""
        return self.transformer_layers[0].gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for block in self.transformer_layers:
            block.gradient_checkpointing = bool(value)

    def _embed(self, config: GemmaConfig, token_ids):
        x = self.token_embedding(token_ids)
        if self.token_embedding.compute_dtype == "float16":
            x = ops.cast(x, "float32")  # as the blocks go on
        # Rounded to the compute dtype, as the original rounds it: 25.25, not 25.298, in bfloat16.
        return x * ops.cast(config.embedding_scale, x.dtype)

    def embed(self, token_ids):
        """Returns the input of the first block: float `(batch, length, hidden_dim)`."""
        return self._embed(self.config, token_ids)

    # --- the same layers with a cache ---

    def empty_cache(self, batch_size, capacity) -> tuple:
        """Zeroed keys and values for each layer, `(batch, kv_heads, capacity, head_dim)` each."""
        return tuple(
            tuple(
                ops.zeros(
                    (batch_size, spec.num_kv_heads, capacity, spec.head_dim),
                    dtype=self.compute_dtype,
                )
                for _ in range(2)
            )
            for spec in self.config.layers
        )

    def prefill(self, token_ids, lengths, capacity: int):
        """Run whole prompts.

        Args:
            token_ids: int `(batch, length)`, prompts from their beginning, padded on the right.
            lengths: how many tokens each prompt has, int `(batch,)`.
            capacity: tokens that the text may come to, at least `length`.

        Returns:
            The normed hidden states of each prompt's last token, `(batch, 1, hidden_dim)`, and a
            cache for `call_with_cache`, in which layers of a sliding window keep no more than it.
        """
        self.config.require_causal("generation")
        x = self.embed(token_ids)
        cache = []
        for block, spec in zip(self.transformer_layers, self.config.layers, strict=True):
            x, layer_cache = block(x, return_cache=True)
            cache.append(
                tuple(place(a, lengths, spec.sliding_window, capacity) for a in layer_cache)
            )
        last = ops.reshape(lengths - 1, (-1, 1, 1))
        return self.layer_norm(ops.take_along_axis(x, last, axis=1)), tuple(cache)

    def call_with_cache(self, token_ids, cache, start):
        """Run tokens at positions `start` onwards, over what the cache holds before them.

        Args:
            token_ids: int `(batch, length)`.
            cache: as `empty_cache`, `prefill` or an earlier call returned it; with PyTorch, outside
                of training, it is changed in place. After `prefill`, one token at a time.
            start: position of the first token: int, or int `(batch,)` where rows differ.

        Returns:
            The normed hidden states `(batch, length, hidden_dim)` and the updated cache.
        """
        self.config.require_causal("generation")
        x = self.embed(token_ids)
        new_cache = []
        for block, layer_cache in zip(self.transformer_layers, cache, strict=True):
            x, layer_cache = block(x, cache=layer_cache, start=start)
            new_cache.append(layer_cache)
        return self.layer_norm(x), tuple(new_cache)

    # --- weights by canonical name ---

    def variable(self, name: str):
        """The Keras variable that holds a weight, by canonical name, such as `layers.3.mlp.up`.

        Not usable for a layer that `quantize` has changed; see `weight_source`.
        """
        if name == "token_embedding":
            return self.token_embedding.embeddings
        if name == "head":
            return self.token_embedding.reverse_embeddings
        if name == "final_norm":
            return self.layer_norm.scale
        _, index, within = name.split(".", 2)
        return self.transformer_layers[int(index)].variable(within)

    def load_weight_source(self, weights: Mapping[str, np.ndarray]) -> None:
        """Assign every weight, a chunk at a time; `FromWeights` makes a model of them.

        Args:
            weights: canonical name to array; see `gemma_keras.checkpoints.names`.

        Raises:
            CheckpointError: a weight is missing, of another shape, or not finite; or `enable_lora`
                or `quantize` has changed its layer.
        """
        for name, spec in weight_specs(self.config).items():
            variable = self.variable(name)
            if not isinstance(variable, keras.Variable):
                raise CheckpointError(
                    f"{name} is no longer a variable, because enable_lora or quantize has "
                    "changed its layer; load the weights first"
                )
            fill(variable, weight_chunks(weights, spec))

    def weight_source(self) -> Mapping[str, np.ndarray]:
        """Returns this model's weights by canonical name, read as float32 on demand, with LoRA
        merged.

        Reading a weight that is not finite, for example after a NaN loss, raises `CheckpointError`.
        Weights that `quantize` has made integers are dequantized. The mapping is also a
        `gemma_keras.checkpoints.quantized_grid.GridSource`.
        """
        return _BackboneWeights(self)

    def default_lora_layer_names(self) -> list[str]:
        """Names of the layers that `enable_lora` adapts by default."""
        return ["query", "value"]

    def enable_lora(self, rank: int, target_layer_names: Sequence[str] | None = None) -> None:
        """Like `keras_hub.models.Backbone.enable_lora`. The same call again changes nothing.

        Raises:
            ValueError: LoRA is enabled already, of another rank or in other layers. Nothing is
                changed.
        """
        names = target_layer_names or self.default_lora_layer_names()
        layers = [layer for layer in self._flatten_layers(include_self=False) if layer.weights]
        adapted = [i for i, one in enumerate(layers) if getattr(one, "lora_enabled", False)]
        if not adapted:
            return super().enable_lora(rank, target_layer_names=target_layer_names)
        before = layers[adapted[0]].lora_rank
        can = [
            i for i, one in enumerate(layers) if one.name in names and hasattr(one, "enable_lora")
        ]
        if rank != before or adapted != can:
            raise ValueError(
                f"LoRA of rank {before} is already enabled in {len(adapted)} layers; rank "
                f"{rank} in {len(can)} layers was requested. Load the model again to change "
                "LoRA"
            )

    def get_config(self):
        return super().get_config() | {
            "config": self.config.to_dict(),
            "gradient_checkpointing": self.gradient_checkpointing,
        }


class _BackboneWeights(NamedWeights):
    def __init__(self, backbone: GemmaBackbone) -> None:
        self._backbone = backbone
        self.specs: dict[str, WeightSpec] = weight_specs(backbone.config)

    def __getitem__(self, name: str) -> np.ndarray:
        quantized = self._quantized(name)
        if quantized is not None:
            values = finite(name, quantized.values())
            return values.T if self.specs[name].kind == "matrix" else values
        variable = self._backbone.variable(name)  # a LoRA layer's kernel is the merged one
        array = finite(name, ops.convert_to_numpy(ops.cast(variable, "float32")))
        return array.T if name == "head" else array

    def table_chunks(self, name: str, chunk_bytes: int) -> Iterator[tuple[int, np.ndarray]]:
        """As `gemma_keras.checkpoints.source.table_chunks`."""
        if self._quantized(name) is not None:
            return row_chunks(self[name], chunk_bytes)
        axis = 1 if name == "head" else 0
        chunks = variable_chunks(self._backbone.variable(name), chunk_bytes, axis)
        checked = ((first, finite(name, array)) for first, array in chunks)
        return ((first, array.T) if axis else (first, array) for first, array in checked)

    def stored_as(self, name: str) -> str | None:
        """Returns how `quantize` has stored a weight, such as `Keras int4`; `None` for floats."""
        quantized = self._quantized(name)
        return None if quantized is None else f"Keras {quantized.mode}"

    def grid(self, name: str) -> QuantizedGrid | None:
        """A quantized weight's integers, a matrix's outputs or a table's tokens as rows; `None` if
        it holds none, or none in blocks of neighbouring inputs."""
        quantized = self._quantized(name)
        return None if quantized is None else quantized.grid()

    def _quantized(self, name: str) -> QuantizedWeight | None:
        kind = self.specs[name].kind
        if kind == "norm":
            return None
        if kind == "table":
            return quantized_weight(self._backbone.token_embedding, reverse=name == "head")
        _, index, within = name.split(".", 2)
        return quantized_weight(self._backbone.transformer_layers[int(index)].sublayer(within))
