"""`Custom`: reward functions of users and of TRL, by name, by file or as an object.

The calling convention is TRL's: keyword arguments `prompts`, `completions`, `completion_ids` and
the data set's columns, each a list with one entry per rollout; the value is a list of numbers, with
None where the function does not apply to a rollout. A function gets what its signature names:

| name | entry per rollout |
|---|---|
| `prompts`, `questions` | the question (`prompts` as one user message if `conversational`) |
| `completions`, `texts` | the answer with all its tags (`completions` as one message if `conversational`) |
| `completion_ids`, `ids` | sampled token ids |
| `answers` | gold answer |
| `answer`, `question` | the same, singular, unless the data has columns of these names |
| `sample_ids` | the sample's id |
| `spans` | the answer's spans as dictionaries |
| `images` | list of the sample's images |
| any column | its value in the sample |
| `group`, `rollouts` | the `Rollout` objects |

Of two equal names the one above wins, except for `answer` and `question`.
`**kwargs` receives all of these but images, group and rollouts, which must be named. So rewards of this
library's own form, `reward(group)` and what `per_rollout` makes, are found by name and file too.
Left out: TRL's `trainer_state`, `log_extra` and `log_metric`, which belong to its trainer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflectvlm.rewards.isolation import Parameters, RewardError, shared_worker
from reflectvlm.rewards.worker import call, describe
from reflectvlm.types import Rollout, Span, Text

_ONLY_IF_NAMED = ("images", "group", "rollouts")


@dataclass(frozen=True, kw_only=True)
class Custom:
    """Example: `Custom(function="my_rewards.py:brevity")`, `Custom(function="my_pkg.rewards.brevity")`.

    A function given by *name or file* runs in its own process and is killed when it takes too long.
    A function given as an *object* runs here, in a daemon thread: after the time-out the rubric goes
    on without it, but the thread cannot be killed, and one that hangs inside C without releasing
    the interpreter lock stops the whole process. `timeout=None` calls an object directly.
    """

    function: str | Callable[..., Any]
    timeout: float | None = 10.0
    name: str | None = None
    """Name in error messages; the function's own if left out."""
    conversational: bool = False
    """True: prompts and completions are lists of messages, as TRL passes them for chat data."""

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"Custom.timeout is {self.timeout}. It must be a positive number of seconds.")
        if isinstance(self.function, str):
            object.__setattr__(self, "function", _checked_target(self.function))
            if self.timeout is None:
                raise ValueError(
                    f"Custom.function is {self.function!r} and timeout is None. A function given by name "
                    "runs in its own process and needs a time-out; pass the function itself to call it here."
                )
            _check_found(self.function)
        elif not callable(self.function):
            raise ValueError(  # noqa: TRY004 - what a user wrote
                f"Custom.function is {self.function!r}. "
                "Give 'my_pkg.mod.fn', 'path/to/file.py:fn' or a callable."
            )

    @property
    def label(self) -> str:
        return self.name or (self.function if isinstance(self.function, str) else _name(self.function))

    def __call__(self, group: Sequence[Rollout], /) -> Any:
        """What the function gave. It may be anything at all: the rubric looks at it."""
        rollouts = tuple(group)
        return self._by_name(rollouts) if isinstance(self.function, str) else self._here(rollouts)

    def _by_name(self, rollouts: tuple[Rollout, ...]) -> Any:
        assert isinstance(self.function, str)
        assert self.timeout is not None
        worker = shared_worker(self.function)
        parameters = worker.parameters(self.function)
        if isinstance(parameters, RewardError):
            raise parameters
        arguments = self._arguments(parameters, self._offered(rollouts))
        value = worker.call(self.function, arguments, self.timeout)
        if isinstance(value, RewardError):
            raise value
        return value

    def _here(self, rollouts: tuple[Rollout, ...]) -> Any:
        function = self.function
        assert callable(function)
        described = describe(function)
        parameters = Parameters(tuple(described["required"]), tuple(described["optional"]), described["any"])
        arguments = self._arguments(parameters, self._offered(rollouts))
        if self.timeout is None:
            return call(function, arguments)
        return _in_thread(function, arguments, self.timeout)

    def _offered(self, rollouts: tuple[Rollout, ...]) -> dict[str, Any]:
        return _columns(rollouts, self.conversational) | {"group": rollouts, "rollouts": rollouts}

    def _arguments(self, parameters: Parameters, offered: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in parameters.required if name not in offered]
        if missing:
            single = " A function of one rollout needs @per_rollout." if "rollout" in missing else ""
            raise ValueError(
                f"Reward function {self.label} asks for {', '.join(map(repr, missing))}, which it cannot "
                f"have. Offered: {', '.join(sorted(offered))}.{single} "
                "Add the column to the data or give a default."
            )
        named = {*parameters.required, *parameters.optional}
        return {
            name: value
            for name, value in offered.items()
            if name in named or (parameters.any and name not in _ONLY_IF_NAMED)
        }


