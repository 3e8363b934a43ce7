"""The command line: `llmrl train | finetune | compare | policy | config | doctor`.

A command reads its configuration, imports what it needs only then, and hands over; `--help` and `config validate`
load neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from llmrl import __version__
from llmrl.failures import reported_failures

app = typer.Typer(
    name="llmrl",
    help="Learned learning-rate and update schedules for fine-tuning language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at and check configuration files.", no_args_is_help=True)
policy_app = typer.Typer(help="Look at, convert and share policies.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(policy_app, name="policy")


class Kind(StrEnum):
    """Which command a configuration is for."""

    TRAIN = "train"
    FINETUNE = "finetune"
    COMPARE = "compare"


class WandbChoice(StrEnum):
    """How Weights & Biases records the run."""

    OFFLINE = "offline"
    ONLINE = "online"
    DISABLED = "disabled"


class ExportFormat(StrEnum):
    """File format of an exported policy."""

    SAFETENSORS = "safetensors"
    NUMPY = "numpy"
    ONNX = "onnx"


# typer reads these aliases when it builds the command, so they cannot be strings.
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML file.")]
OptionalConfigOption = Annotated[Optional[Path], typer.Option("--config", "-c", help="YAML file.")]  # noqa: UP045
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Run directory; new or empty.")]
WandbOption = Annotated[Optional[WandbChoice], typer.Option("--wandb", help="Weights & Biases mode.")]  # noqa: UP045
TrackersOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--trackers", help="Further trackers, separated by commas: tensorboard, trackio, ..."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output.")]
KindOption = Annotated[Optional[Kind], typer.Option("--kind", help="Default: told by the keys.")]  # noqa: UP045
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides of the configuration.", show_default=False),
]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Learned learning-rate and update schedules for fine-tuning language models."""


@app.command()
def train(
    config: ConfigOption,
    output: OutputOption,
    overrides: Overrides = None,
    resume: ResumeOption = False,
    wandb: WandbOption = None,
    trackers: TrackersOption = None,
) -> None:
    """Learn a policy and write it to OUTPUT/policy."""
    again = ["train", "--config", str(config), "--output", str(output), "--resume", *(overrides or [])]
    with reported_failures(_go_on_with(again)):
        settings = _load("train", config, overrides, None, trackers)
        from llmrl.training.loop import train as run

        run(config=settings, output=output, resume=resume, wandb_mode=_value(wandb))


@app.command()
def finetune(
    config: ConfigOption,
    output: OutputOption,
    overrides: Overrides = None,
    policy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--policy",
            "-p",
            help="Folder, Hub id or artifact (wandb:entity/project/name:alias) of a policy, 'default', or 'hold'.",
        ),
    ] = None,
    schedule: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--schedule", "-s", help="A named schedule instead: linear, cosine, constant."),
    ] = None,
    resume: ResumeOption = False,
    wandb: WandbOption = None,
    trackers: TrackersOption = None,
) -> None:
    """Run one fine-tuning job, steered by a policy or by a named schedule."""
    steered = [word for pair in (("--policy", policy), ("--schedule", schedule)) if pair[1] for word in pair if word]
    again = ["finetune", "--config", str(config), *steered, "--output", str(output), "--resume", *(overrides or [])]
    with reported_failures(_go_on_with(again)):
        if (policy is None) == (schedule is None):
            from llmrl_envs.errors import UserError

            got = "neither" if policy is None else "both"
            raise UserError("what steers the job?", expected="one of --policy and --schedule", got=got)
        settings = _load("finetune", config, overrides, wandb, trackers)
        from llmrl.finetune import finetune as run

        run(config=settings, output=output, policy=policy, schedule=schedule, resume=resume)


@app.command()
def compare(
    output: OutputOption,
    config: OptionalConfigOption = None,
    policy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--policy",
            "-p",
            help="Folder, Hub id or artifact (wandb:entity/project/name:alias) of a policy, or 'default'.",
        ),
    ] = None,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="[KEY.SUB=VALUE | DIR]...",
            help="Overrides of the configuration; further directories after --from-runs.",
            show_default=False,
        ),
    ] = None,
    wandb: WandbOption = None,
    trackers: TrackersOption = None,
    from_runs: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--from-runs", help="Run directories of `llmrl finetune`, or directories of such, instead."),
    ] = None,
    from_wandb: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--from-wandb", help="entity/project whose runs are compared instead; needs --group."),
    ] = None,
    group: Annotated[Optional[str], typer.Option("--group", help="Group of the runs of --from-wandb.")] = None,  # noqa: UP045
) -> None:
    """Compare a policy with the usual schedules, over tasks, starting rates and seeds; or runs that exist already."""
    with reported_failures(f"stopped; finished runs stay in {output}"):
        if from_runs or from_wandb or group:
            from llmrl.compare.sources import ExistingRuns, compare_sources

            source = ExistingRuns(tuple(from_runs or ()), tuple(overrides or ()), from_wandb, group)
            tracking = _tracking(wandb, trackers)
            compare_sources(source, output=output, tracking=tracking, others=(config, policy))
            return
        if config is None or policy is None:
            from llmrl_envs.errors import UserError

            raise UserError(
                "what is compared?",
                expected="--config and --policy; or --from-runs DIR...; or --from-wandb entity/project --group G",
                got=" ".join(name for name, value in (("--config", config), ("--policy", policy)) if value)
                or "neither",
            )
        settings = _load("compare", config, overrides, wandb, trackers)
        from llmrl.compare.runner import compare as run

        run(config=settings, output=output, policy=policy)


