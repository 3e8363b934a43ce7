"""The report's page, from results that are made up: complete, well-formed, and for itself."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmrl.compare.cache import RunResult
from llmrl.compare.methods import resolve_methods, sweep_method
from llmrl.compare.page import make_html, write_html
from llmrl.compare.page_curves import loss_range, rate_range, shown_rates
from llmrl.compare.page_parts import NUM_COLOURS, Palette, factor_label, number, p_value, short
from llmrl.compare.page_scores import falls_from
from llmrl.compare.plan import Planner
from llmrl.compare.plot_curves import draw_curves, draw_profiles
from llmrl.compare.results import ComparisonShape, make_results
from llmrl.compare.rows import find_oracles, tuned_factors
from llmrl.compare.svg import Panel, decade_ticks, log_scale, nice_ticks
from llmrl.hosts.curve import CurvePoint
from llmrl.run_directory import to_json_value

METHODS = ["policy", "hold", "constant", "linear", "cosine"]
SECTIONS = ["scores", "rates", "profiles", "pairs", "matrix", "curves", "tasks", "failures", "compute", "settings"]
VOID = {"meta", "br", "hr", "img", "input", "link"}


def made_up(method: str, rate: float, seed: int, step_share: float = 1.0) -> float | None:
    """Validation and test loss: schedules of the rate have a best one and are lost at 30 times it."""
    if method in ("policy", "hold"):
        end = 1.9 + 0.02 * seed + 0.1 * (method == "hold")
    else:
        wrong = abs(math.log10(rate / 1e-2))
        end = 2.0 + 0.01 * seed + 0.6 * wrong + 2.0 * (rate > 0.1) + 0.1 * METHODS.index(method) * (method != "linear")
    if end > 4.0:
        return None
    return 3.0 + (end - 3.0) * step_share


def result_of(method: str, rate: float, seed: int) -> RunResult:
    final = made_up(method, rate, seed)
    curve = tuple(
        CurvePoint(2 * k, made_up(method, rate, seed, k / 4), None, None if k == 0 else rate * (1 - k / 4) or None)
        for k in range(5)
    )
    return RunResult(
        loss_initial=3.0, loss_test=final, accuracy_test=None, diverged=final is None or final > 3.0, seconds=1.5,
        tokens_trained=100, tokens_evaluated=10, curve=curve, peak_memory_bytes=3 * 2**20,
        events={"spikes": int(final is None)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(make_config) -> dict[str, Any]:
    """Every regime, with runs that are lost."""
    hard = make_config().tasks[0].model_copy(update={"name": "a <b>hard</b> one", "steps": 4})
    config = make_config(methods=METHODS, learning_rate_factors=[1 / 30, 1, 30], stress_tasks=[hard.model_dump()])
    methods = resolve_methods(config, "hold")
    planner = Planner(config, methods, sweep_method(config), "cpu")
    planner.add_known()
    found = {key: result_of(run.method, run.learning_rate, run.seed) for key, run in planner.plan.runs.items()}
    planner.add_tuned(tuned_factors(planner.plan, find_oracles(planner.plan, 3, found)))
    found |= {key: result_of(run.method, run.learning_rate, run.seed) for key, run in planner.plan.runs.items()}
    told = {name: {"depends_on_rate": method.depends_on_rate} for name, method in methods.items()}
    made = make_results(ComparisonShape.of(config), planner.plan, found, told)
    return to_json_value({**made, "versions": {"llmrl": "1.2.3"}, "settings": {"seeds": [0, 1]}})


@pytest.fixture(scope="module")
def page(results: dict[str, Any]) -> str:
    return make_html(results, title="a & b")


class Reader(HTMLParser):
    """Checks that every element is closed, and collects what a browser would show and fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "poster", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_the_page_is_whole_and_needs_nothing_else(page: str) -> None:
    reader = read(page)
    assert all(link.startswith("#") for link in reader.fetched)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", page)
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    assert {link[1:] for link in reader.fetched} == set(SECTIONS)


def test_names_are_text_and_no_markup(page: str) -> None:
    assert "<b>hard</b>" not in page
    shown = "".join(read(page).text)
    assert "a <b>hard</b> one" in shown
    assert "a & b" in shown


