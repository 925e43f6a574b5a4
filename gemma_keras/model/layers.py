"""The layers of a Gemma.

Shapes are written as comments where they change. `length` counts the tokens of this call,
`total` the tokens that keys and values cover: with a cache its capacity, else `length`.
"""

from __future__ import annotations

import functools

import keras
import numpy as np
from keras import ops

from gemma_keras.config import LayerSpec
from gemma_keras.model.cache import write
from gemma_keras.model.dense import GemmaDense

_MASKED = -1e30


class Float32Stream(keras.layers.Layer):
    """A layer that under a float16 policy takes and returns float32, and casts only what it
    multiplies matrices with.

    The sums of Gemma's residual stream, and its normed values, exceed float16's largest number,
    65,504: those of the 270M reach 104,000. With other policies it is a normal layer.
    """

    @property
    def autocast(self) -> bool:
        """Whether Keras casts inputs to the compute dtype."""
        return self._autocast and not self.keeps_float32

    @autocast.setter
    def autocast(self, value: bool) -> None:
        self._autocast = value

    @property
    def keeps_float32(self) -> bool:
        """Whether the policy computes in float16."""
        return self.compute_dtype == "float16"

    def compute_output_spec(self, x, *args, **kwargs):
        dtype = "float32" if self.keeps_float32 else self.compute_dtype
        return keras.KerasTensor(x.shape, dtype=dtype)


