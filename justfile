# Chores. `just` lists them.

default:
    @just --list

# What CI runs
ci:
    .ci/run

# Every test
test:
    cargo test --workspace

# Format, then lint
fix:
    cargo fmt --all
    cargo clippy --workspace --all-targets -- -D warnings

# A small library, two pipelines, and what was evicted and why
demo *ARGS:
    cargo run --release -- demo {{ARGS}}

# Everything to check hotset on a machine with a GPU, in one archive
gpu-bundle:
    scripts/gpu-bundle

# The API's documentation, in a browser
docs:
    cargo doc --workspace --no-deps --open

# Licences, advisories, doubled dependencies (needs cargo-deny)
deny:
    cargo deny check

# Shuttle explores interleavings of the locks that several threads share (ledger, arena, turns on a link)
models:
    scripts/models

# Every fuzz target for so many seconds (needs a nightly toolchain and cargo-fuzz)
fuzz SECONDS="60":
    fuzz/run.sh {{SECONDS}}

# Tests of the unsafe modules under Miri, AddressSanitizer or valgrind, whichever is there
sanitize:
    scripts/sanitize
