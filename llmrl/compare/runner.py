"""`llmrl compare`: plans the runs, trains those that are missing, scores them, and reports.

OUTPUT/config.yaml     the configuration with every default filled in
       methods.json    digest of what each method does
       runs/           one file a finished run; a comparison that was stopped goes on from them
       results.json    rows, aggregates, oracle, compute
       results.csv     the rows
       report.html     all of it for a reader; one file, needs no network
       comparison.png  scores and losses
       profiles.png    performance profiles
       curves.png      learning curves and schedules
       wandb/          files of Weights & Biases

Runs come in two stages: the sweep and every start that is known, and then the starts from the rate that the sweep found
best for each task.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from llmrl_envs.errors import UserError
from llmrl_envs.jobs.loading import resolve_device
from rich.console import Console

import llmrl
from llmrl.compare.cache import RunResult, RunStore
from llmrl.compare.execution import Setting, execute
from llmrl.compare.existing import compare_existing
from llmrl.compare.methods import Method, resolve_methods, sweep_method
from llmrl.compare.page import write_html
from llmrl.compare.plan import Plan, Planner, Run
from llmrl.compare.plot import draw_comparison
from llmrl.compare.plot_curves import draw_curves, draw_profiles
from llmrl.compare.report import print_report, row_cells, table_cells, write_csv
from llmrl.compare.results import ComparisonShape, make_results
from llmrl.compare.rows import find_oracles, tuned_factors
from llmrl.config import CompareConfig, TrackingConfig
from llmrl.config_loading import config_to_dict, config_to_yaml
from llmrl.run_directory import atomic_write_json, atomic_write_text, create_run_directory, to_json_value
from llmrl.tracking import Tracker, ending, make_tracker
from llmrl.tracking.runs import RecordedRun

CONFIG_FILE, METHODS_FILE, RUNS_FOLDER = "config.yaml", "methods.json", "runs"
RESULTS_FILE, CSV_FILE, HTML_FILE = "results.json", "results.csv", "report.html"
PICTURES = {"comparison.png": draw_comparison, "profiles.png": draw_profiles, "curves.png": draw_curves}

FREE_TO_CHANGE = frozenset({"tracking", "workers"})
"""Keys that change nothing in the results, so that a comparison may go on with others."""


def compare(*, config: CompareConfig, output: Path, policy: str) -> dict[str, Any]:
    """Runs the comparison and returns what `results.json` holds.

    Args:
        config: Tasks, methods, starting rates, seeds.
        output: Run directory: new, empty, or that of the same comparison, which then goes on.
        policy: Folder, Hub id, "default" or "hold".

    Raises:
        UserError: Bad input; nothing has been trained then.
    """
    setting = _setting(config, policy, output)
    methods, sweep = resolve_methods(setting.config, policy), sweep_method(config)
    device = resolve_device(config.device)
    _claim_directory(output, config, methods)
    planner = Planner(config, methods, sweep, device.type)
    tracker = make_tracker(config.tracking, "compare", output, {**config_to_dict(config), "policy": policy})
    with ending(tracker):
        found = _find_results(setting, planner, tracker)
        made = make_results(ComparisonShape.of(config), planner.plan, found, _describe(methods, policy))
        results: dict[str, Any] = to_json_value({**made, **_provenance(config_to_dict(config), device.type)})
        _write(results, output)
        _track(results, output, tracker)
    _announce(results, output)
    return results


def _setting(config: CompareConfig, policy: str, output: Path) -> Setting:
    """What runs share; they count tasks and those of `stress_tasks` alike."""
    together = config.model_copy(update={"tasks": config.all_tasks, "stress_tasks": ()})
    return Setting(together, policy, output / RUNS_FOLDER)


def _provenance(settings: Mapping[str, Any], device: str | None) -> dict[str, Any]:
    """Where results come from; the keys that change nothing in them are left out."""
    return {
        "settings": _comparable(settings),
        "versions": {
            "llmrl": llmrl.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
            "device": device,
            "platform": f"{platform.system()} {platform.machine()}",
        },
    }


def compare_runs(*, runs: Sequence[RecordedRun], output: Path, tracking: TrackingConfig) -> dict[str, Any]:
    """Makes the same comparison from runs that exist already, and returns what `results.json` holds.

    Args:
        runs: See `llmrl.compare.existing.read_runs` and `llmrl.tracking.runs.fetch_group`.
        output: Run directory, new or empty.
        tracking: Where the comparison is recorded.

    Raises:
        UserError: None of the runs can be compared, or the directory is in use.
    """
    results = {**compare_existing(runs), **_provenance({"runs": [run.label for run in runs]}, None)}
    create_run_directory(output)
    with ending(make_tracker(tracking, "compare", output, {"runs": [run.label for run in runs]})) as tracker:
        _write(results, output)
        _track(results, output, tracker)
    _announce(results, output)
    return results


def _claim_directory(output: Path, config: CompareConfig, methods: Mapping[str, Method]) -> None:
    """Makes the run directory, or checks that what lies there is the same comparison.

    Raises:
        UserError: It holds something else, or cannot be written to.
    """
    create_run_directory(output, resume=True)
    digests = {name: method.digest for name, method in methods.items()}
    wanted = _comparable(config_to_dict(config))
    if not (output / CONFIG_FILE).is_file():
        _refuse_files(output)
    elif (there := _comparable(_read(output / CONFIG_FILE))) != wanted:
        changed = sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key))
        raise UserError(
            "the run directory holds something else",
            where=str(output / CONFIG_FILE),
            expected="the same configuration, to go on with that comparison, or another --output",
            got=f"other values of {', '.join(changed)}",
        )
    elif (output / METHODS_FILE).is_file() and _read(output / METHODS_FILE) != digests:
        known = _read(output / METHODS_FILE)
        raise UserError(
            "the run directory holds a comparison of other policies",
            where=str(output),
            expected="the policies that it was begun with, or another --output",
            got=f"changed: {', '.join(name for name in digests if digests[name] != known.get(name))}",
        )
    atomic_write_text(output / CONFIG_FILE, config_to_yaml(config))
    atomic_write_json(output / METHODS_FILE, digests)


def _refuse_files(output: Path) -> None:
    """Without a configuration there may be nothing but what an interrupted first write left."""
    if any(not path.name.endswith(".tmp") for path in output.iterdir()):
        raise UserError(
            "the run directory exists and is not empty",
            where=str(output),
            expected=f"a new or empty directory, or one with the {CONFIG_FILE} of this comparison",
        )


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in FREE_TO_CHANGE}


def _read(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file (JSON is YAML); empty if it is damaged."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return values if isinstance(values, dict) else {}


def _find_results(setting: Setting, planner: Planner, tracker: Tracker) -> dict[str, RunResult]:
    """Results of all runs: those on disk, and the others after training them, one stage after the other."""
    found: dict[str, RunResult] = {}
    planner.add_known()
    _train_missing(setting, planner.plan, found, tracker)
    if setting.config.tuned:
        oracles = find_oracles(planner.plan, len(setting.config.tasks), found)
        factors = tuned_factors(planner.plan, oracles)
        planner.add_tuned(factors)
        _train_missing(setting, planner.plan, found, tracker)
    return found


def _train_missing(setting: Setting, plan: Plan, found: dict[str, RunResult], tracker: Tracker) -> None:
    """Adds to `found` what the plan still lacks."""
    store = RunStore(setting.store)
    lacking = [run for key, run in plan.runs.items() if key not in found]
    found |= {run.key: result for run in lacking if (result := store.read(run.key)) is not None}

    def on_result(run: Run, result: RunResult) -> None:
        found[run.key] = result
        metrics = {"compare/seconds": result.seconds, "compare/loss_test": result.loss_test}
        tracker.log({name: value for name, value in metrics.items() if value is not None}, step=len(found))

    execute(setting, [run for run in lacking if run.key not in found], on_result)


def _describe(methods: Mapping[str, Method], policy: str) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "source": policy if name == "policy" else name,
            "digest": method.digest,
            **method.description,
            "num_jobs": method.num_jobs,
            "depends_on_rate": method.depends_on_rate,
        }
        for name, method in methods.items()
    }


def _write(results: Mapping[str, Any], output: Path) -> None:
    """Writes the files; results.json last, so that it stands for a finished comparison."""
    write_csv(output / CSV_FILE, results["rows"])
    for name, draw in PICTURES.items():
        draw(results, output / name)
    write_html(output / HTML_FILE, results, title=output.name)
    atomic_write_json(output / RESULTS_FILE, results)


def _track(results: Mapping[str, Any], output: Path, tracker: Tracker) -> None:
    headings, lines = table_cells(results)
    tracker.log_table("compare/summary", headings, lines)
    tracker.log_table("compare/rows", *row_cells(results["rows"]))
    for name in PICTURES:
        tracker.log_image(f"compare/{Path(name).stem}", output / name)
    tracker.log_html("compare/report", output / HTML_FILE)
    tracker.set_summary({"aggregate": results["aggregate"], "oracle": results["oracle"]})
    for name in (RESULTS_FILE, HTML_FILE):
        tracker.log_artifact(f"{output.name}-{Path(name).stem}", "comparison", output / name)


def _announce(results: Mapping[str, Any], output: Path) -> None:
    console = Console()
    print_report(results, console)
    for name in (RESULTS_FILE, CSV_FILE, HTML_FILE, *PICTURES):
        console.print(str(output / name), markup=False, highlight=False, soft_wrap=True)
