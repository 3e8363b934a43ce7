import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.interface.action import action_table
from llmrl_envs.interface.observation import ObservationSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings

from llmrl.cli import main
from llmrl.dqn.config import NetworkConfig
from llmrl.dqn.networks import QNetwork
from llmrl.policy import SchedulePolicy
from llmrl.policy_numpy import NumpyPolicy

TABLE = action_table("moves")
SPEC = ObservationSpec(TABLE)
SHAPES: list[dict[str, Any]] = [
    {},
    {"layer_norm": True, "dueling": True, "hidden_sizes": (16, 16)},
    {"head": "categorical", "dueling": True, "cvar_level": 0.3},
    {"head": "quantile", "cvar_level": 0.25},
    {"head": "quantile", "num_quantiles": 5},
    {"noisy": True, "normalize_obs": True},
    {"branches": (3, 3), "dueling": True},
    {"default_action": TABLE.hold, "default_action_margin": 0.05},
    {
        "default_action": TABLE.hold,
        "default_action_margin": tuple(0.0 if i == TABLE.hold else 0.02 * i for i in range(TABLE.num_actions)),
    },
]


def write_policy(folder: Path, **shape: Any) -> Path:
    config = NetworkConfig(
        **{"obs_shape": (SPEC.size,), "num_actions": TABLE.num_actions, "hidden_sizes": (8,), **shape}
    )
    network = QNetwork(config, torch.Generator().manual_seed(0))
    if config.normalize_obs:
        network.set_obs_statistics(np.linspace(-1, 1, SPEC.size), np.linspace(0.1, 2, SPEC.size))
    SchedulePolicy(TABLE, SPEC, ScheduleSettings(), network, {"name": "tiny"}).save_pretrained(folder)
    return folder


def export(policy: Path, output: Path, file_format: str) -> Path:
    assert main(["policy", "export", str(policy), "--output", str(output), "--format", file_format]) == 0
    return output


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return write_policy(tmp_path / "policy")


@pytest.fixture
def observations() -> np.ndarray:
    """Observations over the whole range, float32[200, O]."""
    low, high = SPEC.bounds()
    return np.random.default_rng(0).uniform(low, high, size=(200, SPEC.size)).astype(np.float32)


def test_show_prints_the_card(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "show", str(policy)]) == 0
    assert "# tiny: a learning-rate schedule policy" in capsys.readouterr().out
    assert main(["policy", "show", "hold"]) == 0


def test_an_exported_folder_is_the_same_policy(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["policy", "export", str(policy), "--output", str(output)]) == 0
    for file in policy.iterdir():
        assert (output / file.name).read_bytes() == file.read_bytes()
    assert str(output / "config.json") in capsys.readouterr().out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_numpy_form_decides_as_the_policy(tmp_path: Path, observations: np.ndarray, shape: dict[str, Any]) -> None:
    policy = write_policy(tmp_path / "policy", **shape)
    loaded = SchedulePolicy.from_pretrained(policy)
    exported = NumpyPolicy.from_export(export(policy, tmp_path / "out", "numpy"))
    mask = np.random.default_rng(1).random((200, TABLE.num_actions)) < 0.7
    mask[:, TABLE.hold] = True
    expected, got = loaded.act(observations, mask), exported.act(observations, mask)
    np.testing.assert_allclose(got.q_values, expected.q_values, rtol=1e-4, atol=1e-5)
    gaps = np.sort(np.where(mask, expected.q_values, -np.inf), axis=1)
    clear = gaps[:, -1] - gaps[:, -2] > 1e-4
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(got.actions[clear], expected.actions[clear])
    assert (exported.table, exported.settings) == (loaded.table, loaded.settings)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_onnx_form_gives_the_same_values(tmp_path: Path, observations: np.ndarray, shape: dict[str, Any]) -> None:
    import onnxruntime

    policy = write_policy(tmp_path / "policy", **shape)
    output = export(policy, tmp_path / "out", "onnx")
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "config.json", "network.onnx"]
    session = onnxruntime.InferenceSession(str(output / "network.onnx"))
    expected = SchedulePolicy.from_pretrained(policy).act(observations, np.ones((200, TABLE.num_actions), np.bool_))
    for rows in (slice(None), slice(0, 1)):
        (values,) = session.run(["q_values"], {"observation": observations[rows]})
        np.testing.assert_allclose(values, expected.q_values[rows], rtol=1e-4, atol=1e-5)
    told = json.loads(session.get_modelmeta().custom_metadata_map["llmrl"])
    assert told == {"actions": list(TABLE.names), "observation": list(SPEC.names)}


