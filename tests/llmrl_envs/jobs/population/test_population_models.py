"""Every kind of model as a population: the same numbers as one by one; and what cannot be stacked is named."""

import numpy as np
import pytest
import torch
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.population import evaluation
from llmrl_envs.jobs.population.members import IntervalPlan
from llmrl_envs.jobs.population.session import PopulationSession
from llmrl_envs.jobs.session import FineTuningSession
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

SMALL = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True, pad_token_id=0)),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, **HEADS, num_key_value_heads=1)),
    "gpt": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=260, n_positions=48, n_embd=16, n_layer=2, n_head=2,
                   resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ),
}  # fmt: skip
RATES = np.array([1e-3, 3e-3, 2e-3])


@pytest.fixture(scope="module")
def make_directory(tmp_path_factory, make_tokenizer):
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            MODELS[kind]().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return folder

    return make


class AtRates:
    """A schedule of given rates, as `FineTuningSession` asks for them."""

    def __init__(self, rates, *, frozen=False, share=1.0, skips=False):
        self._rates, self.frozen, self._share, self._skips = rates, np.array([frozen]), share, skips

    def learning_rate(self, step):
        return np.array([self._rates[int(step[0]) % len(self._rates)]])

    def clipping_factor(self):
        return np.ones(1)

    def momentum_share(self):
        return np.array([self._share])

    def skips_outliers(self):
        return self._skips


def noise_only(name):
    """Biases of keys change no attention weight: their gradients are rounding errors, and Adam blows those up."""
    return "k_proj.bias" in name or "c_attn.bias" in name or "key.bias" in name


def evaluate(population, members, full_core):
    """Job by job where one has so many tokens, as plain layers; otherwise all in one pass, as stacked ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "FULL_CORE_TOKENS", full_core)
        return population.evaluate(members, "validation")


def check(job, *, level_norm="effective", seeds=(3, 8)):
    """Two intervals, in the second one job is frozen and another leans on its gradients, against jobs one by one."""
    population = PopulationSession(job, level_norm=level_norm)
    members = [population.add(job, seed) for seed in seeds]
    assert population.initial_norms() == pytest.approx(
        FineTuningSession(job, seed=0, level_norm=level_norm).initial_norms(), rel=1e-6
    )
    first = population.run_interval([IntervalPlan(member, RATES, 1.0) for member in members])
    again = population.run_interval(
        [
            IntervalPlan(member, RATES, 1.0, frozen=index == 0, momentum_share=0.7 if index == 1 else 1.0)
            for index, member in enumerate(members)
        ]
    )
    ways = [evaluate(population, members, full_core) for full_core in (1, 2**60)]
    for index, seed in enumerate(seeds):
        session = FineTuningSession(job, seed=seed, level_norm=level_norm)
        capable = bool(population.stack.lower_half)
        for results, frozen, share in (
            (first, False, 1.0),
            (again, index == 0 and capable, 0.7 if index == 1 else 1.0),
        ):
            wanted = session.run_interval(3, AtRates(RATES, frozen=frozen, share=share))
            found = results[index]
            np.testing.assert_allclose(found.loss, wanted.loss[0], rtol=2e-5)
            np.testing.assert_allclose(found.gradient_norm, wanted.gradient_norm[0], rtol=1e-4)
            for name in ("update_norm", "weight_norm", "momentum_cosine", "signal_to_noise"):
                assert getattr(found, name) == pytest.approx(getattr(wanted, name)[0], rel=2e-3, abs=2e-4), name
        mine = population.parameters(members[index])
        for name, parameter in job.loaded.trainable.items():
            if not noise_only(name):
                distance = (mine[name] - parameter).detach().norm() / (parameter.detach().norm() + 1e-12)
                assert distance < 1e-4, name
        reference = session.evaluate("validation")
        for evaluations in ways:
            assert evaluations[index].loss == pytest.approx(reference.loss, rel=1e-5)
            assert evaluations[index].num_targets == reference.num_targets
            assert evaluations[index].accuracy == reference.accuracy


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "bert", "tied", "qwen", "gpt"])
def test_jobs_in_a_population_equal_jobs_one_by_one(kind, mode, make_job, make_directory):
    """The jobs' completions are of uneven length, so passes are padded otherwise than single batches."""
    if kind in MODELS:
        check(make_job("llama", model=str(make_directory(kind)), mode=mode))
    elif kind == "bert":
        check(without_dropout(make_job("bert", own_model=True, mode=mode)))
    else:
        check(make_job(kind, mode=mode))


def without_dropout(job):
    """Changes the model, which therefore must be the test's own."""
    for module in job.loaded.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return job


def test_decoders_classify_in_a_population(make_job, tmp_path, write_lines):
    rows = [{"text": f"{'abc'[i % 3] * (1 + i % 7)} {i}", "label": i % 3} for i in range(60)]
    path = write_lines(rows)
    for mode in ("full", "lora"):
        check(make_job("llama", objective="classification", data=str(path), mode=mode))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_jobs_of_a_population_meet_the_bad_batches_of_jobs_one_by_one(kind, make_job):
    job = make_job(kind, own_model=True, mode="lora", bad_batches=0.5, gradient_accumulation=2)
    check(without_dropout(job) if kind == "bert" else job, seeds=(0, 1, 2))


def test_adapters_own_norms_can_be_measured(make_job):
    check(make_job("llama", mode="lora"), level_norm="adapters")


def test_a_layer_that_cannot_be_stacked_is_named_with_the_remedy(make_job):
    class Odd(nn.Linear):
        pass

    job = make_job("llama", own_model=True)
    layer = job.loaded.model.model.layers[1].mlp
    layer.up_proj.__class__ = Odd
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj") as caught:
        PopulationSession(job)
    assert "mode lora" in str(caught.value)
    assert "vectorization" in str(caught.value)
    assert "Odd" in str(caught.value)


def test_a_model_that_mixes_sequences_is_refused(make_job):
    job = make_job("llama", own_model=True)
    norm = job.loaded.model.model.norm
    norm.register_forward_hook(lambda module, inputs, output: output + output.mean(dim=0, keepdim=True))
    with pytest.raises(UserError, match="does not compute the same with stacked layers"):
        PopulationSession(job)


def test_frozen_weights_are_shared_and_not_copied(make_job):
    job = make_job("llama", mode="lora")
    population = PopulationSession(job)
    population.reserve(8)
    base = {p.data_ptr() for name, p in job.loaded.model.named_parameters() if not p.requires_grad}
    mine = {p.data_ptr() for p in population.stack.model.parameters() if len(p)}
    assert base <= mine


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_the_stacked_model_can_be_compiled(make_job):
    job = make_job("llama")
    population = PopulationSession(job)
    members = [population.add(job, seed) for seed in (0, 1)]
    ids = torch.arange(2 * 2 * 6).view(4, 6) + 4
    population.stack.bind(0, 2, 4)
    plain = population.stack.model(input_ids=ids).logits
    plain.square().mean().backward()
    wanted = population.stack.gradients.clone()
    population.stack.gradients.zero_()
    compiled = torch.compile(population.stack.model, backend="aot_eager")
    logits = compiled(input_ids=ids).logits
    torch.testing.assert_close(logits, plain)
    logits.square().mean().backward()
    torch.testing.assert_close(population.stack.gradients, wanted, rtol=1e-4, atol=1e-6)
    assert len(members) == 2
