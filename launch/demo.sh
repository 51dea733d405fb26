#!/usr/bin/env bash
# Samples a short multi-shot video from the built-in model, on any CPU, to out/demo/video.mp4.
# Arguments are passed to `longlive demo`; see ./launch/demo.sh --help.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
setup
exec .venv/bin/python -m longlive_jax demo "$@"
