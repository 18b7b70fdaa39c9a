#!/bin/sh
# Runs every fuzz target for a bounded time. Usage: fuzz/run.sh [SECONDS EACH, default 60]
# Needs cargo-fuzz and a nightly toolchain. fuzz/corpus has the seeds; what is found is kept in fuzz/target/corpus.
set -eu
cd "$(dirname "$0")/.."
seconds="${1:-60}"
if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    echo "cargo-fuzz on a nightly toolchain is needed: cargo install cargo-fuzz" >&2
    exit 1
fi
for target in safetensors gguf index bridge; do
    mkdir -p "fuzz/target/corpus/$target"
    cargo +nightly fuzz run "$target" "fuzz/target/corpus/$target" "fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536
done
