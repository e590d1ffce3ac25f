"""The policy for Qwen2-VL, Qwen2.5-VL and Qwen3-VL, on the stock classes of transformers.

No part of the model is patched: features are scattered into the input embeddings, positions are
always explicit (so no `rope_deltas` of an earlier call can leak in), and log-probs are taken from
hidden states, so [T, 152k] logits are never built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reflectvlm import ops
from reflectvlm.batch import Batch, ReferenceStates, TokenScores
from reflectvlm.head import fused_scores_and_kl, fused_token_scores, next_token_logits
from reflectvlm.models.attention import AttentionWatch, watching
from reflectvlm.models.attention_choice import (
    Attention,
    check_attention,
    flash_attn_missing,
    prefix_attention_for,
    settle_vision,
)
from reflectvlm.models.called_as import called_as
from reflectvlm.models.chat import chat_spans
from reflectvlm.models.export import merged, save_adapter
from reflectvlm.models.families import Embedded, Family, family_of, with_features
from reflectvlm.models.feature_cache import FeatureCache, check_frozen, vision_of
from reflectvlm.models.freezing import Embeddings, Part, check_embeddings
from reflectvlm.models.loading import (
    Dtype,
    enable_checkpointing,
    load_image_processor,
    load_model,
    load_tokenizer,
)
from reflectvlm.models.lora import LoRA, check_lora, choose_what_trains
from reflectvlm.models.new_tags import add_tags
from reflectvlm.models.offsets import token_offsets
from reflectvlm.models.prefix import pack
from reflectvlm.models.products import fast_products
from reflectvlm.models.quantized import Quantize
from reflectvlm.models.tree import Line, line_up
from reflectvlm.models.tree_attention import Kind, Tree, prefix_tree
from reflectvlm.models.tree_choice import PrefixAttention, check_prefix_attention, choose, heads_of
from reflectvlm.spans import VisionIds, collate, count_tokens
from reflectvlm.types import Grid, Instruction, Patches, Prompt, Sample, Spans, Text

# Ids that stand for pixels. A policy that samples one makes tokens and features disagree.
_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def load_policy(
    path: str = "tiny",
    *,
    dtype: Dtype = "float32",
    compute: Dtype | None = None,
    attention: Attention = "auto",
    freeze_parts: Sequence[Part] = (),
    new_tags: Sequence[str] = (),
    embeddings: Embeddings = "all",
    lora: LoRA | None = None,
    quantize: Quantize | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    gradient_checkpointing: bool = False,
    prefix_attention: PrefixAttention = "auto",
    chunk: int = 256,
    trust_remote_code: bool = False,
    feature_cache: FeatureCache | None = None,
) -> QwenVL:
    """A policy from `"tiny"`, a folder, or a hub name.

    `dtype` is that of the weights: with AdamW at a rate like 1e-6 it must be float32, because a
    bfloat16 weight is too coarse to take so small a step. `compute` is the dtype of the matrix
    products (autocast); None is `dtype`. `freeze_parts` of vision, projector, language stay as they
    are. `new_tags` become special tokens in spare embedding rows (`new_tags.py`); those the folder has
    already stay what they are. `embeddings="new_tags"` trains of embedding and head only the rows of
    `new_tags`, also where language is frozen. Pixel limits are those of the image after resizing; None
    keeps the model's own. `attention` is auto, sdpa, eager or flash_attention_2 (`attention_choice.py`),
    `prefix_attention` how answers that share a prompt attend (`tree_choice.py`): auto, dense, split, varlen
    or flex. `chunk` is how many tokens' logits exist at once. `feature_cache`
    keeps the features of every image for the whole run, for which vision and projector must be frozen.
    `lora` freezes the model and trains adapters in it, and the rows of `new_tags` where there are any
    (`lora.py`); the weights may then be bfloat16. `quantize` stores the language model's layers in 4 or
    8 bits: for adapters, or for answering (`quantized.py`).
    """
    check_embeddings(embeddings, new_tags)
    check_prefix_attention(prefix_attention, attention)
    products = getattr(torch, compute or dtype)
    check_attention(attention, products, torch.cuda.is_available(), flash_attn_missing)
    check_lora(lora, dtype, compute, new_tags)
    model = load_model(
        path,
        dtype=dtype,
        attention=attention,
        quantize=quantize,
        compute=compute,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    tags = add_tags(model, tokenizer, new_tags)
    choose_what_trains(model, tags, freeze_parts=freeze_parts, embeddings=embeddings, lora=lora)
    if gradient_checkpointing:
        enable_checkpointing(model)
    return QwenVL(
        model=model,
        tokenizer=tokenizer,
        image_processor=load_image_processor(path, min_pixels, max_pixels),
        source=path,
        compute=compute,
        attention=attention,
        prefix_attention=prefix_attention_for(attention, prefix_attention),
        chunk=chunk,
        feature_cache=feature_cache,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class QwenVL:
    """Satisfies `protocols.Policy`."""

    model: Any
    tokenizer: Any
    image_processor: Any
    source: str = ""
    padding_side: Literal["right", "left"] = "right"
    """Which side short rows are padded on. No result depends on it; tests try both."""
    compute: Dtype | None = None
    """Dtype of matrix products; None is that of the weights."""
    attention: Attention = "auto"
    """What the vision tower attends with, settled for the device it is on (`attention_choice.py`)."""
    share_prefix: bool = True
    """Rows of one prompt run it once (`prefix.py`). False is the plain way; results are the same."""
    prefix_attention: PrefixAttention = "auto"
    """How they attend then: `dense` is the portable reference; results are the same."""
    chunk: int = 256
    """Trained tokens whose logits exist at one time."""
    fast_products: bool = True
    """On a CPU linear layers go through oneDNN where it is fast (`products.py`). False: PyTorch's choice."""
    fused_head: bool = True
    """Log-probs a tile of the vocabulary at a time (`head.py`). False is the plain way."""
    feature_cache: FeatureCache | None = None
    """Keeps features for the whole run where the tower is frozen; None runs it each time."""

    def __post_init__(self) -> None:
        if not isinstance(self.feature_cache, FeatureCache | None):
            raise ValueError(  # noqa: TRY004 - what a user wrote in a recipe
                f"feature_cache is {self.feature_cache!r}. It takes FeatureCache, in a recipe "
                "{_target_: reflectvlm.models.feature_cache.FeatureCache, memory_mb: 512}, or null."
            )
        if self.feature_cache is not None and self.model is not None:
            check_frozen(vision_of(self.model))

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.model
        return module

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @functools.cached_property
    def family(self) -> Family:
        return family_of(self.model.config.model_type)

    @functools.cached_property
    def vision(self) -> VisionIds:
        config = self.model.config
        return VisionIds(config.vision_start_token_id, config.image_token_id, config.vision_end_token_id)

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a turn."""
        return tuple(self.tokenizer.convert_tokens_to_ids(list(_END_TOKENS)))

    @functools.cached_property
    def pad_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids("<|endoftext|>"))

    @functools.cached_property
    def reserved_ids(self) -> tuple[int, ...]:
        """Ids that stand for pixels, and embedding rows that no token owns."""
        vision = self.tokenizer.convert_tokens_to_ids(list(_VISION_TOKENS))
        spare = range(len(self.tokenizer), self.model.lm_head.out_features)
        return tuple(sorted({*vision, *spare}))

    @property
    def banned(self) -> Int[Tensor, " R"]:
        return _on_device(self.reserved_ids, self.device)

    def prompt(self, sample: Sample, instruction: Instruction) -> Prompt:
        spans = chat_spans(self.tokenizer, self.vision, sample, instruction)
        return Prompt(sample=sample, spans=spans, patches=tuple(map(self.patches, sample.images)))

    def for_reading(self) -> QwenVL:
        """The policy without its weights, small enough for another process: it makes prompts and encodes
        gold answers."""
        light = dataclasses.replace(self, model=None, feature_cache=None)
        for name in ("vision", "end_ids", "pad_id", "reserved_ids"):  # what follows from the model
            vars(light)[name] = getattr(self, name)
        return light

    def patches(self, image: Any) -> Patches:
        """One image, resized to the run's limits and cut into patches."""
        made = self.image_processor(images=[image], return_tensors="pt")
        frames, rows, columns = made["image_grid_thw"][0].tolist()
        merge = self.image_processor.merge_size
        return Patches(pixels=made["pixel_values"], grid=Grid(frames, rows // merge, columns // merge))

    def prompt_length(self, prompt: Prompt) -> int:
        """Tokens of a prompt, visual tokens counted."""
        return count_tokens(prompt.spans, prompt.grids)

    def answer(self, text: str) -> tuple[Text]:
        """A gold answer as a trained span that ends its turn. Special tags count as special.

        Raises ValueError if the text spells a token that stands for pixels.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if reserved := sorted({*ids} & {*self.reserved_ids}):
            raise ValueError(
                f"A gold answer spells {self.decode(reserved)!r}, which stands for pixels and can be neither "
                f"sampled nor trained. Remove it from: {text[:80]!r}"
            )
        return (Text(ids=(*ids, self.end_ids[0]), trained=True),)

    def batch(self, sequences: Sequence[tuple[Prompt, Spans]]) -> Batch:
        return collate(sequences, self.vision, self.pad_id, side=self.padding_side).to(self.device)

    def features(self, images: Sequence[Patches]) -> Float[Tensor, "V F"]:
        """One row for each visual token, with all that the language model takes of it (`families.py`)."""
        if not images:
            width = self.family.width(self.model.config)
            return torch.zeros(0, width, device=self.device, dtype=self.model.dtype)
        settle_vision(self.model, self.attention, self.device, self._products)
        if self.feature_cache is None:
            return self._encoded(images).to(self.model.dtype)
        kept = self.feature_cache(images, self.model, self.compute, self._encoded)
        return torch.cat([one.to(self.device) for one in kept]).to(self.model.dtype)

    def _encoded(self, images: Sequence[Patches]) -> Float[Tensor, "V F"]:
        """One pass of vision tower and projector; features in the dtype they come in."""
        merge = self.image_processor.merge_size
        grids = [(i.grid.frames, i.grid.rows * merge, i.grid.columns * merge) for i in images]
        pixels = torch.cat([image.pixels for image in images]).to(self.device)
        with self._arithmetic():
            made = self.model.model.get_image_features(
                pixels, torch.tensor(grids, device=self.device), return_dict=True
            )
        return self.family.rows(made)

    def embed(
        self, ids: Int[Tensor, "B T"], visual: Int[Tensor, "B T"], features: Float[Tensor, "V F"]
    ) -> Embedded:
        """Input embeddings with features where `visual` names a feature row."""
        width = self.family.width(self.model.config)
        assert features.shape[1] == width, f"feature rows of {features.shape[1]} numbers, not {width}"
        return with_features(self.model.get_input_embeddings()(ids), visual, features)

    def hidden(
        self,
        embedded: Embedded,
        positions: Int[Tensor, "3 B T"],
        mask: Tensor | None,
        cache: Any = None,
        watch: AttentionWatch | None = None,
        tree: Tree | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Last hidden states. `mask` is [B, T] over columns, or [B, 1, T, S] over cached keys; None
        is plain causal attention, or that of packed rows along `tree`. `watch` learns what its queries
        attend to."""
        language_model = self.model.model.language_model
        with self._arithmetic(), watching(language_model, watch) as watched:
            out = language_model(
                inputs_embeds=embedded.tokens,
                position_ids=positions,
                attention_mask=self._attention_mask(mask),
                past_key_values=cache,
                use_cache=cache is not None,
                **embedded.deepstack,
                **watched,
                **prefix_tree(language_model, tree),
            )
        return out.last_hidden_state

    def logits(self, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B vocabulary"]:
        """Next-token logits in float32 with reserved ids at minus infinity."""
        with self._arithmetic():
            logits = next_token_logits(self.model.lm_head, hidden).float()
        # Without gradients the logits are nobody else's.
        fill = logits.index_fill if logits.requires_grad else logits.index_fill_
        return fill(-1, self.banned, float("-inf"))

    def score(
        self,
        batch: Batch,
        features: Float[Tensor, "V F"],
        temperature: float = 1.0,
        *,
        entropy: bool = True,
        reference: ReferenceStates | None = None,
    ) -> TokenScores:
        row, column = batch.trained.nonzero(as_tuple=True)
        hidden = self._predicting(batch, features, row, column)
        with self._autocast():
            logprobs, spread, kl = called_as(
                self.model.lm_head,
                self._token_scores,
                hidden,
                batch.ids[row, column],
                reference,
                banned=self.banned,
                temperature=temperature,
                chunk=self.chunk,
                entropy=entropy,
            )
        empty = torch.zeros(batch.ids.shape, device=logprobs.device, dtype=logprobs.dtype)
        return TokenScores(
            logprobs=empty.index_put((row, column), logprobs),
            entropy=empty.index_put((row, column), spread),
            kl=None if kl is None else empty.index_put((row, column), kl),
        )

    def states(self, batch: Batch, features: Float[Tensor, "V F"]) -> ReferenceStates:
        """Satisfies `protocols.Reference`."""
        with torch.no_grad():
            hidden = self._predicting(batch, features, *batch.trained.nonzero(as_tuple=True))
            return ReferenceStates(hidden=hidden, weight=self.model.lm_head.weight.detach())

    def _predicting(
        self, batch: Batch, features: Float[Tensor, "V F"], row: Int[Tensor, " K"], column: Int[Tensor, " K"]
    ) -> Float[Tensor, "K D"]:
        """Hidden states from which these tokens are predicted."""
        hidden, where = self._hidden_states(batch, features)
        # Not hidden[…]: a group's answers share places, and its backward on a CPU adds with all threads at
        # once, in another order each time. On a GPU it is this one's that has no order, but it need not sort.
        return hidden.flatten(0, 1).index_select(0, where[row, batch.predictor[row, column]])

    def _hidden_states(
        self, batch: Batch, features: Float[Tensor, "V F"]
    ) -> tuple[Float[Tensor, "N S D"], Int[Tensor, "B T"]]:
        """Hidden states, and for each token of the batch its place in them, as n * S + s."""
        if self.share_prefix and (line := line_up(batch)) is not None:
            packed = pack(batch, line, self._prefix_kind(line), self.pad_id)
            embedded = self.embed(packed.ids, packed.visual, features)
            return self.hidden(embedded, packed.positions, packed.mask, tree=packed.tree), packed.where
        # With padding on the right no token sees it, and causal attention needs no mask.
        mask = None if not batch.layout.start.any() else batch.attention.long()
        hidden = self.hidden(self.embed(batch.ids, batch.visual, features), batch.positions, mask)
        return hidden, torch.arange(batch.ids.numel(), device=self.device).view(batch.ids.shape)

    @property
    def _products(self) -> torch.dtype:
        """Dtype of the model's matrix products."""
        return self.model.dtype if self.compute is None else getattr(torch, self.compute)

    def _prefix_kind(self, line: Line) -> Kind:
        attention = self.model.config._attn_implementation
        heads = heads_of(self.model.model.language_model, self._products)
        return choose(self.prefix_attention, attention, heads, line)

    def _token_scores(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        reference: ReferenceStates | None,
        *,
        entropy: bool,
        **settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs, entropies, and the KL to a reference if there is one."""
        ours = hidden, weight
        theirs = None if reference is None else (reference.hidden, reference.weight)
        if not self.fused_head:
            kl = None if theirs is None else ops.token_kl(*ours, *theirs, **settings)
            return *ops.token_scores(*ours, targets, entropy=entropy, **settings), kl
        settings |= {"entropy": entropy, "fast_products": self.fast_products}
        if theirs is None:
            return *fused_token_scores(*ours, targets, **settings), None
        return fused_scores_and_kl(*ours, targets, *theirs, **settings)

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """How the model's matrix products are computed."""
        if self.compute is None:
            return fast_products(self.fast_products and self.device.type == "cpu")
        return self._autocast()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.compute is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.compute))

    def _attention_mask(self, mask: Tensor | None) -> Tensor | None:
        """A [N, 1, T, S] mask in the form that the model's attention implementation takes."""
        if mask is None or mask.dim() != 4:
            return mask
        kind = self.model.config._attn_implementation
        if kind == "sdpa":
            return mask
        if kind == "eager":
            lowest = torch.finfo(self.model.dtype).min
            return torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, lowest)
        raise ValueError(
            f"attention={kind!r} takes no mask of its own, which rollouts and shared prefixes need. "
            "Load the policy with attention=sdpa (the default) or attention=eager."
        )

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def offsets(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Character of `decode(ids)` at which each token begins."""
        return token_offsets(self.tokenizer.convert_ids_to_tokens(list(ids)))

    def save(self, folder: Any) -> None:
        """A folder that stock `from_pretrained` loads: weights, tokenizer, image processor. Adapters are
        merged into the weights, and stand by themselves in `adapter/`."""
        with merged(self.model) as whole:
            whole.save_pretrained(folder)
        save_adapter(self.model, Path(folder) / "adapter", self.source)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


@functools.lru_cache(maxsize=16)
def _on_device(ids: tuple[int, ...], device: torch.device) -> Int[Tensor, " R"]:
    with torch.inference_mode(False):  # whoever asks first: training must be able to use it
        return torch.tensor(ids, dtype=torch.long, device=device)
