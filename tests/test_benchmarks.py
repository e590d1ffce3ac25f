"""The benchmarks' own help, and the speed benchmark: its tables, its refusals, its scripts at tiny sizes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reflectvlm import Implicit
from reflectvlm.models import qwen_vl
from reflectvlm.models.prefix import Packed, pack
from reflectvlm.models.tiny import random_tiny

FOLDER = Path(__file__).parent.parent / "benchmarks"
SPEED = FOLDER / "speed"
SCALE = FOLDER / "scale"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """A module of benchmarks/speed or benchmarks/scale by its name; none of them is left imported."""
    for folder in (FOLDER, SCALE, SPEED):
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith((str(SPEED), str(SCALE))):
            del sys.modules[name]


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "insertion",
        "qwen_la",
        "torture",
        "overlap",
        "scale/scale",
        "speed/compare",
        "speed/gpu",
        "speed/products",
        "speed/recipes",
    ],
)
@pytest.mark.usefixtures("script")
def test_help_is_the_docstring_as_written(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands and formulas that argparse runs together into one paragraph."""
    file = FOLDER / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(file), run_name="__main__")
    written = file.read_text(encoding="utf-8").split('"""')[1]
    assert written.strip() in capsys.readouterr().out


# -- side by side --------------------------------------------------------------------------------


def run_of(name: str, number: int, rollout: list[float], update: list[float], peak: float) -> dict[str, Any]:
    return {
        "name": name,
        "round": number,
        "rollout": rollout,
        "update": update,
        "tokens": 512,
        "prompt": 317,
        "trained": 46,
        "idle": 500.0,
        "peak": peak,
        "settings": {"rows": 8},
        "versions": {"torch": "2.13"},
        "threads": 2,
    }


RUNS = [
    run_of("ours", 0, [1.0, 2.0], [2.0, 2.0], 1000.0),
    run_of("TRL", 0, [4.0, 4.0], [16.0, 16.0], 4000.0),
    run_of("ours", 1, [1.0, 1.0], [2.0, 4.0], 1000.0),
    run_of("TRL", 1, [4.0, 4.0], [14.0, 16.0], 4000.0),
]


def test_medians_and_spread_are_over_all_rounds(script: Callable[[str], Any]) -> None:
    """Bug: a table of one round, or of the best one."""
    ours = script("tables").summary(RUNS)["ours"]
    assert ours["rollout"] == (1.0, 1.0, 2.0)  # of 1, 2, 1, 1
    assert ours["step"] == (3.5, 3.0, 5.0)  # of 3, 4, 3, 5
    assert ours["update tokens/s"] == (256.0, 128.0, 256.0)  # 512 / 2, and 512 / 4 once
    assert ours["above idle"] == (500.0, 500.0, 500.0)


def test_ratios_have_the_range_of_the_rounds(script: Callable[[str], Any]) -> None:
    """Bug: a ratio upside down, or its spread taken from the best of one and the worst of the other."""
    found = script("tables").ratios(RUNS, "TRL")
    # Round 0: 20 / 3.5; round 1: medians of 18 and 20 over medians of 3 and 5; all: 20 / 3.5.
    assert found["step"] == pytest.approx((20 / 3.5, 19 / 4, 20 / 3.5))
    assert found["peak"] == (0.25, 0.25, 0.25)
    assert found["above idle"] == pytest.approx((1 / 7, 1 / 7, 1 / 7))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("tokens", 500, "TRL had 500 for 'tokens', not 512"),
        ("prompt", 316, "TRL had 316 for 'prompt', not 317"),
        ("trained", 45, "different numbers of parameters"),
        ("rollout", [], "TRL measured nothing"),
    ],
)
def test_sides_that_did_different_work_are_refused(
    script: Callable[[str], Any], field: str, value: Any, said: str
) -> None:
    """Bug: a side looks fast because an answer ended early, the image was smaller or the tower was frozen."""
    tables = script("tables")
    tables.check_same_work(RUNS, 512)
    with pytest.raises(tables.DifferentWork, match=said):
        tables.check_same_work([*RUNS, RUNS[1] | {field: value}], 512)


