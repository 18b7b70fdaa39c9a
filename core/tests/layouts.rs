//! The signatures against the layouts that diffusers, transformers and LoRA trainers write.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use hotset_core::catalog::{ScanOptions, scan};

/// Writes a sparse safetensors file of these keys and shapes.
fn write(path: &Path, tensors: &[(&str, Vec<u64>)]) {
    let mut header = serde_json::Map::new();
    let mut end = 0_u64;
    for (key, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        let told =
            serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert((*key).to_owned(), told);
    }
    let header = serde_json::to_vec(&header).unwrap();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(&header).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
}

#[test]
fn what_the_libraries_write_is_known_for_what_it_is() {
    let root = tempfile::tempdir().unwrap();
    let mut expected = BTreeMap::new();
    for layout in include_str!("layouts/layouts.txt").split("\n= ").skip(1) {
        let (title, keys) = layout.split_once('\n').unwrap();
        let [name, kind, architecture] = title.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{title}");
        };
        let tensors: Vec<(&str, Vec<u64>)> = keys
            .lines()
            .map(|line| {
                let (key, shape) = line.split_once(' ').unwrap_or((line, ""));
                let sizes = shape.split('x').filter(|size| !size.is_empty());
                (key, sizes.map(|size| size.parse().unwrap()).collect())
            })
            .collect();
        write(&root.path().join(format!("{name}.safetensors")), &tensors);
        expected.insert(name.to_owned(), format!("{kind} {architecture}"));
    }
    assert!(expected.len() > 90, "{}", expected.len());
    let report = scan(
        &ScanOptions::new(vec![root.path().to_owned()]),
        None,
        &|_| {},
    );
    let found: BTreeMap<String, String> = report
        .catalogue
        .models()
        .map(|model| {
            assert_eq!(model.error, None, "{}", model.name);
            let architecture = model.architecture.as_deref().unwrap_or("-");
            (
                model.name.to_string(),
                format!("{} {architecture}", model.kind),
            )
        })
        .collect();
    let wrong: Vec<String> = expected
        .iter()
        .filter(|(name, is)| found.get(*name) != Some(is))
        .map(|(name, is)| format!("{name} is {is}, not {:?}", found.get(name)))
        .collect();
    assert_eq!(wrong, [""; 0]);
}
