"""What people write after --policy, and what they are told when it cannot be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from llmrl_envs.errors import UserError

from llmrl.cli import main
from llmrl.policy import SchedulePolicy, hold_policy
from llmrl.policy_reference import ReferenceKind, locate_policy, parse_reference

ARTIFACT = "wandb:team/project/policy:v3"


@pytest.mark.parametrize(
    ("text", "kind", "name", "revision"),
    [
        ("hold", ReferenceKind.HOLD, "hold", None),
        ("default", ReferenceKind.DEFAULT, "default", None),
        ("owner/name", ReferenceKind.HUB, "owner/name", None),
        ("owner/name@v1.0", ReferenceKind.HUB, "owner/name", "v1.0"),
        (ARTIFACT, ReferenceKind.WANDB, "team/project/policy:v3", None),
        ("wandb:team/project/policy", ReferenceKind.WANDB, "team/project/policy:latest", None),
    ],
)
def test_every_form_is_understood(text: str, kind: ReferenceKind, name: str, revision: str | None) -> None:
    reference = parse_reference(text)
    assert (reference.kind, reference.name, reference.revision) == (kind, name, revision)


def test_a_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_reference("owner/name").kind is ReferenceKind.FOLDER
    assert locate_policy("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    "text",
    [
        "", "nowhere", "./owner/name", "/no/such/policy", "a/b/c", "../up", "owner/name@", "-x/name", "owner/na me",
        "~nobody.of.that.name/x", "a" * 5000, "a/" * 3000, "two\nlines", "\udcff", "\0",
    ],
    ids=lambda text: ascii(text[:30]),
)  # fmt: skip
def test_what_is_none_of_the_forms_is_told(text: str) -> None:
    with pytest.raises(UserError, match="no policy folder") as caught:
        parse_reference(text, where="callbacks")
    assert "callbacks" in str(caught.value)
    assert "owner/name" in str(caught.value)
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


@pytest.mark.parametrize(
    "text", ["wandb:", "wandb:name", "wandb:a/b", "wandb:a/b/c/d", "wandb:a/b/c:d:e", "wandb:a//c"]
)
def test_an_artifact_needs_its_full_name(text: str) -> None:
    with pytest.raises(UserError, match="not the name of an artifact") as caught:
        parse_reference(text)
    assert "wandb:entity/project/name:alias" in str(caught.value)


def test_a_hub_id_without_network_says_what_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tmp_path / "job.yaml"
    config.write_text("task: {data: 'builtin:json', steps: 20}\n")
    words = ["finetune", "--config", str(config), "--output", str(tmp_path / "run"), "--policy", "owner/name"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "config.json of owner/name" in told
    assert "hf download owner/name --local-dir DIR" in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_a_hub_id_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    hold_policy().save_pretrained(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert SchedulePolicy.from_pretrained("owner/name").network is None


# -- artifacts ----------------------------------------------------------------------------------------------------


class FakeEntry:
    """An entry of a manifest that 'downloads' from a folder."""

    def __init__(self, source: Path, ref: str | None = None) -> None:
        self.source, self.ref = source, ref

    def download(self, root: str, skip_cache: bool) -> None:
        (Path(root) / self.source.name).write_bytes(self.source.read_bytes())


class FakeApi:
    """Stands in for `wandb.Api`: one artifact, whose entries a test chooses."""

    def __init__(self) -> None:
        self.entries: dict[str, FakeEntry] = {}
        self.asked: list[str] = []

    def artifact(self, name: str) -> Any:
        self.asked.append(name)
        return SimpleNamespace(digest="d1", manifest=SimpleNamespace(entries=self.entries))


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    hold_policy().save_pretrained(tmp_path / "policy")
    fake = FakeApi()
    fake.entries = {path.name: FakeEntry(path) for path in (tmp_path / "policy").iterdir()}
    monkeypatch.setattr(wandb, "Api", lambda: fake)
    return fake


def test_an_artifact_is_a_policy_and_is_fetched_once(api: FakeApi) -> None:
    assert SchedulePolicy.from_pretrained(ARTIFACT).network is None
    for entry in api.entries.values():
        entry.source.unlink()
    assert SchedulePolicy.from_pretrained(ARTIFACT).network is None
    assert api.asked == ["team/project/policy:v3"] * 2


@pytest.mark.parametrize("path", ["../config.json", "/etc/config.json", "a/../../b", "..\\config.json"])
def test_a_path_of_an_artifact_cannot_escape(api: FakeApi, path: str, tmp_path: Path) -> None:
    api.entries[path] = next(iter(api.entries.values()))
    with pytest.raises(UserError, match="outside of its folder"):
        locate_policy(ARTIFACT)
    assert not (tmp_path / "cache").exists()


def test_a_reference_in_an_artifact_is_not_followed(api: FakeApi) -> None:
    api.entries["config.json"].ref = "s3://bucket/config.json"
    with pytest.raises(UserError, match="reference to another place"):
        locate_policy(ARTIFACT)


def test_what_else_an_artifact_holds_is_not_fetched(api: FakeApi, tmp_path: Path) -> None:
    (tmp_path / "code.pkl").write_bytes(b"\x80\x04.")
    api.entries["code.pkl"] = FakeEntry(tmp_path / "code.pkl")
    folder = locate_policy(ARTIFACT)
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json"]


def test_an_artifact_that_is_no_policy_is_told(api: FakeApi) -> None:
    api.entries = {"results.json": api.entries["config.json"]}
    with pytest.raises(UserError, match=r"no policy[\s\S]*results\.json"):
        locate_policy(ARTIFACT)


def test_an_artifact_offline_says_how_to_use_a_local_copy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["policy", "show", ARTIFACT]) == 2
    told = capsys.readouterr().err
    assert "config.json, model.safetensors, README.md of team/project/policy:v3" in told
    assert "wandb artifact get team/project/policy:v3 --root DIR" in told


def test_a_service_that_refuses_is_no_traceback(api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise wandb.errors.CommError("project not found")

    monkeypatch.setattr(api, "artifact", refuse)
    with pytest.raises(UserError, match="project not found"):
        locate_policy(ARTIFACT)


# -- imports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["llmrl", "llmrl.policy_reference", "llmrl.policy_files", "llmrl.tracking"])
def test_importing_stays_light(module: str) -> None:
    heavy = {"torch", "transformers", "datasets", "accelerate", "peft", "wandb", "matplotlib"}
    code = (
        f"import sys, {module}; sys.exit(str(sorted({heavy} & set(sys.modules))) if {heavy} & set(sys.modules) else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_the_package_offers_its_names() -> None:
    import llmrl

    assert llmrl.SchedulePolicy is SchedulePolicy
    with pytest.raises(AttributeError, match="NoSuchThing"):
        llmrl.NoSuchThing  # noqa: B018
