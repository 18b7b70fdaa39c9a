//! Headers of GGUF files.
#![no_main]

use hotset_core::catalog::gguf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    if let Ok(parsed) = gguf::parse(file, file.len() as u64) {
        for tensor in &parsed.tensors {
            assert!(tensor.start <= tensor.end);
            assert!(parsed.data_start + tensor.end <= file.len() as u64);
        }
    }
});
