"""Recipes: composing, what is said about mistakes, and building the trainer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from reflectvlm import stages
from reflectvlm.config import SHORT_NAMES, compose, load_recipe
from reflectvlm.models.tiny import tiny_folder
from reflectvlm.recipe_check import RecipeError
from reflectvlm.recipe_files import find_recipe, recipes, recipes_folder
from reflectvlm.rewards.pool import shared_pool
from reflectvlm.train.rl import RLTrainer
from reflectvlm.train.sft import SFTTrainer
from reflectvlm.types import Prompt, Rollout, Sample

SMALL = ("prompts_per_step=1", "group_size=2", "sampling.max_tokens=4", "evaluation=null", "test=null")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny policy as a folder."""
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds or leaves a cold start in the user's own cache."""
    monkeypatch.setenv(stages.VARIABLE, str(tmp_path / "cache"))


# -- composing ------------------------------------------------------------------------------------


def test_overrides_reach_the_values_and_references_follow() -> None:
    """A `${variant}` resolved before the override would cold-start another variant than it trains."""
    values = compose("lookback_rl", ("variant=solution", "optimizer.lr=2e-4", "+drop_truncated=true")).values
    assert values["rubric"]["layout"]["variant"] == "solution"
    assert values["start_from"]["overrides"][0] == "variant=solution"
    assert values["optimizer"]["lr"] == 2e-4
    assert values["drop_truncated"] is True


def test_choosing_a_policy_replaces_the_node_whole() -> None:
    """Keys of the replaced choice must not linger: the tiny policy has no pixel limits."""
    policy = compose("lookback_rl_7b", ("policy=tiny",)).values["policy"]
    assert policy["path"] == "tiny"
    assert "min_pixels" not in policy


def test_short_names_mean_keys_of_output() -> None:
    """`resume=auto` that lands at the top would be an unknown argument of the trainer."""
    given = {"resume": "auto", "save_every": 3, "eval_every": 4, "root": "here", "keep": 7, "max_minutes": 9}
    assert set(given) == set(SHORT_NAMES)
    output = compose("grpo", [f"{key}={value}" for key, value in given.items()]).values["output"]
    assert given.items() <= output.items()


def test_short_names_work_in_a_recipe_without_output(tmp_path: Path) -> None:
    """An `output` made of one key alone would reach the trainer as a plain dict."""
    own = tmp_path / "own.yaml"
    own.write_text("_target_: reflectvlm.train.rl.RLTrainer\nsteps: 1\n")
    output = compose(str(own), ("keep=3",)).values["output"]
    assert output == {"keep": 3, "_target_": "reflectvlm.train.run.Output"}


