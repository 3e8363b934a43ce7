"""`report.html`: a comparison for a reader, in one file that needs no network.

Its sections are made in `llmrl.compare.page_*`. Style and script stand beside this file. Without the script the page
loses sorting and hiding, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from llmrl.compare.page_curves import curves_section
from llmrl.compare.page_pairs import failures_section, matrix_section, pairs_section
from llmrl.compare.page_parts import Palette, details, section
from llmrl.compare.page_scores import compute_section, profiles_section, rates_section, scores_section, tasks_section
from llmrl.run_directory import atomic_write_text

_CONTENTS = {
    "scores": "Scores",
    "rates": "Starting rate",
    "profiles": "Profiles",
    "pairs": "Paired differences",
    "matrix": "Who beats whom",
    "curves": "Curves",
    "tasks": "Tasks",
    "failures": "Failures",
    "compute": "Compute",
    "settings": "Settings",
}


def write_html(path: Path, results: Mapping[str, Any], *, title: str) -> None:
    """Writes the page.

    Args:
        path: The file.
        results: What `results.json` holds.
        title: What the comparison is called.
    """
    atomic_write_text(path, make_html(results, title=title))


def make_html(results: Mapping[str, Any], *, title: str) -> str:
    """The page as text."""
    palette = Palette(results)
    sections = [
        scores_section(results, palette),
        rates_section(results, palette),
        profiles_section(results, palette),
        pairs_section(results, palette),
        matrix_section(results, palette),
        curves_section(results, palette),
        tasks_section(results, palette),
        failures_section(results, palette),
        compute_section(results, palette),
        _settings_section(results),
    ]
    links = "".join(
        f'<a href="#{name}">{text}</a>'
        for name, text in _CONTENTS.items()
        if any(part.startswith(f'<section id="{name}"') for part in sections)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: comparison</title><style>{_resource('page.css')}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{_subtitle(results)}</p>{_warnings(results)}<nav>{links}</nav></header>"
        f"<main>{''.join(sections)}</main><script>{_resource('page.js')}</script></body></html>\n"
    )


def _resource(name: str) -> str:
    return files("llmrl.compare").joinpath(name).read_text(encoding="utf-8")


def _subtitle(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    counts = {
        "method": len(results["aggregate"]),
        "task": len(results["oracle"]),
        "seed": len({row["seed"] for row in rows}),
        "row": len(rows),
        "run": sum(entry["num_runs"] for entry in results["compute"].values()),
    }
    return escape(", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items()))


def _warnings(results: Mapping[str, Any]) -> str:
    told = "".join(f"<li>{escape(warning)}</li>" for warning in results["warnings"])
    return f'<ul class="warnings" aria-label="Warnings">{told}</ul>' if told else ""


def _settings_section(results: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in results.get("versions", {}).items() if value)
    parts = [
        details(title, f"<pre>{escape(_yaml(results[key]))}</pre>")
        for key, title in (("settings", "configuration"), ("methods", "methods"), ("statistics", "statistics"))
        if key in results
    ]
    intro = f"Made with {versions}." if versions else "Versions are not known."
    return section("settings", "Settings and versions", intro, "".join(parts))


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
