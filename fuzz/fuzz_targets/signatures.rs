//! A user's file of signatures.
#![no_main]

use std::fs;

use hotset_core::catalog::Signatures;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let path = std::env::temp_dir().join(format!("hotset-fuzz-signatures-{}.toml", std::process::id()));
    fs::write(&path, text).expect("the temporary folder takes files");
    let _ = Signatures::with_files(&[path]);
});
