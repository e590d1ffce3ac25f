r"""Instructions by name: the texts in `instructions/`, or a user's own text file.

    semantic_back, solution_back   Look-Back's two variants (arXiv 2507.03019, layout of its prompts), in full
    grpo                           the baseline without `<back>`; the paper puts it in the system turn
    qwen_la                        Qwen-LA's blocks (arXiv 2505.23558), in full
    boxed                          only where the answer goes
    brief_back, brief_think, brief_qwen_la   one line each, for the tiny policy

The layouts are the papers', the wording is ours.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Literal

from reflectvlm.types import Instruction


def instruction(name: str, place: Literal["user", "system"] = "user") -> Instruction:
    """The instruction called `name`, or the content of a file if `name` ends in `.txt`.

    Example: `instruction("brief_back").text` is "Think in <think>, look at …".
    """
    return Instruction(text=_read(str(name)).strip(), place=place)


def instruction_names() -> tuple[str, ...]:
    """Names that `instruction` knows."""
    return tuple(sorted(file.stem for file in _folder().glob("*.txt")))


def _read(name: str) -> str:
    if name.endswith(".txt"):
        return _read_file(Path(name).expanduser())
    known = instruction_names()
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"No instruction is called {name!r}, only {', '.join(known)}. Did you mean {near!r}? "
            "Your own text goes by the path of a .txt file."
        )
    return (_folder() / f"{name}.txt").read_text(encoding="utf-8")


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(
            f"Instruction file '{path}' cannot be read: {reason}. Give the path of a UTF-8 text file, "
            f"or one of the names {', '.join(instruction_names())}."
        ) from error


def _folder() -> Path:
    return Path(str(resources.files("reflectvlm"))) / "data" / "instructions"
