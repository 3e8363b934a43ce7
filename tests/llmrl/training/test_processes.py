"""Several processes that learn one policy, on small problems, with everything that can happen to them.

The processes are forked from a fresh interpreter that runs this file as a program (see the end); all scenarios share
its imports. What a scenario left is in FOLDER/<name>: the run directory, and the exit code and words of each process.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

from llmrl.run_directory import read_jsonl
from llmrl.training.checkpoint import is_whole

LEARNER = {
    "hidden_sizes": [16], "learning_starts": 20, "batch_size": 9, "replay_capacity": 400, "gamma": 0.9, "n_step": 2,
    "epsilon_decay_steps": 100, "replay_ratio": 0.5,
}  # fmt: skip
EVERYTHING = {
    "sampling": "prioritized", "noisy": True, "normalize_obs": True, "normalize_obs_steps": 120, "reset_period": 40,
    "exploration_max_repeat": 3,
}  # fmt: skip
LENGTH = {"decisions": 240, "checkpoint_period_episodes": 3, "evaluation_period_episodes": 4, "evaluation_episodes": 2}
GRID = {
    "env": {"id": "llmrl/GridWorld-v0"},
    "agent": {**LEARNER, **EVERYTHING},
    "training": {**LENGTH, "process_timeout_seconds": 60},
    "tracking": {"wandb": "disabled"},
}
QUADRATIC = {
    **GRID,
    "env": {
        "id": "llmrl/NoisyQuadratic-v0",
        "population": 3,
        "kwargs": {"distribution": {"total_steps": [12, 40]}},
    },
    "agent": {**LEARNER, "head": "quantile"},
}
SMALL_TIMEOUT = {**GRID, "training": {**LENGTH, "process_timeout_seconds": 3}}
TABULAR = {**GRID, "agent": {"name": "tabular"}}
TINY_BATCH = {**GRID, "agent": {**LEARNER, "batch_size": 1}}
KILLED_AT = {"grid": 75, "quadratic": 25}
RESIZED = [("two-to-one", 2, 1), ("one-to-two", 1, 2), ("two-to-three", 2, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where every scenario has been played."""
    folder = tmp_path_factory.mktemp("processes")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=280)
    return folder


def rows(folder, name, kind):
    return [row for row in read_jsonl(folder / name / "run" / "metrics.jsonl") if row["kind"] == kind]


def codes(folder, name, *, resumed=False):
    return json.loads((folder / name / f"ended{'-resumed' * resumed}.json").read_text())["codes"]


def seconds(folder, name):
    return json.loads((folder / name / "ended.json").read_text())["seconds"]


def words(folder, name, rank):
    return (folder / name / f"said.{rank}").read_text()


def policy(folder, name):
    return {path.name: path.read_bytes() for path in sorted((folder / name / "run" / "policy").iterdir())}


@pytest.mark.parametrize("name", ["grid", "quadratic"])
def test_all_processes_hold_the_same_network_bit_for_bit(folder, name):
    assert codes(folder, name) == [0, 0]
    checked = rows(folder, name, "processes")
    assert len(checked) > 2, "at every checkpoint and at the end"
    for row in checked:
        assert len(row["digests"]) == 2
        assert len(set(row["digests"])) == 1
    assert len({row["digests"][0] for row in checked}) == len(checked), "it learns between checkpoints"


def test_every_process_has_episodes_of_its_own_and_the_first_tells_of_all(folder):
    episodes = rows(folder, "quadratic", "episode")
    assert [row["episode"] for row in episodes] == list(range(1, len(episodes) + 1))
    returns = [[row["return"] for row in episodes if row["process"] == rank] for rank in (0, 1)]
    assert min(map(len, returns)) > 4
    assert set(returns[0]) & set(returns[1]) <= {-3.0}, "which is what divergence returns"
    assert rows(folder, "quadratic", "final_evaluation")[0]["decisions"] == 240


def test_a_configuration_means_the_same_for_any_number_of_processes(folder):
    """Decisions and updates count all processes together."""
    for name in ("grid", "grid-alone"):
        last = rows(folder, name, "episode")[-1]
        assert abs(last["learner_steps"] - ((last["decisions"] - 20) * 0.5 + 1)) <= 1
        assert rows(folder, name, "final_evaluation")[0]["decisions"] in (240, 241)


