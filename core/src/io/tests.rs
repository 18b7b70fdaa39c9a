//! What every reader does, whatever the way: each test runs them all.

use std::fs;
use std::path::Path;

use super::*;
use crate::catalog::test_utils::{put, safetensors};
use crate::catalog::{ScanOptions, scan};
use crate::config::{LoadConfig, ReaderKind};
use crate::memory::{Arena, ArenaOptions, Slab};

/// The one component of the one model below `root`.
fn scanned(root: &Path) -> Arc<Component> {
    let report = scan(&ScanOptions::new(vec![root.to_owned()]), None, &|_| {});
    let model = report.catalogue.models().next().cloned().unwrap();
    assert_eq!(model.error, None);
    assert_eq!(model.components.len(), 1);
    model.components[0].clone()
}

/// All readers that this machine has.
fn readers() -> Vec<Arc<dyn Reader>> {
    let kinds = [
        ReaderKind::Auto,
        ReaderKind::IoUring,
        ReaderKind::Pread,
        ReaderKind::Buffered,
    ];
    let mut readers: Vec<Arc<dyn Reader>> = vec![Arc::new(PreadReader)];
    for reader in kinds {
        let config = LoadConfig {
            reader,
            piece: Bytes::kib(64),
            in_flight: Bytes::kib(256),
            ..LoadConfig::default()
        };
        match DiskReader::start(&config) {
            Ok(reader) => readers.push(Arc::new(reader)),
            Err(StartReaderError::NoRing { source }) => {
                eprintln!("SKIPPED: io_uring is refused here: {source}");
            }
            Err(error) => panic!("{error}"),
        }
    }
    readers
}

/// Takes a component's files out of the page cache, where the file system lets go of them.
fn drop_cached(component: &Component) {
    for source in &component.files {
        drop_from_cache(&fs::File::open(&source.path).unwrap()).unwrap();
    }
}

