//! The catalogue follows the folders.

use std::time::Duration;

use hotset::{ActorName, Bytes, ComponentSet};

use crate::library::{Library, Rig, assert_tensors, outcome, until};

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
