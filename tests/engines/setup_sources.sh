#!/usr/bin/env bash
# The wheels of SGLang and vLLM, for the tests that compare our heads with their sources (tests/export/test_engines.py,
# test_engine_rope.py, test_sglang_loader.py). They are only read: nothing of them is installed, no dependency is
# fetched, no GPU is needed. Usage: tests/engines/setup_sources.sh [FOLDER]   (default: .engines in the repository)
set -euo pipefail

FOLDER=${1:-$(cd "$(dirname "$0")/../.." && pwd)/.engines}
PYTHON=${PYTHON:-python3}

for release in sglang==0.5.23 vllm==0.33.0; do
    if compgen -G "$FOLDER/${release/==/-}-*.whl" >/dev/null; then
        echo "$FOLDER: the wheel of ${release/==/ } is already there"
    else
        "$PYTHON" -m pip download -q --no-deps --only-binary :all: "$release" -d "$FOLDER"
    fi
done
ls "$FOLDER"
