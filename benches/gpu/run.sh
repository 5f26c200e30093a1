#!/usr/bin/env bash
# Builds the GPU program; where there is a GPU, runs its checks and then its measurements.
# `benches/gpu/run.sh [--sanitize]`: with it, the checks run under compute-sanitizer too.
set -euo pipefail
cd "$(dirname "$0")"
NVCC=$(../../.ci/nvcc)
export NVCC CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-../../target/gpu}
cargo build --release
program=$CARGO_TARGET_DIR/release/ppo-kernels-gpu
if ! command -v nvidia-smi >/dev/null; then
    echo "no GPU here; carry $program to one and run it with \`check\` and \`time\`"
    exit 0
fi
"$program" check
if [ "${1:-}" = --sanitize ]; then
    for tool in memcheck racecheck initcheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$program" check small
    done
fi
"$program" time
