"""What the two backends say to TRL and vLLM, against fakes of both; TRL's signatures and client are real."""

from __future__ import annotations

import inspect
import sys
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures import make_policy, noise_image
from reflectvlm.integrations import vllm_backends
from reflectvlm.integrations.vllm_backends import (
    Colocated,
    Server,
    generation_arguments,
    placed_features,
    sampling_arguments,
)
from reflectvlm.integrations.vllm_engine import VLLMEngine
from reflectvlm.integrations.vllm_requests import Request
from reflectvlm.models.qwen_vl import QwenVL
from reflectvlm.models.tiny import pretrained_tiny
from reflectvlm.reattention import Implicit
from reflectvlm.types import SamplingParams

PAD = 900


def request(**changes: Any) -> Request:
    """Two images of 4 and 2 visual tokens, with ids around them."""
    values: dict[str, Any] = {
        "ids": (5, 899, PAD, 901, 6, 899, PAD, 901, 7),
        "images": (noise_image(1), noise_image(2)),
        "image_tokens": (4, 2),
        "image_id": PAD,
        "max_tokens": 9,
        "temperature": 0.7,
        "seed": 123,
        "stop_ids": (1, 2),
        "stop": ("<back>",),
        "banned": (899, PAD, 901),
    }
    return Request(**values | changes)


@pytest.fixture(scope="module")
def policy() -> QwenVL:
    made = make_policy()
    made.model.name_or_path = str(pretrained_tiny())
    return made


# -- colocated ------------------------------------------------------------------------------------


@dataclass
class FakeLLM:
    """`vllm.LLM`, as far as it is called."""

    calls: list[Any] = field(default_factory=list)

    def generate(self, prompts: Any, *, sampling_params: Any, use_tqdm: bool) -> list[Any]:
        self.calls.append(("generate", prompts, sampling_params, use_tqdm))
        made = SimpleNamespace(
            token_ids=[11, 12],
            # vLLM also gives the likeliest id where another one was drawn.
            logprobs=[
                {11: SimpleNamespace(logprob=-0.25)},
                {99: SimpleNamespace(logprob=-0.1), 12: SimpleNamespace(logprob=-2.5)},
            ],
        )
        return [SimpleNamespace(prompt_token_ids=[5, 6], outputs=[made]) for _ in prompts]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("prefix")
        return True

    def reset_mm_cache(self) -> None:
        self.calls.append("mm")

    @property
    def llm_engine(self) -> Any:
        return SimpleNamespace(reset_encoder_cache=lambda: self.calls.append("encoder"))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake", tags))

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))


def colocated(policy: QwenVL, sleeps: bool = True) -> tuple[Colocated, FakeLLM]:
    llm = FakeLLM()
    generation = SimpleNamespace(llm=llm, sync_weights=lambda: llm.calls.append("weights"))
    return Colocated(policy=policy, generation=generation, sleeps=sleeps), llm


