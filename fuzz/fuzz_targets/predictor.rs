//! A saved predictor: what is accepted can be gone on with, and saved and read once more.
#![no_main]

use std::time::Duration;

use hotset_core::predict::Predictor;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut predictor) = serde_json::from_slice::<Predictor>(bytes) else { return };
    predictor.resume(Duration::from_secs(1), Duration::from_secs(60));
    let _ = predictor.stats();
    let _ = predictor.proposals(Duration::from_secs(2), &[], 8);
    let saved = serde_json::to_vec(&predictor).expect("what was read can be written");
    serde_json::from_slice::<Predictor>(&saved).expect("and read again");
});
