"""Kinds of attention over packed rows: which one is taken, and kernels that cannot run here."""

from __future__ import annotations

import dataclasses
import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures import make_policy
from reflectvlm.models import tree_attention, tree_choice, varlen_kernels
from reflectvlm.models.qwen_vl import QwenVL, load_policy
from reflectvlm.models.tree import Line
from reflectvlm.models.tree_choice import (
    DENSE_ELEMENTS,
    Heads,
    accelerator_kinds,
    attention_call,
    choose,
    fastest,
    timed,
)
from reflectvlm.models.varlen_kernels import plain_varlen, trial_error, varlen_kernel
from test_prefix import gradients, rows
from test_tree import line_of, make_batch

HEADS = Heads(query=4, key=2, size=16, dtype=torch.float32, device=torch.device("cpu"))
SMALL = line_of(make_batch([(2, 3), (2, 4)]))
"""A mask of 10 x 10."""
LARGE = line_of(make_batch([(99, 60), (99, 60)]))
"""A mask of 220 x 220 = 48,400."""


def test_on_a_cpu_the_size_of_the_mask_decides() -> None:
    """Bug: timing, which differs from run to run, decides where a resumed run must be exact."""
    assert choose("auto", "sdpa", HEADS, SMALL) == "dense"
    assert choose("auto", "sdpa", HEADS, LARGE) == "split"
    assert choose("auto", "eager", HEADS, LARGE) == "dense"
    assert choose("varlen", "sdpa", HEADS, SMALL) == "varlen"


def test_the_rule_is_what_was_measured() -> None:
    """Bug: a rule that nobody measured any more, or a table of another rule."""
    found = json.loads((Path(__file__).parents[1] / "benchmarks/results/tree_attention.json").read_text())
    assert found["rule"] == DENSE_ELEMENTS
    for row in found["rows"]:
        fastest_one = min(row["seconds"], key=row["seconds"].get)
        if not DENSE_ELEMENTS / 2 < row["mask"] < DENSE_ELEMENTS * 2:
            assert fastest_one == ("dense" if row["mask"] < DENSE_ELEMENTS else "split"), row