def test_own_recipe_builds_on_ours_from_any_folder(tmp_path: Path) -> None:
    """A folder whose name needs quoting broke the search path."""
    folder = tmp_path / "it's ünder (my) {home}, a=b"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# Mine\ndefaults: [lookback_rl, _self_]\nsteps: 4\n")
    composed = compose(str(folder / "mine.yaml"), ("policy=qwen2_5_vl_3b",))
    assert composed.values["steps"] == 4
    assert composed.values["policy"]["path"] == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_our_recipes_are_found_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of an installation is pasted into an override, where a quote ends a text."""
    odd = tmp_path / "it's (here), a=b"
    shutil.copytree(recipes_folder(), odd)
    monkeypatch.setattr("reflectvlm.config.recipes_folder", lambda: odd)
    (tmp_path / "mine.yaml").write_text("defaults: [grpo, _self_]\nsteps: 4\n")
    assert compose(str(tmp_path / "mine.yaml")).values["steps"] == 4


def test_composed_text_is_a_recipe_with_the_same_values(tmp_path: Path) -> None:
    """`reflectvlm show` and the run folder promise a file that gives the same run."""
    composed = compose("lookback_rl", ("steps=7",))
    (tmp_path / "again.yaml").write_text(composed.yaml)
    assert compose(str(tmp_path / "again.yaml")).values == composed.values


def test_recipes_lists_descriptions_and_no_shared_parts() -> None:
    """A shared part in the list would be offered as something to run."""
    assert all(description for description in recipes().values())
    assert not any(name.startswith("_") for name in recipes())
    assert (recipes_folder() / "_rl.yaml").is_file()


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "override", "says"),
    [
        (
            "lookbakc_rl",
            "",
            r"No recipe is called 'lookbakc_rl'. Did you mean 'lookback_rl'.*reflectvlm recipes",
        ),
        ("./none.yaml", "", r"No recipe file at './none.yaml'"),
        ("./mine.yml", "", r"does not end in .yaml"),
        ("grpo", "stpes=3", r"no key 'stpes'. Did you mean steps\?"),
        ("grpo", "dynamic_sampling=null", r"not shown .* Add it with a '\+': \+dynamic_sampling"),
        ("grpo", "optimizer.ep=1", r"Did you mean \+optimizer.eps\?"),
        ("grpo", "lr=1", r"Did you mean optimizer.lr\?"),
        ("grpo", "max_pixels=9", r"Did you mean \+policy.max_pixels\?"),
        ("grpo", "resum=auto", r"Did you mean resume\?"),
        ("grpo", "~stepz", r"no key 'stepz'"),
        ("grpo", "+steps=3", r"steps is in recipe 'grpo' already"),
        ("grpo", "policy=tinny", r"policy has no choice 'tinny', only .* Did you mean policy=tiny\?"),
        ("tiny_base", "data=digits", r"writes its data out, so none can be chosen"),
        ("grpo", "steps", r"'steps' is no override. Write key=value"),
        ("grpo", "steps=[1,", r"Cannot read the value in 'steps=\[1,'.*two kinds of quotes"),
        ("grpo", "steps=1,2", r"'steps=1,2' has several values, and a run takes one"),
        ("grpo", "steps=${nope}", r"nope.* not found"),
    ],
)
def test_a_mistake_is_one_line_with_a_remedy(recipe: str, override: str, says: str) -> None:
    """Hydra's own messages show search paths and pictures of the override, and no nearest name."""
    with pytest.raises(RecipeError, match=says) as caught:
        compose(recipe, [override] if override else [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("+stepz=3", r"^stepz is no argument of RLTrainer. Did you mean 'steps'\?"),
        ("+optimizer.lrr=3", r"^optimizer.lrr is no argument of AdamW. Did you mean 'optimizer.lr'\?"),
        ("steps=abc", r"^steps is 'abc', but RLTrainer wants int"),
        ("steps=1.5", r"^steps is 1.5, but RLTrainer wants int"),
        ("steps=true", r"^steps is True, but RLTrainer wants int"),
        ("steps=0", r"^steps is 0. It must be at least 1"),
        ("updates_per_step=3", r"^updates_per_step=3 does not divide"),
        ("objective.clip_low=-1", r"^objective: ClippedSurrogate.clip_low is -1"),
        (
            "objective.kl={_target_:reflectvlm.objectives.KL,coefficient:-1}",
            r"^objective.kl: KL.coefficient is -1",
        ),
        (
            "variant=solutoin",
            r"^rubric.layout: look_back has no variant 'solutoin'.*Did you mean 'solution'\?",
        ),
        (
            "instruction.name=brief_bakc",
            r"^instruction: No instruction is called.*Did you mean 'brief_back'\?",
        ),
        ("data=rows", r"^data.path has no value yet. Give it with data.path=…"),
        ("data._target_=nowhere.Rows", r"^data._target_ is 'nowhere.Rows', which cannot be imported"),
        (
            "policy._target_=reflectvlm.models.qwen_vl.load_polcy",
            r"^policy._target_ .*Did you mean reflectvlm.models.qwen_vl.load_policy\?",
        ),
        ("~steps", r"^steps is missing: RLTrainer needs it"),
        ("~_target_", r"has no _target_"),
        ("_target_=reflectvlm.types.Text", r"no argument of Text"),
        ("start_from=lookback_sft", r"^start_from is 'lookback_sft'. Write \{recipe: name"),
        (
            "policy.path=/nowhere",
            r"^policy.path is '/nowhere', but start_from would replace it.*start_from=null",
        ),
    ],
)
def test_constructors_speak_for_themselves_before_anything_runs(
    override: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake told after a cold start or after loading 7B weights costs minutes."""

    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("something was run or loaded")

    monkeypatch.setattr(SFTTrainer, "run", too_late)
    monkeypatch.setattr("reflectvlm.models.qwen_vl.load_model", too_late)
    with pytest.raises(RecipeError, match=says):
        load_recipe("lookback_rl", override)


def test_a_missing_model_is_a_mistake_with_its_key() -> None:
    """FileNotFoundError from inside of the loader came out with a traceback."""
    with pytest.raises(RecipeError, match=r"^policy: No model folder at '/nowhere'"):
        load_recipe("grpo", "policy.path=/nowhere")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: [1\nc: 2\n", r"bad.yaml:3: no valid YAML"),
        ("a: 1\na: 2\n", r"bad.yaml:2: no valid YAML: found duplicate key"),
        ("defaults: [lookbakc_rl]\n", r"lookbakc_rl"),
    ],
)
def test_broken_yaml_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    """A YAML error without file and line leaves the user to search."""
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeError, match=says) as caught:
        compose(str(tmp_path / "bad.yaml"))
    assert "\n" not in str(caught.value)


def test_a_value_may_hold_anything_in_two_kinds_of_quotes() -> None:
    """The remedy in the message about unreadable values must work."""
    assert compose("grpo", ["name='a, b=(c)'"]).values["name"] == "a, b=(c)"


# -- building -------------------------------------------------------------------------------------


def test_load_recipe_builds_the_trainer_and_keeps_what_was_asked_for(tiny: Path) -> None:
    """The run folder must be able to say what was run; `resume` is not part of it."""
    asked = (f"policy.path={tiny}", "resume=auto", *SMALL)
    trainer = load_recipe("grpo", *asked)
    assert isinstance(trainer, RLTrainer)
    assert trainer.policy.source == str(tiny)
    assert trainer.output.resume == "auto"
    assert trainer.output.overrides == asked
    kept = yaml.safe_load(trainer.output.recipe_yaml or "")
    assert kept["group_size"] == 2
    assert "resume" not in kept["output"]


def test_find_recipe_takes_names_and_paths(tmp_path: Path) -> None:
    """A file called like one of our recipes is taken only if a path is given."""
    (tmp_path / "grpo.yaml").write_text("_target_: x.y\n")
    assert find_recipe("grpo")[0] == recipes_folder()
    assert find_recipe(str(tmp_path / "grpo.yaml")) == (tmp_path, "grpo")


def test_the_recipe_of_the_contributing_page_builds(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of a reward in a recipe named an argument that its rubric does not have."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text)
    code = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def " in block]
    (tmp_path / "my_rewards.py").write_text("\n".join(code))
    monkeypatch.chdir(tmp_path)
    trainer = load_recipe("./mine.yaml", "start_from=null", f"policy.path={tiny}", *SMALL)
    assert isinstance(trainer, RLTrainer)
    prompt = Prompt(sample=Sample(id="s", question="?", answer="5"), spans=())
    scored = trainer.rubric([Rollout(prompt=prompt, spans=(), text="no", stop="eos")])
    assert (scored.parts["short"], scored.parts["looks"]) == ((1.0,), (0.0,))
    assert scored.rewards == pytest.approx((0.1,))  # wrong and without the format: 0.1 for being short
    for name in ("short", "looks_twice"):
        shared_pool(f"{tmp_path / 'my_rewards.py'}:{name}").close()
