#!/usr/bin/env bash
# The tests of the CUDA kernels and their measurements, for a machine with a GPU.
#
#   benches/gpu/run.sh build             on a machine with Rust: makes benches/gpu/bin/, to carry along
#   benches/gpu/run.sh test              runs the tests
#   benches/gpu/run.sh sanitize          runs them under compute-sanitizer's memcheck, racecheck, initcheck
#   benches/gpu/run.sh time              prints the table
set -euo pipefail
cd "$(dirname "$0")"

build() {
    NVCC=$(../../.ci/nvcc)
    export NVCC CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-../../target/gpu}
    rm -rf bin
    mkdir bin
    cargo build --release
    cp "$CARGO_TARGET_DIR/release/ppo-kernels-gpu" bin/time
    cargo test --release --no-run --message-format=json-render-diagnostics |
        sed -n '/"kind":\["test"\]/s/.*"executable":"\([^"]*\)".*/\1/p' |
        while read -r test; do
            name=${test##*/}
            cp "$test" "bin/test-${name%-*}"
        done
    strip bin/*
    ls -l bin
}

each_test() {
    for test in bin/test-*; do
        echo "== ${*:+$* }${test#bin/test-}"
        "$@" "$test"
    done
}

case ${1:-} in
build) build ;;
test) each_test ;;
sanitize)
    for tool in memcheck racecheck initcheck; do
        each_test compute-sanitizer --tool "$tool" --error-exitcode 1
    done
    ;;
time) bin/time ;;
*)
    sed -n '2,8s/^# *//p' run.sh
    exit 2
    ;;
esac
