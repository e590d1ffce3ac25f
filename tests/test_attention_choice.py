"""Which attention the vision tower gets, in which words; what is available follows a script."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from fixtures import make_policy, noise_image
from reflectvlm import load_policy
from reflectvlm.models import attention_choice
from reflectvlm.models.attention_choice import (
    Attention,
    check_attention,
    choose_attention,
    flash_attn_missing,
    prefix_attention_for,
    settle_vision,
)
from reflectvlm.models.feature_cache import vision_of
from reflectvlm.models.qwen_vl import QwenVL

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def there(device: torch.device) -> str | None:
    assert device.type == "cuda", "asked only where it could run"


def gone(device: torch.device) -> str | None:
    assert device.type == "cuda"
    return "flash-attn is not installed"


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_flash_attn_is_taken_where_it_can_be(half: torch.dtype) -> None:
    """Bug: installed, and never used."""
    for wanted in ("auto", "flash_attention_2"):
        assert choose_attention(wanted, CUDA, half, there).vision == "flash_attention_2"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "dtype", "missing", "why"),
    [
        (CPU, torch.bfloat16, there, "flash-attn runs on CUDA devices, and this is 'cpu'"),
        (
            CUDA,
            torch.float32,
            there,
            "flash-attn takes bfloat16 and float16, and products are float32 (faster: set compute=bfloat16)",
        ),
        (
            CUDA,
            torch.bfloat16,
            gone,
            "flash-attn is not installed (faster: install the extra (pip install 'reflectvlm[flash-attn]'))",
        ),
    ],
)
def test_otherwise_sdpa_and_why(device: torch.device, dtype: torch.dtype, missing: object, why: str) -> None:
    """Bug: the slower attention is taken without a word on what would be faster."""
    assert choose_attention("auto", device, dtype, missing) == ("sdpa", why)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "dtype", "missing", "match"),
    [
        (
            CPU,
            torch.bfloat16,
            there,
            r"CUDA devices, and this is 'cpu'\. Run on a GPU, or use attention=auto",
        ),
        (CUDA, torch.float32, there, r"products are float32\. Set compute=bfloat16, or use"),
        (
            CUDA,
            torch.float16,
            gone,
            r"is not installed\. Install the extra \(pip install 'reflectvlm\[flash-attn",
        ),
    ],
)
def test_flash_attn_by_name_is_never_replaced(
    device: torch.device, dtype: torch.dtype, missing: object, match: str
) -> None:
    """Bug: a run that was told to use flash-attn goes on without it, at half the speed."""
    with pytest.raises(ValueError, match=r"attention='flash_attention_2' cannot be used: .*" + match):
        choose_attention("flash_attention_2", device, dtype, missing)  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["sdpa", "eager"])
def test_other_words_are_as_asked(word: Attention) -> None:
    """Bug: who turns flash-attn off gets it."""
    assert choose_attention(word, CUDA, torch.bfloat16, there).vision == word


def test_words_are_checked_where_they_are_written() -> None:
    """Bug: a word that the model library takes for a repository of kernels is downloaded and run."""
    with pytest.raises(
        ValueError, match=r"attention is 'kernels-community/flash'\. It must be one of auto, eager"
    ):
        load_policy("tiny", attention="kernels-community/flash")  # type: ignore[arg-type]
    check_attention("flash_attention_2", torch.bfloat16, True, there)
    with pytest.raises(ValueError, match="Run on a GPU"):
        check_attention("flash_attention_2", torch.bfloat16, False, there)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_flash_attn_on_a_cpu_is_an_error_at_once() -> None:
    """Bug: the error comes after the weights are loaded, from inside the model library."""
    with pytest.raises(ValueError, match=r"runs on CUDA devices, and this is 'cpu'\. Run on a GPU"):
        load_policy("tiny", attention="flash_attention_2", compute="bfloat16")


def test_packed_rows_follow_flash_attn_by_name() -> None:
    """Bug: `flash_attention_2` leaves most of an update to another kernel; or overrules a kind by name."""
    assert prefix_attention_for("flash_attention_2", "auto") == "varlen"
    assert prefix_attention_for("flash_attention_2", "dense") == "dense"
    assert prefix_attention_for("auto", "auto") == "auto"


def tower(policy: QwenVL) -> str:
    return str(vision_of(policy.model).config._attn_implementation)


def test_the_tower_s_attention_follows_the_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a policy that was chosen for a GPU is moved to a CPU, where flash-attn does not run; or its
    language model, whose masks flash-attn does not take, is changed too."""
    policy = make_policy()
    before = policy.model.model.language_model.config._attn_implementation
    monkeypatch.setattr(attention_choice, "flash_attn_missing", there)
    attention_choice._told.cache_clear()
    try:
        with caplog.at_level(logging.DEBUG, logger="reflectvlm"):
            for _ in range(2):
                settle_vision(policy.model, "auto", CUDA, torch.bfloat16)
                assert tower(policy) == "flash_attention_2"
                settle_vision(policy.model, "auto", CPU, torch.bfloat16)
                assert tower(policy) == "sdpa"
    finally:
        attention_choice._told.cache_clear()
    assert policy.model.model.language_model.config._attn_implementation == before
    told = [record.getMessage() for record in caplog.records]
    assert told == [  # once each
        "vision attention on cuda: flash_attention_2; flash-attn fits, and products are halves",
        "vision attention on cpu: sdpa; flash-attn runs on CUDA devices, and this is 'cpu'",
    ]


def test_features_settle_it() -> None:
    """Bug: the choice is made and nobody calls it. On a CPU it ends where it began, at sdpa."""
    policy = make_policy()
    vision_of(policy.model).config._attn_implementation = "flash_attention_2"
    policy.features([policy.patches(noise_image(0))])
    assert tower(policy) == "sdpa"


def test_eager_stays_eager() -> None:
    """Bug: an attention that the user chose is replaced."""
    policy = load_policy("tiny", attention="eager")
    policy.features([policy.patches(noise_image(0))])
    assert tower(policy) == "eager"
    plain = dataclasses.replace(policy, attention="auto")
    plain.features([plain.patches(noise_image(0))])
    assert tower(plain) == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_is_missing_here() -> None:
    """Bug: the real look-up raises where the package or the device is not there."""
    assert flash_attn_missing(CUDA) is not None
