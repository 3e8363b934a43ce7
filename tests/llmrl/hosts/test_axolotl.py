"""The plugin in a stand-in for axolotl: the part of its interface that a plugin meets, in the order of a training."""

import importlib
import sys
import types

import pytest
from llmrl_envs.errors import UserError


class BasePlugin:
    """axolotl.integrations.base.BasePlugin: every hook that its manager calls, doing nothing."""

    def register(self, cfg):
        pass

    def get_input_args(self):
        pass

    def load_datasets(self, cfg, preprocess=False):
        pass

    def pre_model_load(self, cfg):
        pass

    def post_model_build(self, cfg, model):
        pass

    def pre_lora_load(self, cfg, model):
        pass

    def post_lora_load(self, cfg, model):
        pass

    def post_model_load(self, cfg, model):
        pass

    def get_trainer_cls(self, cfg):
        pass

    def post_trainer_create(self, cfg, trainer):
        pass

    def create_optimizer(self, cfg, trainer):
        pass

    def create_lr_scheduler(self, cfg, trainer, optimizer, num_training_steps):
        pass

    def add_callbacks_pre_trainer(self, cfg, model):
        return []

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []

    def post_train(self, cfg, model):
        pass

    def post_train_unload(self, cfg):
        pass


class Config(dict):
    """axolotl.utils.dict.DictDefault: a missing key is None."""

    def __getattr__(self, name):
        return self.get(name)


@pytest.fixture
def axolotl(monkeypatch):
    """Puts the stand-in where axolotl would be; gives a function that loads a plugin by its name, as axolotl does."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin
    for name, module in {
        "axolotl": types.ModuleType("axolotl"),
        "axolotl.integrations": types.ModuleType("axolotl.integrations"),
        "axolotl.integrations.base": base,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "llmrl.hosts.axolotl", raising=False)

    def load(name):
        module, _, kind = name.rpartition(".")
        return getattr(importlib.import_module(module), kind)()

    yield load
    sys.modules.pop("llmrl.hosts.axolotl", None)


def train(plugin, cfg, make_trainer):
    """The hooks that axolotl calls around a training, in its order."""
    plugin.register(cfg)
    plugin.pre_model_load(cfg)
    callbacks = plugin.add_callbacks_pre_trainer(cfg, None)
    trainer = make_trainer(callbacks, lr_scheduler_type="cosine")
    plugin.post_trainer_create(cfg, trainer)
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train()
    plugin.post_train(cfg, trainer.model)
    return trainer, callbacks[0]


def test_a_job_of_axolotl_is_steered(axolotl, make_trainer):
    plugin = axolotl("llmrl.hosts.axolotl.SchedulePlugin")
    trainer, callback = train(plugin, Config(llmrl_policy="hold"), make_trainer)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(callback.controller.records) > 3
    assert max(rates) > 10 * trainer.args.learning_rate, "the level sets the rate, not the configuration"
    assert callback.controller.records[0].level == pytest.approx(0.0025)


def test_a_wrong_policy_is_told_before_the_model_is_loaded(axolotl):
    plugin = axolotl("llmrl.hosts.axolotl.SchedulePlugin")
    with pytest.raises(UserError, match="llmrl_policy in axolotl's configuration"):
        plugin.pre_model_load(Config(llmrl_policy="./nowhere"))


def test_without_keys_it_holds(axolotl):
    plugin = axolotl("llmrl.hosts.axolotl.SchedulePlugin")
    (callback,) = plugin.add_callbacks_pre_trainer(Config(), None)
    assert callback.policy.network is None


def test_axolotl_finds_the_keys_by_their_name(axolotl):
    plugin = axolotl("llmrl.hosts.axolotl.SchedulePlugin")
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    assert set(arguments.model_fields) == {"llmrl_policy", "llmrl_guarded", "llmrl_snapshots"}
    with pytest.raises(ValueError, match="llmrl_snapshots"):
        arguments(llmrl_snapshots="tape")


def test_nothing_else_needs_axolotl():
    assert "axolotl" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="axolotl"):
        importlib.import_module("llmrl.hosts.axolotl")