def test_colocated_asks_with_collapsed_ids_images_and_the_policys_limits(
    policy: QwenVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: vLLM's image processor with its own limits, or one seed for all rows."""
    fake = types.ModuleType("vllm")
    fake.SamplingParams = lambda **named: named  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    backend, llm = colocated(policy)
    text = request(ids=(5, 6), images=(), image_tokens=(), stop=(), seed=124)
    made = backend.generate([request(), text])
    (_, (first, second), (how, how_text), use_tqdm), *_ = llm.calls
    assert first["prompt_token_ids"] == [5, 899, PAD, 901, 6, 899, PAD, 901, 7]
    assert [image.size for image in first["multi_modal_data"]["image"]] == [(64, 64), (64, 64)]
    size = policy.image_processor.size
    limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    assert first["mm_processor_kwargs"] == limits
    assert second == {"prompt_token_ids": [5, 6]}
    assert (how["seed"], how_text["seed"]) == (123, 124)
    assert (how["detokenize"], how_text["detokenize"]) == (True, False)  # stop texts need it
    assert use_tqdm is False
    assert made[0].ids == (11, 12)
    assert made[0].logprobs == (-0.25, -2.5)  # the drawn id's, not the likeliest one's
    assert made[0].prompt_ids == (5, 6)


def test_sampling_arguments_name_everything_a_generation_config_could_set() -> None:
    """Bug: Qwen2.5-VL's own generation_config has repetition_penalty 1.05: no trainer knows of it."""
    made = sampling_arguments(request())
    assert made["repetition_penalty"] == made["top_p"] == 1.0
    assert made["top_k"] == made["min_p"] == made["logprobs"] == 0
    assert (made["temperature"], made["max_tokens"], made["seed"], made["n"]) == (0.7, 9, 123, 1)
    assert made["logit_bias"] == {899: -100.0, PAD: -100.0, 901: -100.0}
    assert made["stop_token_ids"] == [1, 2]
    assert made["stop"] == ["<back>"]
    assert made["include_stop_str_in_output"] is True
    assert made["skip_special_tokens"] is False


@pytest.mark.parametrize(
    ("encoder", "reset"), [(True, ["prefix", "mm", "encoder"]), (False, ["prefix", "mm"])]
)
def test_colocated_weights_caches_and_sleep(policy: QwenVL, encoder: bool, reset: list[str]) -> None:
    """Bug: a cache of old weights stays, or vLLM holds its memory while the trainer needs it."""
    backend, llm = colocated(policy)
    backend.load_weights()
    backend.wake()
    backend.reset_caches(encoder=encoder)
    assert backend.sleep() is True
    assert llm.calls == ["weights", ("wake", ["kv_cache"]), *reset, ("sleep", 2)]
    awake, llm = colocated(policy, sleeps=False)
    awake.wake()
    assert awake.sleep() is False
    assert llm.calls == []


# -- server ---------------------------------------------------------------------------------------


@dataclass
class FakeClient:
    """TRL's `VLLMClient`, as far as it is called."""

    base_url: str = "http://gpu-7:8000"
    status: int = 200
    lengths: Sequence[int] = (4, 2)
    calls: list[Any] = field(default_factory=list)

    def image_features(self, images: list[Any]) -> list[Any]:
        self.calls.append(("features", [len(one) for one in images]))
        places = [{"offset": 3, "length": length} for length in self.lengths]
        return [{"mm_placeholders": {"image": places}, "mm_hashes": {"image": ["a", "b"]}} for _ in images]

    def generate(self, prompts: Any, features: Any = None, **named: Any) -> dict[str, Any]:
        self.calls.append(("generate", prompts, features, named))
        return {
            "prompt_ids": prompts,
            "completion_ids": [[11, 12]],
            "logprobs": [[[-0.25], [None]]],
            "logprob_token_ids": [[[11], [12]]],
        }

    def reset_prefix_cache(self) -> None:
        self.calls.append("prefix")

    @property
    def session(self) -> Any:
        return SimpleNamespace(post=self._post)

    def _post(self, url: str) -> Any:
        self.calls.append(url)
        return SimpleNamespace(status_code=self.status)


def server(client: FakeClient, main: bool = True) -> Server:
    def wait() -> None:
        client.calls.append("barrier")

    accelerator = SimpleNamespace(is_main_process=main, wait_for_everyone=wait)
    generation = SimpleNamespace(sync_weights=lambda: client.calls.append("weights"))
    return Server(client=client, generation=generation, accelerator=accelerator, max_rows=1)


def test_server_asks_with_expanded_ids_and_features_at_their_places() -> None:
    """Bug: a server takes expanded ids, unlike `LLM`; collapsed ones would match no feature."""
    client = FakeClient()
    same = request()
    text = request(ids=(5, 6), images=(), image_tokens=())
    made = server(client).generate([same, same, text])
    assert client.calls[0] == ("features", [2])  # equal sets of images are sent once
    _, prompts, (features,), named = client.calls[1]
    assert prompts == [[5, 899, *[PAD] * 4, 901, 6, 899, *[PAD] * 2, 901, 7]]
    # 5 and 899 stand before the first; 4 visual tokens, 901, 6, 899 between the two: 2 + 4 + 3 = 9.
    assert features["mm_placeholders"]["image"] == [{"offset": 2, "length": 4}, {"offset": 9, "length": 2}]
    assert features["mm_hashes"] == {"image": ["a", "b"]}
    assert named["temperature"] == 0.7
    assert named["generation_kwargs"]["seed"] == 123
    assert not {*named} & {*named["generation_kwargs"]}
    assert client.calls[3][1:3] == ([[5, 6]], None)
    assert made[0].prompt_ids == request().expanded
    assert made[0].logprobs[0] == -0.25
    assert made[0].logprobs[1] != made[0].logprobs[1]  # NaN, which the engine refuses


def test_other_features_than_the_policys_are_refused() -> None:
    """Bug: a server with other image limits rolls out on other visual tokens (trap 7)."""
    with pytest.raises(ValueError, match=r"images into \[4, 2\] visual tokens, vLLM into \[4, 9\].*limits"):
        server(FakeClient(lengths=(4, 9))).generate([request()])


@pytest.mark.parametrize("main", [True, False])
def test_server_weights_wait_for_all_processes(main: bool) -> None:
    """Bug: one process samples while another one's weights arrive, or caches are reset by each of them."""
    client = FakeClient()
    backend = server(client, main)
    backend.load_weights()
    backend.wake()
    backend.reset_caches(encoder=True)
    assert backend.sleep() is False
    resets = ["prefix", "http://gpu-7:8000/reset_mm_cache", "http://gpu-7:8000/reset_encoder_cache"]
    assert client.calls == ["barrier", "weights", *(resets if main else []), "barrier"]


def test_a_server_that_keeps_its_caches_is_refused() -> None:
    """Bug: the server lacks the route, and goes on with features of the first weights."""
    with pytest.raises(RuntimeError, match=r"answered /reset_mm_cache with 404.*VLLM_SERVER_DEV_MODE=1"):
        server(FakeClient(status=404)).reset_caches(encoder=True)


def test_a_server_with_raw_logprobs_is_refused() -> None:
    """Bug: log-probs at temperature 1 whatever the run samples at."""

    def info(mode: str) -> Any:
        return SimpleNamespace(get_server_info=lambda: {"model_config": {"logprobs_mode": mode}})

    vllm_backends._check_server(info("processed_logprobs"))
    with pytest.raises(ValueError, match=r"states raw_logprobs.*--logprobs-mode processed_logprobs"):
        vllm_backends._check_server(info("raw_logprobs"))


def test_features_of_one_image_shown_twice_are_placed_twice() -> None:
    """Bug: COPY's block would point at the prompt's image, and the model attends to nothing there."""
    once = noise_image(1)
    twice = request(images=(once, once), image_tokens=(4, 4))
    made = placed_features(twice, {"mm_placeholders": {"image": [{"offset": 0, "length": 4}] * 2}})
    assert [place["offset"] for place in made["mm_placeholders"]["image"]] == [2, 9]


# -- TRL's signatures -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl() -> Any:
    with warnings.catch_warnings():  # its dependencies warn as they please
        warnings.simplefilter("ignore")
        pytest.importorskip("trl", reason="trl is not installed: pip install reflectvlm[trl]")
        from trl.generation import vllm_client, vllm_generation
    return SimpleNamespace(client=vllm_client.VLLMClient, generation=vllm_generation.VLLMGeneration)


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "mode": "colocate", "max_rows": 8, "max_model_len": 100, "gpu_memory_utilization": 0.3, "sleep": True,
        "url": "http://gpu-7:8000", "group_port": 1, "timeout": 2.0,
    } | changes  # fmt: skip


