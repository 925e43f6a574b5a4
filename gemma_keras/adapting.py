"""LoRA adapters of a task: several by name, switched, merged, saved and loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_keras.checkpoints.adapters.read import norm_means, read_adapter
from gemma_keras.checkpoints.low_rank import Adapter
from gemma_keras.learning import LearnsTokens
from gemma_keras.model import lora
from gemma_keras.model.dense import GemmaDense
from gemma_keras.model.lora import Targets
from gemma_keras.model.training import anew

_DEFAULT = "default"


@dataclasses.dataclass
class _Adapters:
    """What a task knows of its adapters.

    Attributes:
        parked: the values of those that are not in the layers.
        name: of the one in the layers, in use or not.
        rslora: how its alpha was given.
        merged: whether its product has been added to the weights.
    """

    parked: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    name: str = _DEFAULT
    rslora: bool = False
    merged: bool = False


class Adapts(LearnsTokens):
    """A task on a `GemmaBackbone` that may have LoRA adapters.

    One adapter is in the layers, and is trained. The others wait in memory. `save` writes the one
    in the layers, in use or not, and warns of the others; `save_adapter` writes each.
    """

    _adapters_of_task: Any = None
    _adapter_changes = 0

    def enable_lora(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: Targets = None,
        rslora: bool = False,
        name: str = _DEFAULT,
    ) -> None:
        """Add a new adapter and use it. All other weights are frozen.

        Args:
            rank: of the two matrices that are added to a matrix.
            alpha: their product is scaled by `alpha / rank`; by default by 1.
            dropout: the share of the inputs that training leaves out.
            targets: which matrices: `"all-linear"`, or names such as `query` or PEFT's `q_proj`; by
                default queries and values.
            rslora: whether the scale is `alpha / sqrt(rank)`.
            name: of the adapter.

        Raises:
            ValueError: the name is taken, an argument is not valid, or an adapter is merged.
        """
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already; choose another name")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}; it must be 0 or more, and less than 1")
        if dropout and self.backbone.gradient_checkpointing:
            raise ValueError(
                "dropout of LoRA cannot be used with gradient_checkpointing, which would leave out "
                "other inputs when it computes a block again"
            )
        shape = lora.shape_of(rank, alpha, rslora)
        shapes = dict.fromkeys(lora.chosen(self.backbone.config, targets), shape)
        self._park()
        lora.enable(self.backbone, shapes, dropout)
        state = self._state()
        state.name, state.rslora = name, rslora
        self._renew()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of all adapters."""
        state = self._state()
        own = (state.name,) if self._has_lora() else ()
        return (*state.parked, *own)

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter that counts in what the model computes; `None` without one."""
        layers = lora.layers_of(self.backbone).values()
        on = any(layer.lora_enabled for layer in layers) or self._state().merged
        return self._state().name if on else None

    def set_adapter(self, name: str | None) -> None:
        """Use another adapter, or none.

        Adapters of the same rank and targets take each other's place in the layers. Otherwise the
        optimizer begins anew.

        Args:
            name: of the adapter; `None` for the model without one.

        Raises:
            ValueError: there is no adapter of that name, or one is merged.
        """
        state = self._state()
        if name is not None and name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"there is no adapter {name!r}; there are: {known}")
        self._refuse_merged("set_adapter")
        if name is None:
            lora.switch(self.backbone, False)
        elif name == state.name and self._has_lora():
            lora.switch(self.backbone, True)
        else:
            before = self._variables()
            adapter = state.parked[name]
            if self._has_lora():
                state.parked[state.name] = lora.values_of(self.backbone, state.rslora)
            lora.put(self.backbone, adapter)
            del state.parked[name]
            state.name, state.rslora = name, adapter.rslora
            if self._variables() != before:
                return self._renew()
        self._forget_functions()

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Within this context the model computes what it does without an adapter.

        Raises:
            ValueError: the adapter is merged.
        """
        before = self.active_adapter
        self.set_adapter(None)
        try:
            yield
        finally:
            self.set_adapter(before)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter. Without the one in the layers, all weights are trainable again.

        Raises:
            ValueError: there is no adapter of that name, or it is merged.
        """
        state = self._state()
        if name not in self.adapters:
            raise ValueError(f"there is no adapter {name!r}")
        if name in state.parked:
            del state.parked[name]
            return
        self._refuse_merged("delete_adapter")
        lora.disable(self.backbone)
        self._renew()

    def merge_lora(self) -> None:
        """Add the active adapter's product to the weights, which then take no extra time.

        Raises:
            ValueError: there is no active adapter, it is merged, or the weights are quantized.
        """
        self._refuse_merged("merge_lora")
        if self.active_adapter is None:
            raise ValueError("there is no active adapter to merge")
        lora.add_to_kernels(self.backbone, 1)
        lora.switch(self.backbone, False)
        self._state().merged = True
        self._forget_functions()

    def unmerge_lora(self) -> None:
        """Subtract the product again. What a weight's dtype rounded away is not put back.

        Raises:
            ValueError: no adapter is merged.
        """
        if not self._state().merged:
            raise ValueError("no adapter is merged")
        lora.add_to_kernels(self.backbone, -1)
        lora.switch(self.backbone, True)
        self._state().merged = False
        self._forget_functions()

    def save_adapter(
        self,
        path: str | os.PathLike[str],
        name: str | None = None,
        format: str = "peft",
        dtype: str = "float32",
        overwrite: bool = False,
    ) -> None:
        """Write an adapter without its base model.

        Args:
            path: of the folder, or of the file for `"gguf"`. It appears when it is complete.
            name: of the adapter; by default the one in the layers.
            format: `"peft"`, a folder that PEFT loads, or `"gguf"`, a file that llama.cpp loads.
            dtype: `float32`, `float16` or `bfloat16`, of PEFT's matrices.
            overwrite: whether an adapter of that path may be replaced.

        Raises:
            ValueError: there is no such adapter, the embedding has LoRA too, or the format is
                unknown.
            CheckpointError: it cannot be written, or a matrix is not finite.
        """
        from gemma_keras.checkpoints.adapters.write import (
            Base,
            write_gguf_adapter,
            write_peft_adapter,
        )

        self._refuse_lora_of_the_embedding()
        adapter = self._adapter(name)
        if format not in ("peft", "gguf"):
            raise ValueError(f"format is {format!r}; it must be 'peft' or 'gguf'")
        config = self.backbone.config
        if format == "gguf":
            return write_gguf_adapter(path, adapter, config, overwrite)
        base = Base(getattr(self, "provenance", {}), self._norms())
        write_peft_adapter(path, adapter, config, base, dtype, overwrite)

    def adapters_in_memory(self) -> dict[str, Adapter]:
        """Returns copies of all adapters, by name.

        Raises:
            ValueError: one is merged, or the embedding has LoRA, which is not part of an adapter.
        """
        self._refuse_lora_of_the_embedding()
        self._refuse_merged("keeping adapters apart")
        return {name: self._adapter(name) for name in self.adapters}

    def load_adapter(
        self, path: str | os.PathLike[str], name: str = _DEFAULT, check_base: bool = True
    ) -> None:
        """Read an adapter of PEFT's or llama.cpp's format and use it.

        Args:
            path: a folder that PEFT or `save_adapter` wrote, or a GGUF file.
            name: for it.
            check_base: whether an adapter that says what its base is like must be for this one.

        Raises:
            ValueError: the name is taken, or an adapter is merged.
            CheckpointError: the adapter cannot be read, is for another base, changes more than
                matrices of the blocks, or is not finite.
        """
        if name in self.adapters:
            raise ValueError(f"there is an adapter {name!r} already; choose another name")
        found = read_adapter(Path(path), self.backbone.config)
        if check_base:
            found.check_base(self._norms(), "load its base, or pass check_base=False")
        adapter = found.adapter()
        self._park()
        lora.put(self.backbone, adapter)
        state = self._state()
        state.name, state.rslora = name, found.rslora
        self._renew()

    # --- as Keras saves and trains it ---

    def get_compile_config(self) -> dict[str, Any]:
        """Returns the arguments of `compile`, what `TrainsOn` adds, and which adapter there is.

        Warns:
            UserWarning: there are other adapters, which are not saved.
        """
        config, state = dict(super().get_compile_config()), self._state()
        if not config or not self._has_lora():
            return config
        if state.parked:
            warnings.warn(
                f"of the adapters only {state.name!r} is saved with the model; save_adapter writes "
                f"{', '.join(map(repr, state.parked))}",
                stacklevel=2,
            )
        own = {"name": state.name, "rslora": state.rslora, "merged": state.merged}
        return config | {"adapter": own}

    def compile_from_config(self, config: Mapping[str, Any]) -> None:
        """Train as before, with the same adapter."""
        config = dict(config)
        own = config.pop("adapter", {})
        super().compile_from_config(config)
        self._note(adapters_of_task=_Adapters(**own))

    def _check_that_it_learns(self) -> None:
        if not self._has_lora() or any(
            variable.name not in GemmaDense.LORA for variable in self.trainable_variables
        ):
            return
        if self._state().merged:
            raise ValueError(
                f"the adapter {self._state().name!r} is merged, so that it cannot learn; call "
                "unmerge_lora first"
            )
        if self.active_adapter is None:
            raise ValueError(
                "no adapter is in use, so that nothing can learn; call "
                f"set_adapter({self._state().name!r}) first"
            )

    def _learns(self) -> dict[str, Any]:
        return super()._learns() | {"another LoRA": self._lora_settings()}

    def _lora_settings(self) -> dict[str, Any]:
        """What of LoRA is no variable: alpha and dropout of each matrix that has it."""
        layers = lora.layers_of(self.backbone)
        return {n: [one.lora_alpha, one.lora_dropout] for n, one in layers.items() if one.has_lora}

    # --- within ---

    def _state(self) -> _Adapters:
        state = self._adapters_of_task or _Adapters()
        self._note(adapters_of_task=state)
        return state

    def _has_lora(self) -> bool:
        return any(layer.has_lora for layer in lora.layers_of(self.backbone).values())

    def _adapter(self, name: str | None) -> Adapter:
        state = self._state()
        if name in state.parked:
            return state.parked[name]
        if not self._has_lora() or name not in (None, state.name):
            known = ", ".join(self.adapters) or "none"
            raise ValueError(f"there is no adapter {name or ''!r}; there are: {known}")
        return lora.values_of(self.backbone, state.rslora)

    def _park(self) -> None:
        """Take the adapter out of the layers, if there is one."""
        self._refuse_merged("another adapter")
        if self._has_lora():
            state = self._state()
            state.parked[state.name] = lora.values_of(self.backbone, state.rslora)
            lora.disable(self.backbone)

    def _refuse_merged(self, what: str) -> None:
        if self._state().merged:
            raise ValueError(f"{what} needs weights without an adapter; call unmerge_lora first")

    def _refuse_lora_of_the_embedding(self) -> None:
        if getattr(self.backbone.token_embedding, "lora_enabled", False):
            raise ValueError(
                "LoRA of the embedding cannot be saved as an adapter; export the model, which "
                "merges it"
            )

    def _variables(self) -> list[int]:
        return [id(variable) for variable in self.variables]

    def _norms(self) -> dict[str, float]:
        return norm_means(self.backbone.config, self.backbone.weight_source())

    def _forget_functions(self) -> None:
        """Compiled functions have what LoRA is in them, also those of a tuner around this task."""
        self._note(adapter_changes=self._adapter_changes + 1)
        for model in (self, self.backbone):
            model.train_function = model.test_function = model.predict_function = None
        if hasattr(self, "generate_function"):
            self.generate_function = None

    def _renew(self) -> None:
        """Begin the optimizer anew: other variables are trained now."""
        self._forget_functions()
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None:
            self.optimizer = anew(optimizer)