def test_on_an_accelerator_the_fastest_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a choice by name, one anew for each batch, or one that nobody is told."""
    asked: list[Any] = []

    def scripted(heads: Heads, line: Line, kinds: Any) -> dict[str, float]:
        asked.append((heads, line, kinds))
        return {"dense": 0.4, "split": 0.1, "varlen": 0.2}

    monkeypatch.setattr(tree_choice, "timed", scripted)
    monkeypatch.setattr(tree_choice, "_chosen", {})
    there = HEADS._replace(dtype=torch.bfloat16, device=torch.device("cuda", 0))
    with caplog.at_level(logging.INFO, logger="reflectvlm"):
        assert [choose("auto", "sdpa", there, line) for line in (LARGE, SMALL)] == ["split"] * 2
    assert asked == [(there, LARGE, ("dense", "split", "varlen", "flex"))]
    assert "split, by time relative to the fastest: dense 4.00, split 1.00, varlen 2.00" in caplog.text
    assert accelerator_kinds(there._replace(dtype=torch.float32)) == ("dense", "split", "flex")


def test_timing_takes_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a kernel that is missing ends the run; or the run's random numbers depend on a timing."""
    before = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO, logger="reflectvlm"):
        found = timed(HEADS, SMALL, ("dense", "split", "varlen", "flex"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found.keys() == {"dense", "split"}
    assert all(seconds > 0 for seconds in found.values())
    assert "varlen left out: prefix_attention='varlen' runs on a CUDA device" in caplog.text
    assert "flex left out: prefix_attention='flex' has no gradients on a CPU" in caplog.text
    with pytest.raises(RuntimeError, match=r"None of varlen, flex runs on packed rows of 10 tokens"):
        timed(HEADS, SMALL, ("varlen", "flex"))
    assert fastest({"dense": 2.0, "flex": 1.0}, HEADS) == "flex"


def test_what_is_timed_is_the_attention_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the trial times another call than the forward makes: the dense mask left out, say."""
    calls: list[Any] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Tensor:
        calls.append((tuple(query.shape), None if mask is None else tuple(mask.shape)))
        return tree_attention.sdpa(query, key, value, mask, **settings)

    monkeypatch.setattr(tree_choice, "sdpa", watched)
    attention_call("dense", HEADS, LARGE)()
    assert calls == [((1, 4, 220, 16), (1, 1, 220, 220))]


def test_auto_is_what_it_names() -> None:
    """Bug: `auto` and the kind it stands for differ in a bit, so that a note of it explains nothing."""
    policy = make_policy()
    batch = policy.batch(rows(policy))
    chosen = choose("auto", "sdpa", HEADS, line_of(batch))
    found, named = (
        gradients(dataclasses.replace(policy, prefix_attention=kind), batch) for kind in ("auto", chosen)
    )
    assert torch.equal(found[0], named[0])
    assert all(torch.equal(one, other) for one, other in zip(found[1], named[1], strict=True))


def test_settings_are_checked_where_they_are_written() -> None:
    """Bug: a run ends at its first update over a word in its recipe."""
    with pytest.raises(ValueError, match=r"prefix_attention is 'sparse'\. It must be one of auto, dense"):
        load_policy("tiny", prefix_attention="sparse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prefix_attention='split' needs attention=sdpa"):
        load_policy("tiny", prefix_attention="split", attention="eager")
    assert load_policy("tiny", prefix_attention="split").prefix_attention == "split"


def test_eager_attention_takes_dense_masks() -> None:
    """Bug: the kinds that have no mask take the place of an attention the user chose."""
    policy = load_policy("tiny", attention="eager")
    batch = policy.batch(rows(policy))
    found = gradients(policy, batch)[0]
    wanted = gradients(load_policy("tiny", prefix_attention="split"), batch)[0]
    assert policy.model.model.language_model.config._attn_implementation == "eager"
    assert (found - wanted).abs().max() < 1e-4
    with pytest.raises(ValueError, match="needs attention=sdpa"):
        gradients(dataclasses.replace(policy, prefix_attention="split"), batch)


def test_a_saved_model_names_no_function_of_ours(tmp_path: Path) -> None:
    """Bug: the attention function that stays in place is written down, and nobody else can load the model."""
    policy = make_policy(prefix_attention="split")
    gradients(policy, policy.batch(rows(policy)))
    assert policy.model.model.language_model.config._attn_implementation == tree_attention.NAME
    policy.save(tmp_path)
    assert "reflectvlm_" not in (tmp_path / "config.json").read_text()
    again = load_policy(str(tmp_path))
    assert again.model.model.language_model.config._attn_implementation == "sdpa"


# -- kernels for segments of unequal length ---------------------------------------------------------------


def test_varlen_is_refused_on_a_cpu(tiny_policy: QwenVL) -> None:
    policy = dataclasses.replace(tiny_policy, prefix_attention="varlen")
    batch = policy.batch(rows(policy))
    with pytest.raises(ValueError, match=r"runs on a CUDA device, and the policy is on 'cpu'\. Load it with"):
        gradients(policy, batch)


def upper_left(*arguments: Any) -> Tensor:
    """Causal at the other corner, as torch's own attention has it where there are more keys."""
    query, key, value, cu_q, cu_k, _, _, scaling = arguments
    found = []
    for (q0, q1), (k0, k1) in zip(_cuts(cu_q), _cuts(cu_k), strict=True):
        part = [
            each[None, a:b].transpose(1, 2)
            for each, a, b in ((query, q0, q1), (key, k0, k1), (value, k0, k1))
        ]
        out = torch.nn.functional.scaled_dot_product_attention(
            *part, is_causal=True, scale=scaling, enable_gqa=True
        )
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


def _cuts(limits: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(limits.tolist()))


def no_gradient_of_keys(*arguments: Any) -> Tensor:
    query, key, *others = arguments
    return plain_varlen(query, key.detach() + 0 * key, *others)


def test_the_trial_knows_the_right_kernel() -> None:
    """Bug: a kernel with another convention is used, and answers attend to the prompt's beginning only."""
    for dtype in (torch.bfloat16, torch.float32):
        assert trial_error(plain_varlen, "cpu", dtype) < varlen_kernels.TOLERANCE / 2
        assert trial_error(upper_left, "cpu", dtype) > 4 * varlen_kernels.TOLERANCE
        assert trial_error(no_gradient_of_keys, "cpu", dtype) > 4 * varlen_kernels.TOLERANCE


def test_flash_attn_is_called_as_it_wants() -> None:
    """Its keywords, checked without it: a wrong `causal` or scale shows in the trial."""

    def scripted(q: Any, k: Any, v: Any, *limits: Any, softmax_scale: float, causal: bool) -> Tensor:
        assert causal
        return plain_varlen(q, k, v, *limits, softmax_scale)

    assert trial_error(varlen_kernels._flash_attn(scripted), "cpu") < varlen_kernels.TOLERANCE


def test_torchs_kernel_is_called_as_it_wants() -> None:
    def scripted(
        q: Any, k: Any, v: Any, *limits: Any, scale: float, window_size: Any, enable_gqa: bool
    ) -> Tensor:
        assert (window_size, enable_gqa) == ((-1, 0), True)
        return plain_varlen(q, k, v, *limits, scale)

    kernel = varlen_kernels._torch_varlen(scripted)
    assert kernel is not None
    assert trial_error(kernel, "cpu") < varlen_kernels.TOLERANCE

    def early(*, is_causal: bool = False) -> Tensor:
        raise AssertionError(is_causal)

    assert varlen_kernels._torch_varlen(early) is None, "the first release: no shared key heads"


def test_a_kernel_that_fails_the_trial_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: nothing tells a user that neither kernel was taken, nor why."""
    monkeypatch.setattr(varlen_kernels, "flash_attn_kernel", lambda: None)
    monkeypatch.setattr(varlen_kernels, "torch_kernel", lambda: upper_left)
    monkeypatch.setattr(varlen_kernels, "trial_error", lambda kernel, _: trial_error(kernel, "cpu"))
    try:
        with pytest.raises(ValueError, match=r"flash-attn has none, torch's is off by .* Install the extra"):
            varlen_kernel(torch.device("cuda", 7))
        monkeypatch.setattr(varlen_kernels, "torch_kernel", lambda: plain_varlen)
        assert varlen_kernel(torch.device("cuda", 7)) is plain_varlen
    finally:
        varlen_kernel.cache_clear()


def test_trials_run_where_nothing_is_trained() -> None:
    """Bug: the first packed batch is the reference's, scored without gradients, and every kind fails its
    trial."""
    with torch.no_grad():
        assert set(timed(HEADS, SMALL, ("dense", "split"))) == {"dense", "split"}
        assert trial_error(plain_varlen, "cpu") < varlen_kernels.TOLERANCE


def test_a_variable_length_kernel_is_refused_in_float32() -> None:
    """Bug: an error of a kernel in the middle of a run instead of a remedy before it."""
    with pytest.raises(ValueError, match=r"needs bfloat16 or float16 products.* in float32\. Set compute="):
        choose("varlen", "sdpa", HEADS._replace(device=torch.device("cuda")), SMALL)
