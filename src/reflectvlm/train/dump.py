"""Writing a batch to disk, so that a step that broke can be looked at and taken again.

    nonfinite-step-12/  batch.safetensors  every tensor of the batch, and `image.0`, `image.1`, …
                        batch.json         why, which rows, what is not finite, the text; written last

`reflectvlm inspect FOLDER` shows it; `load_dump(FOLDER).batch` is the batch again, which with the weights of
the step before gives the same loss. Left out: the weights, which a checkpoint has.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reflectvlm.batch import Batch
from reflectvlm.types import Grid, Patches

FORMAT_VERSION = 1
TENSORS, ABOUT = "batch.safetensors", "batch.json"
LIMIT = 2**30
"""Bytes above which a dump goes without its images."""

Decode = Callable[[Sequence[int]], str]


def dump_batch(
    folder: Path,
    batch: Batch,
    reason: str,
    *,
    row_ids: Sequence[str] = (),
    step: int | None = None,
    decode: Decode | None = None,
    more: Mapping[str, Tensor] | None = None,
    limit: int = LIMIT,
) -> Path:
    """Writes the batch and what is known of it, and returns the folder.

    `row_ids`: the samples of the batch's rows, or of the whole step. `decode`: ids to text, with all tags.
    `more`: further tensors with one row per row of the batch, e.g. the log-probs of the broken pass.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(batch) | dict(more or {})
    images = {f"image.{i}": image.pixels for i, image in enumerate(batch.images)}
    fits = sum(one.nbytes for one in (*tensors.values(), *images.values())) <= limit
    save_file(_plain(tensors | (images if fits else {})), folder / TENSORS)
    about = {
        "format": FORMAT_VERSION,
        "reason": reason,
        "step": step,
        "row_ids": list(batch.row_ids or row_ids),
        "num_tokens": batch.num_tokens,
        "num_sequences": batch.num_sequences,
        "grids": [list(image.grid) for image in batch.images],
        "images_kept": fits,
        "image_bytes": sum(one.nbytes for one in images.values()),
        "nonfinite": nonfinite(tensors | images, len(batch)),
        "texts": None if decode is None else texts(batch, decode),
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=True), encoding="utf-8")
    return folder


@dataclass(frozen=True, kw_only=True, eq=False)
class Dump:
    """What `load_dump` gives back."""

    batch: Batch
    """With empty images if they were left out."""
    more: Mapping[str, Tensor]
    reason: str
    step: int | None
    named: Sequence[str]
    """Samples of the rows, or of the whole step."""
    images_kept: bool
    image_bytes: int
    nonfinite: Mapping[str, Mapping[str, Any]]
    """As `nonfinite` found it, also in images that were left out."""
    texts: Sequence[Mapping[str, str]] | None

    @property
    def row_ids(self) -> Sequence[str]:
        """One sample per row of the batch; empty if only those of the whole step are known."""
        return self.named if len(self.named) == len(self.batch) else ()


def load_dump(folder: Path | str) -> Dump:
    """A batch that `dump_batch` has written. Raises ValueError for anything else; nothing is unpickled."""
    from safetensors import SafetensorError

    folder = Path(folder)
    try:
        return _read(folder)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is no whole dump: {Path(str(error.filename)).name} is missing. The process was "
            "stopped while it was written, or a file was taken away."
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{folder} is no dump that can be read: {error}") from error


def nonfinite(tensors: Mapping[str, Tensor], rows: int) -> dict[str, dict[str, Any]]:
    """Tensor -> how many of its values are NaN or infinite, and in which of the batch's rows."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or (good := tensor.isfinite()).all():
            continue
        found[name] = {"nan": int(tensor.isnan().sum()), "infinite": int(tensor.isinf().sum())}
        if tensor.dim() and len(tensor) == rows and not name.startswith("image."):
            found[name]["rows"] = (~good).reshape(rows, -1).any(1).nonzero().flatten().tolist()
    return found


def texts(batch: Batch, decode: Decode) -> list[dict[str, str]]:
    """Prompt and answer of every row; visual tokens as `[16 visual tokens]`."""
    found = []
    for b in range(len(batch)):
        columns = batch.attention[b].nonzero().flatten().tolist()
        split = int(batch.prompt_tokens[b])
        parts = {"prompt": columns[:split], "answer": columns[split:]}
        found.append({name: _text(batch, b, part, decode) for name, part in parts.items()})
    return found


def _text(batch: Batch, row: int, columns: Sequence[int], decode: Decode) -> str:
    pieces: list[str] = []
    ids: list[int] = []
    visual = 0
    for column in columns:
        if int(batch.visual[row, column]) >= 0:
            pieces.append(decode(ids) if ids else "")
            ids, visual = [], visual + 1
        else:
            pieces.append(f"[{visual} visual tokens]" if visual else "")
            visual = 0
            ids.append(int(batch.ids[row, column]))
    pieces.append(f"[{visual} visual tokens]" if visual else "")
    return "".join([*pieces, decode(ids) if ids else ""])


def _tensors(batch: Batch) -> dict[str, Tensor]:
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, on the CPU, and no two of them in one memory."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _read(folder: Path) -> Dump:
    from safetensors.torch import load_file

    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    if about.get("format", 0) > FORMAT_VERSION:
        raise ValueError(
            f"it has format {about['format']}; this version of reflectvlm reads up to {FORMAT_VERSION}"
        )
    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(2, "", str(folder / TENSORS))
    tensors = load_file(folder / TENSORS)
    kept = about["images_kept"]
    images = tuple(
        Patches(pixels=tensors.pop(f"image.{i}") if kept else torch.empty(0, 0), grid=Grid(*grid))
        for i, grid in enumerate(about["grids"])
    )
    names = {field.name for field in dataclasses.fields(Batch)}
    _check_shapes({name: tensor for name, tensor in tensors.items() if name in names})
    fields: dict[str, Any] = {name: tensors.pop(name) for name in list(tensors) if name in names}
    named = tuple(str(one) for one in about["row_ids"])
    batch = Batch(
        **fields,
        row_ids=named if len(named) == len(fields["ids"]) else (),
        images=images,
        num_tokens=float(about["num_tokens"]),
        num_sequences=float(about["num_sequences"]),
    )
    return Dump(
        batch=batch,
        more={name: tensor for name, tensor in tensors.items() if tensor.dim() and len(tensor) == len(batch)},
        reason=str(about["reason"]),
        step=about["step"],
        named=named,
        images_kept=bool(kept),
        image_bytes=int(about["image_bytes"]),
        nonfinite={str(name): dict(one) for name, one in about["nonfinite"].items()},
        texts=None if about["texts"] is None else _checked_texts(about["texts"], len(batch)),
    )


def _checked_texts(found: Any, rows: int) -> list[dict[str, str]]:
    if len(found) != rows:
        raise ValueError(f"it has {len(found)} texts for {rows} rows")
    return [{name: str(one[name]) for name in ("prompt", "answer")} for one in found]


def _check_shapes(tensors: Mapping[str, Tensor]) -> None:
    """All tensors of a batch have its rows and columns."""
    rows, columns = tensors["ids"].shape
    for name, tensor in tensors.items():
        right = {1: (rows,), 2: (rows, columns), 3: (3, rows, columns)}.get(tensor.dim())
        if right is None or tuple(tensor.shape) != right:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, and ids has {[rows, columns]}")
