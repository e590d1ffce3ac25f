"""No code but the user's own runs, no pickle is read, and no secret is written down."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import reflectvlm
from reflectvlm.cli import main
from reflectvlm.config import compose
from reflectvlm.models.carried import KEY
from reflectvlm.models.loading import load_model, load_tokenizer
from reflectvlm.models.qwen_vl import load_policy
from reflectvlm.models.tiny import pretrained_tiny
from reflectvlm.models.trust import CodeRefused
from reflectvlm.no_secrets import check_no_secrets
from reflectvlm.recipe_check import RecipeError

SOURCE = Path(reflectvlm.__file__).parent

# -- calls that run what they are given ---------------------------------------------------------------

NEVER = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "pty.spawn",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pandas.read_pickle",
    "tempfile.mktemp",
    "shutil.unpack_archive",
}
NEEDS = {"torch.load": ("weights_only", True), "tarfile.open": ("filter", "data")}
"""Calls that are safe with this argument alone."""
REFUSES = {"shell": True, "allow_pickle": True}
"""Arguments that no call may have."""
ALLOWED = {
    ("rewards/worker.py", "pickle.loads"): "a call's arguments, which its own parent wrote into its pipe",
    ("train/ranks.py", "pickle.loads"): "errors that processes of one run tell each other",
    ("train/prefetch_worker.py", "pickle.loads"): "rows, and errors, between a parent and its own workers",
}


def unsafe_calls(text: str) -> Iterator[str]:
    """Dotted names of the calls in a file that its reader has to be told the reason of."""
    tree = ast.parse(text)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {one.asname: one.name for one in node.names if one.asname}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            called = f"{names.get(first, first)}{dot}{rest}".removeprefix("builtins.")
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            name, value = NEEDS.get(called, ("", None))
            if called in NEVER or (name and given.get(name) != value):
                yield called
            yield from (f"{called}({arg}={v})" for arg, v in REFUSES.items() if given.get(arg) == v)


def test_nothing_runs_text_or_reads_a_pickle() -> None:
    """Bug: a number in an answer that is found with eval, or a cache that is read with pickle."""
    found = {
        (path.relative_to(SOURCE).as_posix(), call)
        for path in SOURCE.rglob("*.py")
        for call in unsafe_calls(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED), "a call without a stated reason, or a reason without a call"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("eval('1')", ["eval"]),
        ("from pickle import loads as read\nread(b'')", ["pickle.loads"]),
        ("import pickle as p\np.Unpickler(f).load()", ["pickle.Unpickler"]),
        ("torch.load(f)", ["torch.load"]),
        ("torch.load(f, weights_only=False)", ["torch.load"]),
        ("torch.load(f, weights_only=True)", []),
        ("subprocess.run('ls', shell=True)", ["subprocess.run(shell=True)"]),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", ["numpy.load(allow_pickle=True)"]),
        ("import os as o\no.system('ls')\nmodel.eval()\nre.compile('x')", ["os.system"]),
        ("import builtins\nbuiltins.exec('x')", ["exec"]),
    ],
)
def test_the_search_finds_what_it_looks_for(text: str, found: list[str]) -> None:
    """Bug: the test above passes because an import by another name hides the call."""
    assert list(unsafe_calls(text)) == found


# -- models -------------------------------------------------------------------------------------------


def a_model(folder: Path, file: str, **entries: object) -> Path:
    """The tiny model with more entries in one of its configurations, and a module that tells if it ran."""
    shutil.copytree(pretrained_tiny(), folder)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    (folder / "theirs.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(folder / 'ran')!r}).touch()\n"
        "from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer\n"
        "class Config(Qwen2_5_VLConfig): pass\n"
        "class Model(Qwen2_5_VLForConditionalGeneration): config_class = Config\n"
        "class Tokenizer(Qwen2Tokenizer): pass\n"
    )
    return folder


@pytest.mark.parametrize(
    ("file", "entries", "says"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "theirs.Config"}}, r"config.json: auto_map {'AutoConfig"),
        (
            "config.json",
            {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}},
            r"config.json: auto_map",
        ),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}},
            r"tokenizer_config.json: auto_map",
        ),
        ("config.json", {"attn_implementation": "some-one/kernel"}, r"attn_implementation 'some-one/kernel'"),
    ],
)
def test_code_that_comes_with_a_model_is_refused(
    tmp_path: Path,
    file: str,
    entries: dict[str, object],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: a model from a hub runs its author's code; or a question on stdin waits in a batch job; or the
    stock class is taken in place of the one that the folder names, without a word."""
    folder = a_model(tmp_path / "model", file, **entries)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(CodeRefused, match=rf"{says}.*Read that code; then trust_remote_code=true"):
        load_policy(str(folder))
    with pytest.raises(CodeRefused, match=says):
        load_tokenizer(str(folder))
    assert main(["generate", f"model={folder}", "question=a"]) == 2
    err = capsys.readouterr().err
    assert "comes with code of its own" in err
    assert err.endswith("to have the stock classes.\n")
    assert not (folder / "ran").exists()


