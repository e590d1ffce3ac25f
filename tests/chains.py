"""A chain of three small recipes for tests: a cold start, a distillation with its model, SFT on its rows."""

from __future__ import annotations

from pathlib import Path

COLD = """# Cold start
defaults: [lookback_sft, _self_]
name: cold
steps: 1
rows_per_step: 2
evaluation: null
test: null
"""

ASK = """# Distillation
defaults: [_distill, policy: tiny, data: digit_traces, _self_]
name: ask
variant: semantic
start_from: {{recipe: {folder}/cold.yaml, overrides: ["seed=${{seed}}"]}}
rubric: {{_target_: training.rubric}}
accept: {{remainder: 0.3}}
wrong: repair
rows: 5
rows_per_batch: 2
sampling: {{_target_: reflectvlm.types.SamplingParams, max_tokens: 5}}
"""

LEARN = """# SFT on the distilled rows
defaults: [_sft, policy: tiny, data: rows, _self_]
name: learn
data_from: {{recipe: {folder}/ask.yaml, overrides: ["seed=${{seed}}"]}}
rubric: {{_target_: training.rubric}}
steps: 1
rows_per_step: 2
optimizer: {{_target_: reflectvlm.train.optim.AdamW, lr: 1.0e-3}}
"""

PIPELINE = """# A pipeline
stages: {{learn: ["micro_tokens=800"]}}
held_out:
  _target_: reflectvlm.train.evaluate.Evaluation
  data: {{_target_: reflectvlm.data.digits.Digits, split: test, size: 3}}
  max_tokens: 6
measures: {{hallucination: {{_target_: test_pipeline.seen_things}}}}
table:
  - name: base
    recipe: {folder}/learn.yaml
    start: true
    instruction: {{_target_: reflectvlm.data.instructions.instruction, name: boxed}}
    rubric: {{_target_: test_pipeline.judged}}
  - {{name: taught, recipe: {folder}/learn.yaml}}
  - name: taught twice
    recipe: {folder}/learn.yaml
    overrides: [steps=2]
    reattention: {{_target_: reflectvlm.reattention.VisualCopy, trigger: <back>}}
"""


def write_chain(folder: Path) -> Path:
    """The recipes and the pipeline, each in its file of `folder`."""
    for name, text in (("cold", COLD), ("ask", ASK), ("learn", LEARN), ("pipe", PIPELINE)):
        text = text.format(folder=folder) if name != "cold" else text
        (folder / f"{name}.yaml").write_text(text)
    return folder
