"""What a traced model looks like inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from d2kit.utils.file_io import atomic_write

__all__ = ["dump_torchscript_IR"]


def dump_torchscript_IR(model: Any, dir: str) -> None:  # noqa: N802 - Detectron2's name
    """Write code and graph of a TorchScript model as text.

    Args:
        model: what ``torch.jit.trace`` returned.
        dir: folder for ``model_ts_code.txt``, ``model_ts_IR.txt``, ``model_ts_IR_inlined.txt`` and
            ``model.txt``.
    """
    folder = Path(dir)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "model_ts_code.txt": "\n\n".join(
            f"# {name or type(part).__name__}\n{part.code}"
            for name, part in model.named_modules()
            if hasattr(part, "code")
        ),
        "model_ts_IR.txt": str(model.graph),
        "model_ts_IR_inlined.txt": str(model.inlined_graph),
        "model.txt": str(model),
    }
    for name, text in texts.items():
        with atomic_write(folder / name, "w") as file:
            file.write(text)