def test_calls_of_trl_fit_its_signatures(trl: Any, policy: QwenVL) -> None:
    """Bug: TRL renames an argument, and the first run on hardware finds it."""
    arguments = generation_arguments(policy, None, **settings())
    inspect.signature(trl.generation.__init__).bind(None, **arguments)
    assert arguments["max_model_length"] == 100
    client = FakeClient()
    server(client).generate([request()])
    _, prompts, features, named = client.calls[1]
    inspect.signature(trl.client.generate).bind(None, prompts, features=features, **named)
    inspect.signature(trl.client.image_features).bind(None, [[]])
    inspect.signature(trl.client.__init__).bind(None, base_url="", connection_timeout=1.0)
    for owner, names in (
        (trl.client, ("get_server_info", "reset_prefix_cache")),
        (trl.generation, ("sync_weights",)),
    ):
        assert all(callable(getattr(owner, name)) for name in names)


def test_trls_client_carries_a_request_to_the_server_and_back(trl: Any) -> None:
    """Bug: a field that the client drops, or a log-prob of another id than the sampled one."""
    posts: list[Any] = []

    def post(url: str, json: dict[str, Any]) -> dict[str, Any]:
        posts.append((url.rpartition(":8000")[2], json))
        named = [("token_id:11", -0.25), ("token_id:12", -2.5)]
        if "features" in json:
            content = [{"token": token, "logprob": of, "top_logprobs": []} for token, of in named]
            return {"choices": [{"token_ids": [11, 12], "logprobs": {"content": content}}]}
        tokens, values = zip(*named, strict=True)
        logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": [None, None]}
        choice = {"token_ids": [11, 12], "prompt_token_ids": json["prompt"][0], "logprobs": logprobs}
        return {"choices": [choice]}

    client = object.__new__(trl.client)
    client.base_url, client.model, client._post = "http://gpu-7:8000", "a model", post
    client.image_features = FakeClient().image_features
    backend = Server(client=client, generation=None, accelerator=None, max_rows=1)
    text = request(ids=(5, 6), images=(), image_tokens=(), seed=124)
    for made in backend.generate([request(), text]):
        assert (made.ids, made.logprobs) == ((11, 12), (-0.25, -2.5))
    (where, first), (where_text, second) = posts
    assert (where, where_text) == ("/inference/v1/generate", "/v1/completions")
    assert first["token_ids"] == list(request().expanded)
    assert first["features"]["mm_placeholders"]["image"][1] == {"offset": 9, "length": 2}
    for name, value in sampling_arguments(request()).items():
        assert first["sampling_params"][name] == value, name
    for name, value in sampling_arguments(text).items():
        assert second[name] == value, name