def test_the_page_says_who_was_left_out(script: Callable[[str], Any]) -> None:
    """Bug: a comparison without TRL that does not say so."""
    about = dict.fromkeys(("command", "machine", "commit", "model", "work", "rounds", "repeats"), "x")
    page = script("tables").comparison(
        {"runs": RUNS[::2], "about": about | {"without": ["TRL"], "notes": ["A note."]}}
    )
    assert "| TRL | left out |" in page
    assert "A note." in page
    assert "512 (256 to 512)" in page


def test_a_point_without_memory_is_named(script: Callable[[str], Any]) -> None:
    """Bug: a point of a curve that one side could not do is missing without a word."""
    tables = script("tables")
    point = {"axis": "G", "value": 16, "runs": {"ours": RUNS[0]}, "failed": {"TRL": "needs more than 9 MB"}}
    about = dict.fromkeys(("command", "machine", "commit", "model", "base", "repeats"), "x")
    assert "| 16 | 3.5 | needs more than 9 MB |" in tables.scaling({"points": [point], "about": about})


@pytest.mark.parametrize(
    ("fits", "tried", "note"),
    [
        (4, [4], ""),
        (2, [4, 2], "TRL with 2 of 4 rows a pass: more need too much memory"),
        (0, [4, 2, 1], ""),
    ],
)
def test_a_side_without_memory_gets_fewer_rows(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, fits: int, tried: list[int], note: str
) -> None:
    """Bug: TRL looks as if it could not do a work that it can do with accumulation."""
    sweep, driving = script("sweep"), script("driving")
    work, asked = script("workload").Work(group=4, tokens=128), []

    def run(side: Any, *_: Any) -> dict[str, Any]:
        if side.name == "TRL":
            asked.append(side.settings["rows"])
            if asked[-1] > fits:
                raise driving.SideFailed("TRL", "can't allocate memory", memory=True)
        return RUNS[1] | {"name": side.name}

    monkeypatch.setattr(sweep, "run", run)
    args = argparse.Namespace(threads=0, out=Path("nowhere"))
    made = sweep.point(args, Path("model"), Path("python"), work, driving.Bounds(memory=9))
    assert asked == tried
    assert made["note"] == note
    assert ("TRL" in made["runs"]) == (fits > 0)
    assert fits or made["failed"]["TRL"] == "needs more than 9 MB"


@pytest.mark.parametrize(
    ("body", "memory", "why"),
    [
        ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')", True, "DefaultCPUAllocator"),
        ("raise ImportError('no liger')", False, "ImportError: no liger"),
        ("import time; time.sleep(60)", False, "no result within 2 s"),
    ],
)
def test_a_side_that_fails_says_why(
    script: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    body: str,
    memory: bool,
    why: str,
) -> None:
    """Bug: a side that died is told as one that had no memory, or the other way round."""
    driving, work = script("driving"), script("workload").Work()
    (tmp_path / "side.py").write_text(body)
    monkeypatch.setattr(driving, "HERE", tmp_path)
    with pytest.raises(driving.SideFailed, match=why) as caught:
        driving.run(driving.Side(name="x", script="side.py"), tmp_path, work, driving.Bounds(limit=2.0))
    assert caught.value.memory is memory


