#!/usr/bin/env bash
# Install torch into a virtual environment: the CPU build on a Linux machine without an NVIDIA
# card (the default wheel there brings several GB of CUDA libraries), the default build elsewhere.
# Usage: tools/install_torch.sh VENV VERSION
set -euo pipefail
pip="$1/bin/pip"
version="$2"

if "$1/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$version')" 2>/dev/null; then
  exit 0
fi
if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then
  "$pip" install --quiet "torch==$version"
elif "$pip" install --quiet --no-index --no-deps "torch==$version" 2>/dev/null; then
  # A wheel in a local folder that pip is configured to look at (find-links).
  echo "torch $version from a local wheel"
else
  "$pip" install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$version"
fi
