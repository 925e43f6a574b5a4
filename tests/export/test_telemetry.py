"""An export runs onnxruntime too, and leaves nothing of it in the user's home."""

from __future__ import annotations

from tests.edge_demo.test_telemetry import collects, files_left
from tests.gguf_files import metadata, tensors, write_gguf

__all__ = ["collects"]


def test_an_export_leaves_an_empty_home_as_keras_leaves_it(collects, tmp_path):
    meta = metadata("gemma3", 2)
    source = write_gguf(tmp_path / "tiny.gguf", meta, tensors(meta))
    command = ("-m", "export.cli", str(source), str(tmp_path / "out"), "--recipe", "int8")
    left = files_left(tmp_path, *command)
    assert (tmp_path / "out" / "bundle.json").exists()
    keras_own = (".keras/", "cache/matplotlib/")  # its settings; it imports matplotlib if it can
    assert [name for name in left if not name.startswith(keras_own)] == []
