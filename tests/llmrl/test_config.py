from pathlib import Path
from typing import Any

import pytest
import yaml
from llmrl_envs.errors import UserError
from llmrl_envs.interface.reward import RewardSpec
from llmrl_envs.interface.schedule_settings import ScheduleSettings
from pydantic import ValidationError

from llmrl.config import CompareConfig, FinetuneConfig, TrainConfig
from llmrl.config_loading import config_to_yaml, load_config
from llmrl.dqn.config import DQNConfig

TRAIN = "env: {tasks: {tasks: [{data: 'builtin:json'}]}}\n"
FINETUNE = "task: {data: 'builtin:json', steps: 20}\n"
COMPARE = "tasks:\n  - {name: a, data: 'builtin:json'}\n  - {name: b, data: 'builtin:email'}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(tmp_path: Path, text: str, *overrides: str, kind: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(kind, write(tmp_path, text), overrides)
    return str(caught.value)


# What is read


def test_the_kind_is_told_by_the_keys(tmp_path: Path) -> None:
    assert isinstance(load_config(None, write(tmp_path, TRAIN)), TrainConfig)
    assert isinstance(load_config(None, write(tmp_path, FINETUNE)), FinetuneConfig)
    assert isinstance(load_config(None, write(tmp_path, COMPARE)), CompareConfig)
    assert "--kind" in mistakes(tmp_path, "seed: 1\n")
    assert "an empty file" in mistakes(tmp_path, "")


@pytest.mark.parametrize("text", [TRAIN, FINETUNE, COMPARE, "env: {id: CartPole-v1, kwargs: {x: 1}}\n"])
def test_what_is_written_is_read_back_equal(tmp_path: Path, text: str) -> None:
    config = load_config(None, write(tmp_path, text))
    again = load_config(None, write(tmp_path, config_to_yaml(config)))
    assert again == config


def test_overrides_reach_sections_lists_and_missing_sections(tmp_path: Path) -> None:
    overrides = [
        "env.tasks.tasks.0.steps=33",
        "env.tasks.tasks.0.data={train: a.txt, validation: b.txt}",
        "training.decisions=7",
        "agent.n_step=5",
        "tracking.tags=[a, b]",
        "training.decisions=8",
    ]
    config = load_config("train", write(tmp_path, TRAIN), overrides)
    assert config.env.tasks is not None
    task = config.env.tasks.tasks[0]
    assert (task.steps, task.data.train, task.data.validation) == (33, "a.txt", "b.txt")
    assert (config.training.decisions, config.agent.n_step, config.tracking.tags) == (8, 5, ("a", "b"))


@pytest.mark.parametrize("written", ["1e-3", "1E-3", "1.e-3", "+1e-03", ".1e-2", "0.001", "'1e-3'"])
def test_powers_of_ten_are_numbers(tmp_path: Path, written: str) -> None:
    config = load_config("finetune", write(tmp_path, FINETUNE + f"learning_rate: {written}\n"))
    assert config.learning_rate == pytest.approx(1e-3)
    config = load_config("finetune", write(tmp_path, FINETUNE), [f"learning_rate={written}"])
    assert config.learning_rate == pytest.approx(1e-3)


def test_powers_of_ten_are_numbers_where_no_type_is_declared(tmp_path: Path) -> None:
    text = "env: {id: CartPole-v1, kwargs: {rate: 1e-3, name: e3, version: 1e, minus: -2E+4}}\n"
    config = load_config("train", write(tmp_path, text))
    assert config.env.kwargs == {"rate": 0.001, "name": "e3", "version": "1e", "minus": -20_000.0}


def test_an_empty_section_keeps_its_defaults(tmp_path: Path) -> None:
    text = "env:\n  tasks: {tasks: [{data: 'builtin:json'}]}\n  reward:\nagent:\ntracking:\n"
    assert load_config("train", write(tmp_path, text)) == load_config("train", write(tmp_path, TRAIN))


def test_defaults_are_those_of_what_is_configured(tmp_path: Path) -> None:
    config = load_config("train", write(tmp_path, TRAIN))
    assert vars(config.env.reward) == vars(RewardSpec())
    assert vars(config.env.schedule) == vars(ScheduleSettings())
    assert isinstance(config.env.reward, RewardSpec)
    assert isinstance(config.env.schedule, ScheduleSettings)
    assert config.agent.dqn(seed=4) == DQNConfig.preset("default", seed=4)