def test_the_fastest_settings_that_need_no_other_environment_are_taken(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    """Bug: TRL runs with settings that were not its best."""
    tries = [
        {"side": "TRL", "settings": {}, "environment": {}, "run": RUNS[1]},
        {"side": "TRL", "settings": {"rows": 4}, "environment": {}, "run": RUNS[3]},
        {"side": "TRL", "settings": {"rows": 2}, "environment": {"A": "1"}, "run": RUNS[0] | {"name": "TRL"}},
        {"side": "TRL", "settings": {"liger": True}, "environment": {}, "failed": "no driver"},
        {"side": "ours", "settings": {"x": 1}, "environment": {}, "run": RUNS[0]},
    ]
    file = tmp_path / "speed_tuning.json"
    fastest = script("tune").fastest
    assert fastest(file) == {}
    file.write_text(json.dumps({"tries": tries}))
    assert fastest(file) == {"rows": 4}


def test_compare_runs(tmp_path: Path) -> None:
    """Bug: the one command does not run; or its sides, on the real library, do different work."""
    command = [sys.executable, str(SPEED / "compare.py"), "--tiny", "--without", "trl", "--rounds", "1"]
    folders = ["--repeats", "1", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path)]
    subprocess.run([*command, *folders], check=True, capture_output=True, env=environment())
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [run["tokens"] for run in found["runs"]] == [32, 32]  # 4 rollouts of 8 tokens
    assert str(tmp_path) not in found["about"]["command"]
    assert "| TRL | left out |" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_compare_writes_nothing_if_the_work_differs(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bug: the check exists and nobody calls it."""
    compare, tables = script("compare"), script("tables")
    monkeypatch.setattr(compare, "run", lambda side, *_: RUNS[0] | {"name": side.name, "tokens": 511})
    args = compare.arguments().parse_args(["--without", "trl", "--out", str(tmp_path)])
    with pytest.raises(tables.DifferentWork, match="ours had 511"):
        compare.compare(args, tmp_path, None, "a model")
    assert not list(tmp_path.iterdir())


def test_no_answer_of_ours_ends_early(script: Callable[[str], Any]) -> None:
    """Bug: our side samples fewer tokens because the policy ends its turn."""
    policy = random_tiny()
    with torch.no_grad():
        weight = policy.model.get_output_embeddings().weight
        (newline,) = policy.tokenizer.encode("\n", add_special_tokens=False)
        weight[list(policy.end_ids)] += 9 * weight[newline]  # behind which every answer begins
    checks = script("gpu_checks")
    assert min(len(one.sampled_ids) for one in checks.rollouts(policy, Implicit())) < 40
    made = script("ours").never_ends(policy)
    assert {len(one.sampled_ids) for one in checks.rollouts(made, Implicit())} == {40}


def test_profile_names_all_parts(tmp_path: Path) -> None:
    """Bug: a part of the step was renamed, and its time is counted as the rest."""
    command = [sys.executable, str(SPEED / "step_profile.py"), "--tiny", "--steps", "1"]
    done = subprocess.run(
        [*command, "--cache", str(tmp_path)], check=True, capture_output=True, text=True, env=environment()
    )
    for part in ("rows and images", "prefill", "decoding: layers", "decoding: head", "rewards"):
        assert f"| {part} |" in done.stdout
    for part in ("vision tower", "layers", "head and packing", "backward", "optimiser", "gradient norm"):
        assert f"| {part} |" in done.stdout.split("**update**")[1]


def environment() -> dict[str, str]:
    source = str(Path(qwen_vl.__file__).parent.parent.parent)
    return os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


# -- on a GPU ------------------------------------------------------------------------------------


def test_work_of_a_step_by_hand(script: Callable[[str], Any]) -> None:
    """Bug: a share of the matrix rate that counts prompts G times, or forgets the head."""
    work, flops = script("workload"), script("flops")
    shape = work.Shape(
        width=2,
        layers=1,
        heads=1,
        kv_heads=1,
        mlp=3,
        vision_width=2,
        vision_layers=1,
        vision_mlp=3,
        vocabulary=5,
    )
    # q and o 2 x 4, k and v 2 x 4, three matrices of 2 x 3.
    assert flops.language_weights(shape) == 34
    one = work.Work(pixels=28, group=2, tokens=3, prompts=1)
    # A prompt of 4 once and 6 sampled tokens; pairs 4 + 3 + 2 + 1, and twice 3 x 4 + 3 + 2 + 1; 4 patches of
    # 1176 x 2 + 16 + 18 + (8 x 8 + 8 x 2) / 4 weights.
    assert flops.language_flops(shape, one, 4) == 2 * 34 * 10 + 4 * 2 * 46 + 2 * 10 * 6  # 1168
    assert flops.vision_flops(shape, one) == 2 * 2406 * 4  # 19248
    assert flops.update_flops(shape, one, 4) == 4 * (1168 + 19248)
    assert flops.update_flops(shape, dataclasses.replace(one, kl=0.0), 4) == 3 * (1168 + 19248)
    assert flops.update_flops(shape, one, 4, frozen_vision=True) == 4 * 1168 + 19248
    # Weights of layers and head, and for each of three rows two numbers x 2 of 10 tokens; two bytes each.
    assert flops.decode_bytes(shape, 3, 10) == 2 * (34 + 10 + 3 * 40)


@pytest.mark.parametrize(
    ("body", "ended"), [("raise SystemExit(3)", 3), ("import time; time.sleep(60)", "time limit")]
)
def test_a_stage_that_dies_loses_nothing(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, ended: object
) -> None:
    """Bug: a crash or a hang in one stage takes the other results with it."""
    gpu = script("gpu")
    said = f"import json, sys; sys.path.insert(0, {str(SPEED)!r}); import gpu, pathlib\n"
    said += "gpu.say(pathlib.Path(sys.argv[3]), sys.argv[1], 'copy', bytes_per_second=1.0)\n"
    (tmp_path / "gpu_stages.py").write_text(said + body)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "LEAST", 0)
    gpu.run("machine", 2.0, tmp_path, tiny=True)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["what"] for line in lines] == ["copy", "end"]
    assert lines[1]["status"] == ended
    assert lines[1]["seconds"] < 20
    assert "machine: " in script("gpu_table").page(lines)


def test_a_stage_without_time_left_says_so(script: Callable[[str], Any], tmp_path: Path) -> None:
    """Bug: what was not measured looks as if it had been forgotten."""
    script("gpu").run("trl", 5.0, tmp_path, tiny=True)
    lines = [json.loads((tmp_path / "gpu.jsonl").read_text())]
    assert "- trl: not begun, 5 s left" in script("gpu_table").page(lines)


def test_gpu_page_sets_results_against_targets(script: Callable[[str], Any]) -> None:
    """Bug: ratios upside down, or not of the other side's best."""
    update = {"what": "update", "tokens_per_second": 1.0}
    decode = {"what": "decode", "seconds": 1.0, "bytes_per_second": 3.0}
    lines = [
        {"what": "copy", "bytes_per_second": 4.0},
        {"what": "matmul", "flops_per_second": 10.0},
        decode | {"side": "ours", "tokens_per_second": 90.0},
        decode | {"side": "transformers generate", "tokens_per_second": 10.0},
        decode | {"side": "transformers generate, static cache", "tokens_per_second": 20.0},
        update | {"side": "ours", "seconds": 2.0, "flops_per_second": 5.0, "peak_allocated": 3.0},
        update | {"side": "TRL", "seconds": 8.0, "flops_per_second": 1.0, "peak_allocated": 6.0},
    ]
    table = script("gpu_table")
    assert list(table.measured(lines).values()) == [0.75, 4.5, 4.0, 0.5, 0.5]
    lines[-1]["trained"] = 7
    assert "update, times TRL" not in table.measured(lines)
    assert "did different work: trained" in table.page(lines)


def test_gpu_stages_run_at_tiny_size(tmp_path: Path) -> None:
    """Bug: a script for a machine that is seldom at hand has a slip in its last stage."""
    command = [
        "bash",
        str(SPEED / "gpu.sh"),
        "--tiny",
        "--stages",
        "decode",
        "update",
        "transformers",
    ]
    settings = {"OUT": str(tmp_path), "PYTHON": sys.executable}
    subprocess.run(command, check=True, capture_output=True, env=environment() | settings)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines if line["what"] == "end"] == [0, 0, 0]
    measured = {(line["what"], line.get("side")) for line in lines}
    assert {("decode", "ours"), ("update", "ours"), ("decode", "transformers generate")} <= measured


