//! The JSON files of a model folder: a shard index, a pipeline's index and a configuration made of the same bytes.
#![no_main]

use std::fs;

use hotset_core::catalog::{ScanOptions, scan};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|json: &[u8]| {
    let root = std::env::temp_dir().join(format!("hotset-fuzz-{}", std::process::id()));
    let model = root.join("model");
    let pipeline = root.join("pipeline");
    for folder in [&model, &pipeline] {
        fs::create_dir_all(folder).expect("the temporary folder takes folders");
    }
    let put = |path: std::path::PathBuf, bytes: &[u8]| {
        fs::write(path, bytes).expect("the temporary folder takes files");
    };
    put(model.join("model.safetensors.index.json"), json);
    put(model.join("config.json"), json);
    put(pipeline.join("model_index.json"), json);
    let report = scan(&ScanOptions::new(vec![root]), None, &|_| {});
    for found in report.catalogue.models() {
        for file in found.components.iter().flat_map(|c| &c.files) {
            assert!(file.path.starts_with(&*found.path) || found.path.parent().is_some_and(|p| file.path.starts_with(p)));
        }
    }
});