def test_the_numpy_form_needs_no_torch(policy: Path, tmp_path: Path) -> None:
    output = export(policy, tmp_path / "out", "numpy")
    code = (
        "import sys, numpy as np\n"
        "from llmrl.policy_numpy import NumpyPolicy\n"
        "policy = NumpyPolicy.from_export(sys.argv[1])\n"
        "mask = np.ones((1, policy.table.num_actions), bool)\n"
        "policy.act(np.zeros((1, policy.spec.size), np.float32), mask)\n"
        "heavy = {'torch', 'transformers', 'safetensors', 'wandb'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    finished = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def change_arrays(folder: Path, **changes: Any) -> None:
    with np.load(folder / "network.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    np.savez(folder / "network.npz", **arrays)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"head.layer.bias": None}, "head.layer.bias"),
        ({"extra": np.zeros(1, np.float32)}, "extra"),
        ({"head.layer.bias": np.zeros(3, np.float32)}, r"expected \[9\], got \[3\]"),
        ({"head.layer.bias": np.zeros(9, np.float64)}, "float64"),
        ({"head.layer.bias": np.full(9, np.inf, np.float32)}, "finite"),
        ({"head.layer.bias": np.array([{}] * 9, object)}, "allow_pickle"),
    ],
    ids=["missing", "extra", "shape", "dtype", "infinite", "pickle"],
)
def test_changed_arrays_are_refused(policy: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    output = export(policy, tmp_path / "out", "numpy")
    change_arrays(output, **changes)
    with pytest.raises(UserError, match=told):
        NumpyPolicy.from_export(output)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("network.npz", b""),
        ("network.npz", b"PK\x03\x04 torn"),
        ("network.npz", pickle.dumps([1])),
        ("network.json", b"{"),
        ("network.json", b'{"obs_shape": [3], "num_actions": 9, "hidden_sizes": [1000000000]}'),
        ("config.json", b"{"),
    ],
)
def test_a_damaged_export_is_refused(policy: Path, tmp_path: Path, name: str, content: bytes) -> None:
    output = export(policy, tmp_path / "out", "numpy")
    (output / name).write_bytes(content)
    with pytest.raises(UserError):
        NumpyPolicy.from_export(output)


def test_a_missing_export_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exported policy"):
        NumpyPolicy.from_export(tmp_path / "nowhere")


def test_weights_of_a_giant_network_are_refused_before_it_is_built(policy: Path) -> None:
    """A file of a few kilobytes may claim terabytes."""
    path = policy / "model.safetensors"
    content = path.read_bytes()
    small, giant = b'\\"hidden_sizes\\":[8]', b'\\"hidden_sizes\\":[99999999999]'
    assert small in content
    length = int.from_bytes(content[:8], "little") + len(giant) - len(small)
    path.write_bytes(length.to_bytes(8, "little") + content[8:].replace(small, giant))
    with pytest.raises(UserError, match="weights cannot be read"):
        SchedulePolicy.from_pretrained(policy)


def test_without_its_packages_onnx_says_what_to_install(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["policy", "export", str(policy), "--output", str(tmp_path / "out"), "--format", "onnx"]
    assert main(words) == 2
    assert "llmrl[onnx]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "hold", "--format", "numpy"], "no network"),
        (["export", "hold", "--format", "onnx"], "no network"),
        (["export", "./missing"], "no policy folder"),
    ],
)
def test_what_cannot_be_exported_is_told(
    tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["policy", *words, "--output", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_overwrites_nothing(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "export", str(policy), "--output", str(policy)]) == 2
    assert "not empty" in capsys.readouterr().err


def test_a_push_without_a_network_is_told(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["policy", "push", str(policy), "owner/name"]) == 2
    told = capsys.readouterr().err
    assert "not uploaded" in told
    assert "owner/name" in told
    assert "Traceback" not in told


class FakeHub:
    """Stands in for `HfApi`; keeps what is uploaded."""

    uploads: list[tuple[str, dict[str, bytes]]]

    def __init__(self) -> None:
        self.uploads = []

    def __call__(self) -> "FakeHub":
        return self

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> str:
        return f"https://hub/{repository}?private={private}"

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        files = {name: (Path(folder_path) / name).read_bytes() for name in allow_patterns}
        self.uploads.append((repo_id, files))


def test_a_push_uploads_the_three_files(
    policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    (policy / "notes.txt").write_text("private")
    assert main(["policy", "push", str(policy), "owner/name", "--private"]) == 0
    assert capsys.readouterr().out.strip() == "https://hub/owner/name?private=True"
    SchedulePolicy.from_pretrained(policy).push_to_hub("owner/other")
    files = {path.name: path.read_bytes() for path in policy.iterdir() if path.name != "notes.txt"}
    assert hub.uploads == [("owner/name", files), ("owner/other", files)]


def test_what_is_no_policy_is_not_pushed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "push", str(tmp_path), "owner/name"]) == 2
    assert "config.json" in capsys.readouterr().err
