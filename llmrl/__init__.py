"""Learned learning-rate and update schedules for fine-tuning language models."""

from __future__ import annotations

__version__ = "0.1.0"
