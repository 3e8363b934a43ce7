"""Tests of real models are collected only where LLMRL_SHARED names a directory that holds `models/` and `data/`."""

import os

collect_ignore = [] if "LLMRL_SHARED" in os.environ else ["test_real_models.py"]
