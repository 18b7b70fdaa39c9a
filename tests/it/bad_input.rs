//! Broken, lying and vanishing files: each is an entry with its error or a refused load, and the rest goes on.

use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use hotset::core::io::ReadError;
use hotset::core::memory::FlightFailure;
use hotset::{Bytes, ComponentSet, LoadError};
use serde_json::json;

use crate::library::{Library, Rig, assert_tensors, outcome, until, write_json, write_weights};

fn raw(path: &Path, header: &str, data: usize) {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + data, 7);
    std::fs::write(path, file).unwrap();
}

fn tensor(dtype: &str, start: u64, end: u64) -> String {
    let n = (end - start) / 2;
    format!(r#"{{"dtype":"{dtype}","shape":[{n}],"data_offsets":[{start},{end}]}}"#)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_broken_file_is_told_and_the_rest_loads() {
    let library = Library::new();
    let good = library.single("good", 1, 100);
    let at = |name: &str| library.path(&format!("{name}.safetensors"));
    library.single("truncated", 2, 100);
    let file = std::fs::File::options()
        .write(true)
        .open(at("truncated"))
        .unwrap();
    file.set_len(50_000).unwrap();
    std::fs::write(at("long-header"), u64::MAX.to_le_bytes()).unwrap();
    std::fs::write(at("short"), b"abc").unwrap();
    std::fs::write(at("empty"), b"").unwrap();
    let (a, b) = (tensor("F16", 0, 8), tensor("F16", 4, 12));
    raw(&at("overlapping"), &format!(r#"{{"a":{a},"b":{b}}}"#), 12);
    raw(&at("duplicate"), &format!(r#"{{"a":{a},"a":{a}}}"#), 8);
    raw(
        &at("dtype"),
        &format!(r#"{{"a":{}}}"#, tensor("F12", 0, 8)),
        8,
    );
    raw(&at("json"), "{nonsense", 8);
    raw(&at("deep"), &"[".repeat(100_000), 8);
    let shards = library.path("sharded");
    write_weights(&shards.join("model-00001-of-00002.safetensors"), 3, 1, 1000);
    write_json(
        &shards.join("model.safetensors.index.json"),
        &json!({"metadata": {}, "weight_map": {
            "block.0.weight": "model-00001-of-00002.safetensors",
            "x": "model-00002-of-00002.safetensors",
        }}),
    );
    write_json(&shards.join("config.json"), &json!({"model_type": "llama"}));
    let escaping = library.path("escaping");
    write_json(
        &escaping.join("model.safetensors.index.json"),
        &json!({"weight_map": {"x": "../good.safetensors"}}),
    );
    write_json(
        &escaping.join("config.json"),
        &json!({"model_type": "llama"}),
    );
    let odd = std::ffi::OsString::from_vec(b"odd-\xff\xfe.safetensors".to_vec());
    let odd_tensors = write_weights(&library.dir.path().join(odd), 4, 2, 1000);
    std::os::unix::fs::symlink(library.dir.path(), library.path("loop")).unwrap();
    std::os::unix::fs::symlink("/nonexistent", at("dangling")).unwrap();

    let rig = Rig::start(library.config(Bytes::mib(4))).await;
    let catalogue = rig.hotset.catalogue();
    let error_of = |name: &str| {
        let model = catalogue
            .find(name)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let error = model.error.clone();
        error.unwrap_or_else(|| panic!("{name} has no error"))
    };
    for (name, says) in [
        ("truncated", "truncated"),
        ("long-header", "header"),
        ("short", "3 bytes"),
        ("empty", "0 bytes"),
        ("overlapping", "b"),
        ("duplicate", "a"),
        ("dtype", "F12"),
        ("json", "JSON"),
        ("deep", "JSON"),
        ("sharded", "model-00002-of-00002.safetensors"),
        ("escaping", "../good.safetensors"),
    ] {
        let error = error_of(name);
        assert!(error.contains(says), "{name}: {error}");
    }
    assert_eq!(
        catalogue
            .models()
            .filter(|m| *m.path == *at("good"))
            .count(),
        1,
        "the loop is walked once"
    );
    let odd = catalogue
        .models()
        .find(|m| m.name.as_str().starts_with("odd-"))
        .unwrap();

    let session = rig.hotset.session("test").await.unwrap();
    let leases = outcome(session.load(ComponentSet::new(["good"])))
        .await
        .unwrap();
    assert_tensors(&leases[0], &good).await;
    drop(leases);
    let leases = outcome(session.load(ComponentSet::new([odd.name.as_str()])))
        .await
        .unwrap();
    assert_tensors(&leases[0], &odd_tensors).await;
    let refused = outcome(session.load(ComponentSet::new(["truncated"])))
        .await
        .unwrap_err();
    assert!(matches!(refused, LoadError::Resolve(_)), "{refused}");
    drop(leases);
    rig.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_root_is_a_problem_and_not_the_end() {
    let library = Library::new();
    library.single("good", 1, 100);
    let mut config = library.config(Bytes::mib(4));
    config.catalog.roots.push("/nonexistent/models".into());
    let rig = Rig::start(config).await;
    assert_eq!(rig.hotset.catalogue().len(), 1);
    let problems = rig.hotset.scan().await.unwrap().problems;
    assert!(
        problems.iter().any(|p| p.contains("/nonexistent/models")),
        "{problems:?}"
    );
}

fn source_changed(error: &LoadError) -> bool {
    matches!(
        error,
        LoadError::Component { failure: FlightFailure::Read(read), .. }
            if matches!(**read, ReadError::SourceChanged { .. })
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_between_scan_and_load_is_not_served() {
    let library = Library::new();
    library.single("a", 1, 100);
    let rig = Rig::start(library.config(Bytes::mib(4))).await;
    let tensors = library.single("a", 2, 120);
    let session = rig.hotset.session("test").await.unwrap();
    let error = outcome(session.load(ComponentSet::new(["a"])))
        .await
        .unwrap_err();
    assert!(source_changed(&error), "{error}");
    rig.hotset.scan().await.unwrap();
    let leases = outcome(session.load(ComponentSet::new(["a"])))
        .await
        .unwrap();
    assert_tensors(&leases[0], &tensors).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_during_the_load_is_not_served() {
    // Truncated, overwritten in place, and grown, after the first pieces were read.
    let deeds: [fn(&Path); 3] = [
        |path| {
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.set_len(100_000).unwrap();
        },
        |path| {
            use std::os::unix::fs::FileExt;
            std::thread::sleep(std::time::Duration::from_millis(20));
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.write_all_at(b"other bytes", 400_000).unwrap();
        },
        |path| {
            use std::io::Write;
            let mut file = std::fs::File::options().append(true).open(path).unwrap();
            file.write_all(b"more").unwrap();
        },
    ];
    for target in [hotset::Target::Ram, hotset::Target::AnyGpu] {
        for change in deeds {
            let library = Library::new();
            library.single("a", 1, 500);
            let rig = Rig::start(library.config_with_gpu(Bytes::mib(4), Bytes::mib(4))).await;
            rig.reader.close();
            let session = rig.hotset.session("test").await.unwrap();
            let loading = session.load(ComponentSet::new(["a"]).on(target));
            rig.reader.pass(2);
            until("two pieces", async || {
                loading.progress().is_some_and(|p| p.done >= Bytes::kib(60))
            })
            .await;
            change(&library.path("a.safetensors"));
            rig.reader.open_wide();
            let error = outcome(loading).await.unwrap_err();
            let truncated = matches!(
                &error,
                LoadError::Component { failure: FlightFailure::Read(read), .. }
                    if matches!(**read, ReadError::Truncated { .. })
            );
            assert!(source_changed(&error) || truncated, "{error}");
            rig.assert_empty().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_replaced_by_rename_during_the_load_is_served_whole() {
    // The open descriptor still leads to the old file, which nobody changes any more.
    let library = Library::new();
    let old = library.single("a", 1, 500);
    let rig = Rig::start(library.config(Bytes::mib(4))).await;
    rig.reader.close();
    let session = rig.hotset.session("test").await.unwrap();
    let loading = session.load(ComponentSet::new(["a"]));
    rig.reader.pass(2);
    until("two pieces", async || {
        loading.progress().is_some_and(|p| p.done >= Bytes::kib(60))
    })
    .await;
    library.single("a", 2, 500);
    rig.reader.open_wide();
    match outcome(loading).await {
        // Whole and old, or refused: never a mixture.
        Ok(leases) => assert_tensors(&leases[0], &old).await,
        Err(error) => assert!(source_changed(&error), "{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_gone_or_a_fifo_is_told() {
    let library = Library::new();
    library.single("gone", 1, 100);
    library.single("fifo", 2, 100);
    let rig = Rig::start(library.config(Bytes::mib(4))).await;
    std::fs::remove_file(library.path("gone.safetensors")).unwrap();
    std::fs::remove_file(library.path("fifo.safetensors")).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(library.path("fifo.safetensors"))
        .status();
    assert!(made.unwrap().success());
    let session = rig.hotset.session("test").await.unwrap();
    let gone = outcome(session.load(ComponentSet::new(["gone"])))
        .await
        .unwrap_err();
    assert!(gone.to_string().contains("gone.safetensors"), "{gone}");
    let fifo = outcome(session.load(ComponentSet::new(["fifo"])))
        .await
        .unwrap_err();
    assert!(fifo.to_string().contains("not a regular file"), "{fifo}");
    rig.assert_empty().await;
}
