#!/usr/bin/env bash
# The tests of the CUDA kernels and their measurements, for a machine that has a GPU for some minutes and
# no Rust: all that is needed is built before, and carried there. What is worth most comes first; every
# step is a process with a limit of its own, and what it prints is in the results folder as it comes.
#
#   benches/gpu/run.sh build          with Rust and nvcc, without a GPU: makes benches/gpu/bin/, and
#                                     bin.tar.xz to carry along
#   benches/gpu/run.sh build candle   the same, with what `third` runs: takes half an hour, the CUDA
#                                     toolkit's libraries, and, where there is no GPU to ask, the one to
#                                     compile for in CUDA_COMPUTE_CAP (90 is an H100 or H200)
#   benches/gpu/run.sh build peers    makes peers.tar.xz to carry along: the Python packages that ours are
#                                     measured beside, for Python $PEERS_PYTHON (3.12) with PyTorch
#
#   benches/gpu/run.sh first          330 s: smoke test table parts python sanitize
#   benches/gpu/run.sh second         230 s: smoke peers counters table
#   benches/gpu/run.sh third [ARGS]   570 s: smoke candle train; ARGS as of `train`
#   benches/gpu/run.sh STEP..         these steps, in 570 s:
#       smoke      the machine, one test, one backward pass of PyTorch
#       test       every test; what fails runs once more, alone and without launches beside it
#       table      time, GB/s and share of a copy of every pass: bf16, then f32 and the ops on tokens
#       parts      the forward passes with the parts of a row side by side, and one after the other
#       python     the PyTorch ops' tests on CUDA
#       sanitize   six tests under compute-sanitizer: memcheck, racecheck, synccheck, initcheck
#       peers      the PyTorch ops beside eager, torch.compile and the packages of `build peers`
#       counters   Nsight Compute's counters of seven kernels
#       candle     after `build candle`: tests and benches of the ops through candle
#       train      after `build candle`: checks every op, and trains with $TRAIN_ARGS
#   benches/gpu/run.sh time [ARGS]    the table by itself, to the screen; ARGS as `time --help` says
#
# $OUT is the results folder, a temporary one by default: eight files at most. $BUDGET is the seconds in
# all; no step gets more than is left. Ends with 0 if all went well, 1 if a step failed (steps.txt says
# which), 2 if this is not how it is called, 3 if what is to run was not brought along or does not start
# here, 4 if there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
bin=benches/gpu/bin
peers=benches/gpu/peers

# A tool of compute-sanitizer, and a test that is short under it.
SANITIZED=(
    "memcheck kl_cuda::special_rows_come_out_as_on_the_cpu"
    "racecheck logprob_cuda::bits_do_not_depend_on_the_other_rows"
    "racecheck gae_cuda::special_values_stay_where_they_belong"
    "racecheck ppo_loss_cuda::from_logits_reads_no_masked_row_and_ignores_what_is_to_be_ignored"
    "synccheck ppo_loss_cuda::optional_terms_fall_away"
    "initcheck whiten_cuda::too_few_elements_are_nan_or_an_error_where_they_can_be_seen"
)
SMOKE=logprob_cuda::bits_do_not_depend_on_the_other_rows

# QuACK is the last whose compiler, by far the largest, packs to less than 60 MB: a later one is
# quack-kernels 0.6.5 with nvidia-cutlass-dsl and its -libs-base, -libs-core and -libs-cu13 4.8.1.
PEERS=(
    quack-kernels==0.2.4 nvidia-cutlass-dsl==4.3.5 apache-tvm-ffi==0.1.15.post2
    torch-c-dlpack-ext==0.1.5 liger-kernel==0.8.5 trl==1.16.0 verl==0.9.1 openrlhf==0.11.2
)

usage() { sed -n '2,/^set /{/^set /!s/^#\( \|$\)//p}' benches/gpu/run.sh; }

# --- Building ---