def seen_one_further(made: Packed) -> Packed:
    return dataclasses.replace(made, positions=made.positions + (made.mask[:, 0].sum(-1) > 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_checks_hold_and_can_fail(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Bug: checks whose limits, in bfloat16 above all, are so wide that nothing is found."""
    checks = script("gpu_checks")
    policy = checks.reflecting(torch.device("cpu"), dtype)
    found = {name: check() for name, check in checks.the_checks(policy) if "COPY" in name}
    assert len(found) == 5  # rollouts two ways, packed two ways, head
    assert all(gap <= most for gaps in found.values() for gap, most in gaps.values()), found
    made = checks.rollouts(policy, checks.REATTENTIONS["COPY"])
    monkeypatch.setattr(qwen_vl, "pack", lambda *given: seen_one_further(pack(*given)))
    gaps = checks.packing(policy, "dense", made)
    assert all(gap > most for gap, most in gaps.values()), gaps


# -- scale on a GPU ------------------------------------------------------------------------------


def test_scale_stages_run_at_tiny_size(tmp_path: Path) -> None:
    """Bug: a script for a machine that is seldom at hand does not even start its stages, or loses results."""
    stages = ("machine", "oracles", "lora")
    command = ["bash", str(SCALE / "gpu_scale.sh"), "--device", "cpu", "--tiny", "--stages", *stages]
    settings = {"OUT": str(tmp_path), "PYTHON": sys.executable}
    subprocess.run(command, check=True, capture_output=True, env=environment() | settings)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {line["stage"]: line["status"] for line in lines if line["what"] == "end"} == dict.fromkeys(
        stages, 0
    )
    asked = [line for line in lines if line["what"] in ("oracle", "7B")]
    assert [line for line in asked if line["ok"] is not True] == []
    assert len(asked) == 10  # of each kind of question one, and a case
    step = asked[-1]
    assert set(step["phases"]) == {"rollout", "reference", "update"}
    assert step["measured"] > 0
    assert json.loads((tmp_path / "scale.json").read_text()) == lines
    assert "it measures nothing" in (tmp_path / "scale.md").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "gpu.jsonl",
        "gpu.log",
        "scale.json",
        "scale.md",
    ]


def test_every_scale_stage_is_known_to_both_scripts(script: Callable[[str], Any]) -> None:
    """Bug: a case is added, and the run does not start it; or its time is more than there is."""
    run, stages = script("scale"), script("scale_stages")
    assert list(run.STAGES) == list(stages.STAGES)
    assert list(run.ALONE) == list(script("seven_b").CASES)
    assert max(run.TOGETHER.values()) + max(run.ALONE.values()) < 440


def test_scale_refuses_7b_on_a_cpu(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scale.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        script("scale").main()


def test_every_recipe_is_asked_for_bfloat16(script: Callable[[str], Any]) -> None:
    """Bug: a recipe is added and left out, or runs in float32 and nobody notices."""
    small = script("small")
    device = torch.device("cpu")
    calls = dict(small.each_recipe(device))
    assert sorted(calls) == sorted(small.recipes())
    words = importlib.import_module("test_recipes").SMALL
    numbers = {name: small.in_halves(name, words[name], Path("tiny"))[1] for name in calls}
    assert numbers["grpo"] == numbers["qwen_la_route"] == "bfloat16 weights"
    assert numbers["lookback_rl_7b"] == "bfloat16 products"
    assert numbers["tiny_base"] == "bfloat16 products, set in Python"


def test_scale_oracles_can_fail(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: questions that every answer passes. Here each image's rows of DeepStack are another's."""
    oracles = script("oracles")
    policy = oracles.on(torch.device("cpu"), "qwen3_vl")
    asked = dict(oracles.questions(policy))
    wrong = importlib.import_module("test_families").rows_of_neighbours
    monkeypatch.setattr(qwen_vl, "with_features", wrong)
    for name in ("scores, padded left", "COPY", "rollouts, copy"):
        with pytest.raises(AssertionError):
            asked[name]()
    assert oracles.holds(lambda: 1e-6)["ok"] is True
    assert oracles.holds(lambda: 1e-4)["ok"] is False
    assert oracles.holds(lambda: float("nan"))["ok"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_checks_of_the_head_can_fail(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Bug: limits so wide that a temperature which only one side has passes."""
    oracles = script("oracles")
    device = torch.device("cpu")
    found = oracles.head(device, dtype, tokens=40)
    assert all(gap <= most for gap, most in found.values()), found
    fused = oracles.fused_scores_and_kl
    monkeypatch.setattr(oracles, "fused_scores_and_kl", lambda *a, **k: fused(*a, **k | {"temperature": 0.8}))
    wrong = oracles.head(device, dtype, tokens=40)
    assert all(gap > most for gap, most in wrong.values()), wrong


def test_a_case_that_does_not_fit_is_not_run(script: Callable[[str], Any]) -> None:
    """Bug: minutes of a machine seldom at hand go into a step that the plan knows to fail."""
    from reflectvlm.planning import Compute, Job, Load, Training
    from reflectvlm.planning.cards import card
    from reflectvlm.planning.reading import read_shape

    seven_b = script("seven_b")
    planned = Job(
        shape=read_shape("Qwen/Qwen2.5-VL-7B-Instruct"),
        training=Training(weights="bfloat16", checkpointing=True),
        load=Load(prompt=1100, visual=1024, answer=256, group=8, prompts=2),
    )
    gpu = argparse.Namespace(device=torch.device("cuda"))
    assert "by the plan" in seven_b.hindrance(gpu, planned, card("24GB"))
    assert seven_b.hindrance(gpu, planned, card("H200")) is None
    away = dataclasses.replace(planned, compute=Compute(kind="zero2", offload_optimizer=True))
    # 8.3e9 numbers with 12 bytes, and 4 of a gradient.
    told = seven_b.hindrance(gpu, away, card("H200"))
    assert told is None or told.startswith("133 GB of host memory")


def test_scale_page_says_what_failed_and_what_was_left_out(script: Callable[[str], Any]) -> None:
    """Bug: a failed or skipped question is counted as one that holds, or not at all."""
    step = {"what": "7B", "name": "lora", "case": "LoRA", "ok": True, "measured": 50e9, "plan": 60e9}
    step |= {"predicted": 40e9, "at": "head", "seconds": {"rollout": 4.0, "update": 6.0}}
    step |= {"plan_seconds": {"rollout": 3.0, "update": 5.0}, "card_used": 65e9}
    lines = [
        {"what": "recipe", "name": "grpo", "ok": True},
        {"what": "recipe", "name": "tiny_base", "ok": False, "error": "no digits"},
        {"what": "setting", "name": "zero9", "ok": None, "skipped": "deepspeed is not installed"},
        {"what": "oracle", "name": "COPY", "ok": False, "gap": 0.5},
        step,
        step | {"measured": 39e9},
        {"what": "7B", "name": "whole", "case": "all", "ok": None, "skipped": "too large", "plan": 200e9},
        {"what": "end", "stage": "whole", "status": "time limit", "seconds": 60.0},
    ]
    page = script("scale_table").page(lines)
    assert "| recipes take steps in bfloat16 | 1 | 1 | 0 |" in page
    assert "float32 and bfloat16 | not asked |" in page
    assert "- **tiny_base** (recipe): no digits" in page
    assert "- zero9: not run, deepspeed is not installed" in page
    assert "- **COPY** (oracle): difference 0.5" in page
    assert "| LoRA | 4 | 6 | 10 | 8 | 50 | 40 | -20.0 % **beyond 15 %** | 65.0 | 60 | head |" in page
    assert "| +2.6 % |" in page
    assert "| all | not measured: too large |" in page
    assert "- whole: time limit, 60.0 s" in page


def test_the_cost_of_trust_can_be_measured(script: Callable[[str], Any], tmp_path: Path) -> None:
    """Bug: the benchmark reaches into the loop, and the loop is another one."""
    times, *others = script("trust").of_a_run(tmp_path, 1, 1, "prompts_per_step=1", "group_size=2")
    assert {name: len(found) for name, found in times.items()} == {
        "alone": 1,
        "in the loop": 1,
        "while saving": 1,
    }
    assert all(len(found) == 1 and found[0] > 0 for found in others)