async fn read_all(
    reader: &dyn Reader,
    component: &Arc<Component>,
    piece: u64,
) -> Result<(Arc<Slab>, Arc<TensorTable>), ReadError> {
    let mut open = reader.open(component.clone()).await?;
    let table = open.table().clone();
    let mut writer = Slab::create("test", open.image_bytes()).unwrap();
    while writer.filled() < open.image_bytes() {
        let before = writer.filled();
        (open, writer) = open.read(writer, Bytes(piece)).await?;
        assert!(writer.filled() > before, "a read that reads nothing");
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
    for reader in readers() {
        gguf_by(&*reader, &component).await;
    }
}

async fn gguf_by(reader: &dyn Reader, component: &Arc<Component>) {
    let (slab, table) = read_all(reader, component, 100).await.unwrap();
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
    for (reader, piece) in readers()
        .iter()
        .flat_map(|reader| [1, 100, 4096, 5000, 1 << 20].map(|piece| (reader, piece)))
    {
        drop_cached(&component);
        let (slab, table) = read_all(&**reader, &component, piece).await.unwrap();
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
    for reader in readers() {
        part_by(&*reader, &component, file.len()).await;
    }
}

async fn part_by(reader: &dyn Reader, component: &Arc<Component>, file_len: usize) {
    drop_cached(component);
    let (slab, table) = read_all(reader, component, 4096).await.unwrap();
    assert_eq!(table.len(), 2);
    for (name, value) in [("a.weight", 0), ("c.weight", 2)] {
        let entry = table.get(name).unwrap();
        let bytes = &slab.filled()[entry.offset as usize..(entry.offset + entry.bytes) as usize];
        assert_eq!(bytes.len(), 10_000);
        assert!(bytes.iter().all(|byte| *byte == value), "{name}");
    }
    assert!(slab.bytes() <= component.ram_bytes());
    assert!(
        slab.bytes().get() < file_len as u64,
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
    for reader in readers() {
        assert!(matches!(
            reader.open(component.clone()).await.map(|_| ()),
            Err(ReadError::SourceChanged { .. })
        ));
    }
    fs::remove_file(folder.path().join("one.safetensors")).unwrap();
    for reader in readers() {
        assert!(matches!(
            reader.open(component.clone()).await.map(|_| ()),
            Err(ReadError::Open { .. })
        ));
    }
}

/// Writes a safetensors file of this many bytes of data that differ from place to place; gives the file.
fn noise(root: &Path, name: &str, bytes: usize) -> Vec<u8> {
    let mut file = safetensors(&[("t", &[bytes / 2])], &[]);
    let data = file.len() - bytes;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for byte in &mut file[data..] {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state as u8;
    }
    put(root, name, &file);
    file
}

#[tokio::test]
async fn the_slab_is_the_file_cached_or_not_on_fresh_memory_or_used() {
    let folder = tempfile::tempdir().unwrap();
    // No multiple of anything.
    let file = noise(folder.path(), "one.safetensors", 3_000_002);
    let component = scanned(folder.path());
    for reader in readers() {
        let arena = Arena::new(ArenaOptions::default());
        for cached in [true, false, false] {
            if !cached {
                drop_cached(&component);
            }
            let mut open = reader.open(component.clone()).await.unwrap();
            let image = open.image_bytes();
            let mut writer = arena.slab("test", image).unwrap();
            while writer.filled() < image {
                (open, writer) = open.read(writer, Bytes::kib(64)).await.unwrap();
                let filled = writer.slab().filled();
                let there = filled.len().min(file.len());
                assert!(filled[..there] == file[..there], "{reader:?}");
            }
            let slab = writer.seal().unwrap();
            assert!(slab.filled()[file.len()..].iter().all(|byte| *byte == 0));
        }
        let view = arena.view();
        assert_eq!((view.fresh, view.reused), (1, 2));
    }
}

#[tokio::test]
async fn a_file_that_shrinks_or_changes_while_it_is_read_is_no_mixture() {
    for reader in readers() {
        for shrink in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            // Far more than waits in the queue, so that the first read cannot have taken all of it.
            let file = noise(folder.path(), "one.safetensors", 16 << 20);
            let component = scanned(folder.path());
            drop_cached(&component);
            let open = reader.open(component.clone()).await.unwrap();
            let writer = Slab::create("test", open.image_bytes()).unwrap();
            let slab = writer.slab().clone();
            let (mut open, mut writer) = open.read(writer, Bytes::kib(64)).await.unwrap();
            let path = folder.path().join("one.safetensors");
            let changed = fs::OpenOptions::new().write(true).open(&path).unwrap();
            if shrink {
                changed.set_len(100_000).unwrap();
            } else {
                std::os::unix::fs::FileExt::write_all_at(&changed, &[7; 4096], 15_000_000).unwrap();
            }
            // The kernel's clock for files ticks in milliseconds, and this test may be quicker.
            let later = std::time::SystemTime::now() + std::time::Duration::from_secs(1);
            changed.set_modified(later).unwrap();
            let error = loop {
                match open.read(writer, Bytes::kib(64)).await {
                    Ok(on) => (open, writer) = on,
                    Err(error) => break error,
                }
                assert!(
                    writer.filled() < writer.slab().bytes(),
                    "{reader:?}: all of it came"
                );
            };
            let told = match &error {
                ReadError::Truncated { path: of, .. } => shrink && *of == path,
                ReadError::SourceChanged { path: of, .. } => *of == path,
                _ => false,
            };
            assert!(told, "{reader:?}: {error}");
            assert!(slab.filled().len() < file.len());
        }
    }
}

#[tokio::test]
async fn a_read_that_is_stopped_leaves_the_memory_alone() {
    let folder = tempfile::tempdir().unwrap();
    noise(folder.path(), "one.safetensors", 4 << 20);
    let component = scanned(folder.path());
    for reader in readers() {
        drop_cached(&component);
        let open = reader.open(component.clone()).await.unwrap();
        let writer = Slab::create("test", open.image_bytes()).unwrap();
        let slab = writer.slab().clone();
        let (open, writer) = open.read(writer, Bytes::kib(64)).await.unwrap();
        open.stop(writer).await;
        assert_eq!(
            Arc::strong_count(&slab),
            1,
            "{reader:?}: somebody writes still"
        );
        // And dropped without a word, it does no harm either.
        let open = reader.open(component.clone()).await.unwrap();
        let writer = Slab::create("test", open.image_bytes()).unwrap();
        drop(open.read(writer, Bytes::kib(64)).await.unwrap());
    }
}

#[tokio::test]
async fn a_component_in_halves_of_a_ring_is_the_file_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let file = noise(folder.path(), "one.safetensors", 1_000_000);
    let component = scanned(folder.path());
    for reader in readers() {
        drop_cached(&component);
        let mut open = reader.open(component.clone()).await.unwrap();
        let image = open.image_bytes().get();
        let mut half = Slab::create("half", Bytes::kib(128)).unwrap();
        let mut seen = Vec::new();
        while (seen.len() as u64) < image {
            let wanted = (image - seen.len() as u64).min(half.slab().bytes().get());
            while half.filled().get() < wanted {
                (open, half) = open.read(half, Bytes::kib(64)).await.unwrap();
            }
            seen.extend_from_slice(half.slab().filled());
            half = half.rewind().unwrap();
        }
        assert!(seen[..file.len()] == file, "{reader:?}");
    }
}

#[tokio::test]
async fn the_reader_may_go_before_what_it_opened() {
    let folder = tempfile::tempdir().unwrap();
    noise(folder.path(), "one.safetensors", 1 << 20);
    let component = scanned(folder.path());
    for reader in readers() {
        let mut open = reader.open(component.clone()).await.unwrap();
        drop(reader);
        let image = open.image_bytes();
        let mut writer = Slab::create("test", image).unwrap();
        while writer.filled() < image {
            (open, writer) = open.read(writer, Bytes::kib(64)).await.unwrap();
        }
    }
}