@pytest.mark.parametrize("name", ["grid", "quadratic"])
def test_killed_and_resumed_by_the_same_number_equals_undisturbed(folder, name):
    assert -signal.SIGKILL in codes(folder, f"{name}-torn")
    assert codes(folder, f"{name}-torn", resumed=True) == [0, 0]
    assert policy(folder, f"{name}-torn") == policy(folder, name)
    assert read_jsonl(folder / f"{name}-torn" / "run" / "metrics.jsonl") == read_jsonl(
        folder / name / "run" / "metrics.jsonl"
    )


@pytest.mark.parametrize(("name", "before", "now"), RESIZED)
def test_another_number_of_processes_goes_on(folder, name, before, now):
    assert codes(folder, name, resumed=True) == [0] * now
    assert rows(folder, name, "resumed") == [{"kind": "resumed", "processes_before": before, "processes": now}]
    assert words(folder, name, 0).count("experience divided") == 1
    stored = json.loads((folder / name / "before.json").read_text())
    resumed = [json.loads((folder / name / f"resumed.{rank}.json").read_text()) for rank in range(now)]
    for found in resumed:
        assert found["digest"] == stored["digest"], "networks, optimizer and generator exactly"
        assert found["counters"] == stored["counters"]
        assert found["first_episode"] > max(stored["used_episodes"]), "no episode is played twice"
        assert len(found["rewards"]) > 0.5 * len(stored["rewards"]) / now
    rewards = [reward for found in resumed for reward in found["rewards"]]
    assert sorted(rewards) == sorted(stored["rewards"]), "nothing is lost or doubled"
    assert rows(folder, name, "final_evaluation")[0]["decisions"] in range(240, 240 + now)


def test_processes_divide_the_experience_of_earlier_runs_and_learn_from_it_together(folder):
    assert codes(folder, "logs") == [0, 0]
    taken = rows(folder, "logs", "experience")
    before = json.loads((folder / "logs" / "before.json").read_text())
    assert len(taken) == 2, "the earlier run had two processes"
    assert sum(row["transitions"] for row in taken) == len(before["rewards"])
    assert [row["learner_steps"] for row in rows(folder, "logs", "pretraining")][-1] == 40
    assert len(set(rows(folder, "logs", "processes")[-1]["digests"])) == 1
    assert codes(folder, "logs-torn", resumed=True) == [0, 0]
    assert policy(folder, "logs-torn") == policy(folder, "logs")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_others_with_a_clear_message(folder, lost):
    found = codes(folder, f"lost-{lost}")
    assert found[lost] == -signal.SIGKILL
    assert found[1 - lost] == 2
    told = words(folder, f"lost-{lost}", 1 - lost)
    assert f"process {1 - lost} of 2 lost another one" in told
    assert "--resume" in told
    assert "Traceback" not in told
    assert seconds(folder, f"lost-{lost}")[1 - lost] - seconds(folder, f"lost-{lost}")[lost] < 5


def test_a_process_that_hangs_is_given_up_after_the_timeout(folder):
    assert codes(folder, "hung")[0] == 2
    assert "process 0 of 2 lost another one" in words(folder, "hung", 0)
    assert 3 <= seconds(folder, "hung")[0] < 20


@pytest.mark.parametrize(("name", "code"), [("bad-reward", 1), ("bad-input", 2), ("disk-full", 2)])
def test_what_fails_in_one_process_is_told_by_the_first(folder, name, code):
    assert codes(folder, name) == [2, code]
    told = words(folder, name, 0)
    assert "process 1 of 2 failed" in told
    assert {"bad-reward": "got nan", "bad-input": "no such thing", "disk-full": "no space left"}[name] in told
    assert "Traceback" not in told


def test_a_full_disk_keeps_the_earlier_checkpoints_and_nothing_else(folder):
    (kept,) = (folder / "disk-full" / "run" / "checkpoints").iterdir()
    assert is_whole(kept)


def test_what_is_wrong_for_all_is_told_once(folder):
    expected = {
        "tabular": "learns in one process",
        "tiny-batch": "smaller than the number of processes",
        "not-empty": "not empty",
    }
    for name, told in expected.items():
        assert codes(folder, name) == [2, 2]
        assert told in words(folder, name, 0)
        assert words(folder, name, 1) == ""


