"""Writing a batch to disk for inspection."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from reflectvlm.batch import Batch


def dump_batch(folder: Path, batch: Batch, reason: str, *, row_ids: Sequence[str] = ()) -> Path:
    """Tensors as `batch.safetensors`; counts, the reason and the ids of the step's rows as
    `batch.json`. Returns the folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in fields.items() if isinstance(value, Tensor)
    }
    tensors |= {
        f"image.{i}": image.pixels.detach().cpu().contiguous() for i, image in enumerate(batch.images)
    }
    save_file(tensors, folder / "batch.safetensors")
    about = {
        "reason": reason,
        "row_ids": list(row_ids),
        "num_tokens": batch.num_tokens,
        "num_sequences": batch.num_sequences,
        "grids": [list(image.grid) for image in batch.images],
    }
    (folder / "batch.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder
