#!/usr/bin/env bash
# The tests of the CUDA kernels and their measurements, for a machine with a GPU.
#
#   benches/gpu/run.sh build [candle]    on a machine with Rust: makes benches/gpu/bin/, to carry along;
#                                        with candle's own ops to measure beside, which takes twenty
#                                        minutes and the libraries of the CUDA toolkit
#   benches/gpu/run.sh test              runs the tests
#   benches/gpu/run.sh sanitize          runs them under compute-sanitizer's memcheck, racecheck, initcheck
#   benches/gpu/run.sh time              prints the table
set -euo pipefail
cd "$(dirname "$0")"

build() {
    NVCC=${NVCC:-$(../../.ci/nvcc)}
    export NVCC CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-../../target/gpu}
    rm -rf bin
    mkdir bin
    cp "$(executables bin build ${1:+--features "$1"})" bin/time
    executables test test --no-run | while read -r test; do
        name=${test##*/}
        cp "$test" "bin/test-${name%-*}"
    done
    strip bin/*
    ls -l bin
}

# Prints what of the kind $1 cargo makes when it is told the rest.
executables() {
    local kind=$1
    shift
    cargo "$@" --release --message-format=json-render-diagnostics |
        sed -n '/"kind":\["'"$kind"'"\]/s/.*"executable":"\([^"]*\)".*/\1/p'
}

each_test() {
    for test in bin/test-*; do
        echo "== ${*:+$* }${test#bin/test-}"
        "$@" "$test"
    done
}

case ${1:-} in
build) build "${2:-}" ;;
test) each_test ;;
sanitize)
    for tool in memcheck racecheck initcheck; do
        each_test compute-sanitizer --tool "$tool" --error-exitcode 1
    done
    ;;
time) bin/time ;;
*)
    sed -n '2,10s/^# *//p' run.sh
    exit 2
    ;;
esac