def test_asked_to_stop_one_process_stops_all_at_the_same_step(folder):
    assert codes(folder, "stopped") == [130, 130]
    steps = [int((folder / "stopped" / f"steps.{rank}").read_text()) for rank in (0, 1)]
    assert steps[0] == steps[1] >= 50
    assert "accelerate launch -m llmrl train" in words(folder, "stopped", 0)
    assert words(folder, "stopped", 1) == ""


def test_a_world_size_without_a_launcher_is_told(tmp_path, monkeypatch, capsys):
    from llmrl.cli import main

    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "train.yaml").write_text(json.dumps(GRID))
    assert main(["train", "--config", str(tmp_path / "train.yaml"), "--output", str(tmp_path / "run")]) == 2
    assert "no RANK, MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err


# -- the program ----------------------------------------------------------------------------------------------------


def at_step(number, action):
    """Makes this process do something before its collector's step of that number."""
    from llmrl.dqn.collector import Collector

    original, count = Collector.step, iter(range(1, 10**9))

    def step(self, **named):
        if next(count) == number:
            action()
        return original(self, **named)

    Collector.step = step


def at_update(number, action):
    """The same for an update."""
    from llmrl.dqn.agent import DQNAgent

    original, count = DQNAgent._update, iter(range(1, 10**9))

    def update(self):
        if next(count) == number:
            action()
        return original(self)

    DQNAgent._update = update


def kill_myself():
    os.kill(os.getpid(), signal.SIGKILL)


def break_reward():
    from llmrl_envs.grid_world import GridWorldEnv

    original = GridWorldEnv.step

    def step(self, action):
        obs, _, terminated, truncated, info = original(self, action)
        return obs, float("nan"), terminated, truncated, info

    GridWorldEnv.step = step


def refuse():
    from llmrl_envs.errors import UserError

    raise UserError("no such thing", where="here")


def fill_disk_at_the_second_checkpoint():
    from llmrl.dqn.agent import DQNAgent

    original, count = DQNAgent.save, iter(range(1, 10**9))

    def save(self, directory):
        if next(count) == 2:
            raise OSError(28, "No space left on device", str(directory))
        original(self, directory)

    DQNAgent.save = save


def count_steps(place, rank):
    from llmrl.training.loop import TrainingRun

    original, count = TrainingRun._step, iter(range(1, 10**9))

    def step(self):
        (place / f"steps.{rank}").write_text(str(next(count)))
        return original(self)

    TrainingRun._step = step


def note_what_is_resumed(place, rank):
    from llmrl.training import loop
    from llmrl.training.sharing import learner_digest

    original = loop.TrainingRun.resume

    def resume(self):
        original(self)
        agent = self.agent
        found = {
            "digest": learner_digest(agent),
            "counters": [agent.env_steps, agent.learner_steps, agent._scheduled_updates, self.num_episodes],
            "rewards": agent.replay.rows.records["reward"][agent.replay.rows.live_slots()].tolist(),
            "first_episode": int(self.collector._index[0]),
        }
        (place / f"resumed.{rank}.json").write_text(json.dumps(found))

    loop.TrainingRun.resume = resume


def checkpoint_facts(output):
    """What the newest checkpoint holds, read from its files."""
    from llmrl.dqn.agent_files import read_tensors
    from llmrl.dqn.replay_storage import StoredReplay
    from llmrl.training.checkpoint import latest_checkpoint
    from llmrl.training.sharing import digest_of

    path, state = latest_checkpoint(output / "checkpoints")
    folders = sorted(path.glob("agent*"))
    agent = json.loads((folders[0] / "agent.json").read_text())
    tensors = read_tensors(folders[0] / "learner.safetensors")
    replays = [StoredReplay(folder / "replay") for folder in folders]
    return {
        "digest": digest_of({n: t for n, t in tensors.items() if not n.startswith(("statistics.", "acting_noise"))}),
        "counters": [
            agent["env_steps"],
            agent["counters"]["learner_steps"],
            agent["scheduled_updates"],
            state["num_episodes"],
        ],
        "rewards": [float(r) for each in replays for r in each.transitions(np.arange(each.num_intact)).reward],
        "used_episodes": [index for collector in state["collectors"] for index in collector["index"]],
    }


