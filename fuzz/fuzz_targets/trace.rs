//! Recorded requests for `hotset replay`, in any of the columns that it knows, with a table of components or without.
#![no_main]

use hotset_core::replay::Trace;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    // Both tables in one input.
    let (requests, components) = match text.split_once("\n\n") {
        Some((requests, components)) => (requests, Some(components)),
        None => (text, None),
    };
    if let Ok(trace) = Trace::read(requests, components) {
        for request in trace.requests() {
            assert!(request.components.iter().all(|at| *at < trace.components().len()));
        }
        let _ = trace.footprint();
    }
});
