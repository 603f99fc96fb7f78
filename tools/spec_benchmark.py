#!/usr/bin/env python3
"""Benchmark a draft head: plain against speculative decoding. AngelSlim's command line of `fledge bench`.

Its flags are accepted by `fledge bench`, too; what differs are the temperature and the tree: 1.0 and 60/5/10 here, as
documented there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a checkout without an install

from fledge.cli import run_command  # noqa: E402

DEFAULTS = ("--temperature", "1.0", "--total-token", "60", "--depth", "5", "--top-k", "10")

if __name__ == "__main__":
    recipe = any(word.partition("=")[0] == "--config" for word in sys.argv)  # a recipe says what it wants
    sys.exit(run_command("bench", [*([] if recipe else DEFAULTS), *sys.argv[1:]]))