build() (
    set -e
    case ${1:-} in
        '' | candle) ;;
        peers)
            bring_peers
            exit
            ;;
        *)
            usage >&2
            exit 2
            ;;
    esac
    # shellcheck disable=SC2030  # this subshell's, and its functions'
    NVCC=${NVCC:-$(.ci/nvcc)}
    export NVCC CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target/gpu}
    # Machine code for these chips, and PTX for what comes after them.
    export PPO_KERNELS_CUDA_ARCHS=${PPO_KERNELS_CUDA_ARCHS:-90}
    rm -rf "$bin" "$bin.tar.xz"
    mkdir "$bin"
    # Assigned first: what fails within an argument ends nothing.
    built=$(cd benches/gpu && executables bin build)
    cp "$built" "$bin/time"
    built=$(cd benches/gpu && executables test test --no-run --test cuda)
    cp "$built" "$bin/test"
    built=$(library)
    cp "$built" "$bin/"
    if [ -n "${1:-}" ]; then
        through_candle
    fi
    strip "$bin"/*
    # What was built, as the machine with the GPU may have no git.
    {
        echo "commit $(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)"
        echo "built $(date -u +%Y-%m-%dT%H:%MZ) by $(rustc --version)"
        echo "kernels for $PPO_KERNELS_CUDA_ARCHS by nvcc $("$NVCC" --version | sed -n 's/.*, V//p')"
    } >"$bin/BUILT"
    every_name_is_a_test
    # The largest dictionary: much is the same in all of them.
    XZ_OPT=-9 tar -cJf "$bin.tar.xz" "$bin"
    ls -l "$bin" "$bin.tar.xz"
)

# The ops' tests and benches through candle, the training program, and the table with candle's own ops.
through_candle() {
    local ops
    mapfile -t ops < <(ops)
    if ! command -v nvidia-smi >/dev/null; then
        export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:?the GPU to compile candle for, such as 90 for an H100}
    fi
    # shellcheck disable=SC2031  # called in it
    export PATH=${NVCC%/*}:$PATH
    built=$(cd benches/gpu && executables bin build --features candle)
    cp "$built" "$bin/time-candle"
    built=$(executables bin build --features cuda,driver)
    cp "$built" "$bin/ppo-kernels"
    executables test test --no-run --features cuda "${ops[@]/#/--test=}" | copy_as candle-test
    executables bench build --features cuda "${ops[@]/#/--bench=}" --bench=ppo_step |
        copy_as candle-bench
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

# A test whose name has changed would run nothing, and pass.
every_name_is_a_test() {
    local tests op name
    tests=$("$bin/test" --list)
    for op in $(ops); do
        grep -q "^${op}_cuda::.*: test$" <<<"$tests" || { echo "$op has no tests" && exit 1; }
    done
    for name in "$SMOKE" "${SANITIZED[@]#* }"; do
        grep -qx "$name: test" <<<"$tests" || { echo "there is no test $name" && exit 1; }
    done
}

# Packed again, since wheels are packed for speed.
bring_peers() {
    local version=${PEERS_PYTHON:-3.12} platforms=() n
    for n in 39 36 35 34 31 28 27 24 17; do
        platforms+=(--platform "manylinux_2_${n}_x86_64")
    done
    rm -rf "$peers" "$peers.tar.xz"
    python3 -m pip install --quiet --no-deps --no-compile --only-binary=:all: --target "$peers" \
        --python-version "$version" --implementation cp "${platforms[@]}" \
        --platform manylinux2014_x86_64 "${PEERS[@]}"
    XZ_OPT='-T0 --block-size=64MiB --x86 --lzma2=preset=6,dict=64MiB' tar -cJf "$peers.tar.xz" "$peers"
    rm -rf "$peers"
    ls -l "$peers.tar.xz"
}

ops() { for file in kernels/*.cu; do basename "$file" .cu; done; }

# --- On the GPU ---

# Ends all when what is to run is not there, or is for another machine.
bring() {
    local name missing=()
    if [ -e "$bin.tar.xz" ]; then
        python3 -m tarfile -e "$bin.tar.xz" >/dev/null 2>&1
    fi
    for name in "$@"; do
        [ -e "$bin/$name" ] || missing+=("$bin/$name")
    done
    if ((${#missing[@]})); then
        echo "not here: ${missing[*]}; make them by \`$0 build\`, and bring $bin.tar.xz along" >&2
        exit 3
    fi
    # An interpreter or a library that is missing, or a version of one.
    for name in time test libppo_kernels.so; do
        if ! ldd "$bin/$name" >/dev/null 2>&1 || ldd "$bin/$name" 2>&1 | grep "not found"; then
            echo "$bin/$name does not start on this machine: build it on one whose C library is older" >&2
            exit 3
        fi
    done
}

# Where the driver and the toolkit are, should the machine's own settings not say it.
environment() {
    export PATH=$PATH:/usr/local/cuda/bin:/usr/local/nvidia/bin
    LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/nvidia/lib64:/usr/local/nvidia/lib
    export LD_LIBRARY_PATH=$LD_LIBRARY_PATH:/usr/local/cuda/lib64
    export PPO_KERNELS_LIB=$PWD/$bin/libppo_kernels.so PYTHONUNBUFFERED=1
    export PYTHONPATH=$PWD/python/src${PYTHONPATH:+:$PYTHONPATH}
    # A backtrace takes seconds and says nothing about the device.
    export RUST_BACKTRACE=0
}

prepare() {
    OUT=${OUT:-$(mktemp -d)}
    mkdir -p "$OUT" || exit
    environment
    echo "results in $OUT, $BUDGET s"
    trap report EXIT
}

# step SECONDS FILE NAME COMMAND..: what the command prints goes to FILE.txt, how it went to steps.txt.
step() {
    local limit=$1 to=$OUT/$2.txt name=$3 left=$((BUDGET - SECONDS)) began=$SECONDS rc
    shift 3
    if ((left < 6)); then
        went "$name: no time left"
        return 1
    fi
    ((limit > left - 5)) && limit=$((left - 5))
    printf '\n== %s\n' "$name" >>"$to"
    timeout --kill-after=3 "$limit" "$@" </dev/null >>"$to" 2>&1
    rc=$?
    went "$name: rc=$rc in $((SECONDS - began)) s of $limit"
    return "$rc"
}

# Says how a step went, now and, if not well, at the end: the folder may be of several runs.
went() {
    echo "$1" | tee -a "$OUT/steps.txt"
    case $1 in *": rc=0 in "*) ;; *) failed+=("$1") ;; esac
}

report() {
    local rc=$?
    # The end of what is printed is what is sure to be seen.
    if [ -e "$OUT/table.txt" ]; then tail -n 60 "$OUT/table.txt"; fi
    printf '\n== %s s of %s, files in %s\n' "$SECONDS" "$BUDGET" "$OUT"
    if ((${#failed[@]})); then printf '%s\n' "${failed[@]}"; else echo "every step went well"; fi
    exit "$rc"
}

smoke() {
    # shellcheck disable=SC2016  # it is the inner shell that expands these
    step 20 env "the machine" bash -c '
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,ecc.mode.current \
            --format=csv,noheader || echo "no nvidia-smi"
        cat "$1"
        if command -v nvcc; then nvcc --version | tail -n 2; fi
        command -v compute-sanitizer ncu
        python3 -c "import sys, torch; print(sys.version, torch.__version__, torch.version.cuda)" ||
            echo "no PyTorch"
        date -u +%Y-%m-%dT%H:%MZ; uname -srm; nproc; ldd --version | head -n 1' machine "$bin/BUILT"
    if ! step 25 env "the device" "$bin/time" --device; then
        went "no GPU that can be used: $(tail -n 1 "$OUT/env.txt")"
        exit 4
    fi
    step 20 tests "smoke: a test" "$bin/test" --exact "$SMOKE"
    # The backward pass runs in a thread that has made no CUDA call.
    step 40 pytorch "smoke: a backward pass of PyTorch" python3 -c '
import torch, ppo_kernels
logits = torch.randn(8, 151936, device="cuda", dtype=torch.bfloat16, requires_grad=True)
index = torch.randint(151936, (8,), device="cuda")
torch.autograd.backward(ppo_kernels.selective_log_softmax(logits, index), torch.ones(8, device="cuda"))
print(torch.cuda.get_device_name(), "row sums of the gradient:", logits.grad.float().sum(-1).tolist())'
}

# A kernel that faults takes the other tests of its process along: those that failed run once more, alone.
run_tests() {
    local module modules test
    mapfile -t modules < <({ ops && "$bin/test" --list | sed -n 's/_cuda::.*//p'; } | sort -u)
    for module in "${modules[@]}"; do
        step 60 tests "test $module" "$bin/test" --test-threads 8 "${module}_cuda::" && continue
        while read -r test; do
            CUDA_LAUNCH_BLOCKING=1 step 15 tests "alone: $test" "$bin/test" --exact "$test"
        done < <(failed_tests "test $module" | head -n 3)
    done
}