def test_every_chart_is_well_formed(page: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", page)
    assert len(charts) > 40
    for chart in charts:
        root = ElementTree.fromstring(chart)
        numbers = [float(n) for e in root.iter() for n in re.findall(r"-?\d+\.?\d*", e.get("d") or "")]
        assert all(-1 <= n <= 900 for n in numbers), "nothing lies outside of its picture"
        assert "nan" not in chart


def test_it_tells_scores_differences_failures_and_versions(results: dict[str, Any], page: str) -> None:
    shown = "".join(read(page).text)
    for regime in ("default rate", "wrong rate", "tuned rate", "stress"):
        assert regime in shown
    policy = results["aggregate"]["policy"]["wrong"]
    assert f"{policy['iqm']:.3f}" in shown
    assert f"[{policy['ci_low']:.3f}, {policy['ci_high']:.3f}]" in shown
    difference = results["paired"]["regimes"]["wrong"]["cosine"]["mean"]["value"]
    assert f"+{difference:.3f}" in shown
    # On two tasks with two seeds, all schedules of the rate are lost at 30 times it; too low, linear alone is not.
    assert [results["aggregate"][name]["all"]["failures"] for name in METHODS] == [0, 0, 8, 4, 8]
    assert "the runs (20)" in shown
    assert "not finite" in shown
    assert "spikes 1" in shown
    assert "llmrl 1.2.3" in shown
    assert all(warning in shown for warning in results["warnings"])


def test_it_can_be_read_without_colour_or_script(page: str) -> None:
    reader = read(page)
    assert page.count("<script>") == 1
    assert "prefers-color-scheme: dark" in page
    assert not [link for link in reader.fetched if "javascript" in link]
    # Lines of methods have titles, and three of the seven are dashed.
    assert page.count("<title>policy</title>") > 5
    assert page.count("stroke-dasharray") >= 4


@pytest.mark.parametrize("kind", ["nothing scored", "one seed", "no curves", "many methods"])
def test_every_outcome_has_a_page_and_a_picture(results: dict[str, Any], tmp_path: Path, kind: str) -> None:
    changed = json.loads(json.dumps(results))
    if kind == "no curves":
        changed["curves"] = []
    if kind == "one seed":
        _drop(changed, ("ci_low", "ci_high", "task_ci_low", "task_ci_high", "improvement_ci_low"))
    if kind == "nothing scored":
        _drop(changed, ("iqm", "ci_low", "ci_high", "task_ci_low", "task_ci_high", "score", "score_per_cost"))
        changed["paired"]["regimes"] = {name: {} for name in changed["paired"]["regimes"]}
        changed["profiles"]["regimes"] = {name: {} for name in changed["profiles"]["regimes"]}
    if kind == "many methods":
        for copy in range(9):
            name = f"runs/a/policy/far/down/in/the/folders/{copy}"
            for part in ("aggregate", "by_factor", "compute"):
                changed[part][name] = changed[part]["cosine"]
            for matrix in changed["improvement"].values():
                matrix[name] = {}
    write_html(tmp_path / "report.html", changed, title="t")
    read((tmp_path / "report.html").read_text(encoding="utf-8"))
    pictures = {"no curves": draw_curves, "nothing scored": draw_profiles, "many methods": draw_profiles}
    if kind in pictures:
        pictures[kind](changed, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 2_000


def _drop(value: Any, keys: tuple[str, ...]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if key in keys:
                value[key] = None
            else:
                _drop(item, keys)
    elif isinstance(value, list):
        for item in value:
            _drop(item, keys)


# -- pieces -------------------------------------------------------------------------------------------------------


def test_the_best_methods_and_the_references_have_colours(results: dict[str, Any]) -> None:
    changed = {**results, "aggregate": dict(results["aggregate"])}
    for copy in range(9):
        changed["aggregate"][f"worse {copy}"] = {"all": {"iqm": -0.5}}
    palette = Palette(changed)
    assert len(palette.coloured) == NUM_COLOURS
    assert palette.coloured[:3] == ["policy", "linear", "hold"]
    assert set(METHODS) < set(palette.coloured)
    assert palette.kind("worse 8") == "muted m13"
    assert palette.in_front_last()[-1] == "policy"


def test_numbers_for_readers() -> None:
    assert [number(-0.12345), number(None), number(-0.0001)] == ["−0.123", "–", "0.000"]
    assert [factor_label(factor) for factor in (1.0, 30.0, 1 / 30, 0.1)] == ["1", "×30", "/30", "/10"]
    assert [p_value(value) for value in (0.0004, 0.04, None)] == ["< 0.001", "0.040", "–"]
    assert short("runs/somewhere/deep/down/policy", 12) == "…down/policy"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (2.31, 2.52, [2.35, 2.4, 2.45, 2.5]), (0, 60, [0, 20, 40, 60])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_ticks_of_decades() -> None:
    assert decade_ticks(2e-5, 0.3) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert decade_ticks(2e-4, 5e-4) == [2e-4, 5e-4]
    assert len(decade_ticks(1e-12, 1.0)) <= 5
    assert log_scale(1.0, 100.0, 0.0, 10.0)(10.0) == pytest.approx(5.0)


def test_a_line_is_broken_where_nothing_was_measured_and_stays_inside() -> None:
    panel = Panel((0, 4), (0.0, 1.0), width=100, height=100)
    panel.line([(0, 0.5), (1, None), (2, 9.0), (3, 0.0)], "c0", "a < b")
    (path,) = ElementTree.fromstring(panel.svg()).iter("path")
    assert (path.get("d") or "").count("M") == 2
    assert f" {Panel.TOP:.1f}" in (path.get("d") or "")
    assert path[0].text == "a < b"


def test_ranges_show_what_differs() -> None:
    curves = [
        {"loss_validation": [3.0, 2.0], "learning_rate": [None, 1e-3]},
        {"loss_validation": [3.0, 99.0], "learning_rate": [1e-2, 1e-9]},
        {"loss_validation": [3.0, None], "learning_rate": [None, None]},
    ]
    low, high = loss_range(curves)
    assert 1.9 < low < 2.0
    assert 3.0 < high < 3.3, "a lost run does not flatten the others"
    assert shown_rates(curves[1]) == [1e-2, None]
    assert rate_range(curves) == (1e-3, 1e-2)
    assert rate_range(curves[2:]) == (1e-4, 1e-3)
    assert loss_range(curves[2:])[0] < loss_range(curves[2:])[1]
    taus = [-1.0, 0.0, 0.5, 1.0]
    assert falls_from({"x": {"share": [1.0, 1.0, 0.9, 0.0]}}, taus) == pytest.approx(0.45)
    assert falls_from({"x": {"share": [0.9, 0.8, 0.5, 0.0]}}, taus) == -1.0
    assert falls_from({}, taus) < 1.0
