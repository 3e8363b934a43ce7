"""Loads the model of a task, ready to train: float32 weights, a head or adapters that start the same way every time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto
from transformers.pytorch_utils import Conv1D

from llmrl_envs.errors import UserError
from llmrl_envs.jobs.model_files import ModelSource, find_model, load_errors, load_tokenizer, quiet_transformers
from llmrl_envs.jobs.task import FineTuningTask, LoraSettings, Mode

__all__ = ["LoadedModel", "check_length", "load_model", "load_tokenizer", "position_limit", "save_model"]

INITIALISATION_SEED = 20_260_101
"""Seed of the weights that no file holds (a classification head, adapters)."""

_WITHOUT_LIMIT = frozenset({"bloom", "mpt", "mt5", "t5", "umt5", "xlnet"})
"""Model types whose positions are relative, so that a size in their configuration limits nothing."""


@dataclass
class LoadedModel:
    """A model that is ready to train.

    Attributes:
        model: The model, in evaluation mode, on its device; with adapters a `PeftModel`.
        tokenizer: Its tokenizer.
        trainable: The parameters to train by name, in the order of the model.
        mode: Whether all weights are trained, or adapters.
        trainable_fraction: Share of the parameters that is trained.
        num_parameters: Number of parameters, adapters included.
        use_cache: Whether the configuration asked for a key-value cache, which training switches off.
    """

    model: nn.Module
    tokenizer: Any
    trainable: dict[str, nn.Parameter]
    mode: Mode
    trainable_fraction: float
    num_parameters: int
    use_cache: bool | None = None


def load_model(
    task: FineTuningTask, *, num_labels: int | None, device: torch.device | str, tokenizer: Any = None
) -> LoadedModel:
    """Loads the model of a task in float32, with a classification head or adapters where the task wants them.

    Args:
        task: The task.
        num_labels: Number of classes of a classification task, as found in its data.
        device: Where the model goes.
        tokenizer: The model's tokenizer, where it is loaded already.

    Raises:
        UserError: The model is missing, broken, of the wrong kind, or shorter than the task's `max_length`.
    """
    if task.objective == "classification" and num_labels is None:
        raise ValueError("num_labels: expected the number of classes of a classification task, got None")
    source = find_model(task.model)
    config = _load_config(source)
    _check_kind(config, task)
    check_length(config, task)
    tokenizer = load_tokenizer(task.model) if tokenizer is None else tokenizer
    if task.objective == "classification":
        config.num_labels, config.problem_type = num_labels, "single_label_classification"
    model = _load_weights(source, config, task)
    _check_vocabulary(model, tokenizer, task)
    if task.objective == "classification":
        # A decoder's classifier reads the last token that is no padding. Set on the finished model, because some models
        # number their positions from the pad token that they were built with.
        model.config.pad_token_id = tokenizer.pad_token_id
    use_cache = getattr(model.config, "use_cache", None)
    if use_cache:
        model.config.use_cache = False
    if task.mode == "lora":
        model = _add_adapters(model, task.lora, is_classifier=task.objective == "classification")
    return _ready(model.to(device), tokenizer, task, use_cache)


def _ready(model: nn.Module, tokenizer: Any, task: FineTuningTask, use_cache: bool | None) -> LoadedModel:
    model.eval()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trainable.values())
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        trainable=trainable,
        mode=task.mode,
        trainable_fraction=trained / total,
        num_parameters=total,
        use_cache=use_cache,
    )


def save_model(
    loaded: LoadedModel,
    directory: Path | str,
    label_names: Sequence[str] = (),
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Writes the model with its tokenizer, as safetensors, so that `from_pretrained` reads it; of LoRA the adapters.

    Args:
        loaded: The model.
        directory: Made if it is not there.
        label_names: Names of a classifier's classes, for its configuration.
        state: All weights by name, where the model holds a shard of them only.
    """
    model: Any = loaded.model
    if label_names:
        model.config.id2label = dict(enumerate(label_names))
        model.config.label2id = {name: index for index, name in enumerate(label_names)}
    arguments: dict[str, Any] = {"save_embedding_layers": False} if loaded.mode == "lora" else {}
    if state is not None:
        arguments["state_dict"] = dict(state)
    if loaded.use_cache is not None:
        model.config.use_cache = loaded.use_cache
    try:
        with quiet_transformers():
            model.save_pretrained(str(directory), **arguments)
            loaded.tokenizer.save_pretrained(str(directory))
    finally:
        if loaded.use_cache is not None:
            model.config.use_cache = False


def _load_config(source: ModelSource) -> Any:
    with quiet_transformers(source), load_errors(source, "configuration"):
        return transformers.AutoConfig.from_pretrained(**source.arguments())


