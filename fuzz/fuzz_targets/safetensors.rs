//! Headers of safetensors files: any bytes, any claimed length of the file.
#![no_main]

use hotset_core::catalog::safetensors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u16, &[u8])| {
    let (extra, header) = input;
    let file_len = 8 + header.len() as u64 + u64::from(extra);
    if let Ok(parsed) = safetensors::parse(header, file_len) {
        // What is accepted fills the file without gaps.
        let bytes: u64 = parsed.tensors.iter().map(|tensor| tensor.bytes()).sum();
        assert_eq!(parsed.data_start + bytes, file_len);
    }
});
