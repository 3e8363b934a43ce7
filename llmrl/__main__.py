"""`python -m llmrl`, and with it `accelerate launch -m llmrl finetune ...`."""

from __future__ import annotations

import sys

from llmrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
