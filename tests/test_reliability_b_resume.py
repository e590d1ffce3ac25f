"""Section B: a run that was cut off ends exactly as the one that was not."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from reflectvlm.data.digits import Digits
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import random_tiny
from reflectvlm.objectives import KL, ClippedSurrogate
from reflectvlm.rollout.engine import InProcessEngine
from reflectvlm.train import checkpoint, keeping, loop
from reflectvlm.train.changes import settings
from reflectvlm.train.evaluate import Evaluation
from reflectvlm.train.optim import AdamW
from reflectvlm.train.reference_sync import ReferenceSync
from reflectvlm.train.rl import DynamicSampling, RLTrainer
from training import at_call, crashed, logged, same_runs, small_brpo_copy, small_rl, small_sft

AUTO = {"resume": "auto"}
SYNC = {"reference_sync": ReferenceSync(every=2, mix=0.5)}


def cut_and_resumed(make, root, owner, name, number, **changes):
    """A run that dies at a call, and its second part."""
    trainer = make(root, **changes)
    crashed(
        trainer, owner, name, number, within=None if name == "step" and owner is type(trainer) else trainer
    )
    return make(root, **changes | {"output": changes.get("output", {}) | AUTO}).run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Unbroken runs, each made once."""
    made = {}

    def find(make, **changes):
        key = (make.__name__, repr(sorted(changes.items(), key=str)))
        if key not in made:
            made[key] = make(tmp_path_factory.mktemp("whole"), **changes).run().folder
        return made[key]

    return find


# 12 rows, 2 a step, 5 steps: no epoch edge. 4 rows, 3 a step: an edge within steps 2, 3 and 4.
EDGE = {"data": Digits(size=4), "prompts_per_step": 3, "updates_per_step": 3}


@pytest.mark.parametrize(
    ("make", "changes"),
    [(small_rl, {}), (small_rl, EDGE), (small_rl, SYNC), (small_sft, {}), (small_brpo_copy, {})],
    ids=["grpo", "grpo-epoch-edges", "grpo-reference-sync", "sft", "brpo-copy"],
)
@pytest.mark.parametrize("cut", [2, 3, 4, 5])
def test_b1_resumed_at_every_step(make, changes, cut, tmp_path, whole):
    """Bug: a resumed run repeats rows, forgets moments or the reference, or draws other tokens."""
    cls = type(make(tmp_path / "type", **changes))
    resumed = cut_and_resumed(make, tmp_path, cls, "step", cut, **changes)
    same_runs(resumed.folder, whole(make, **changes))


# A step of small_rl: 2 rows, one generate, 2 x 2 updates of one micro-batch each, or 3 with micro_tokens=1.
POINTS = [
    (small_rl, QwenVL, "prompt", 4, "amid the rows of a step"),
    (small_rl, RLTrainer, "update", 3, "between rollout and update"),
    (small_rl, torch.optim.AdamW, "step", 6, "between the updates of a step, weights half moved"),
    (small_rl, ReferenceSync, "__call__", 4, "between update and reference sync"),
    (small_rl, loop._Loop, "_report", 5, "after the update, before its line is written"),
    (small_rl, Evaluation, "__call__", 2, "before an evaluation"),
    (small_rl, keeping, "snapshot", 2, "before a save"),
    (small_rl, QwenVL, "save", 1, "before the model is written"),
    (small_sft, QwenVL, "score", 5, "amid accumulation"),
    (small_brpo_copy, QwenVL, "score", 9, "amid accumulation, with inserted blocks"),
]


@pytest.mark.parametrize(("make", "owner", "name", "number", "where"), POINTS, ids=[p[4] for p in POINTS])
def test_b1_resumed_within_a_step(make, owner, name, number, where, tmp_path, whole):
    """Bug: state that changes in the middle of a step is saved, or is not put back, there."""
    changes = {"micro_tokens": 1} if where.startswith("amid acc") else SYNC
    if make is not small_rl:
        changes = {"micro_tokens": 1}
    resumed = cut_and_resumed(make, tmp_path, owner, name, number, **changes)
    same_runs(resumed.folder, whole(make, **changes))


