# `just`: the commands of every day.
default:
    @just --list

# The main job: fits a small model and trains it by PPO.
train *ARGS:
    cargo run --release --features driver -- train {{ARGS}}

# Everything in Rust and of the CPU.
test *ARGS:
    cargo test {{ARGS}}

# The CUDA kernels, without a GPU: plain and under the sanitizers.
simt:
    .ci/simt

# Our ops beside candle's, and their share of the memory's limit.
bench *ARGS:
    cargo bench {{ARGS}}
    cargo run --release --features driver,capi -- bench-table

# The gate, or steps of it.
gate *STEPS:
    .ci/run {{STEPS}}

# Formats Rust, Python and, where clang-format is installed, the kernels.
format:
    cargo fmt
    ruff format python
    clang-format -i kernels/*.cu kernels/common/* src/cuda/simt/*.cpp src/cuda/simt/*.h