def test_a_preset_lies_under_the_flags_that_are_given(tmp_path: Path) -> None:
    config = load_config("train", write(tmp_path, TRAIN), ["agent.preset=nature", "agent.batch_size=64"])
    assert config.agent.dqn(seed=1) == DQNConfig.preset("nature", batch_size=64, seed=1)


def test_seeds_are_a_list_or_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, COMPARE)
    assert load_config("compare", path, ["seeds=4"]).seeds == (0, 1, 2, 3)
    assert load_config("compare", path, ["seeds=[3, 9]"]).seeds == (3, 9)


def test_configurations_are_frozen(tmp_path: Path) -> None:
    config = load_config("train", write(tmp_path, TRAIN))
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]


# What is refused


def test_every_mistake_is_told_at_once_with_its_place(tmp_path: Path) -> None:
    text = (
        "seed: -1\n"
        "env:\n"
        "  populaton: 4\n"
        "  tasks:\n"
        "    tasks:\n"
        "      - {data: 'builtin:json', steps: ten}\n"
        "tracking: {wandb: ofline}\n"
    )
    told = mistakes(tmp_path, text, "agent.n_stepp=3", "nonsense", "env.reward.baseline=refrence", kind="train")
    assert told.startswith("7 mistakes")
    for expected in [
        "line 1, seed\n  expected: at least 0\n  got:      -1",
        "unknown key 'populaton'; did you mean 'population'?",
        "line 3, env.populaton",
        "line 6, env.tasks.tasks.0.steps\n  expected: a whole number\n  got:      'ten'",
        "line 7, tracking.wandb",
        "did you mean 'offline'?",
        "unknown key 'n_stepp'; did you mean 'n_step'?",
        "command line, agent.n_stepp",
        "expected: key.sub=value\n  got:      nonsense",
        "command line, env.reward.baseline",
        "did you mean 'reference'?",
    ]:
        assert expected in told


def test_a_key_in_the_wrong_place_is_sent_to_the_right_one(tmp_path: Path) -> None:
    assert "did you mean 'training.decisions'?" in mistakes(tmp_path, TRAIN, "decisions=5")


def test_an_unknown_key_like_no_other_gets_the_list(tmp_path: Path) -> None:
    assert "one of checkpoint_period_episodes, decisions" in mistakes(tmp_path, TRAIN, "training.zzz=5")


def test_a_union_is_one_mistake(tmp_path: Path) -> None:
    told = mistakes(tmp_path, TRAIN, "env.tasks.tasks.0.lora.target_modules=5")
    assert "env.tasks.tasks.0.lora.target_modules\n  expected: 'all-linear' or a list\n  got:      5" in told
    assert "mistakes" not in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.decisions=-1", "at least 0"),
        ("agent={name: tabular, n_step: 5}", "tabular does not read agent.n_step"),
        ("agent={name: reinforce, dueling: false, epsilon_end: 0.1}", "read agent.dueling, agent.epsilon_end"),
        ("agent={name: reinforce, preset: nature}", "agent.preset"),
        ("training.decisions=1.5", "a whole number"),
        ("training=5", "a section (key: value)"),
        ("env.schedule=5", "a section (key: value)"),
        ("env.device=gpu", "cuda"),
        ("env.reward.switch_cost=.nan", "a finite number"),
        ("env.reward.switch_cost=-1", "command line, env.reward.switch_cost"),
        ("env.tasks.tasks=[]", "at least 1 entries"),
        ("env.tasks.tasks.3.steps=5", "an index below 1"),
        ("env.tasks.tasks.0.data.train=x", "leads through a value"),
        ("env.tasks.learning_rate_log10_range=[1, -1]", "the low end first"),
        ("env.kwargs={x: 1}", "llmrl/FineTuning-v0 does not read env.kwargs"),
        ("env={id: llmrl/NoisyQuadratic-v0, device: cpu}", "llmrl/NoisyQuadratic-v0 does not read env.device"),
        ("env={id: CartPole-v1, actions: levels, reward: {switch_cost: 1}}", "does not read env.actions, env.reward"),
        ("env.id=CartPole-v1", "CartPole-v1 does not read env.tasks"),
        ("env.actions=move", "one of moves, moves_only"),
        ("agent.seed=3", "the run's `seed`"),
        ("agent.preset=nature2", "'nature'"),
        ("agent.name=dqnn", "did you mean 'dqn'?"),
        ("agent.sampling=[", "not valid YAML"),
        ("=5", "key.sub=value"),
        ("agent..n_step=5", "key.sub=value"),
    ],
)
def test_each_wrong_value_is_told(tmp_path: Path, override: str, told: str) -> None:
    assert told in mistakes(tmp_path, TRAIN, override, kind="train")


