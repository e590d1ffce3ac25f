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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from reflectvlm.rewards.isolation import Code, Parameters, RewardError, pickled
from reflectvlm.rewards.lanes import Ahead, still_wanted
from reflectvlm.rewards.lift import PerRollout
from reflectvlm.rewards.pool import WorkerPool, default_size, shared_pool
from reflectvlm.rewards.worker import call, describe
from reflectvlm.types import Rollout, Span, Text

_ONLY_IF_NAMED = ("images", "group", "rollouts")


@dataclass(frozen=True, kw_only=True)
class Custom:
    """Example: `Custom(function="my_rewards.py:brevity")`, `Custom(function=lambda texts: [...])`.

    The function runs in processes of its own and is killed when it takes too long; whatever it does
    costs the rows of its call. One given by *name or file* is imported there. One given as an *object*
    travels as it is when the `Custom` is made (with cloudpickle, so those of a notebook do too): what it
    changes outside of itself stays in its process, and it must not count on state between calls.
    With `timeout=None` an object is called here, in this process, where nothing can stop it: a hang or a
    crash in it is one of the run.
    """

    function: str | Callable[..., Any]
    timeout: float | None = 10.0
    """Seconds for one call; importing the function has 60 of its own. None: call it here."""
    name: str | None = None
    """Name in error messages; the function's own if left out."""
    conversational: bool = False
    """True: prompts and completions are lists of messages, as TRL passes them for chat data."""
    rowwise: bool = False
    """True: one call per rollout instead of one per group, so that a failure costs one rollout. A
    function made by `per_rollout` is always asked so."""
    workers: int | None = None
    """Calls, and processes, at the same time; None: one per core, at most 4."""
    memory_gib: float | None = None
    """Address space of one process; None is unlimited."""
    _code: Code | None = field(default=None, init=False, repr=False, compare=False)
    _pool: WorkerPool | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"Custom.timeout is {self.timeout}. It must be a positive number of seconds.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"Custom.workers is {self.workers}. It must be at least 1, or None.")
        if isinstance(self.function, str):
            object.__setattr__(self, "function", _checked_target(self.function))
            if self.timeout is None:
                raise ValueError(
                    f"Custom.function is {self.function!r} and timeout is None. A function given by name "
                    "runs in its own process and needs a time-out; pass the function itself to call it here."
                )
            self._check_found(self.function)
        elif not callable(self.function):
            raise ValueError(  # noqa: TRY004 - what a user wrote
                f"Custom.function is {self.function!r}. "
                "Give 'my_pkg.mod.fn', 'path/to/file.py:fn' or a callable."
            )
        else:
            if isinstance(self.function, PerRollout):
                object.__setattr__(self, "rowwise", True)
            if self.timeout is not None:
                object.__setattr__(self, "_code", _travelling(self.function, self.label))

    @property
    def label(self) -> str:
        return self.name or (self.function if isinstance(self.function, str) else _name(self.function))

    def __call__(self, group: Sequence[Rollout], /) -> Any:
        """What the function gave. It may be anything at all: the rubric looks at it."""
        (value,) = self.many([group])
        if isinstance(value, BaseException):
            raise value
        return value

    def many(self, groups: Sequence[Sequence[Rollout]], /) -> list[Any]:
        """What the function gave for each group, or the exception; several calls at once."""
        if self.timeout is None:
            return [self._here(tuple(group)) for group in groups]
        target = self._target()
        pool = self._workers(target)
        parameters = pool.parameters(target)
        if isinstance(parameters, RewardError):
            return [parameters] * len(groups)
        found: list[Any] = []
        for group in groups:
            try:
                found.append(self._arguments(parameters, self._offered(tuple(group))))
            except ValueError as error:
                found.append(error)  # it asks for a column that these rows lack
        values = iter(pool.map(target, [one for one in found if isinstance(one, dict)], self.timeout))
        return [next(values) if isinstance(one, dict) else one for one in found]

    @property
    def lanes(self) -> int:
        return self.workers or default_size()

    def early(self, group: Sequence[Rollout], place: int, /) -> Ahead | None:
        """The same for one group, while others are still decoded; see `early.py`."""
        if self.timeout is None:
            return None
        pool = self._workers(self._target())
        return Ahead(partial(self._one, pool, tuple(group), place), stop=pool.abort)

    def _one(self, pool: WorkerPool, group: tuple[Rollout, ...], place: int) -> Any:
        target = self._target()
        parameters = pool.parameters(target)
        if isinstance(parameters, RewardError):
            return parameters
        arguments = self._arguments(parameters, self._offered(group))
        assert self.timeout is not None
        return pool.map(target, [arguments], self.timeout, first=place)[0]

    def close(self) -> None:
        """Ends the function's processes. A later call starts fresh ones."""
        if self.timeout is not None:
            self._workers(self._target()).close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # processes do not travel

    def _target(self) -> str | Code:
        if isinstance(self.function, str):
            return self.function
        assert self._code is not None
        return self._code

    def _workers(self, target: str | Code) -> WorkerPool:
        if self._pool is None or not self._pool.owned:
            object.__setattr__(self, "_pool", shared_pool(target, self.workers, self.memory_gib))
        assert self._pool is not None
        return self._pool

    def _check_found(self, target: str) -> None:
        """A misspelt name fails on every rollout of a run: it is told before the first."""
        pool = self._workers(target)
        loaded = pool.parameters(target)
        if isinstance(loaded, RewardError):
            pool.close()
            raise ValueError(  # noqa: TRY004 - what a user wrote
                f"Custom.function is {target!r}, which cannot be loaded: {loaded}. "
                "Correct the name, or what its file does when it is imported."
            )

    def _here(self, rollouts: tuple[Rollout, ...]) -> Any:
        function = self.function
        assert callable(function)
        still_wanted()
        try:
            described = describe(function)
            parameters = Parameters(
                tuple(described["required"]), tuple(described["optional"]), described["any"]
            )
            return call(function, self._arguments(parameters, self._offered(rollouts)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - `many` gives each call's own exception
            return error

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


def _travelling(function: Callable[..., Any], label: str) -> Code:
    try:
        return pickled(function, label)
    except Exception as error:  # any object may refuse to be pickled, in any way
        raise ValueError(
            f"Custom.function {label} cannot be sent to a process of its own: {error!r}. "
            "Put what it holds (a lock, an open file, a connection) inside the function, give it by name as "
            "'path/to/file.py:fn', or pass timeout=None to call it here, in this process, without a time-out."
        ) from error


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
