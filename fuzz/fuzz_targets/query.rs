//! What a client looks for in the catalogue.
#![no_main]

use hotset_core::catalog::Catalogue;
use hotset_core::catalog::query::Query;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(query) = Query::parse(text) {
        let _ = Catalogue::default().search(&query, 10);
    }
});