# Those of the last time that the step ran.
failed_tests() {
    awk -v head="== $1" '$0 == head { n = 0 } / \.\.\. FAILED$/ { names[n++] = $2 }
        END { for (i = 0; i < n; i++) print names[i] }' "$OUT/tests.txt"
}

table() {
    step 30 table "table, bf16" "$bin/time" --bf16
    step 40 table "table, f32 and tokens" "$bin/time" --f32
}

parts() {
    step 15 table "forward passes, wide" "$bin/time" --bf16 --wide forward
    step 15 table "forward passes, narrow" "$bin/time" --bf16 --narrow forward
}

python() {
    # In names or parameters: what runs on a GPU.
    step 60 pytorch "pytest on CUDA" python3 -m pytest -q --maxfail 5 -p no:cacheprovider \
        -k "cuda or stream or graph" python/tests/test_torch.py
    step 60 pytorch "pytest on CUDA, from hidden states" python3 -m pytest -q --maxfail 5 \
        -p no:cacheprovider -k cuda python/tests/test_linear.py
}

sanitize() {
    local case tool settings
    for case in "${SANITIZED[@]}"; do
        tool=${case%% *}
        settings=()
        # initcheck is to see the workspaces that the tests would fill.
        if [ "$tool" = initcheck ]; then settings=(PPO_KERNELS_INITCHECK=1); fi
        step 30 sanitizers "$case" env "${settings[@]}" compute-sanitizer --error-exitcode 1 \
            --tool "$tool" "$bin/test" --test-threads 1 --exact "${case#* }"
    done
}