def test_b1_resumed_with_dynamic_sampling(tmp_path, whole):
    """Bug: a step that took more rows than usual moves the cursor, and the resumed run stands elsewhere."""
    changes = {"dynamic_sampling": DynamicSampling(max_rounds=3), "group_size": 2}
    resumed = cut_and_resumed(small_rl, tmp_path, RLTrainer, "step", 4, **changes)
    same_runs(resumed.folder, whole(small_rl, **changes))


def test_b1_resumed_from_a_checkpoint_by_name(tmp_path, whole):
    """Bug: going back to an earlier checkpoint by name takes the newest, or mixes the two histories."""
    first = small_rl(tmp_path, output={"keep": 9}).run().folder
    (first / "summary.json").unlink()
    named = first / "checkpoints" / "step-000002"
    again = small_rl(tmp_path, output={"resume": str(named), "keep": 9}).run()
    same_runs(again.folder, whole(small_rl))
    found = sorted(path.name for path in named.parent.iterdir())
    assert found == ["step-000002", "step-000004", "step-000005"] + [
        f"superseded-step-00000{step}" for step in (4, 5)
    ]


def test_b1_a_named_checkpoint_must_be_there_and_valid(tmp_path):
    """Bug: a damaged or missing checkpoint that was asked for by name quietly becomes another one."""
    first = small_rl(tmp_path, steps=2).run().folder
    (first / "summary.json").unlink()
    with pytest.raises(
        ValueError, match=r"step-000009' is not there. Checkpoints of that run: step-000002\."
    ):
        small_rl(tmp_path, output={"resume": str(first / "checkpoints" / "step-000009")}).run()
    path = first / "checkpoints" / "step-000002"
    (path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-000002 is no valid checkpoint: state\.json has 2 bytes"):
        small_rl(tmp_path, output={"resume": str(path)}).run()


def _drawing(trainer):
    """A trainer each of whose steps uses every global generator."""
    take = trainer.step

    def step(number):
        result = take(number)
        drawn = {"python": random.random(), "numpy": float(np.random.rand()), "torch": float(torch.rand(()))}
        return dataclasses.replace(result, metrics=result.metrics | drawn)

    trainer.step = step
    return trainer


@pytest.mark.parametrize("forget", [None, "python", "numpy", "torch"])
def test_b2_every_generator_is_put_back(forget, tmp_path, monkeypatch):
    """Bug: the state of one of the generators is lost on resume. Dropping any of them must show."""

    def seeded(root, **changes):
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(3)
        return _drawing(small_sft(root, **changes))

    unbroken = seeded(tmp_path / "whole").run()
    trainer = seeded(tmp_path / "cut")
    crashed(trainer, trainer, "step", 4)
    put_back = keeping.set_rng_state

    def partly(tensors, packed):
        kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
        put_back(tensors, packed)
        if forget == "python":
            random.setstate(kept[0])
        elif forget == "numpy":
            np.random.set_state(kept[1])
        elif forget == "torch":
            torch.set_rng_state(kept[2])

    monkeypatch.setattr(keeping, "set_rng_state", partly)
    resumed = seeded(tmp_path / "cut", output=AUTO).run()
    assert (logged(resumed.folder) == logged(unbroken.folder)) == (forget is None)


@pytest.mark.parametrize("forget", ["position", "updates", "optimizer", "model", "reference"])
def test_b2_forgetting_any_part_of_the_state_shows(forget, tmp_path, monkeypatch, whole):
    """Bug: the equalities above hold because nothing depends on what is put back."""
    changes = SYNC | {"output": {"samples_every": 1}}
    put_back = keeping.put_back

    def partly(trainer, found, about):
        kept = {
            "model": {name: value.clone() for name, value in trainer.policy.module.state_dict().items()},
            "optimizer": trainer.updater.optimizer.state_dict(),
            "reference": {n: v.clone() for n, v in trainer.reference.module.state_dict().items()},
            "position": trainer.position,
            "updates": trainer.updates,
        }
        loop = put_back(trainer, found, about)
        if forget == "model":
            trainer.policy.module.load_state_dict(kept["model"])
        elif forget == "optimizer":
            trainer.updater.optimizer.load_state_dict(kept["optimizer"])
        elif forget == "reference":
            trainer.reference.module.load_state_dict(kept["reference"])
        else:
            setattr(trainer, forget, kept[forget])
        return loop

    monkeypatch.setattr(keeping, "put_back", partly)
    resumed = cut_and_resumed(small_rl, tmp_path, RLTrainer, "step", 4, **changes)
    unbroken = whole(small_rl, **changes)
    if forget == "updates":  # it labels rollouts and changes nothing learned
        assert logged(resumed.folder) == logged(unbroken)
        assert (resumed.folder / "samples.jsonl").read_text() != (unbroken / "samples.jsonl").read_text()
    else:
        assert logged(resumed.folder) != logged(unbroken)


@pytest.mark.parametrize("workers", [0, 2])
def test_b3_rows_come_from_the_position_whoever_reads_them(workers, tmp_path):
    """Bug: rows that workers have read ahead are lost or doubled by a resume, in whatever order they were
    read."""
    trainer = small_rl(tmp_path, workers=workers, prefetch=3 if workers else None)
    trainer.next_prompts(2)  # with workers rows 2 to 5 are being read now
    trainer.load_state(trainer.state() | {"position": 7})
    ids = [prompt.sample.id for prompt in trainer.next_prompts(4)]
    trainer.load_state(trainer.state() | {"position": 1})
    ids += [prompt.sample.id for prompt in trainer.next_prompts(2)]
    trainer.feed.close()
    straight = [prompt.sample.id for prompt in small_rl(tmp_path).next_prompts(11)]
    assert ids == straight[7:] + straight[1:3]


@pytest.mark.parametrize(("make", "cut"), [(small_rl, 4), (small_sft, 3)])
def test_b3_resumed_with_workers(make, cut, tmp_path, whole):
    """Bug: what workers had read ahead when the run died is counted as taken, or read in place of other
    rows; 4 rows make epoch edges fall among those that are read ahead."""
    changes = EDGE if make is small_rl else {}
    cls = type(make(tmp_path / "type", **changes))
    ahead = {"workers": 2, "prefetch": 5}
    resumed = cut_and_resumed(make, tmp_path, cls, "step", cut, **changes, **ahead)
    same_runs(resumed.folder, whole(make, **changes))


def test_b4_evaluating_and_saving_more_often_changes_nothing_learned(tmp_path):
    """Bug: an evaluation or a save in between moves the random numbers of training."""
    often = small_rl(tmp_path / "often", output={"eval_every": 1, "save_every": 1, "samples_every": 1}).run()
    never = small_rl(tmp_path / "never", output={"eval_every": 0, "save_every": 100}).run()
    losses = [[row["loss"] for row in logged(run.folder) if "loss" in row] for run in (often, never)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_b4_a_given_up_evaluation_is_made_up_for(tmp_path, monkeypatch, whole):
    """Bug: a run stopped within an evaluation goes on without that point of its curve."""
    trainer = small_rl(tmp_path)
    with monkeypatch.context() as hook:  # two steps, and then the curve at step 2
        stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        at_call(InProcessEngine, "groups", 3, stop, hook, within=trainer)
        stopped = trainer.run()
    assert stopped.exit_code == 143
    assert [row["step"] for row in logged(stopped.folder)] == [0, 1, 2]
    same_runs(small_rl(tmp_path, output=AUTO).run().folder, whole(small_rl))


def test_b5_same_seed_same_run_other_seed_other_run(tmp_path, whole):
    """Bug: something outside of the seed decides, or the seed decides nothing."""
    same_runs(small_rl(tmp_path / "again").run().folder, whole(small_rl))
    other = small_rl(tmp_path / "other", seed=1).run().folder
    assert logged(other) != logged(whole(small_rl))


def test_b6_resuming_a_finished_run_does_nothing(tmp_path):
    """Bug: a second `resume=auto` trains on, or fails because there is nothing left to do."""
    first = small_rl(tmp_path).run()
    written = (first.folder / "metrics.jsonl").read_bytes()
    again = small_rl(tmp_path, output=AUTO).run()
    assert (again.finished, again.exit_code) == (True, 0)
    assert again.after == first.after
    assert (first.folder / "metrics.jsonl").read_bytes() == written


def test_b6_resume_takes_the_killed_run_not_the_finished_one(tmp_path):
    """Bug: after a finished run and a killed second one, auto says that nothing is left to do."""
    first = small_rl(tmp_path).run()
    second = cut_and_resumed(small_rl, tmp_path, RLTrainer, "step", 4)
    assert second.folder == tmp_path / "rl-2"
    assert logged(second.folder) == logged(first.folder)


def test_b_another_model_tokenizer_or_data_is_refused(tmp_path):
    """Bug: weights, ids or rows of another run are taken for this one's, and the run goes on wrongly."""
    crashed(small_rl(tmp_path), RLTrainer, "step", 4)
    weights = random_tiny().module.state_dict()

    def refused(match, **changes):
        trainer = small_rl(tmp_path, output=AUTO, **changes)
        with pytest.raises(ValueError, match=match):
            trainer.run()
        assert all(bool((trainer.policy.module.state_dict()[n] == v).all()) for n, v in weights.items())

    refused("belongs to another data|made with another data", data=Digits(size=11))
    refused("made with another data", data=Digits(size=12, seed=5))
    frozen = random_tiny()
    frozen.model.lm_head.weight.requires_grad_(False)
    refused(r"belongs to another model: .* is float32 .*, frozen, and was float32 .*, trained", policy=frozen)
    renamed = random_tiny()
    renamed.tokenizer.add_tokens(["<new>"])
    refused("made with another tokenizer", policy=renamed)
    resumed = small_rl(tmp_path, output=AUTO).run()  # nothing of it was touched
    assert resumed.finished


def test_b_other_versions_are_told(tmp_path, monkeypatch, caplog):
    """Bug: a run goes on under another version of torch and nobody is told that bits may differ."""
    crashed(small_rl(tmp_path), RLTrainer, "step", 4)
    version = keeping._version
    monkeypatch.setattr(keeping, "_version", lambda name: "9.9" if name == "torch" else version(name))
    assert small_rl(tmp_path, output=AUTO).run().finished
    assert "torch is 9.9, and was" in caplog.text


def test_b_settings_that_may_change_are_told_and_kept(tmp_path, capsys):
    """Bug: a changed rate is refused for no reason, or used without a word; another seed is let through."""
    text = "steps: 5\nseed: 0\noptimizer: {lr: 0.001}\noutput: {keep: 2}\n"
    crashed(small_rl(tmp_path, output={"recipe_yaml": text}), RLTrainer, "step", 4)
    other = text.replace("0.001", "0.002")
    with pytest.raises(
        ValueError, match=r"seed 0 → 1 \(1 other change would be allowed\)\. Go on with the old"
    ):
        small_rl(tmp_path, output=AUTO | {"recipe_yaml": other.replace("seed: 0", "seed: 1")}).run()
    resumed = small_rl(tmp_path, output=AUTO | {"recipe_yaml": other}).run()
    told = capsys.readouterr().out
    assert "goes on with other settings" in told
    assert "optimizer.lr" in told
    assert resumed.finished
    assert (resumed.folder / "recipe.1.yaml").read_text() == text


def test_b_resuming_reads_a_checkpoint_for_its_checksum_once(tmp_path, monkeypatch):
    """Bug: the bytes of a large checkpoint are hashed twice before the first step."""
    whole_reads = []
    crashed(small_rl(tmp_path), RLTrainer, "step", 4)
    verify = checkpoint.read_manifest

    def counted(path, *, content=True):
        whole_reads.append(content)
        return verify(path, content=content)

    monkeypatch.setattr(checkpoint, "read_manifest", counted)
    crashed(small_rl(tmp_path, output=AUTO), RLTrainer, "step", 1)
    assert whole_reads == [True, False]


def test_b_resume_by_path_and_its_error(tmp_path):
    """Bug: `resume=PATH` with a wrong path quietly starts from nothing."""
    crashed(small_rl(tmp_path), RLTrainer, "step", 4)
    resumed = small_rl(tmp_path / "elsewhere", output={"resume": str(tmp_path / "rl")}).run()
    assert resumed.folder == tmp_path / "rl"
    with pytest.raises(ValueError, match="is no run folder"):
        small_rl(tmp_path, output={"resume": str(tmp_path / "missing")}).run()


def test_b_a_reference_that_follows(tmp_path):
    """Bug: the reference is never moved, or moved by the wrong share: after a sync with mix=1 the KL of
    the next step's first update is 0 again."""
    rows = {}
    for name, sync in (("fixed", None), ("follows", ReferenceSync(every=1, mix=1.0))):
        run = small_rl(
            tmp_path / name,
            objective=ClippedSurrogate(kl=KL()),
            reference_sync=sync,
            updates_per_step=1,
            epochs_per_step=1,
        ).run()
        rows[name] = [row["kl"] for row in logged(run.folder) if "kl" in row]
    assert rows["fixed"][0] == rows["follows"][0] == pytest.approx(0, abs=1e-6)
    assert min(rows["fixed"][1:]) > 1e-6
    assert max(rows["follows"]) < 1e-6
    with pytest.raises(ValueError, match="reference_sync is set, but the objective has no KL term"):
        small_rl(tmp_path, objective=ClippedSurrogate(), reference_sync=ReferenceSync())


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from training import small_rl
output = {{"resume": "auto", "save_every": 1}}
result = small_rl(Path(sys.argv[1]), steps=int(sys.argv[2]), output=output).run()
sys.exit(result.exit_code)
"""


def start(tmp_path: Path, steps: int) -> subprocess.Popen[str]:
    code = CHILD.format(here=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(steps)], text=True)


def wait_for_steps(metrics: Path, count: int) -> None:
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        if metrics.is_file() and sum('"loss"' in line for line in metrics.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} steps in {metrics}")


def test_b1_killed_process_resumes_bit_for_bit(tmp_path):
    """Bug: after `kill -9` at any instant the run cannot go on, or goes on from a mixture."""
    steps = 8
    child = start(tmp_path / "cut", steps)
    wait_for_steps(tmp_path / "cut" / "rl" / "metrics.jsonl", 3)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert start(tmp_path / "cut", steps).wait() == 0
    assert start(tmp_path / "whole", steps).wait() == 0
    assert logged(tmp_path / "cut" / "rl") == logged(tmp_path / "whole" / "rl")
    assert json.loads((tmp_path / "cut" / "rl" / "summary.json").read_text())["steps"] == steps


def test_b_a_finished_run_goes_on_if_given_more_steps(tmp_path, whole):
    """Bug: `steps=…` of a finished run is taken, told, and nothing is trained; or it begins at 0."""
    first = small_rl(tmp_path, steps=3, optimizer=AdamW(lr=1e-3, schedule="constant")).run()
    longer = {"steps": 5, "optimizer": AdamW(lr=1e-3, schedule="constant")}
    again = small_rl(tmp_path, **longer, output={"resume": str(first.folder)}).run()
    assert again.finished
    assert again.folder == first.folder
    unbroken = whole(small_rl, **longer)
    assert [r["loss"] for r in logged(again.folder) if "loss" in r] == [
        r["loss"] for r in logged(unbroken) if "loss" in r
    ]
    assert again.after == json.loads((unbroken / "summary.json").read_text())["after"]
    assert (first.folder / "summary.1.json").is_file()
    with pytest.raises(ValueError, match=r"is finished, and was .*: group_size 3 → 4\."):
        small_rl(tmp_path, **longer, group_size=4, output={"resume": str(first.folder)}).run()
    named = first.folder / "checkpoints" / "step-000004"
    with pytest.raises(ValueError, match=r"is finished, so it cannot go on from step-000004"):
        small_rl(tmp_path, **longer, output={"resume": str(named)}).run()


def test_b_auto_takes_no_other_run_for_this_one(tmp_path, caplog):
    """Bug: in Python, where there is no recipe, the result of another experiment of the same name is given
    out as this one's, or another seed goes on with its checkpoint."""
    caplog.set_level(logging.INFO)
    first = small_rl(tmp_path, steps=2, test=None).run()
    other = small_rl(tmp_path, steps=2, seed=5, test=None, output=AUTO).run()
    assert other.folder == tmp_path / "rl-2"
    assert f"{first.folder} is finished with other settings" in caplog.text
    (other.folder / "summary.json").unlink()
    with pytest.raises(
        ValueError, match=r"rl-2 is unfinished and was started with another recipe: seed 5 → 6"
    ):
        small_rl(tmp_path, steps=2, seed=6, test=None, output=AUTO).run()


def test_b_a_changed_optimizer_is_used(tmp_path):
    """Bug: the table says that betas and decay have changed, and the checkpoint's are used."""
    crashed(small_rl(tmp_path), RLTrainer, "step", 4)
    trainer = small_rl(tmp_path, optimizer=AdamW(lr=1e-3, betas=(0.5, 0.6), weight_decay=0.25), output=AUTO)
    assert trainer.run().finished
    groups = trainer.updater.optimizer.param_groups
    assert [group["betas"] for group in groups] == [(0.5, 0.6)] * len(groups)
    assert max(group["weight_decay"] for group in groups) == 0.25


def test_b_a_changed_file_is_told(tmp_path, caplog):
    """Bug: a reward's file was edited, and the run goes on as if it were the same."""
    file = tmp_path / "my_rewards.py"
    file.write_text("a = 1\n")
    text = f"steps: 5\nrubric: {{function: '{file}:brevity'}}\n"
    crashed(small_rl(tmp_path, output={"recipe_yaml": text}), RLTrainer, "step", 4)
    file.write_text("a = 2\n")
    assert small_rl(tmp_path, output=AUTO | {"recipe_yaml": text}).run().finished
    assert "my_rewards.py" in caplog.text
    assert "is another one than when" in caplog.text


def test_b_damaged_checkpoints_do_not_let_a_run_begin_again(tmp_path):
    """Bug: the only checkpoint is damaged, and days of metrics are replaced by a new beginning."""
    crashed(small_rl(tmp_path), RLTrainer, "step", 4)
    written = (tmp_path / "rl" / "metrics.jsonl").read_bytes()
    (tmp_path / "rl" / "checkpoints" / "step-000002" / "manifest.json").unlink()
    with pytest.raises(RuntimeError, match=r"None of the checkpoints in .* is valid \(step-000002;"):
        small_rl(tmp_path, output=AUTO).run()
    assert (tmp_path / "rl" / "metrics.jsonl").read_bytes() == written


def test_b_a_stop_after_the_beginning_is_saved(tmp_path, monkeypatch):
    """Bug: a run resumed from its step 0 finishes its first evaluation, is stopped, and saves nothing: with
    short slots that repeats for ever."""
    stop = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with monkeypatch.context() as hook:
        at_call(Evaluation, "__call__", 1, stop, hook)
        assert small_rl(tmp_path).run().before == {}
    trainer = small_rl(tmp_path, output=AUTO)
    with monkeypatch.context() as hook:
        at_call(InProcessEngine, "groups", 1, stop, hook, within=trainer)
        stopped = trainer.run()
    assert stopped.before
    store = checkpoint.CheckpointStore(stopped.folder / "checkpoints")
    assert store.load(store.latest()).state["loop"]["begun"]


def test_b_settings_of_any_kind_can_be_written_down(tmp_path):
    """Bug: a rate that numpy made, or a name that is an enum's, and a run in Python cannot begin."""
    trainer = small_rl(tmp_path, optimizer=AdamW(lr=np.float64(1e-3)), variant=Kind.PLAIN, tag="<b>")
    found = yaml.safe_load(settings(trainer))
    assert found["optimizer"]["lr"] == 1e-3
    assert found["variant"] == "plain"
    assert found["objective"]["_target_"] == "ClippedSurrogate"
    assert "policy" not in found


class Kind(enum.StrEnum):
    PLAIN = "plain"
