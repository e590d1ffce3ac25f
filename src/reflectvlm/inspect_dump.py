"""A dumped batch on the screen: why it was dumped, what its tensors hold, and the text of its rows."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from reflectvlm.train.dump import Decode, Dump, load_dump, nonfinite, texts
from reflectvlm.train.table import Table, say, visible

_PER_ROW = ("old_logprobs", "ref_logprobs")
_LONGEST = 4000
"""Characters of a text that are shown."""


def show_dump(folder: Path, model: str | None, rows: int) -> int:
    """Prints everything, the text of at most `rows` rows, those first that are not finite."""
    dump = load_dump(folder)
    found = _texts(folder, dump, model)
    for line in _head(folder, dump):
        say(line)
    say("")
    _tensor_table(dump).show()
    say("")
    _row_table(dump).show()
    _show_texts(dump, found, rows)
    return 0


def _head(folder: Path, dump: Dump) -> list[str]:
    batch, step = dump.batch, dump.step
    lines = [f"{folder}: a batch of {'a step' if step is None else f'step {step}'}", f"why: {dump.reason}"]
    count = len(batch.images)
    kept = "" if dump.images_kept else ", left out of the dump because it would have been too large"
    lines.append(
        f"{len(batch)} rows; {batch.num_tokens:g} trained tokens and {batch.num_sequences:g} sequences in "
        f"the whole update; {count} images of {dump.image_bytes / 1e6:.1f} MB{kept}"
    )
    if dump.named and not dump.row_ids:
        lines.append(f"samples of the step, in no known order: {', '.join(dump.named)}")
    if not dump.nonfinite:
        lines.append("every value of the batch is finite: what is not arose in the model or the loss")
    return lines


def _tensor_table(dump: Dump) -> Table:
    table = Table("Tensors", ("tensor", "shape", "type", "min", "max", "NaN", "infinite"))
    for name, tensor in _all(dump).items():
        low, high = _range(tensor)
        bad = nonfinite({name: tensor}, len(dump.batch)).get(name, {"nan": 0, "infinite": 0})
        shape = " x ".join(map(str, tensor.shape))
        kind = str(tensor.dtype).removeprefix("torch.")
        table.add(name, shape, kind, low, high, str(bad["nan"]), str(bad["infinite"]))
    for name, one in dump.nonfinite.items():
        if name not in _all(dump):  # an image that was left out
            table.add(name, "?", "?", "?", "?", str(one.get("nan")), str(one.get("infinite")))
    return table


def _row_table(dump: Dump) -> Table:
    batch, tensors = dump.batch, _all(dump)
    shown = [name for name in (*_PER_ROW, *dump.more) if name in tensors]
    columns = ("row", "sample", "group", "tokens", "prompt", "trained", "advantage", *shown, "not finite")
    table = Table("Rows", columns)
    bad = _bad_rows(dump)
    for b in range(len(batch)):
        trained = batch.trained[b]
        spans = []
        for name in shown:
            row = tensors[name][b]
            spans.append(" to ".join(_range(row[trained] if row.shape == trained.shape else row)))
        table.add(
            str(b),
            dump.row_ids[b] if dump.row_ids else "?",
            str(int(batch.prompt[b])),
            str(int(batch.attention[b].sum())),
            str(int(batch.prompt_tokens[b])),
            str(int(trained.sum())),
            f"{float(batch.advantages[b]):.4g}",
            *spans,
            ", ".join(bad.get(b, ())) or "–",
        )
    return table


def _show_texts(dump: Dump, found: Sequence[Mapping[str, str]] | None, rows: int) -> None:
    if found is None:
        say("")
        say("The dump has no text. model=PATH, a folder with the run's tokenizer, makes it of the ids.")
        return
    bad = _bad_rows(dump)
    order = sorted(range(len(found)), key=lambda b: b not in bad)
    for b in order[:rows]:
        name = f", {dump.row_ids[b]}" if dump.row_ids else ""
        advantage = f", advantage {float(dump.batch.advantages[b]):.4g}"
        say("")
        say(f"row {b}{name}{advantage}" + (f", not finite: {', '.join(bad[b])}" if b in bad else ""))
        for part in ("prompt", "answer"):
            say(f"  {part}:")
            for line in _lines(found[b][part]):
                say(textwrap.indent(line, "    "))
    if len(order) > rows:
        say("")
        say(f"{len(order) - rows} more rows; rows={len(order)} shows their text too.")


def _lines(text: str) -> list[str]:
    cut = text[:_LONGEST]
    more = [f"[{len(text) - _LONGEST:,} more characters]"] if len(text) > _LONGEST else []
    return [*(visible(line) for line in cut.split("\n")), *more]


def _texts(folder: Path, dump: Dump, model: str | None) -> Sequence[Mapping[str, str]] | None:
    """Prompts and answers: made by the model that was named, else as they were written, else by the model of
    the run around the dump."""
    if model is not None:
        return texts(dump.batch, _decoder(model))
    if dump.texts is not None:
        return dump.texts
    near = folder.absolute().parent / "model"
    return texts(dump.batch, _decoder(str(near))) if (near / "tokenizer.json").is_file() else None


def _decoder(model: str) -> Decode:
    from reflectvlm.models.loading import load_tokenizer
    from reflectvlm.models.trust import CodeRefused

    try:
        tokenizer = load_tokenizer(model)
    except CodeRefused:
        raise
    except (OSError, ValueError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise ValueError(f"model={model} has no tokenizer that can be loaded: {why[:200]}") from error

    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    return decode


def _all(dump: Dump) -> dict[str, Tensor]:
    own = {name: value for name, value in vars(dump.batch).items() if isinstance(value, Tensor)}
    images = {f"image.{i}": image.pixels for i, image in enumerate(dump.batch.images)}
    return own | dict(dump.more) | (images if dump.images_kept else {})


def _bad_rows(dump: Dump) -> dict[int, list[str]]:
    """Row -> the tensors in which it has a value that is not finite."""
    bad: dict[int, list[str]] = {}
    for name, one in nonfinite(_all(dump), len(dump.batch)).items():
        for row in one.get("rows", ()):
            bad.setdefault(row, []).append(name)
    return bad


def _range(tensor: Tensor) -> tuple[str, str]:
    """Smallest and largest value that is a number."""
    values = tensor.flatten()
    values = values[values.isfinite()] if values.is_floating_point() else values.long()
    if not len(values):
        return "–", "–"
    return f"{float(values.min()):.4g}", f"{float(values.max()):.4g}"
