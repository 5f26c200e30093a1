#!/usr/bin/env bash
# The tests of the CUDA kernels and their measurements, for a machine with a GPU. What fails is named at
# the end, and keeps nothing else from running.
#
#   benches/gpu/run.sh build [candle]    on a machine with Rust: makes benches/gpu/bin/, and bin.tar.xz to
#                                        carry along; with candle's own ops to measure beside, the ops'
#                                        tests and benches through candle, and the training program,
#                                        which takes a quarter of an hour, the libraries of the CUDA
#                                        toolkit, and, where there is no GPU to ask, the one to compile
#                                        for in CUDA_COMPUTE_CAP (90 is an H200)
#   benches/gpu/run.sh test              runs the tests
#   benches/gpu/run.sh sanitize          runs them under compute-sanitizer's memcheck, racecheck, initcheck
#   benches/gpu/run.sh time [ARGS]       prints the table; --no-clusters, or part of a pass's name
#   benches/gpu/run.sh python            tests and measures the PyTorch ops, beside all peers that are there
#   benches/gpu/run.sh candle            runs the tests of the ops through candle, and their benches
#   benches/gpu/run.sh train [ARGS]      checks every op and trains on the GPU; ARGS as of `train`
#   benches/gpu/run.sh all [ARGS]        all of these but the build
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=benches/gpu/bin
OPS=(logprob kl gae whiten ppo_loss)
failed=()

build() {
    NVCC=${NVCC:-$(.ci/nvcc)}
    export NVCC CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target/gpu}
    if [ -n "${1:-}" ] && ! command -v nvidia-smi >/dev/null; then
        export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:?the GPU to compile candle for, such as 90 for an H200}
    fi
    export PATH=${NVCC%/*}:$PATH
    rm -rf "$bin"
    mkdir "$bin"
    cp "$(cd benches/gpu && executables bin build ${1:+--features "$1"})" "$bin/time"
    if [ -n "${1:-}" ]; then
        cp "$(executables bin build --features cuda,driver)" "$bin/ppo-kernels"
        executables test test --no-run --features cuda "${OPS[@]/#/--test=}" | copy_as candle-test
        executables bench build --features cuda "${OPS[@]/#/--bench=}" --bench=ppo_step | copy_as candle-bench
    fi
    cp "$(library)" "$bin/"
    (cd benches/gpu && executables test test --no-run) | copy_as test
    strip "$bin"/*
    # The largest dictionary: much is the same in all of them.
    XZ_OPT=-9 tar -cJf "$bin.tar.xz" "$bin"
    ls -l "$bin" "$bin.tar.xz"
}

# Prints what of the kind $1 cargo makes when it is told the rest.
executables() {
    local kind=$1
    shift
    cargo "$@" --release --message-format=json-render-diagnostics |
        sed -n '/"kind":\["'"$kind"'"\]/s/.*"executable":"\([^"]*\)".*/\1/p'
}

# Copies cargo's executables, whose paths it reads, by their names behind $1.
copy_as() {
    local path name
    while read -r path; do
        name=${path##*/}
        cp "$path" "$bin/$1-${name%-*}"
    done
}

# Prints the C library, which the PyTorch ops load.
library() {
    cargo rustc --release --lib --crate-type cdylib --no-default-features --features capi,cuda \
        --message-format=json-render-diagnostics |
        sed -n 's/.*"\([^"]*libppo_kernels\.so\)".*/\1/p'
}

unpack() {
    if [ -e "$bin.tar.xz" ]; then
        python3 -m tarfile -e "$bin.tar.xz"
    fi
}

attempt() {
    echo "== $*"
    "$@" || failed+=("$*")
}

# With the toolkit's libraries, which candle links; they may be PyTorch's.
with_toolkit() {
    local found
    found=$(python3 -c 'import glob, site
print(*(f for s in site.getsitepackages() for f in glob.glob(s + "/nvidia/*/lib")), sep=":")' || true)
    LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64${found:+:$found} "$@"
}

each_test() {
    for test in "$bin"/test-*; do
        attempt "$@" "$test"
    done
}

sanitize() {
    each_test compute-sanitizer --tool memcheck --error-exitcode 1
    each_test compute-sanitizer --tool racecheck --error-exitcode 1
    PPO_KERNELS_INITCHECK=1 each_test compute-sanitizer --tool initcheck --error-exitcode 1
}

measure() {
    attempt with_toolkit "$bin/time" "$@"
}

in_python() {
    export PPO_KERNELS_LIB=$PWD/$bin/libppo_kernels.so PYTHONPATH=$PWD/python/src
    attempt python3 -m pytest -q -p no:cacheprovider python/tests
    attempt python3 python/bench.py --device cuda
}

through_candle() {
    local program
    for program in "$bin"/candle-test-*; do
        attempt with_toolkit "$program"
    done
    for program in "$bin"/candle-bench-*; do
        attempt with_toolkit "$program" --bench --quick
    done
    attempt with_toolkit "$bin/ppo-kernels" bench-table
}

train() {
    attempt with_toolkit "$bin/ppo-kernels" check --device cuda
    attempt with_toolkit "$bin/ppo-kernels" train --device cuda --out "$(mktemp -d)/run" "$@"
}

all() {
    each_test
    sanitize
    measure
    in_python
    through_candle
    train "$@"
}

case ${1:-} in
test | sanitize | time | python | candle | train | all) unpack ;;
esac
case ${1:-} in
build) build "${2:-}" ;;
test) each_test ;;
sanitize) sanitize ;;
time) measure "${@:2}" ;;
python) in_python ;;
candle) through_candle ;;
train) train "${@:2}" ;;
all) all "${@:2}" ;;
*)
    sed -n '2,19s/^# *//p' benches/gpu/run.sh
    exit 2
    ;;
esac
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