@keras.saving.register_keras_serializable(package="gemma_keras")
class RMSNorm(Float32Stream):
    """`x / rms(x) * (1 + scale)`, always computed in float32.

    Root mean square layer normalization (Zhang and Sennrich, 2019, arXiv:1910.07467), with
    Gemma's scale, which is stored less 1.

    Args:
        epsilon: added to the mean square.
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.scale_initializer = keras.initializers.get("zeros")

    def build(self, input_shape) -> None:
        self.scale = self.add_weight(
            name="scale",
            shape=(input_shape[-1],),
            initializer=self.scale_initializer,
            trainable=True,
        )
        super().build(input_shape)

    def call(self, x):
        x32 = ops.cast(x, "float32")
        mean_square = ops.mean(ops.square(x32), axis=-1, keepdims=True)
        normed = x32 * ops.rsqrt(mean_square + self.epsilon)
        return ops.cast(normed * (1.0 + ops.cast(self.scale, "float32")), x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"epsilon": self.epsilon}


def rotate(x, positions, theta: float, scale: float):
    """Rotary position embedding over halves (Su et al., 2021, arXiv:2104.09864).

    Args:
        x: float `(batch, heads, length, head_dim)`.
        positions: int `(length,)` or `(batch, length)`, absolute.
        theta: base of the frequencies `theta ** (-2i / head_dim)`.
        scale: positions are divided by it.

    Returns:
        A tensor like `x`.
    """
    head_dim = x.shape[-1]
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim) / scale
    angles = ops.expand_dims(ops.cast(positions, "float32"), -1) * ops.convert_to_tensor(
        frequencies, dtype="float32"
    )
    angles = ops.expand_dims(angles, -3)  # (batch or none, 1, length, head_dim / 2)
    cos, sin = ops.cos(angles), ops.sin(angles)
    # a, b to a cos - b sin, b cos + a sin; what is made of positions is the same in other layers
    cos, sin = ops.concatenate([cos, cos], axis=-1), ops.concatenate([-sin, sin], axis=-1)
    x32 = ops.cast(x, "float32")
    return ops.cast(x32 * cos + ops.roll(x32, head_dim // 2, axis=-1) * sin, x.dtype)


def product(dense: keras.layers.Layer, x):
    """Computes a `Dense` of `x`. In float16 the result is float32, and each token is first scaled
    so that its largest number is 1. Then no sum exceeds float16."""
    if dense.compute_dtype != "float16":
        return dense(x)
    x = ops.cast(x, "float32")
    size = _size(x)
    return ops.cast(dense(x / size), "float32") * size


def _size(x):
    """The largest magnitude of each row, `(..., 1)`, but at least 1; gradients take it as given."""
    size = ops.max(ops.abs(ops.stop_gradient(x)), axis=-1, keepdims=True)
    return ops.maximum(size, 1.0)


def _dense(kernel_initializer, dtype, units: int, name: str) -> GemmaDense:
    return GemmaDense(
        units, use_bias=False, kernel_initializer=kernel_initializer, dtype=dtype, name=name
    )


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaAttention(Float32Stream):
    """Grouped-query attention with rotary positions; causal or bidirectional, global or with a
    sliding window, as the spec says.

    Args:
        spec: heads, scales and window.
        hidden_dim: width of the residual stream.
        norm_epsilon: of the query and key norms.
        kernel_initializer: of the four matrices.
    """

    def __init__(
        self,
        spec: LayerSpec,
        hidden_dim: int,
        norm_epsilon: float = 1e-6,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.spec = spec
        self.hidden_dim = hidden_dim

        dense = functools.partial(_dense, kernel_initializer, self.dtype_policy)
        self.query = dense(spec.num_heads * spec.head_dim, "query")
        self.key = dense(spec.num_kv_heads * spec.head_dim, "key")
        self.value = dense(spec.num_kv_heads * spec.head_dim, "value")
        self.output_dense = dense(hidden_dim, "attention_output")
        if spec.qk_norm:
            self.query_norm = RMSNorm(norm_epsilon, dtype=self.dtype_policy, name="query_norm")
            self.key_norm = RMSNorm(norm_epsilon, dtype=self.dtype_policy, name="key_norm")

    def build(self, input_shape) -> None:
        spec = self.spec
        for layer in (self.query, self.key, self.value):
            layer.build((None, None, self.hidden_dim))
        self.output_dense.build((None, None, spec.num_heads * spec.head_dim))
        if spec.qk_norm:
            self.query_norm.build((None, None, spec.num_heads, spec.head_dim))
            self.key_norm.build((None, None, spec.num_kv_heads, spec.head_dim))
        super().build(input_shape)

    def call(self, x, padding_mask=None, cache=None, start=0):
        """Attend from the tokens of `x`, at positions `start` onwards.

        Args:
            x: float `(batch, length, hidden_dim)`.
            padding_mask: int or bool `(batch, length)`, 0 at padding, else 1; or `None`, as with a
                cache. A row may hold several examples, which do not see each other. The mask then
                is 1 plus the place in the row where a token's example begins.
            cache: keys and values of earlier tokens, each `(batch, kv_heads, total, head_dim)`, as
                `gemma_keras.model.cache` lays them out; or `None`, which means there are none.
            start: position of the first token of `x`: int, or int `(batch,)` where rows differ.

        Returns:
            The output `(batch, length, hidden_dim)` and the updated cache; without one, the keys
            and values of `x`.
        """
        spec = self.spec
        batch, length = ops.shape(x)[0], ops.shape(x)[1]
        start = ops.convert_to_tensor(start, dtype="int32")
        # (batch or none, length)
        positions = ops.expand_dims(start, -1) + ops.arange(length, dtype="int32")
        if padding_mask is not None:
            padding_mask = ops.cast(padding_mask, "int32")
            positions = positions - ops.maximum(padding_mask - 1, 0)

        def heads(tensor, count):
            split = ops.reshape(tensor, (batch, length, count, spec.head_dim))
            return ops.swapaxes(split, 1, 2)  # (batch, count, length, head_dim)

        query = heads(product(self.query, x), spec.num_heads)
        key = heads(product(self.key, x), spec.num_kv_heads)
        value = heads(product(self.value, x), spec.num_kv_heads)
        if spec.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, positions, spec.rope_theta, spec.rope_scale)
        key = rotate(key, positions, spec.rope_theta, spec.rope_scale)
        if self.keeps_float32:  # the query is cast where it is multiplied
            key, value = ops.cast(key, "float16"), ops.cast(value, "float16")

        if cache is None:
            key_positions = positions
        else:
            key, value, key_positions = write(cache, key, value, start, spec.sliding_window)
        mask = self._mask(positions, key_positions, padding_mask)
        attended = ops.swapaxes(self._attend(query, key, value, mask), 1, 2)
        attended = ops.reshape(attended, (batch, length, -1))
        return product(self.output_dense, attended), (key, value)

    def _mask(self, positions, key_positions, padding_mask):
        """True where a query may look: bool `(batch or 1, 1, 1, length, total)`."""
        key_positions = ops.expand_dims(key_positions, -2)
        distance = ops.expand_dims(positions, -1) - key_positions
        if self.spec.bidirectional:
            distance = ops.abs(distance)
        mask = distance >= 0
        if self.spec.sliding_window is not None:
            mask = ops.logical_and(mask, distance < self.spec.sliding_window)
            mask = ops.logical_and(mask, key_positions >= 0)
        mask = ops.reshape(mask, (-1, 1, 1, *ops.shape(mask)[-2:]))
        if padding_mask is not None:  # padding sees padding, so that no token sees nothing
            same = ops.equal(padding_mask[:, :, None], padding_mask[:, None, :])
            mask = ops.logical_and(mask, same[:, None, None])
        return mask

    def _attend(self, query, key, value, mask):
        """From `(batch, heads or kv_heads, length or total, head_dim)` to one like `query`."""
        spec = self.spec
        if keras.config.backend() == "torch" and spec.attention_soft_cap is None:
            from gemma_keras.model.attend_torch import attend

            if not self.keeps_float32:
                return attend(query, key, value, mask, spec.query_scale)
            return attend(ops.cast(query * spec.query_scale, "float16"), key, value, mask, 1.0)
        batch, length, total = ops.shape(query)[0], ops.shape(query)[2], ops.shape(key)[2]
        group = spec.num_heads // spec.num_kv_heads
        # The heads that share a key are rows of one product: (batch, kv_heads, group * length, _)
        query = ops.reshape(query, (batch, spec.num_kv_heads, group * length, spec.head_dim))
        scale = spec.query_scale
        if self.keeps_float32:
            size = _size(query)
            query, scale = ops.cast(query / size, "float16"), size * scale
        scores = ops.matmul(query, ops.swapaxes(key, -1, -2))
        scores = ops.cast(scores, "float32") * scale
        if spec.attention_soft_cap is not None:  # before the mask, or masked scores come back
            scores = ops.tanh(scores / spec.attention_soft_cap) * spec.attention_soft_cap
        scores = ops.reshape(scores, (batch, spec.num_kv_heads, group, length, total))
        weights = ops.softmax(ops.where(mask, scores, _MASKED), axis=-1)
        weights = ops.reshape(weights, (batch, spec.num_kv_heads, group * length, total))
        attended = ops.matmul(ops.cast(weights, value.dtype), value)
        return ops.reshape(attended, (batch, spec.num_heads, length, spec.head_dim))

    def compute_output_shape(self, input_shape, *args, **kwargs):
        return input_shape


@keras.saving.register_keras_serializable(package="gemma_keras")
class GatedMLP(Float32Stream):
    """`down(gelu(gate(x)) * up(x))`, GELU in its tanh approximation (Shazeer, 2020,
    arXiv:2002.05202).

    Args:
        ffw_dim: width of the hidden layer.
        hidden_dim: width of the residual stream.
        kernel_initializer: of the three matrices.
    """

    def __init__(
        self, ffw_dim: int, hidden_dim: int, kernel_initializer="glorot_uniform", **kwargs
    ):
        super().__init__(**kwargs)
        self.ffw_dim = ffw_dim
        self.hidden_dim = hidden_dim

        dense = functools.partial(_dense, kernel_initializer, self.dtype_policy)
        self.gate = dense(ffw_dim, "gate")
        self.up = dense(ffw_dim, "up")
        self.down = dense(hidden_dim, "down")

    def build(self, input_shape) -> None:
        self.gate.build((None, None, self.hidden_dim))
        self.up.build((None, None, self.hidden_dim))
        self.down.build((None, None, self.ffw_dim))
        super().build(input_shape)

    def call(self, x):
        gate, up = product(self.gate, x), product(self.up, x)
        return product(self.down, ops.gelu(gate, approximate=True) * up)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaDecoderBlock(Float32Stream):
    """One block: attention and MLP, each normed before, and after where the spec says so.

    Args:
        spec: the block's sizes and switches.
        hidden_dim: width of the residual stream.
        norm_epsilon: of every norm.
        kernel_initializer: of every matrix.

    Attributes:
        gradient_checkpointing: whether training keeps only what goes into the block, and computes
            the rest again for the gradients (Chen et al., 2016, arXiv:1604.06174).
    """

    def __init__(
        self,
        spec: LayerSpec,
        hidden_dim: int,
        norm_epsilon: float = 1e-6,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.spec = spec
        self.hidden_dim = hidden_dim
        self.gradient_checkpointing = False

        def norm(name: str):
            return RMSNorm(norm_epsilon, dtype=self.dtype_policy, name=name)

        self.pre_attention_norm = norm("pre_attention_norm")
        self.pre_ffw_norm = norm("pre_ffw_norm")
        if spec.post_norms:
            self.post_attention_norm = norm("post_attention_norm")
            self.post_ffw_norm = norm("post_ffw_norm")
        self.attention = GemmaAttention(
            spec,
            hidden_dim,
            norm_epsilon,
            kernel_initializer,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.mlp = GatedMLP(
            spec.ffw_dim, hidden_dim, kernel_initializer, dtype=self.dtype_policy, name="mlp"
        )

    def build(self, input_shape) -> None:
        shape = (None, None, self.hidden_dim)
        for layer in self._layers:
            layer.build(shape)
        super().build(input_shape)

    def call(self, x, padding_mask=None, cache=None, start=0, return_cache=False):
        """Like `GemmaAttention.call`, for the whole block; without a cache it returns only `x`,
        unless `return_cache`."""
        if self.gradient_checkpointing and cache is None and not return_cache:
            # A function of only `x`, because TensorFlow's takes no keywords and no `None`.
            return keras.remat(lambda x: self._run(x, padding_mask, None, start)[0])(x)
        x, new_cache = self._run(x, padding_mask, cache, start)
        return (x, new_cache) if return_cache or cache is not None else x

    def _run(self, x, padding_mask, cache, start):
        attended, new_cache = self.attention(
            self.pre_attention_norm(x), padding_mask=padding_mask, cache=cache, start=start
        )
        if self.spec.post_norms:
            attended = self.post_attention_norm(attended)
        x = x + attended
        fed = self.mlp(self.pre_ffw_norm(x))
        if self.spec.post_norms:
            fed = self.post_ffw_norm(fed)
        return x + fed, new_cache

    def compute_output_shape(self, input_shape, *args, **kwargs):
        return input_shape

    # --- by canonical name ---

    def sublayer(self, name: str) -> keras.layers.Layer:
        """The layer of a canonical name within a block, such as `attention.query`."""
        layer = self
        for part in name.split("."):
            layer = getattr(layer, "output_dense" if part == "output" else part)
        return layer

    def variable(self, name: str):
        """The Keras variable that holds the weight of a canonical name within a block."""
        layer = self.sublayer(name)
        return layer.scale if isinstance(layer, RMSNorm) else layer.kernel