def test_code_runs_if_it_is_asked_for(tmp_path: Path) -> None:
    """Bug: trust_remote_code=true that does nothing, so that the refusal cannot be answered."""
    auto_map = {"AutoConfig": "theirs.Config", "AutoModelForImageTextToText": "theirs.Model"}
    folder = a_model(tmp_path / "model", "config.json", auto_map=auto_map)
    words = ["generate", f"model={folder}", "question=a", "max_tokens=1", "trust_remote_code=true"]
    code = f"import sys; from reflectvlm.cli import main; sys.exit(main({words}))"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "ran").exists()


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    """Bug: pytorch_model.bin is unpickled, and runs what its author wrote into it."""

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    folder = tmp_path / "model"
    shutil.copytree(pretrained_tiny(), folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights as safetensors\. Other formats are pickles"):
        load_model(str(folder), dtype="float32", attention="auto")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"has its weights as pytorch_model.bin only\..*save_pretrained"):
        load_model(str(folder), dtype="float32", attention="auto")
    # Beside safetensors it is not looked at.
    (folder / "model.safetensors").write_bytes(whole)
    assert load_model(str(folder), dtype="float32", attention="auto") is not None
    assert not (tmp_path / "ran").exists()


def test_what_a_config_says_of_our_own_use_runs_nothing(tmp_path: Path) -> None:
    """Bug: a re-attention that is named by a module's path, in the configuration of a model from a hub."""
    evil = {"reattention": {"kind": "os.system", "command": "true"}}
    folder = a_model(tmp_path / "model", "config.json", **{KEY: evil})
    assert main(["generate", f"model={folder}", "question=a"]) == 2


# -- secrets ------------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_SecretSecretSecretSecretSecret",
    "OPENAI_API_KEY": "sk-proj-VerySecretVerySecretVerySecret",
    "AWS_SECRET_ACCESS_KEY": "awsSecret/awsSecret+awsSecretawsSecret00",
}
IN_REMOTE = "ghp_RemoteSecretRemoteSecretRemoteSecret"

RUN = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from training import small_rl, rubric
from reflectvlm.rewards.lift import per_rollout
from reflectvlm.train.trackers import Wandb
from reflectvlm.train.update import NonFinite
from reflectvlm.objectives import KL, ClippedSurrogate

root = Path("runs")
trackers = [Wandb(mode="offline", folder=root / "wandb")] if sys.argv[2] == "wandb" else []
root.mkdir()
if trackers:
    (root / "wandb").mkdir()
trainer = small_rl(root, steps=2, output={"trackers": trackers, "overrides": ("steps=2",)})
trainer.run()
broken = small_rl(root, name="broken", optimizer=trainer.optimizer, steps=2)
broken.prepare()
next(broken.policy.module.parameters()).data.fill_(float("nan"))
try:
    broken.run()
except Exception as error:
    print("failed as it should:", error)
"""


def searched(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """The files of a folder, and the names of all of them as one."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    yield folder, "\n".join(map(str, files)).encode()
    yield from ((path, path.read_bytes()) for path in files)