def _columns(rollouts: tuple[Rollout, ...], conversational: bool) -> dict[str, Any]:
    samples = [rollout.prompt.sample for rollout in rollouts]
    questions, texts = [sample.question for sample in samples], [rollout.text for rollout in rollouts]
    answers = [sample.answer for sample in samples]
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    return {
        "question": list(questions),
        "answer": list(answers),
        **{name: [sample.columns.get(name) for sample in samples] for name in names},
        "prompts": [_message("user", text) for text in questions] if conversational else list(questions),
        "completions": [_message("assistant", text) for text in texts] if conversational else list(texts),
        "completion_ids": [list(rollout.sampled_ids) for rollout in rollouts],
        "ids": [list(rollout.sampled_ids) for rollout in rollouts],
        "questions": questions,
        "answers": answers,
        "texts": texts,
        "sample_ids": [sample.id for sample in samples],
        "spans": [[_span(span) for span in rollout.spans] for rollout in rollouts],
        "images": [list(sample.images) for sample in samples],
    }


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _span(span: Span) -> dict[str, Any]:
    """Plain data: a worker that unpickled our types would have to import torch."""
    if isinstance(span, Text):
        return {"type": "text", "ids": list(span.ids), "trained": span.trained}
    return {"type": "visual", "image": span.image, "keep": None if span.keep is None else list(span.keep)}


def _in_thread(function: Callable[..., Any], arguments: dict[str, Any], timeout: float) -> Any:
    outcome: dict[str, Any] = {}

    def run() -> None:
        # Boundary: an exception must reach the caller's thread, sys.exit included.
        try:
            outcome["value"] = call(function, arguments)
        except BaseException as error:  # noqa: BLE001
            outcome["error"] = error

    thread = threading.Thread(target=run, name=f"reward {_name(function)}", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise RewardError("timeout", f"TimeoutError: {_name(function)} gave no answer in {timeout:g} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def _checked_target(target: str) -> str:
    """Files become absolute here, because a run may change its folder before the first reward."""
    place, _, name = target.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).expanduser().resolve()
        if not path.is_file():
            raise ValueError(
                f"Custom.function is {target!r}, but there is no file {path}. Check the path before ':'."
            )
        if name.isidentifier():
            return f"{path}:{name}"
    else:
        parts = target.replace(":", ".", 1).split(".")
        if len(parts) > 1 and all(part.isidentifier() for part in parts):
            return target
    raise ValueError(f"Custom.function is {target!r}. Write 'my_pkg.mod.fn' or 'path/to/file.py:fn'.")


def _check_found(target: str) -> None:
    """A misspelt name fails on every rollout of a run: it is told before the first."""
    worker = shared_worker(target)
    loaded = worker.parameters(target)
    if isinstance(loaded, RewardError):
        worker.close()
        raise ValueError(  # noqa: TRY004 - what a user wrote
            f"Custom.function is {target!r}, which cannot be loaded: {loaded}. "
            "Correct the name, or what its file does when it is imported."
        )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