def test_fine_tuning_needs_tasks(tmp_path: Path) -> None:
    assert "at least one task" in mistakes(tmp_path, "env: {}\n")
    assert "the key 'env' is missing" in mistakes(tmp_path, "seed: 1\n", kind="train")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("learning_rate_factors=[1, 1.0]", "1.0 more than once"),
        ("learning_rate_factors=[0]", "more than 0"),
        ("methods=[hold, hold]", "'hold' more than once"),
        ("seeds=0", "at least 1 entries"),
        ("seeds=true", "a list"),
        ("tasks.1.name=a", "different names"),
    ],
)
def test_each_wrong_comparison_is_told(tmp_path: Path, override: str, told: str) -> None:
    assert told in mistakes(tmp_path, COMPARE, override)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"env: [1, 2\nseed: 3\n", "line 2, column 5"),
        (b"env:\n\t- x\n", "line 2, column 1"),
        (b"seed: 1\nenv: {}\nseed: 2\n", "the key 'seed' stands twice"),
        (b"- a\n- b\n", "not a mapping"),
        (b"just words\n", "not a mapping"),
        (b"name: \xff\xfe\n", "not UTF-8"),
        (b"seed: \x00\n", "not valid YAML"),
        (b"a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
    ],
)
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(None, path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_directory_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        load_config("train", tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="a directory"):
        load_config("train", tmp_path)


def test_written_yaml_has_no_tags(tmp_path: Path) -> None:
    text = config_to_yaml(load_config("compare", write(tmp_path, COMPARE)))
    assert "!!" not in text
    assert yaml.safe_load(text)["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("agent", ["{name: tabular, epsilon_end: 0.1}", "{name: reinforce, batch_size: 64}"])
def test_the_small_agents_take_what_they_read_also_from_a_file_with_every_default(tmp_path: Path, agent: str) -> None:
    config = load_config("train", write(tmp_path, TRAIN), [f"agent={agent}"])
    again = load_config("train", write(tmp_path, config_to_yaml(config)))
    assert again == config


def test_environment_variables_stand_for_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        'task: {model: "${env:PLACE}/small", data: {train: "${env:PLACE}/a.jsonl", fields: {text: "${b}"}}}\n'
    )
    monkeypatch.setenv("PLACE", "/somewhere")
    task = load_config("finetune", path, ["tracking.name=${env:PLACE}"]).task
    assert (task.model, task.data.train) == ("/somewhere/small", "/somewhere/a.jsonl")
    assert task.data.fields == {"text": "${b}"}
    monkeypatch.delenv("PLACE")
    with pytest.raises(UserError, match="the environment variable PLACE is not set") as caught:
        load_config("finetune", path)
    assert str(caught.value).count("PLACE is not set") == 1
    assert caught.value.where == f"{path}, line 1, task.model"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stress_tasks=[{name: job, data: a}]", "tasks of different names, got job, job"),
        ("stress_tasks=[job]", "stress_tasks.0"),
        ("stress_tasks=job", "stress_tasks"),
        ("stress_task=[]", "did you mean 'stress_tasks'?"),
        ("oracle_factors=[]", "wrong value of 'oracle_factors'"),
        ("learning_rate_factors=[]", "wrong value of 'learning_rate_factors'"),
        ("methods=[]", "wrong value of 'methods'"),
        ("seeds=[]", "wrong value of 'seeds'"),
        ("tasks=[]", "wrong value of 'tasks'"),
        ("tuned=perhaps", "wrong value of 'tuned'"),
    ],
)
def test_a_comparison_tells_what_is_wrong_with_its_regimes(tmp_path: Path, override: str, told: str) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text("tasks: [{name: job, data: a}]\n")
    with pytest.raises(UserError) as caught:
        load_config("compare", path, [override])
    assert told in str(caught.value)
