//! The index on disk with some of its bytes changed: it is read, or set aside, and can be saved to again.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use hotset_core::catalog::store::Store;
use hotset_core::catalog::{Catalogue, ScanOptions, scan};
use libfuzzer_sys::fuzz_target;

struct Saved {
    folder: PathBuf,
    file: Vec<u8>,
    catalogue: Catalogue,
}

fn saved() -> &'static Saved {
    static SAVED: OnceLock<Saved> = OnceLock::new();
    SAVED.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("hotset-fuzz-store-{}", std::process::id()));
        let models = folder.join("models");
        fs::create_dir_all(&models).expect("the temporary folder takes folders");
        for name in ["a", "b", "loras/c"] {
            let path = models.join(format!("{name}.safetensors"));
            fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
            let header = br#"{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
            let file = [&(header.len() as u64).to_le_bytes()[..], header, b"1234"].concat();
            fs::write(path, file).expect("files");
        }
        let catalogue = scan(&ScanOptions::new(vec![models]), None, &|_| {}).catalogue;
        let path = folder.join("whole.db");
        {
            let mut store = Store::open(&path).expect("a new index");
            store.save(&catalogue).expect("it is saved");
        }
        let file = fs::read(&path).expect("it is there");
        Saved { folder, file, catalogue }
    })
}

fuzz_target!(|changes: Vec<(u16, u8)>| {
    let saved = saved();
    let mut file = saved.file.clone();
    for (at, byte) in changes {
        let at = usize::from(at) % file.len();
        file[at] = byte;
    }
    let folder = saved.folder.join("changed");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a folder");
    let path = folder.join("index.db");
    fs::write(&path, file).expect("a file");
    if let Ok(mut store) = Store::open(&path) {
        if store.load().is_ok() {
            let _ = store.save(&saved.catalogue);
        }
    }
});
