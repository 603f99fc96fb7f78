#!/usr/bin/env python3
"""Benchmark a draft head: plain against speculative decoding. The documented command line of `fledge bench`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a checkout without an install

from fledge.cli import run_command  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_command("bench", sys.argv[1:]))
