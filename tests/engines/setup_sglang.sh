#!/usr/bin/env bash
# SGLang's wheel, for the tests that compare our heads with its loader (tests/export/test_sglang_loader.py). It is only
# unpacked and read: nothing of it is installed, no dependency is fetched, no GPU is needed.
# Usage: tests/engines/setup_sglang.sh [FOLDER]   (default: .sglang in the repository)
set -euo pipefail

FOLDER=${1:-$(cd "$(dirname "$0")/../.." && pwd)/.sglang}
PYTHON=${PYTHON:-python3}
VERSION=0.5.23

if compgen -G "$FOLDER/sglang-*.whl" >/dev/null; then
    echo "$FOLDER: SGLang's wheel is already there"
    exit 0
fi
"$PYTHON" -m pip download -q --no-deps --only-binary :all: "sglang==$VERSION" -d "$FOLDER"
echo "$(ls "$FOLDER")"
