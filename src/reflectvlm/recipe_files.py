"""Where recipes are, and what there is. Reads files only, so that the list is quick to print."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from reflectvlm.recipe_check import RecipeError, nearest

EVALUATES = "_eval"
"""How the name of a recipe ends that evaluates a model."""


def recipes_folder() -> Path:
    """`recipes/`: inside of an installed package, or at the top of a checkout."""
    package = Path(str(resources.files("reflectvlm")))
    inside, beside = package / "recipes", package.parent.parent / "recipes"
    return inside if inside.is_dir() else beside


def recipes() -> dict[str, str]:
    """Name -> description, the first comment line. Files named `_….yaml` are shared parts, not recipes, and
    `…_eval.yaml` are evaluations."""
    return {file.stem: _first_comment(file) for file in _files() if not file.stem.endswith(EVALUATES)}


def evaluations() -> dict[str, str]:
    """The same of the recipes that `reflectvlm eval` runs."""
    return {file.stem: _first_comment(file) for file in _files() if file.stem.endswith(EVALUATES)}


def pipelines() -> dict[str, str]:
    """Name -> description of the chains of recipes that `reflectvlm pipeline` runs."""
    return {
        file.stem: _first_comment(file) for file in sorted((recipes_folder() / "pipelines").glob("*.yaml"))
    }


def find_pipeline(name: str) -> Path:
    """The file of a pipeline's name, or the file itself, which has a slash or ends in .yaml."""
    if "/" in name or name.endswith(".yaml"):
        path = Path(name).expanduser().absolute()
        if path.suffix != ".yaml" or not path.is_file():
            raise RecipeError(
                f"No pipeline file at {name!r}. Give a .yaml file that exists, or a name: "
                f"{', '.join(pipelines())}."
            )
        return path
    if name not in pipelines():
        near = nearest(name, pipelines())
        hint = f"Did you mean {near!r}? " if near else ""
        raise RecipeError(
            f"No pipeline is called {name!r}, only {', '.join(pipelines())}. {hint}"
            "Your own file goes by its path, e.g. ./mine.yaml."
        )
    return recipes_folder() / "pipelines" / f"{name}.yaml"


def find_recipe(recipe: str) -> tuple[Path, str]:
    """(folder, file name without .yaml) of a name, or of a path, which has a slash or ends in .yaml."""
    if "/" not in recipe and not recipe.endswith((".yaml", ".yml")):
        known = {**recipes(), **evaluations()}
        if recipe in known:
            return recipes_folder(), recipe
        near = nearest(recipe, known)
        hint = f"Did you mean {near!r}? " if near else ""
        raise RecipeError(
            f"No recipe is called {recipe!r}. {hint}`reflectvlm recipes` lists them all; "
            "your own file goes by its path, e.g. recipe=./mine.yaml."
        )
    path = Path(recipe).expanduser().absolute()
    if path.suffix != ".yaml":
        raise RecipeError(f"{recipe!r} does not end in .yaml. A recipe of your own is a .yaml file.")
    if not path.is_file():
        raise RecipeError(
            f"No recipe file at {recipe!r}. Give a path that exists, or a name: {', '.join(recipes())}."
        )
    return path.parent, path.stem


def _files() -> list[Path]:
    return sorted(file for file in recipes_folder().glob("*.yaml") if not file.name.startswith("_"))


def _first_comment(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        first = next(lines, "")
    return first.lstrip("# ").strip() if first.startswith("#") else ""
