"""Which attention the parts of a model get for `policy.attention`, per device, and the line that says so.

    attention           vision tower                                       language model    packed rows
    auto                flash-attn on CUDA, installed, half products;      sdpa              prefix_attention
                        else sdpa
    sdpa                sdpa                                               sdpa              prefix_attention
    flash_attention_2   flash-attn, or an error with its remedy            sdpa              varlen for auto
    eager               eager                                              eager             dense

The tower is where flash-attn pays: an image's windows are one call of it, and a call each with sdpa. The
language model keeps sdpa, because rollouts bring masks of their own, which flash-attn does not take, and
where there is no mask sdpa is a flash kernel of torch. Its packed rows, most of an update, are one flash call
with `prefix_attention=varlen` (`varlen_kernels.py`); `auto` times it beside the others (`tree_choice.py`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch

from reflectvlm.models.feature_cache import vision_of
from reflectvlm.models.tree_choice import PrefixAttention
from reflectvlm.models.varlen_kernels import TOLERANCE, flash_attn_kernel, trial_error

Attention: TypeAlias = Literal["auto", "eager", "sdpa", "flash_attention_2"]
Availability: TypeAlias = Callable[[torch.device], str | None]
"""What keeps flash-attn from being used on a device, in words; None: nothing does."""

INSTALL = "pip install 'reflectvlm[flash-attn]'"
_FLASH: Literal["flash_attention_2"] = "flash_attention_2"
_HALVES = (torch.bfloat16, torch.float16)

log = logging.getLogger("reflectvlm")


class Choice(NamedTuple):
    """The vision tower's attention, and why."""

    vision: str
    why: str


def check_attention(attention: str, dtype: torch.dtype, cuda: bool, missing: Availability) -> None:
    """Raises ValueError for a word there is not, and at once for a flash-attn that no device here can use."""
    words = get_args(Attention)
    if attention not in words:
        raise ValueError(f"attention is {attention!r}. It must be one of {', '.join(words)}.")
    if attention == _FLASH:
        choose_attention(_FLASH, torch.device("cuda" if cuda else "cpu"), dtype, missing)


def choose_attention(
    attention: Attention, device: torch.device, dtype: torch.dtype, missing: Availability
) -> Choice:
    """The vision tower's attention on this device with products in this dtype.

    Raises ValueError if flash-attn is asked for by name and cannot be used.
    """
    if attention not in ("auto", _FLASH):
        return Choice(attention, "as asked")
    why, remedy = _hindrance(device, dtype, missing)
    if why is None:
        return Choice(_FLASH, "flash-attn fits, and products are halves")
    if attention == _FLASH:
        raise ValueError(
            f"attention='{_FLASH}' cannot be used: {why}. {remedy}, or use attention=auto or sdpa."
        )
    faster = f" (faster: {remedy[0].lower()}{remedy[1:]})" if device.type == "cuda" else ""
    return Choice("sdpa", f"{why}{faster}")


def prefix_attention_for(attention: Attention, wanted: PrefixAttention) -> PrefixAttention:
    """Who asks for flash-attn by name gets it for packed rows too, unless another kind is named."""
    return "varlen" if attention == _FLASH and wanted == "auto" else wanted


def settle_vision(model: Any, attention: Attention, device: torch.device, dtype: torch.dtype) -> None:
    """Sets the tower's attention for where the model is now. Says so once for a device and dtype."""
    config: Any = vision_of(model).config
    now = config._attn_implementation
    if attention in ("eager", "sdpa") or now not in ("sdpa", _FLASH):
        return  # as it was loaded
    choice = _told(attention, device, dtype)
    if now != choice.vision:
        config._attn_implementation = choice.vision


@functools.cache
def _told(attention: Attention, device: torch.device, dtype: torch.dtype) -> Choice:
    choice = choose_attention(attention, device, dtype, flash_attn_missing)
    # On a CPU there is nothing to choose.
    level = logging.INFO if device.type == "cuda" else logging.DEBUG
    log.log(level, "vision attention on %s: %s; %s", device, choice.vision, choice.why)
    return choice


@functools.cache
def flash_attn_missing(device: torch.device) -> str | None:
    """Tried on a small case before it is believed, forwards and backwards."""
    kernel = flash_attn_kernel()
    if kernel is None:
        return "flash-attn is not installed, or does not fit this torch"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        error = trial_error(kernel, device)
    except RuntimeError as failed:  # built for other cards
        return f"flash-attn fails on this device ({str(failed).splitlines()[0][:120]})"
    return None if error <= TOLERANCE else f"flash-attn is off by {error:.3g} in a trial"


def _hindrance(device: torch.device, dtype: torch.dtype, missing: Availability) -> tuple[str | None, str]:
    """Why flash-attn cannot be used, and what would help."""
    if device.type != "cuda":
        return f"flash-attn runs on CUDA devices, and this is {str(device)!r}", "Run on a GPU"
    if dtype not in _HALVES:
        name = str(dtype).removeprefix("torch.")
        return f"flash-attn takes bfloat16 and float16, and products are {name}", "Set compute=bfloat16"
    if problem := missing(device):
        return problem, f"Install the extra ({INSTALL})"
    return None, ""
