"""`reflectvlm attention`: figures and numbers of what a model looks at. See `cli_help` and docs/attention.md.

One answer (`image=… question=…`) is here; many (`data=…`) are in `attention_rows.py`. All that a user may
have got wrong in words is told before the weights are loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reflectvlm.attention.boxes import objects_of
from reflectvlm.attention.figures import layers_figure, trend_figure
from reflectvlm.attention.figures_maps import layer_maps_figure, maps_figure
from reflectvlm.attention.files import save_csv, save_figure, save_json, write
from reflectvlm.attention.maps import Heat, heat_maps
from reflectvlm.attention.places import KINDS
from reflectvlm.attention.trends import Trend, trend
from reflectvlm.attention_options import Asked, check_tags, read_words
from reflectvlm.generate_command import Plan, image_names
from reflectvlm.generate_options import Given, described
from reflectvlm.generator import Generator, read_images
from reflectvlm.recipe_check import RecipeError
from reflectvlm.rollout.scripted import ScriptedEngine
from reflectvlm.train.printing import put
from reflectvlm.types import Prompt, Rollout

log = logging.getLogger("reflectvlm")


def attention(words: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    given = read_words(words)
    asked = Asked.read(given)
    if "data" in given:
        from reflectvlm.attention_rows import over_rows

        return over_rows(given, asked)
    plan = Plan.read(given)
    images = read_images([name for value in given.all("image") for name in image_names(value)])
    text = _answer_text(given)
    check_tags(asked.tags, plan.instruction.text, text or "", plan.reattention.trigger or "")
    generator = plan.generator()
    rollout = answered(generator, generator.prompt(images, str(given.text("question"))), text)
    tell(save_one(generator, rollout, asked, given.all("at")))
    return 0


def answered(generator: Generator, prompt: Prompt, text: str | None) -> Rollout:
    """The generator's answer, or the given one with the blocks that its re-attention puts into it."""
    assert generator.reattention is not None
    engine: Any = generator.rollout_engine
    sampling = generator.sampling
    if text is not None:
        engine = ScriptedEngine(policy=generator.policy, texts=(text,))
    ((rollout,),) = engine.generate([prompt], 1, sampling, generator.reattention, seed=generator.seed)
    made: Rollout = rollout
    return made


def save_one(generator: Generator, rollout: Rollout, asked: Asked, at: Sequence[str] = ()) -> list[Path]:
    """All figures and numbers of one answer."""
    policy, question = generator.policy, rollout.prompt.sample.question
    made = trend(policy, rollout, **asked.settings)
    heats = heat_maps(policy, rollout, at, **asked.settings)
    title = _short(question)
    region = " ".join(f"<{tag}>" for tag in asked.tags if f"<{tag}>" in rollout.text)
    files = save_figure(trend_figure(made, title, region), asked.out, "trend")
    files += save_figure(layers_figure(made, title, region=region), asked.out, "layers")
    if heats:
        objects = objects_of(rollout.prompt.sample)
        wanted = () if objects is None else objects.wanted
        shown = maps_figure(heats, rollout.prompt.sample.images, title, wanted)
        files += save_figure(shown, asked.out, "maps")
        if asked.each:
            files += save_figure(layer_maps_figure(heats, title), asked.out, "layer_maps")
    files.append(save_csv(trend_rows(made), asked.out / "trend.csv"))
    files.append(save_json(_numbers(generator, rollout, made, heats), asked.out / "attention.json"))
    files.append(write(asked.out / "answer.txt", rollout.text.encode()))
    return files


def trend_rows(made: Trend) -> list[dict[str, Any]]:
    """One row per generated token."""
    inside = {token for first, stop in made.regions for token in range(first, stop)}
    return [
        {"token": number, "text": text, "inside": int(number in inside)}
        | {f"share_{kind}": value for kind, value in zip(KINDS[1:], made.shares[number], strict=True)}
        | {f"plain_{kind}": value for kind, value in zip(KINDS, made.absolute[number], strict=True)}
        for number, text in enumerate(made.tokens)
    ]


def tell(files: Sequence[Path]) -> None:
    folder = files[0].parent
    names = ", ".join(file.name for file in files if file.suffix != ".svg")
    put(f"{folder}: {names}; figures as PNG and SVG\n")


def _numbers(generator: Generator, rollout: Rollout, made: Trend, heats: Sequence[Heat]) -> dict[str, Any]:
    return {
        "question": rollout.prompt.sample.question,
        "answer": rollout.text,
        "stop": rollout.stop,
        "reattention": described(generator.reattention),
        "query": made.query,
        "layers": list(made.layers),
        "kinds": list(KINDS),
        "tokens": list(made.tokens),
        "regions": [list(region) for region in made.regions],
        "shares": made.shares,
        "per_layer": made.attention,
        "maps": [
            {
                "look": heat.look,
                "shown": heat.shown,
                "image": heat.image,
                "share": heat.share,
                "mean": heat.mean,
                "layers": heat.maps,
            }
            for heat in heats
        ],
    }


def _answer_text(given: Given) -> str | None:
    name = given.text("answer")
    if name is None:
        return None
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise RecipeError(
            f"answer={name} cannot be read: {why}. Give a text file with one answer."
        ) from error
    if not text.strip():
        raise RecipeError(f"answer={name} is empty. Give a text file with one answer, tags included.")
    return text


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 90 else f"{words[:89]}…"