peers() {
    local logits="8192 x 151936" tokens="8192 x 2048" found
    local bench=(python3 python/bench.py --device cuda --seconds 0.3)
    if [ -e "$peers.tar.xz" ]; then
        step 20 pytorch "unpacking the peers" python3 -m tarfile -e "$peers.tar.xz"
        # In the second is QuACK's compiler, which a .pth file names that is not read here.
        found=("$PWD/$peers/nvidia_cutlass_dsl"/*_packages)
        export PYTHONPATH=$PYTHONPATH:$PWD/$peers:${found[0]}
    else
        echo "without $peers.tar.xz: beside what the machine has" | tee -a "$OUT/pytorch.txt"
    fi
    step 90 pytorch "peers, logits" "${bench[@]}" --only "$logits"
    step 45 pytorch "peers, from hidden states" "${bench[@]}" --only head
    step 45 pytorch "peers, tokens" "${bench[@]}" --only "$tokens" --without torch.compile
    step 60 pytorch "peers, few rows" "${bench[@]}" --only "512 x 49152" --only "64 x 151936"
}

counters() {
    count logprob_forward_block_bf16 --bf16 "logprob forward"
    count logprob_backward_bf16 --bf16 "logprob backward"
    count kl_full_forward_block_bf16 --bf16 "exact KL forward"
    count kl_full_backward_bf16 --bf16 "exact KL backward"
    count "gae_(warp|block)_f32" --f32 GAE
    count ppo_loss_from_logits_bf16 --bf16 "from logits"
    count ppo_loss_pass_full_f32 --f32 "PPO loss"
}

# The counters of the second launch of a kernel, while the passes behind it are measured.
count() {
    local kernel=$1
    shift
    step 30 counters "ncu $kernel" ncu --clock-control none --set full --launch-skip 1 --launch-count 1 \
        --kernel-name "regex:$kernel" "$bin/time" "$@"
}

candle() {
    local program
    toolkit
    for program in "$bin"/candle-test-*; do
        step 90 candle "candle: ${program##*/candle-}" "$program"
    done
    for program in "$bin"/candle-bench-*; do
        step 40 candle "candle: ${program##*/candle-}" "$program" --bench --quick
    done
    step 20 candle "candle: the benches' table" "$bin/ppo-kernels" bench-table
    step 90 table "table beside candle" "$bin/time-candle" --bf16
}

train() {
    toolkit
    step 120 candle "check" "$bin/ppo-kernels" check --device cuda
    # shellcheck disable=SC2086  # arguments
    step 240 candle "train" "$bin/ppo-kernels" train --device cuda --out "$(mktemp -d)/run" ${TRAIN_ARGS:-} "$@"
}

# The libraries that candle links, which may be PyTorch's.
toolkit() {
    local found
    found=$(python3 -c 'import glob, site
print(*(f for s in site.getsitepackages() for f in glob.glob(s + "/nvidia/*/lib")), sep=":")')
    export LD_LIBRARY_PATH=$LD_LIBRARY_PATH${found:+:$found}
}

# --- What is asked for ---

if (($# == 0)); then usage >&2 && exit 2; fi
needed=(time test libppo_kernels.so BUILT)
arguments=()
case $1 in
build)
    build "${@:2}"
    exit
    ;;
-h | --help) usage && exit ;;
time)
    bring "${needed[@]}"
    environment
    exec "$bin/time" "${@:2}"
    ;;
first) BUDGET=${BUDGET:-330} steps=(smoke test table parts python sanitize) ;;
second) BUDGET=${BUDGET:-230} steps=(smoke peers counters table) ;;
third)
    BUDGET=${BUDGET:-570} steps=(smoke candle train)
    arguments=("${@:2}")
    ;;
*) BUDGET=${BUDGET:-570} steps=("$@") ;;
esac
for name in "${steps[@]}"; do
    case $name in
    smoke | test | table | parts | python | sanitize | peers | counters) ;;
    candle | train) needed+=(ppo-kernels time-candle) ;;
    *)
        printf 'there is no step %s\n\n' "$name" >&2
        usage >&2
        exit 2
        ;;
    esac
done
bring "${needed[@]}"
failed=()
prepare
for name in "${steps[@]}"; do
    case $name in
    test) run_tests ;;
    train) train "${arguments[@]}" ;;
    *) "$name" ;;
    esac
done
((${#failed[@]} == 0))
