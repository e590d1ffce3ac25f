"""Vision features for the whole run, where the tower is frozen: one image, one pass of the tower.

Rollouts, reference, updates, evaluations, inserted blocks and later epochs ask for the features of the same
images again and again; while no parameter of vision tower and projector trains the answer stays the same.
A key is made of

- the image after processing: sha256 of its pixel values, their shape and kind, and the grid, so limits on
  pixels, resizing and normalisation are all in it;
- the tower: sha256 of its parameters and buffers, taken at the first use and again once one of them was
  written to (the reference after a sync, a checkpoint that was loaded), and its configuration;
- how it computes: dtype of matrix products, kind of device, attention implementation, version of torch.

An image that is not known runs through the tower alone, so that its features do not depend on which
images were missing beside it: a resumed run, whose memory is empty, has the bits of the unbroken one.

Left out: weights written past torch's count of writes (through `.data` or NumPy), which nobody can see; call
`forget` after such a thing. Parts that behave differently by a switch, such as adapters turned off.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from reflectvlm.models.feature_store import FolderStore, MemoryStore, digest_of
from reflectvlm.types import Patches

_MB = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureCache:
    """Example: `load_policy("tiny", freeze_parts=["vision", "projector"], feature_cache=FeatureCache())`

    One cache may serve several policies, and policies of several processes one folder. In an entry is what
    the tower gave, in its own dtype: 334 visual tokens of a 7B model in bfloat16 are 2.4 MB.
    """

    memory_mb: float = 512.0
    """Host memory; 0 keeps nothing there. Room for less than all images of an epoch helps little: in a
    new order each time, most have left when they come again."""
    folder: str | Path | None = None
    """Where features are kept beyond the run; None for nowhere."""
    disk_mb: float = 16384.0
    """What the files in `folder` may take together."""
    _towers: WeakKeyDictionary[nn.Module, _Known] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )
    _images: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, init=False, repr=False)
    """Pixels of images that are in use -> (torch's count of writes to them, their digest)."""

    def __post_init__(self) -> None:
        if self.memory_mb < 0 or self.disk_mb < 0:
            raise ValueError(
                f"FeatureCache has memory_mb={self.memory_mb:g} and disk_mb={self.disk_mb:g}. Neither may be "
                "below 0; 0 keeps nothing there."
            )
        if not self.memory_mb and not (self.folder and self.disk_mb):
            raise ValueError(
                "FeatureCache has memory_mb=0 and no folder with disk_mb above 0, so it would keep nothing. "
                "Give it memory or a folder, or leave policy.feature_cache out (null)."
            )
        if self.folder is not None:
            _make_folder(Path(self.folder))

    def __call__(
        self,
        images: Sequence[Patches],
        model: nn.Module,
        compute: str | None,
        run: Callable[[Sequence[Patches]], Float[Tensor, "V D"]],
    ) -> list[Float[Tensor, "_ D"]]:
        """Features of each image, in host memory; `run` is the tower, for those not known yet. Not to be
        written to. Raises ValueError if a parameter that makes them trains."""
        tower = f"{self._tower(model)} {compute}"
        found: dict[str, Tensor] = {}
        keys = [self._key(image, tower) for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in found:
                found[key] = self._features(key, image, run)
        return [found[key] for key in keys]

    def forget(self) -> None:
        """Takes all weights and pixels for new ones. What is kept stays, under its keys."""
        self._towers.clear()
        self._images.clear()

    # -- keys -----------------------------------------------------------------------------------

    def _key(self, image: Patches, tower: str) -> str:
        pixels = image.pixels
        writes = 0 if pixels.is_inference() else pixels._version
        known = self._images.get(pixels)
        if known is None or known[0] != writes:
            known = self._images[pixels] = (writes, digest_of(pixels))
        about = (tower, known[1], tuple(pixels.shape), pixels.dtype, tuple(image.grid))
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def _tower(self, model: nn.Module) -> str:
        tower = vision_of(model)
        check_frozen(tower)
        stamp = tuple(_stamp(tensor) for _, tensor in _tensors(tower))
        known = self._towers.get(tower)
        if known is None or known.stamp != stamp:
            held = [tensor.untyped_storage() for _, tensor in _tensors(tower)]
            known = self._towers[tower] = _Known(stamp, held, tower_digest(tower))
        return known.digest

    # -- values ---------------------------------------------------------------------------------

    def _features(
        self, key: str, image: Patches, run: Callable[[Sequence[Patches]], Float[Tensor, "V D"]]
    ) -> Float[Tensor, "V D"]:
        value = self._memory.get(key)
        if value is None and self._disk is not None:
            value = self._disk.get(key)
        if value is None or len(value) != image.grid.tokens:
            with torch.no_grad():
                value = run([image]).cpu()
            if self._disk is not None:
                self._disk.put(key, value)
        self._memory.put(key, value)
        return value

    @functools.cached_property
    def _memory(self) -> MemoryStore:
        return MemoryStore(int(self.memory_mb * _MB))

    @functools.cached_property
    def _disk(self) -> FolderStore | None:
        return None if self.folder is None else FolderStore(Path(self.folder), int(self.disk_mb * _MB))


class _Known(NamedTuple):
    """A tower whose digest was taken."""

    stamp: tuple[Any, ...]
    held: list[torch.UntypedStorage]
    """Held on to, so that no other weights can come to lie at the same address unnoticed."""
    digest: str


def vision_of(model: nn.Module) -> nn.Module:
    """The part with everything that makes features: vision tower and projector."""
    return next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "visual")


def check_frozen(tower: nn.Module) -> None:
    """Raises ValueError if a parameter trains."""
    training = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    if training:
        raise ValueError(
            f"policy.feature_cache is set, but {len(training)} tensors of vision tower and projector train "
            f"({training[0]!r} is the first), so the features of an image change with every update. Freeze "
            "both with policy.freeze_parts=[vision, projector], or set policy.feature_cache=null."
        )


def tower_digest(tower: nn.Module) -> str:
    """sha256 of all that decides what the tower makes of an image, but for the dtype of its products."""
    config = getattr(tower, "config", None)
    devices = sorted({tensor.device.type for _, tensor in _tensors(tower)})
    about = [
        config.to_json_string() if config is not None else "",
        str(getattr(config, "_attn_implementation", None)),
        str(devices),
        torch.__version__,
    ]
    digest = hashlib.sha256(repr(about).encode())
    for name, tensor in _tensors(tower):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest_of(tensor)}".encode())
    return digest.hexdigest()


def _tensors(tower: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from tower.named_parameters()
    yield from tower.named_buffers()


def _stamp(tensor: Tensor) -> tuple[Any, ...]:
    """Changes whenever the tensor is written to or replaced."""
    writes = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), writes, tensor.dtype, tensor.shape


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = str(error.strerror or error)
    else:
        if os.access(folder, os.W_OK | os.X_OK):
            return
        problem = "no right to write there"
    raise ValueError(
        f"FeatureCache.folder is {str(folder)!r}, which cannot be written: {problem}. Give a folder that "
        "can, or folder=null to keep features in memory only."
    )
