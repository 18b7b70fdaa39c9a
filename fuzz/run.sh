#!/bin/sh
# Runs every fuzz target for a bounded time: all decoders of bytes that hotset did not write itself.
# Usage: fuzz/run.sh [SECONDS EACH, default 60] [TARGET..]
# Needs a nightly toolchain and cargo-fuzz (`cargo install cargo-fuzz`). fuzz/corpus has the seeds; what is found is kept in
# fuzz/target/corpus.
set -eu
cd "$(dirname "$0")/.."
seconds="${1:-60}"
[ $# -gt 0 ] && shift
if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    echo "cargo-fuzz on a nightly toolchain is needed: cargo install cargo-fuzz" >&2
    exit 1
fi
# Headers of model files, JSON of model folders, the index, users' tables and texts, and what clients send.
all="safetensors gguf index store signatures query trace predictor bridge http"
for target in ${*:-$all}; do
    echo "== $target"
    mkdir -p "fuzz/target/corpus/$target" "fuzz/corpus/$target"
    cargo +nightly fuzz run "$target" "fuzz/target/corpus/$target" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 -print_final_stats=1
done
