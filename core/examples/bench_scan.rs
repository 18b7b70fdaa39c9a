//! Measures scanning on a library of sparse files: `bench_scan [FILES] [FOLDER]`. Prints JSON.

use std::path::PathBuf;

use hotset_core::catalog::bench;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let files = arguments
        .next()
        .map_or(Ok(5_000), |text| text.parse::<u64>())?;
    let folder = arguments
        .next()
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let report = bench::run(&bench::Options {
        files,
        folder,
        ..bench::Options::default()
    })?;
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