@pytest.mark.parametrize("tracker", ["none", "wandb"])
def test_no_secret_of_the_environment_is_written_down(tmp_path: Path, tracker: str) -> None:
    """Bug: a run's folder is shared, and in it are all environment variables or a remote with a token."""
    if tracker == "wandb":
        pytest.importorskip("wandb")
    for words in (
        ("init", "-q"),
        ("remote", "add", "origin", f"https://someone:{IN_REMOTE}@example.com/a/b.git"),
        ("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-m", "a"),
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    environment = {**os.environ, **SECRETS, "PYTHONPATH": os.pathsep.join(sys.path), "WANDB_SILENT": "true"}
    environment |= {"HOME": str(tmp_path / "home"), "REFLECTVLM_TRACEBACK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(Path(__file__).parent), tracker],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"failed as it should" in done.stdout
    assert (tmp_path / "runs" / "rl" / "summary.json").is_file()
    written = [*searched(tmp_path / "runs"), (Path("stdout"), done.stdout), (Path("stderr"), done.stderr)]
    assert len(written) > 15
    for path, content in written:
        for name, secret in {**SECRETS, "remote": IN_REMOTE}.items():
            assert secret.encode() not in content, f"{name} is in {path}"


def test_a_recipe_that_holds_a_secret_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Bug: a key from the environment is resolved into the recipe.yaml that a run keeps."""
    monkeypatch.chdir(tmp_path)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    for word in ("name=${oc.env:HF_TOKEN}", f"name=x{SECRETS['HF_TOKEN']}"):
        with pytest.raises(RecipeError, match=r"^name holds .* variable HF_TOKEN, and a run"):
            compose("grpo", (word,))
    with pytest.raises(RecipeError, match=r"^stages.tiny_base\[0\] holds the value of"):
        compose("grpo", (f"tiny_base:name={SECRETS['HF_TOKEN']}",))
    assert main(["train", "recipe=grpo", f"policy.path=https://me:{IN_REMOTE}@example.com/m"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: policy.path is an address with a password or token in it")
    assert IN_REMOTE not in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("values", "environment", "refused"),
    [
        ({"a": {"b": ["x", "https://u:p@h/"]}}, {}, True),
        ({"a": f"git+https://{IN_REMOTE}@h/x"}, {}, True),
        ({"a": "ssh://git@host/x", "b": "me@host.org", "c": "https://h/x?a=b:c@d"}, {}, False),
        ({"a": "lookback"}, {"DB_PASSWORD": "lookback"}, False),  # a word that is also a password
        ({"a": "0123456789abcdef"}, {"MY_KEY": "0123456789abcdef"}, True),
        ({"a": 1234567890123456}, {"PIN_TOKEN": "1234567890123456"}, True),
        ({"a": "0123456789abcdef"}, {"KEYBOARD": "0123456789abcdef", "MONKEY": "0123456789abcdef"}, False),
        ({"a": str(SOURCE)}, {"GOOGLE_APPLICATION_CREDENTIALS": str(SOURCE)}, False),  # a path is no secret
        ({"a": "Qwen/Qwen2.5-VL-7B-Instruct"}, {"MODEL_KEY": "Qwen/Qwen2.5-VL-7B-Instruct"}, False),
        ({"a": "/gone/models/qwen/final"}, {"MODEL_KEY": "/gone/models/qwen/final"}, False),
        ({"a": "data/train/rows.jsonl"}, {"ROWS_KEY": "data/train/rows.jsonl"}, False),
        ({"a": "../rows/of mine/a.jsonl"}, {"ROWS_KEY": "../rows/of mine/a.jsonl"}, False),
        ({"a": "<|vision_start|>"}, {"SPECIAL_TOKEN": "<|vision_start|>"}, False),
        ({"a": "ssh://a-very-long-name-of-some-team@host/x"}, {}, False),
        ({"a": "See http://example.com?a=1&mail=somebody.long.name@example.com"}, {}, False),
        ({"a": "http://example.com?a=b:c@example.com", "b": "http://example.com#b:c@d"}, {}, False),
        ({"a": "https://:passwordalone@h/x"}, {}, True),
        ({"a": "https://0123456789abcdef0123456789abcdef01234567@h/x"}, {}, True),
        ({"a": "https://hf_abcdefghijklmnop@h/x"}, {}, True),
        ({"a": "hf_abcdefgh/x"}, {"HF_TOKEN": "hf_abcdefgh/x"}, True),
        (
            {"a": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzzzzz"},
            {"AWS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzzzzzzzzz"},
            True,
        ),
        ({"a": "correct horse battery"}, {"DB_PASSWORD": "correct horse battery"}, True),
    ],
)
def test_what_counts_as_a_secret(
    values: dict[str, object], environment: dict[str, str], refused: bool
) -> None:
    """Bug: an ordinary recipe is refused, or a key passes because it stands deep in a list."""
    if not refused:
        check_no_secrets(values, environment)
        return
    with pytest.raises(RecipeError, match="a run's folder keeps its recipe as text") as caught:
        check_no_secrets(values, environment)
    assert not any(secret in str(caught.value) for secret in (*environment.values(), "u:p", IN_REMOTE))
