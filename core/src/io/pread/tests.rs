use std::fs;
use std::path::Path;

use super::*;
use crate::catalog::test_utils::{put, safetensors};
use crate::catalog::{ScanOptions, scan};
use crate::memory::Slab;

/// The one component of the one model below `root`.
fn scanned(root: &Path) -> Arc<Component> {
    let report = scan(&ScanOptions::new(vec![root.to_owned()]), None, &|_| {});
    let model = report.catalogue.models().next().cloned().unwrap();
    assert_eq!(model.error, None);
    assert_eq!(model.components.len(), 1);
    model.components[0].clone()
}

async fn read_all(
    component: &Arc<Component>,
    piece: u64,
) -> Result<(Arc<Slab>, Arc<TensorTable>), ReadError> {
    let mut open = PreadReader.open(component.clone()).await?;
    let table = open.table().clone();
    let mut writer = Slab::create("test", open.image_bytes()).unwrap();
    while writer.filled() < open.image_bytes() {
        let before = writer.filled();
        (open, writer) = open.read(writer, Bytes(piece)).await?;
        assert!(writer.filled() > before && writer.filled().get() <= before.get() + piece);
    }
    Ok((writer.seal().unwrap(), table))
}

/// Two shards whose tensors hold their own numbers.
fn sharded(root: &Path) {
    for shard in 1..=2_u8 {
        let name = format!("model-0000{shard}-of-00002.safetensors");
        let mut file = safetensors(&[(&format!("t{shard}"), &[1000 + usize::from(shard)])], &[]);
        let data = file.len() - 2 * (1000 + usize::from(shard));
        file[data..].fill(shard);
        put(root, &name, file);
    }
    let map = serde_json::json!({"weight_map": {
        "t1": "model-00001-of-00002.safetensors",
        "t2": "model-00002-of-00002.safetensors",
    }});
    put(root, "model.safetensors.index.json", map.to_string());
    put(root, "config.json", r#"{"model_type": "llama"}"#);
}

/// A GGUF file with a plain tensor and one in blocks, whose bytes are their numbers.
fn gguf() -> Vec<u8> {
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    let mut file = b"GGUF".to_vec();
    file.extend(3_u32.to_le_bytes());
    file.extend(2_u64.to_le_bytes());
    file.extend(1_u64.to_le_bytes());
    file.extend(text("general.architecture"));
    file.extend(8_u32.to_le_bytes());
    file.extend(text("llama"));
    for (name, kind, start) in [("norm", 0_u32, 0_u64), ("quantised", 2, 256)] {
        file.extend(text(name));
        file.extend(1_u32.to_le_bytes());
        file.extend(64_u64.to_le_bytes());
        file.extend(kind.to_le_bytes());
        file.extend(start.to_le_bytes());
    }
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend([1; 256]);
    file.extend([2; 36]);
    file
}

#[tokio::test]
async fn gguf_files_are_read_with_their_tensors_in_place() {
    let folder = tempfile::tempdir().unwrap();
    put(folder.path(), "tiny.Q4_0.gguf", gguf());
    let component = scanned(folder.path());
    let (slab, table) = read_all(&component, 100).await.unwrap();
    assert_eq!(slab.filled()[..gguf().len()], gguf());
    let seen: Vec<_> = table
        .iter()
        .map(|entry| {
            let start = entry.offset as usize;
            let bytes = &slab.filled()[start..start + entry.bytes as usize];
            let even = bytes
                .iter()
                .all(|byte| *byte == bytes[0])
                .then_some(bytes[0]);
            (&*entry.name, entry.dtype.name(), entry.bytes, even)
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("norm", "F32", 256, Some(1)),
            ("quantised", "Q4_0", 36, Some(2))
        ]
    );
}

#[tokio::test]
async fn shards_lie_behind_each_other_on_page_borders_whatever_the_piece() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("llm");
    sharded(&root);
    let component = scanned(folder.path());
    for piece in [1, 100, 4096, 5000, 1 << 20] {
        let (slab, table) = read_all(&component, piece).await.unwrap();
        assert_eq!(slab.bytes(), component.ram_bytes());
        for shard in 1..=2_u8 {
            let entry = table.get(&format!("t{shard}")).unwrap();
            let bytes =
                &slab.filled()[entry.offset as usize..(entry.offset + entry.bytes) as usize];
            assert!(bytes.iter().all(|byte| *byte == shard));
            assert_eq!(entry.bytes, 2 * (1000 + u64::from(shard)));
        }
        let first = fs::read(root.join("model-00001-of-00002.safetensors")).unwrap();
        assert_eq!(&slab.filled()[..first.len()], first);
        assert!(
            slab.filled()[first.len()..4096]
                .iter()
                .all(|byte| *byte == 0)
        );
    }
}

#[tokio::test]
async fn a_component_of_a_larger_file_is_read_alone() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["a.weight", "b.weight", "c.weight"];
    let specs: Vec<(&str, &[usize])> = names.iter().map(|name| (*name, &[5000][..])).collect();
    let mut file = safetensors(&specs, &[]);
    let data = file.len() - 3 * 10_000;
    for (i, byte) in (0..).zip(&mut file[data..]) {
        *byte = (i / 10_000) as u8;
    }
    put(folder.path(), "one.safetensors", &file);
    let mut component = (*scanned(folder.path())).clone();
    let range = |i: usize| crate::catalog::FileRange {
        file: 0,
        start: (data + i * 10_000) as u64,
        end: (data + (i + 1) * 10_000) as u64,
    };
    component.selection = Some(Arc::new(crate::catalog::Selection {
        prefixes: vec!["a.".into(), "c.".into()],
        ranges: vec![range(0), range(2)],
    }));
    let component = Arc::new(component);
    let (slab, table) = read_all(&component, 4096).await.unwrap();
    assert_eq!(table.len(), 2);
    for (name, value) in [("a.weight", 0), ("c.weight", 2)] {
        let entry = table.get(name).unwrap();
        let bytes = &slab.filled()[entry.offset as usize..(entry.offset + entry.bytes) as usize];
        assert_eq!(bytes.len(), 10_000);
        assert!(bytes.iter().all(|byte| *byte == value), "{name}");
    }
    assert!(slab.bytes() <= component.ram_bytes());
    assert!(
        slab.bytes().get() < file.len() as u64,
        "the rest was not read"
    );
}

#[tokio::test]
async fn a_file_that_is_not_the_scanned_one_is_refused_before_a_byte_is_read() {
    let folder = tempfile::tempdir().unwrap();
    put(
        folder.path(),
        "one.safetensors",
        safetensors(&[("t", &[10])], &[]),
    );
    let component = scanned(folder.path());
    put(
        folder.path(),
        "one.safetensors",
        safetensors(&[("t", &[11])], &[]),
    );
    assert!(matches!(
        PreadReader.open(component.clone()).await.map(|_| ()),
        Err(ReadError::SourceChanged { .. })
    ));
    fs::remove_file(folder.path().join("one.safetensors")).unwrap();
    assert!(matches!(
        PreadReader.open(component).await.map(|_| ()),
        Err(ReadError::Open { .. })
    ));
}
