#!/usr/bin/env bash
# The tests of the CUDA kernels and their measurements, for a machine with a GPU.
#
#   benches/gpu/run.sh build [candle]    on a machine with Rust: makes benches/gpu/bin/, and bin.tar.xz to
#                                        carry along; with candle's own ops to measure beside and the
#                                        training program, which takes twenty minutes and the libraries
#                                        of the CUDA toolkit
#   benches/gpu/run.sh test              runs the tests
#   benches/gpu/run.sh sanitize          runs them under compute-sanitizer's memcheck, racecheck, initcheck
#   benches/gpu/run.sh time              prints the table
#   benches/gpu/run.sh python            tests and measures the PyTorch ops, beside all peers that are there
#   benches/gpu/run.sh train [ARGS]      checks every op and trains on the GPU; ARGS as of `train`
#   benches/gpu/run.sh all [ARGS]        all of these but the build, and says at the end what failed
set -euo pipefail
cd "$(dirname "$0")"

build() {
    NVCC=${NVCC:-$(../../.ci/nvcc)}
    export NVCC CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/../../target/gpu}
    rm -rf bin
    mkdir bin
    cp "$(executables bin build ${1:+--features "$1"})" bin/time
    if [ -n "${1:-}" ]; then
        cp "$(cd ../.. && executables bin build --features cuda,driver)" bin/ppo-kernels
    fi
    cp "$(cd ../.. && library)" bin/
    executables test test --no-run | while read -r test; do
        name=${test##*/}
        cp "$test" "bin/test-${name%-*}"
    done
    strip bin/*
    python3 -m tarfile -c bin.tar.xz bin
    ls -l bin bin.tar.xz
}

# What was carried, and the toolkit's libraries, which may be PyTorch's.
unpack() {
    if [ ! -d bin ]; then
        python3 -m tarfile -e bin.tar.xz
    fi
    local found
    found=$(python3 -c 'import glob, site
print(*(f for s in site.getsitepackages() for f in glob.glob(s + "/nvidia/*/lib")), sep=":")' || true)
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64:$found
}

# Prints what of the kind $1 cargo makes when it is told the rest.
executables() {
    local kind=$1
    shift
    cargo "$@" --release --message-format=json-render-diagnostics |
        sed -n '/"kind":\["'"$kind"'"\]/s/.*"executable":"\([^"]*\)".*/\1/p'
}

# Prints the C library, which the PyTorch ops load.
library() {
    cargo rustc --release --lib --crate-type cdylib --no-default-features --features capi,cuda \
        --message-format=json-render-diagnostics |
        sed -n 's/.*"\([^"]*libppo_kernels\.so\)".*/\1/p'
}

each_test() {
    for test in bin/test-*; do
        echo "== ${*:+$* }${test#bin/test-}"
        "$@" "$test"
    done
}

sanitize() {
    for tool in memcheck racecheck initcheck; do
        each_test compute-sanitizer --tool "$tool" --error-exitcode 1
    done
}

in_python() {
    export PPO_KERNELS_LIB=$PWD/bin/libppo_kernels.so PYTHONPATH=$PWD/../../python/src
    python3 -m pytest -q -p no:cacheprovider ../../python/tests
    python3 ../../python/bench.py --device cuda
}

train() {
    bin/ppo-kernels check --device cuda
    bin/ppo-kernels train --device cuda --out "$(mktemp -d)/run" "$@"
}

all() {
    local failed=() arguments=()
    for part in test sanitize time python train; do
        echo "== $part"
        if [ "$part" = train ]; then arguments=("$@"); fi
        ./run.sh "$part" "${arguments[@]}" || failed+=("$part")
    done
    echo "failed: ${failed[*]:-nothing}"
    ((${#failed[@]} == 0))
}

case ${1:-} in
test | sanitize | time | python | train) unpack ;;
esac
case ${1:-} in
build) build "${2:-}" ;;
test) each_test ;;
sanitize) sanitize ;;
time) bin/time ;;
python) in_python ;;
train) train "${@:2}" ;;
all) all "${@:2}" ;;
*)
    sed -n '2,14s/^# *//p' run.sh
    exit 2
    ;;
esac
