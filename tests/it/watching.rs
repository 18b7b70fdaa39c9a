//! The catalogue follows the folders.

use std::time::Duration;

use hotset::core::catalog::Presence;
use hotset::core::catalog::store::Store;
use hotset::{ActorName, Bytes, Change, ComponentSet, Hotset};

use crate::library::{Library, Rig, assert_tensors, outcome, soon, until};

#[tokio::test(flavor = "multi_thread")]
async fn new_changed_moved_and_deleted_files_are_seen() {
    let library = Library::new();
    library.single("first", 1, 100);
    let mut config = library.config(Bytes::mib(4));
    config.catalog.watch = true;
    config.catalog.settle = Duration::from_millis(50);
    let rig = Rig::start(config).await;
    assert!(rig.hotset.status().await.catalogue.watching);
    let has = async |name: &str| rig.hotset.catalogue().find(name).is_ok();

    library.single("second", 2, 100);
    until("the new file", async || has("second").await).await;
    let tensors = library.pipeline("folder/base", 3, 50);
    until("the new pipeline", async || {
        let catalogue = rig.hotset.catalogue();
        catalogue
            .find("folder/base")
            .is_ok_and(|m| m.components.len() == 4 && m.error.is_none())
    })
    .await;
    std::fs::rename(library.path("folder"), library.path("moved")).unwrap();
    until("the move", async || {
        has("moved/base").await && !has("folder/base").await
    })
    .await;

    let session = rig.hotset.session("test").await.unwrap();
    let leases = outcome(session.load(ComponentSet::new(["moved/base"])))
        .await
        .unwrap();
    std::fs::remove_dir_all(library.path("moved")).unwrap();
    until("the removal", async || {
        let catalogue = rig.hotset.catalogue();
        catalogue.find("moved/base").map_or(true, |m| {
            m.presence != hotset::core::catalog::Presence::Present
        })
    })
    .await;
    // A model may go, its leases stay.
    for lease in &leases {
        assert_tensors(lease, &tensors[&*lease.component().id.component]).await;
    }

    let changed = library.single("second", 9, 130);
    until("the change to be loadable", async || {
        match outcome(session.load(ComponentSet::new(["second"]))).await {
            Ok(leases) => {
                assert_tensors(&leases[0], &changed).await;
                true
            }
            Err(_) => false,
        }
    })
    .await;

    // Discovery dies: the last snapshot stays published, and its successor watches on.
    let before = rig.hotset.catalogue().len();
    assert!(rig.hotset.kill(ActorName::Discovery));
    assert_eq!(rig.hotset.catalogue().len(), before);
    library.single("third", 4, 100);
    until("the successor to see it", async || has("third").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn equal_components_are_found_and_share_one_residency() {
    let library = Library::new();
    let tensors = library.single("one", 1, 300);
    std::fs::copy(
        library.path("one.safetensors"),
        library.path("copy.safetensors"),
    )
    .unwrap();
    library.single("other", 2, 300);
    let database = tempfile::tempdir().unwrap();
    let mut config = library.config(Bytes::mib(4));
    config.catalog.database = Some(database.path().join("catalogue.db"));
    let rig = Rig::start(config.clone()).await;
    let session = rig.hotset.session("test").await.unwrap();
    let held = outcome(session.load(ComponentSet::new(["one"])))
        .await
        .unwrap();
    let content = |rig: &Rig, name: &str| {
        let catalogue = rig.hotset.catalogue();
        catalogue.find(name).unwrap().components[0].content_id
    };
    until("the copy to be known", async || {
        content(&rig, "one") == content(&rig, "copy")
    })
    .await;
    assert_ne!(content(&rig, "one"), content(&rig, "other"));
    // What was leased before the digest was known is what the copy gets.
    let leases = outcome(session.load(ComponentSet::new(["copy"])))
        .await
        .unwrap();
    assert_tensors(&leases[0], &tensors).await;
    assert_eq!(rig.reader.opened(), 1, "the copy was not read");
    assert_eq!(rig.hotset.ledger().views()[0].residencies.len(), 1);
    drop((held, leases));
    rig.assert_empty().await;
    let named = content(&rig, "one");
    rig.hotset.drain().await;

    // Known at once after a restart, and no header is read.
    let rig = Rig::start(config).await;
    assert_eq!(content(&rig, "copy"), named);
    let scan = rig.hotset.status().await.catalogue.last_scan.unwrap();
    assert_eq!((scan.models, scan.inspected), (3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_told_and_a_removed_model_is_shown_while_it_is_leased() {
    let library = Library::new();
    library.single("stays", 1, 100);
    library.single("goes", 2, 100);
    let rig = Rig::start(library.config(Bytes::mib(4))).await;
    let mut changes = rig.hotset.subscribe();
    let session = rig.hotset.session("test").await.unwrap();
    let leases = outcome(session.load(ComponentSet::new(["goes"])))
        .await
        .unwrap();
    let (path, away) = (library.path("goes.safetensors"), library.path("away"));
    std::fs::rename(&path, &away).unwrap();
    library.single("new", 3, 100);
    rig.hotset.scan().await.unwrap();
    let told = crate::library::soon("the change", changes.recv())
        .await
        .unwrap();
    let names: Vec<String> = told
        .iter()
        .map(|change| match change {
            Change::Added(model) => format!("+{}", model.name),
            Change::Changed(model) => format!("~{}", model.name),
            Change::Removed(model) => format!("-{}", model.name),
            _ => String::new(),
        })
        .collect();
    assert_eq!(names, ["~goes", "+new"]);
    let presence = || {
        rig.hotset
            .catalogue()
            .find("goes")
            .map(|model| model.presence)
    };
    assert_eq!(presence(), Ok(Presence::Gone));
    let refused = outcome(session.load(ComponentSet::new(["goes"])))
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("removed"), "{refused}");
    // Back as it was, it is there again.
    std::fs::rename(&away, &path).unwrap();
    rig.hotset.scan().await.unwrap();
    assert_eq!(presence(), Ok(Presence::Present));
    std::fs::remove_file(&path).unwrap();
    drop(leases);
    rig.hotset.scan().await.unwrap();
    assert!(presence().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_being_written_is_listed_once_it_is_whole() {
    let library = Library::new();
    library.single("elsewhere", 1, 100);
    let whole = std::fs::read(library.path("elsewhere.safetensors")).unwrap();
    let mut config = library.config(Bytes::mib(4));
    config.catalog.watch = true;
    config.catalog.settle = Duration::from_millis(20);
    let rig = Rig::start(config).await;
    let path = library.path("growing.safetensors");
    let appeared = || rig.hotset.catalogue().find("growing").is_ok();
    for length in [4, 60, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        // It has been looked at, and left out, once the scan's summary tells of it.
        until("the part to be looked at", async || {
            assert!(!appeared(), "{length} of {} bytes", whole.len());
            let scan = rig.hotset.status().await.catalogue.last_scan;
            scan.is_some_and(|scan| scan.problems.iter().any(|p| p.contains("not whole yet")))
        })
        .await;
        // Another file beside it makes a new summary, and still does not show it.
        library.single(&format!("beside-{length}"), 2, 50);
        until("the neighbour", async || {
            rig.hotset
                .catalogue()
                .find(&format!("beside-{length}"))
                .is_ok()
        })
        .await;
        assert!(!appeared());
    }
    std::fs::write(&path, &whole).unwrap();
    until("the whole file", async || appeared()).await;
    let catalogue = rig.hotset.catalogue();
    let found = catalogue.find("growing").unwrap();
    assert_eq!((found.presence, &found.error), (Presence::Present, &None));
}

/// The index is kept by a Discovery that was started again as by the first, and made anew where it was spoilt meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn the_index_is_kept_after_a_restart_and_when_it_was_spoilt() {
    let library = Library::new();
    library.single("a", 1, 100);
    let dir = tempfile::tempdir().unwrap();
    let index = dir.path().join("catalogue.db");
    let mut config = library.config(Bytes::mib(8));
    config.catalog.database = Some(index.clone());
    let hotset = Hotset::builder().config(config).start().await.unwrap();
    let kept = || Store::open(&index).unwrap().load().unwrap().len();
    assert_eq!(kept(), 1);

    assert!(hotset.kill(ActorName::Discovery));
    library.single("b", 2, 100);
    soon("a scan", hotset.scan()).await.unwrap();
    assert_eq!(kept(), 2, "by a Discovery that was started again");

    std::fs::write(&index, [0xee; 8192]).unwrap();
    let _ = std::fs::write(index.with_extension("db-wal"), [0xee; 8192]);
    assert!(hotset.kill(ActorName::Discovery));
    library.single("c", 3, 100);
    soon("a scan", hotset.scan()).await.unwrap();
    assert_eq!(kept(), 3, "a new one in the place of a corrupt one");
}

/// Who knows of changes tells of them, and need not know of which.
#[tokio::test(flavor = "multi_thread")]
async fn changes_that_nobody_watches_can_be_told() {
    let library = Library::new();
    library.single("a", 1, 100);
    let hotset = Hotset::builder()
        .config(library.config(Bytes::mib(8)))
        .start()
        .await
        .unwrap();
    for (name, told) in [("b", true), ("c", false)] {
        library.single(name, 2, 100);
        let path = library.path(&format!("{name}.safetensors"));
        assert!(hotset.files_changed(told.then(|| vec![path])));
        until("it to be seen", async || {
            hotset.catalogue().find(name).is_ok()
        })
        .await;
    }
}