def launch(folder, name, config, num_processes=2, *, resume=False, prepare=lambda rank: None, patience=20.0):
    """Runs `llmrl train` in so many processes; notes how each ended, after how many seconds, and what it said.

    What still runs so many seconds after the first has ended is killed.
    """
    place = folder / name
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    command = ["train", "--config", str(place / "config.json"), "--output", str(place / "run")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    children = [
        fork(place, rank, num_processes, port, [*command, *["--resume"] * resume], prepare)
        for rank in range(num_processes)
    ]
    codes, seconds = {}, {}
    while len(codes) < num_processes:
        time.sleep(0.01)
        now = time.monotonic() - began
        for rank, pid in enumerate(children):
            if rank not in codes:
                if seconds and now - min(seconds.values()) > patience:
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank], seconds[rank] = os.waitstatus_to_exitcode(status), now
    ended = {"codes": [codes[rank] for rank in range(num_processes)]}
    ended |= {"seconds": [seconds[rank] for rank in range(num_processes)]}
    (place / f"ended{'-resumed' * resume}.json").write_text(json.dumps(ended))


def fork(place, rank, num_processes, port, command, prepare):
    """A process of the group, as a launcher would start it; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        said = os.open(place / f"said.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        from llmrl.cli import main

        prepare(rank)
        code = main(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def only(chosen, action):
    """Prepares one process."""
    return lambda rank: action() if rank == chosen else None


def main(folder):
    import torch

    from llmrl.config import TrainConfig
    from llmrl.training.loop import train

    torch.set_num_threads(1)
    # A run in this very process loads everything that the forked ones need.
    train(config=TrainConfig.model_validate(GRID), output=folder / "grid-alone" / "run")
    for name, config in (("grid", GRID), ("quadratic", QUADRATIC)):
        launch(folder, name, config)
        launch(folder, f"{name}-torn", config, prepare=lambda rank: at_step(KILLED_AT[name], kill_myself))  # noqa: B023
        launch(folder, f"{name}-torn", config, resume=True)
    for name, before, now in RESIZED:
        launch(folder, name, GRID, before, prepare=lambda rank: at_step(200 // before, kill_myself))  # noqa: B023
        (folder / name / "before.json").write_text(json.dumps(checkpoint_facts(folder / name / "run")))
        launch(folder, name, GRID, now, resume=True, prepare=lambda rank: note_what_is_resumed(folder / name, rank))  # noqa: B023
    for lost in (0, 1):
        launch(folder, f"lost-{lost}", GRID, prepare=only(lost, lambda: at_step(60, kill_myself)))
    stop = only(1, lambda: at_step(60, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    launch(folder, "hung", SMALL_TIMEOUT, prepare=stop, patience=1.0)
    launch(folder, "bad-reward", GRID, prepare=only(1, lambda: at_step(60, break_reward)))
    launch(folder, "bad-input", GRID, prepare=only(1, lambda: at_step(60, refuse)))
    launch(folder, "disk-full", GRID, prepare=only(1, fill_disk_at_the_second_checkpoint))
    launch(folder, "tabular", TABULAR)
    launch(folder, "tiny-batch", TINY_BATCH)
    (folder / "not-empty" / "run" / "mine").mkdir(parents=True)
    launch(folder, "not-empty", GRID)
    logs = {**GRID["agent"], "experience": [str(folder / "grid" / "run")], "pretrain_updates": 40}
    logs = {**GRID, "agent": logs, "training": {**LENGTH, "decisions": 0}}
    launch(folder, "logs", logs)
    (folder / "logs" / "before.json").write_text(json.dumps(checkpoint_facts(folder / "grid" / "run")))
    launch(folder, "logs-torn", logs, prepare=lambda rank: at_update(23, kill_myself))
    launch(folder, "logs-torn", logs, resume=True)

    def stopping(rank):
        count_steps(folder / "stopped", rank)
        if rank == 1:
            at_step(50, lambda: os.kill(os.getpid(), signal.SIGINT))

    launch(folder, "stopped", GRID, prepare=stopping)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
