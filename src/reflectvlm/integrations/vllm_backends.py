"""The two real `Backend`s, on TRL's `VLLMGeneration` and `VLLMClient` (TRL 1.16, vLLM 0.22 to 0.31).

TRL makes the vLLM engine or joins a server, and sends weights: gathered under ZeRO-3, adapters merged. Its
own `generate` is not used, because all rows of it share their sampling parameters, and ours have a seed each.

    colocated   takes collapsed ids with images, and says how it expanded them
    server      takes expanded ids with features that it has made of the images before

Neither has run yet: both follow the sources of the two libraries, and tests hold the calls against
TRL's signatures. Left out: tensor parallelism when colocated, LoRA adapters kept apart in vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from reflectvlm.integrations.vllm_requests import Backend, Completion, Request, image_mismatch
from reflectvlm.models.qwen_vl import QwenVL

BANNED_BIAS = -100.0
"""Added to the logit of a banned id; the most that vLLM's server takes. e^-100 is no probability."""
NAMED = ("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "logprobs")
"""Sampling parameters that TRL's client takes by name; it hands on all others as they are."""
PROCESSED = "processed_logprobs"
"""vLLM's log-probs after temperature and banned ids; its default, "raw_logprobs", are those before."""


def check_installed() -> None:
    """Raises ValueError with what to install."""
    if missing := [name for name in ("trl", "vllm") if find_spec(name) is None]:
        raise ValueError(
            f"VLLMEngine needs {' and '.join(missing)}, not installed: pip install reflectvlm[vllm]. Or take "
            "engine=InProcessEngine (reflectvlm.rollout.engine), which needs neither."
        )


def make_backend(
    policy: QwenVL, *, mode: str, max_rows: int, sleep: bool, url: str, **settings: Any
) -> Backend:
    """TRL's engine for this policy, and what we ask of it."""
    from accelerate import Accelerator
    from trl.generation.vllm_generation import VLLMGeneration

    accelerator = Accelerator()  # its state is the process's: the trainer's own
    arguments = generation_arguments(
        policy, accelerator, mode=mode, max_rows=max_rows, sleep=sleep, url=url, **settings
    )
    generation = VLLMGeneration(**arguments)
    if mode == "colocate":
        return Colocated(policy=policy, generation=generation, sleeps=sleep)
    if accelerator.is_main_process:
        client = generation.vllm_client
    else:
        from trl.generation.vllm_client import VLLMClient

        client = VLLMClient(base_url=url, connection_timeout=settings["timeout"])
    _check_server(client)
    return Server(client=client, generation=generation, accelerator=accelerator, max_rows=max_rows)


def generation_arguments(
    policy: QwenVL,
    accelerator: Any,
    *,
    mode: str,
    max_rows: int,
    max_model_len: int | None,
    gpu_memory_utilization: float,
    sleep: bool,
    url: str,
    group_port: int,
    timeout: float,
) -> dict[str, Any]:
    """What `VLLMGeneration` is made from."""
    if mode == "colocate" and not policy.model.name_or_path:
        raise ValueError(
            "The policy was not loaded from a folder or hub name, from which vLLM could make its own model. "
            "Save it (policy.save(folder)) and load it again with load_policy(folder)."
        )
    return {
        "model": policy.model,
        "accelerator": accelerator,
        "processing_class": policy.tokenizer,
        "mode": mode,
        "server_base_url": url,
        "server_timeout": timeout,
        "group_port": group_port,
        "gpu_memory_utilization": gpu_memory_utilization,
        "max_model_length": max_model_len,
        "max_num_seqs": max_rows,
        "enable_sleep_mode": sleep,
    }


def sampling_arguments(request: Request) -> dict[str, Any]:
    """vLLM's names for what a request asks for. Everything that a model's `generation_config.json` could
    set is named, or a server would take it from there."""
    return {
        "n": 1,
        "temperature": request.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": request.max_tokens,
        "logprobs": 0,  # of the sampled token alone
        "seed": request.seed,
        "stop": list(request.stop),
        "stop_token_ids": list(request.stop_ids),
        "include_stop_str_in_output": True,
        # Tags may be special tokens, and stop texts are looked for in this text.
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        # Not `allowed_token_ids`, of which newer versions take a thousand.
        "logit_bias": dict.fromkeys(request.banned, BANNED_BIAS),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class Colocated:
    """`vllm.LLM` in this process. Satisfies `Backend`."""

    policy: QwenVL
    generation: Any
    """TRL's `VLLMGeneration`."""
    sleeps: bool

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        from vllm import SamplingParams

        size = self.policy.image_processor.size
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        outputs = self.generation.llm.generate(
            [_prompt(request, limits) for request in requests],
            sampling_params=[
                SamplingParams(**sampling_arguments(request), detokenize=bool(request.stop))
                for request in requests
            ],
            use_tqdm=False,
        )
        return [_completion(output) for output in outputs]

    def load_weights(self) -> None:
        self.generation.sync_weights()

    def reset_caches(self, *, encoder: bool) -> None:
        llm = self.generation.llm
        llm.reset_prefix_cache()
        llm.reset_mm_cache()
        if encoder:
            llm.llm_engine.reset_encoder_cache()  # `LLM` itself does not hand this one on

    def wake(self) -> None:
        if self.sleeps:
            self.generation.llm.wake_up(tags=["kv_cache"])

    def sleep(self) -> bool:
        if self.sleeps:
            self.generation.llm.sleep(level=2)  # which keeps no weights
        return self.sleeps


@dataclass(frozen=True, kw_only=True, eq=False)
class Server:
    """A `vllm serve`. Satisfies `Backend`.

    Every process asks it by itself; only weights go through the first one.
    """

    client: Any
    """TRL's `VLLMClient`."""
    generation: Any
    accelerator: Any
    max_rows: int

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        features = self._features(requests)
        with ThreadPoolExecutor(max_workers=self.max_rows) as pool:
            return list(pool.map(self._one, requests, features))

    def _one(self, request: Request, features: Mapping[str, Any] | None) -> Completion:
        ids = list(request.expanded)
        arguments = sampling_arguments(request)
        made = self.client.generate(
            [ids],
            features=None if features is None else [placed_features(request, features)],
            **{name: arguments.pop(name) for name in NAMED},
            generation_kwargs=arguments,
        )
        logprobs = [math.nan if of is None else of for (of, *_) in made["logprobs"][0]]
        return Completion(
            ids=tuple(made["completion_ids"][0]),
            logprobs=tuple(logprobs),
            prompt_ids=tuple(made["prompt_ids"][0]),
        )

    def _features(self, requests: Sequence[Request]) -> list[Mapping[str, Any] | None]:
        """Of each request's images; equal sets of images are sent once."""
        sets = {tuple(map(id, request.images)): request.images for request in requests if request.images}
        if not sets:
            return [None] * len(requests)
        made = self.client.image_features([list(images) for images in sets.values()])
        found = dict(zip(sets, made, strict=True))
        return [found.get(tuple(map(id, request.images))) for request in requests]

    def load_weights(self) -> None:
        self.accelerator.wait_for_everyone()  # nobody may still be sampling
        self.generation.sync_weights()

    def reset_caches(self, *, encoder: bool) -> None:
        if self.accelerator.is_main_process:
            self.client.reset_prefix_cache()
            for name in ("reset_mm_cache", *(("reset_encoder_cache",) if encoder else ())):
                answer = self.client.session.post(f"{self.client.base_url}/{name}")
                if answer.status_code != 200:
                    raise RuntimeError(
                        f"The vLLM server answered /{name} with {answer.status_code}, so it might go on with "
                        "what it made of images under older weights. Start it with VLLM_SERVER_DEV_MODE=1."
                    )
        self.accelerator.wait_for_everyone()

    def wake(self) -> None:
        """It has a GPU of its own and does not sleep."""

    def sleep(self) -> bool:
        return False


def placed_features(request: Request, features: Mapping[str, Any]) -> dict[str, Any]:
    """The server's features of a request's images, told where in the expanded ids each of them stands."""
    lengths = [int(place["length"]) for place in features["mm_placeholders"]["image"]]
    if tuple(lengths) != request.image_tokens:
        raise image_mismatch("A request to the server", request.image_tokens, lengths)
    places: list[dict[str, int]] = []
    at = 0
    for one in request.ids:
        length = lengths[len(places)] if one == request.image_id else 1
        if one == request.image_id:
            places.append({"offset": at, "length": length})
        at += length
    return {**features, "mm_placeholders": {**features["mm_placeholders"], "image": places}}


def _prompt(request: Request, limits: Mapping[str, int]) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": list(request.ids)}
    if request.images:
        prompt["multi_modal_data"] = {"image": list(request.images)}
        prompt["mm_processor_kwargs"] = dict(limits)
    return prompt


def _completion(output: Any) -> Completion:
    """One `vllm.RequestOutput`."""
    (made,) = output.outputs
    ids = tuple(int(one) for one in made.token_ids)
    logprobs = tuple(float(of[one].logprob) for one, of in zip(ids, made.logprobs, strict=True))
    return Completion(ids=ids, logprobs=logprobs, prompt_ids=tuple(output.prompt_token_ids))


def _check_server(client: Any) -> None:
    mode = client.get_server_info()["model_config"]["logprobs_mode"]
    if mode != PROCESSED:
        raise ValueError(
            f"The vLLM server states {mode}, and training needs log-probs at the sampling temperature. Start "
            f"it with --logprobs-mode {PROCESSED}."
        )
