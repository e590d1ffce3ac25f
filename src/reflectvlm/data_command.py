"""`reflectvlm data SUB …`: make, check, mix and review data. What each takes, `data SUB --help` says.

Each SUB is one function of its words, in a module of its own that is imported when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from reflectvlm.recipe_check import RecipeError, nearest
from reflectvlm.train.printing import put

COMMANDS: Mapping[str, tuple[str, str]] = {
    "coldstart": ("reflectvlm.curate.coldstart_command", "make cold-start traces: method= source= teacher="),
    "distill": ("reflectvlm.curate.distil_command", "a policy answers, judges vote, the wrong are rewritten"),
    "review": ("reflectvlm.curate.review_command", "accept, fix or drop rows on a local page"),
    "overlap": ("reflectvlm.curate.overlap_command", "rows that an evaluation set has too"),
    "check": ("reflectvlm.data.check_command", "every problem of a file, by row"),
    "show": ("reflectvlm.data.show_command", "rows with thumbnails, in the terminal or on a page"),
    "mix": ("reflectvlm.data.mix_command", "several sources by weight, into one file"),
    "to-hub": ("reflectvlm.data.to_hub_command", "Parquet and a data card, ready for the hub"),
    "cache": ("reflectvlm.data.cache_command", "rows tokenised and images processed once, to be streamed"),
}
"""Module and a line of help; each module has `run(words) -> exit code` and `HELP`."""


def data(words: Sequence[str]) -> int:
    """Runs one of the commands."""
    sub, *rest = words or ["--help"]
    if sub in ("-h", "--help", "help"):
        put(_help())
        return 0
    if sub not in COMMANDS:
        near = nearest(sub, COMMANDS)
        hint = f" Did you mean {near!r}?" if near else ""
        raise RecipeError(f"data has no {sub!r}, only {', '.join(COMMANDS)}.{hint}")
    module = import_module(COMMANDS[sub][0])
    if "-h" in rest or "--help" in rest:
        put(module.HELP)
        return 0
    run: Callable[[list[str]], int] = module.run
    return run(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  reflectvlm data {name:<{width}}  {line}\n" for name, (_, line) in COMMANDS.items()]
    return "reflectvlm data: make, check, mix and review data\n\n" + "".join(lines)