def test_a_policy_from_nowhere_cannot_be_colocated() -> None:
    """Bug: vLLM is asked to load the model ''."""
    nowhere = make_policy()
    with pytest.raises(ValueError, match=r"not loaded from a folder or hub name.*policy.save\(folder\)"):
        generation_arguments(nowhere, None, **settings())
    assert generation_arguments(nowhere, None, **settings(mode="server"))["mode"] == "server"


def test_the_engine_makes_its_backend_once_from_its_settings(
    policy: QwenVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a setting of the recipe that never reaches vLLM, or a second vLLM at every step."""
    seen: list[Any] = []

    def make(given: QwenVL, **named: Any) -> Any:
        seen.append((given, named))
        backend = SimpleNamespace(
            load_weights=lambda: None,
            wake=lambda: None,
            reset_caches=lambda encoder: None,  # noqa: ARG005
            sleep=lambda: False,
        )
        backend.generate = list
        return backend

    monkeypatch.setattr("reflectvlm.integrations.vllm_engine.check_installed", lambda: None)
    monkeypatch.setattr("reflectvlm.integrations.vllm_engine.make_backend", make)
    named = settings(mode="server")
    engine = VLLMEngine(policy=policy, **named)
    for _ in range(2):
        assert engine.generate([], 2, SamplingParams(), Implicit(), seed=0) == []
    assert seen == [(policy, named)]