def _load_weights(source: ModelSource, config: Any, task: FineTuningTask) -> Any:
    is_classifier = task.objective == "classification"
    loader = transformers.AutoModelForSequenceClassification if is_classifier else transformers.AutoModelForCausalLM
    arguments = source.arguments() | {"config": config, _dtype_argument(): torch.float32}
    if is_classifier:
        arguments["ignore_mismatched_sizes"] = True  # a head for other classes is replaced
    if source.gguf_file is None:
        arguments["use_safetensors"] = True  # never a pickle, which could run code
    elif hasattr(transformers, "GgufConfig"):
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quiet_transformers(source), load_errors(source, "weights"), fixed_initialisation():
        model = loader.from_pretrained(**arguments)
    if source.gguf_file is not None:
        _forget_quantization(model)
    return model


def _forget_quantization(model: Any) -> None:
    """Takes the marks of its file off a model with plain float32 weights, or it could be neither cast nor saved."""
    model.is_quantized, model.hf_quantizer = False, None
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config


def _dtype_argument() -> str:
    """`dtype` was called `torch_dtype` before transformers 4.56."""
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


@contextmanager
def fixed_initialisation() -> Iterator[None]:
    """Draws weights from a fixed seed and leaves the global generators as they were."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the generators of all devices.
        torch.default_generator.manual_seed(INITIALISATION_SEED)
        yield


def _check_kind(config: Any, task: FineTuningTask) -> None:
    """A language model reads from left to right; encoders would see the tokens that they are to predict."""
    is_classifier = task.objective == "classification"
    known = (
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        if is_classifier
        else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    kind = config.model_type
    is_encoder = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    is_encoder = is_encoder or bool(getattr(config, "is_encoder_decoder", False))
    if kind not in known or (is_encoder and not is_classifier):
        raise UserError(
            f"the model cannot be trained for objective {task.objective!r}",
            where=task.model,
            expected="a model with a classification head" if is_classifier else "a decoder-only language model",
            got=f"model type {kind!r}",
        )


def check_length(config: Any, task: FineTuningTask) -> None:
    """Makes sure that a model has positions for a task's sequences.

    Args:
        config: The model's configuration.
        task: The task.

    Raises:
        UserError: The task's `max_length` is longer.
    """
    limit = position_limit(config)
    if limit is not None and task.max_length > limit:
        raise UserError(
            "max_length is longer than the model allows",
            where=f"max_length, model {task.model}",
            expected=f"at most {limit} tokens",
            got=task.max_length,
        )


def position_limit(config: Any) -> int | None:
    """The longest sequence that a model has positions for; None where nothing limits it.

    Args:
        config: A transformers configuration.
    """
    if config.model_type in _WITHOUT_LIMIT or getattr(config, "alibi", False):
        return None
    if getattr(config, "position_biased_input", True) is False:
        return None  # DeBERTa 2 and 3: relative positions only
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if limit is None or limit <= 0:
        return None
    # The RoBERTa family numbers positions from the pad token's id on and loses as many of them.
    offset = (
        config.pad_token_id + 1 if _counts_from_padding(config.model_type) and config.pad_token_id is not None else 0
    )
    return int(limit) - offset


def _counts_from_padding(model_type: str) -> bool:
    return "roberta" in model_type or model_type in {"camembert", "data2vec-text", "longformer", "mpnet", "xmod"}


def _check_vocabulary(model: Any, tokenizer: Any, task: FineTuningTask) -> None:
    num_embeddings = model.get_input_embeddings().num_embeddings
    # Tokens that were added and are never used do no harm.
    used = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    highest = max(tokenizer.vocab_size - 1, *(token for token in used if token is not None))
    if highest >= num_embeddings:
        raise UserError(
            "the tokenizer does not belong to the model",
            where=task.model,
            expected=f"token ids below {num_embeddings}, the number of embeddings",
            got=f"token ids up to {highest}",
        )


def _add_adapters(model: Any, lora: LoraSettings, *, is_classifier: bool) -> nn.Module:
    """Adds LoRA adapters; the layers of a classification head are trained in full beside them."""
    from peft import LoraConfig, TaskType, get_peft_model

    heads = _head_names(model) if is_classifier else []
    targets: str | list[str] = "all-linear" if lora.target_modules == "all-linear" else list(lora.target_modules)
    if is_classifier and targets == "all-linear":
        # Named one by one, because older peft would also adapt the head, which is trained in full.
        targets = [name for name in _linear_names(model) if name.partition(".")[0] == model.base_model_prefix]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if is_classifier else TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=heads or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        with quiet_transformers(), fixed_initialisation():
            adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name in _linear_names(model)})
        raise UserError(
            "LoRA target modules are not in the model",
            where="lora.target_modules",
            expected=f"all-linear, or some of {', '.join(linear)}",
            got=str(targets),
        ) from error
    return adapted


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _head_names(model: Any) -> list[str]:
    """The parts of a classifier that are not its base model."""
    children = model.named_children()
    return [
        name for name, child in children if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