@app.command()
def doctor(config: OptionalConfigOption = None, overrides: Overrides = None) -> None:
    """Report versions, device and W&B; with a configuration also try the job out and estimate its cost."""
    with reported_failures("stopped"):
        settings = None if config is None else _load(None, config, overrides)
        from llmrl.doctor import doctor as run

        run(config=settings)


@config_app.command("validate")
def config_validate(
    config: Annotated[Path, typer.Argument()], overrides: Overrides = None, kind: KindOption = None
) -> None:
    """Check a file; every mistake is told at once."""
    with reported_failures("stopped"):
        settings = _load(_value(kind), config, overrides)
        typer.echo(f"{config} is a valid {_kind_of(settings)} configuration")


@config_app.command("show")
def config_show(
    config: Annotated[Path, typer.Argument()], overrides: Overrides = None, kind: KindOption = None
) -> None:
    """Print a configuration with every default filled in."""
    with reported_failures("stopped"):
        from llmrl.config_loading import config_to_yaml

        typer.echo(config_to_yaml(_load(_value(kind), config, overrides)), nl=False)


@config_app.command("schema")
def config_schema(kind: Annotated[Kind, typer.Argument(help="Which command the configuration is for.")]) -> None:
    """Print the JSON Schema of a configuration; editors complete and check YAML with it."""
    with reported_failures("stopped"):
        from llmrl.config import CONFIG_MODELS

        typer.echo(json.dumps(CONFIG_MODELS[kind.value].model_json_schema(), indent=2))


@policy_app.command("show")
def policy_show(
    policy: Annotated[str, typer.Argument(help="Folder, Hub id, artifact, 'default' or 'hold'.")],
    picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--picture", help="Draw the response to every feature to this PNG file."),
    ] = None,
) -> None:
    """Print what a policy sees, does, and was trained on, and how it responds to each feature that it sees."""
    with reported_failures("stopped"):
        from llmrl.policy import SchedulePolicy

        loaded = SchedulePolicy.from_pretrained(policy, where="policy show")
        typer.echo(loaded.card())
        if loaded.network is None and picture is None:
            return
        from llmrl.policy_response import draw_response, response_text

        if picture is not None:
            draw_response(loaded, picture)
        typer.echo(response_text(loaded))
        if picture is not None:
            typer.echo(picture)


@policy_app.command("export")
def policy_export(
    policy: Annotated[str, typer.Argument(help="Folder, Hub id, artifact, 'default' or 'hold'.")],
    output: OutputOption,
    file_format: Annotated[ExportFormat, typer.Option("--format", help="File format.")] = ExportFormat.SAFETENSORS,
) -> None:
    """Write a policy to OUTPUT: as it is, as NumPy arrays that decide without torch, or as an ONNX graph."""
    with reported_failures("stopped"):
        from llmrl.policy_export import export_policy

        for path in export_policy(policy, output, file_format=file_format.value):
            typer.echo(path)


@policy_app.command("ensemble")
def policy_ensemble(
    policies: Annotated[list[str], typer.Argument(help="Two or more policies of one configuration, by seed.")],
    output: OutputOption,
    lower_bound: Annotated[
        float, typer.Option("--lower-bound", help="Standard deviations below the mean of the members' values.")
    ] = 0.0,
) -> None:
    """Join policies that were learned alike into one that acts on the mean of their values, or below it."""
    with reported_failures("stopped"):
        from llmrl.policy_ensemble import write_ensemble

        typer.echo(write_ensemble(policies, output, lower_bound=lower_bound))


@policy_app.command("push")
def policy_push(
    policy: Annotated[Path, typer.Argument(help="Directory of a policy.")],
    repository: Annotated[str, typer.Argument(help="Hub id: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a policy to the Hugging Face Hub."""
    with reported_failures("stopped; an upload that was under way can be repeated"):
        from llmrl.policy_export import push_policy

        typer.echo(push_policy(policy, repository, private=private))


def _go_on_with(words: Sequence[str]) -> str:
    """What to say after Ctrl-C."""
    program = ["llmrl"] if os.environ.get("WORLD_SIZE", "1") == "1" else ["accelerate", "launch", "-m", "llmrl"]
    return f"stopped; go on with\n  {shlex.join([*program, *words])}"


def _load(
    kind: Any,
    path: Path,
    overrides: Sequence[str] | None,
    wandb: WandbChoice | None = None,
    trackers: str | None = None,
) -> Any:
    from llmrl.config_loading import load_config

    return load_config(kind, path, [*(overrides or []), *_tracking(wandb, trackers)])


def _tracking(wandb: WandbChoice | None, trackers: str | None) -> list[str]:
    """The overrides that the options about tracking stand for."""
    overrides = [] if wandb is None else [f"tracking.wandb={wandb.value}"]
    return overrides if trackers is None else [*overrides, f"tracking.trackers=[{trackers}]"]


def _value(choice: StrEnum | None) -> Any:
    return None if choice is None else choice.value


def _kind_of(settings: object) -> str:
    from llmrl.config import CONFIG_MODELS

    return next(kind for kind, model in CONFIG_MODELS.items() if isinstance(settings, model))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Words after the program's name; None takes them from the process.

    Returns:
        Exit code: 0, 2 after bad input, 130 after Ctrl-C.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="llmrl")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
