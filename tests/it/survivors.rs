//! Clients that outlive a server: what they still map is counted by the next one, and taken over where it can show what it holds.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hotset::bridge::Bridge;
use hotset::bridge::wire::{Adopted, MappedMemory, ServerMessage};
use hotset::client::{Client, ClientError, LoadOptions, RemoteLease};
use hotset::core::memory::Slab;
use hotset::{Bytes, Hotset, Tier};
use tempfile::TempDir;
use tokio::sync::broadcast::Receiver;

use crate::library::{GatedReader, Library, Rig, Tensors, soon, until};

/// A server in this process. Its memory is gone with it, so that for its clients it is as if its process had ended.
struct Server {
    hotset: Arc<Hotset>,
    bridge: Bridge,
    reader: Arc<GatedReader>,
}

impl Server {
    async fn start(library: &Library, place: &TempDir, budget: Bytes) -> Self {
        let mut config = library.config(budget);
        config.bridge.socket = Some(socket(place));
        let Rig { hotset, reader, .. } = Rig::start(config).await;
        let hotset = Arc::new(hotset);
        let bridge = Bridge::open(hotset.clone()).await.unwrap();
        Self {
            hotset,
            bridge,
            reader,
        }
    }

    fn committed(&self) -> Bytes {
        self.hotset.ledger().view(Tier::Ram).unwrap().committed
    }

    fn leases(&self) -> usize {
        self.hotset.ledger().leases().values().sum()
    }

    async fn end(self) {
        soon("close", self.bridge.close()).await;
        let hotset = Arc::into_inner(self.hotset).expect("the bridge keeps nothing");
        soon("drain", hotset.drain()).await;
    }
}

fn socket(place: &TempDir) -> PathBuf {
    place.path().join("run/hotset.sock")
}

async fn connect(place: &TempDir, label: &str) -> Client {
    Client::connect_to(&socket(place), label).await.unwrap()
}

fn assert_bytes(lease: &RemoteLease, expected: &Tensors) {
    for tensor in lease.tensors().unwrap() {
        assert!(tensor.bytes == expected[tensor.name], "{}", tensor.name);
    }
}

fn address(lease: &RemoteLease) -> usize {
    lease.mapping().unwrap().as_slice().as_ptr() as usize
}

async fn adopted(events: &mut Receiver<ServerMessage>) -> Adopted {
    loop {
        if let ServerMessage::Adopted(adopted) = soon("the outcome", events.recv()).await.unwrap() {
            return adopted;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_server_takes_over_what_its_clients_kept_without_reading_it() {
    let library = Library::new();
    let tensors = library.single("one", 1, 900);
    let place = tempfile::tempdir().unwrap();
    let first = Server::start(&library, &place, Bytes::mib(4)).await;
    let (one, two) = (connect(&place, "one").await, connect(&place, "two").await);
    let load = LoadOptions::new(["one"]).on("ram");
    let (kept, other) = (
        one.load(&load).await.unwrap(),
        two.load(&load).await.unwrap(),
    );
    let bytes = first.committed();
    first.end().await;

    // The loss is told once; from then on each request looks for the next server.
    let (mut heard, mut heard_too) = (one.events(), two.events());
    for client in [&one, &two] {
        let lost = client.closed().await;
        assert!(matches!(lost, ClientError::Lost { .. }), "{lost}");
        let gone = client.ping().await.unwrap_err();
        assert!(matches!(gone, ClientError::Connect { .. }), "{gone}");
    }
    assert_bytes(&kept[0], &tensors);

    let next = Server::start(&library, &place, Bytes::mib(4)).await;
    one.reconnect(Duration::from_secs(60)).await.unwrap();
    two.reconnect(Duration::from_secs(60)).await.unwrap();
    for events in [&mut heard, &mut heard_too] {
        let adopted = adopted(events).await;
        assert!(adopted.resident, "{adopted:?}");
        assert_eq!(adopted.component, kept[0].leased().component);
    }
    // Both map the same memory, which counts once, and holds a lease for each of them.
    assert_eq!((next.committed(), next.leases()), (bytes, 2));
    let counters = next.hotset.status().await.counters;
    assert_eq!((counters.adoptions, counters.reads), (1, 0));
    let why = one.why("one", 10).await.unwrap();
    assert_eq!(why[0].0["act"], "adopt");

    // Loading it again gives the same bytes at the same place; a third client gets them too, and nobody has read a thing.
    let again = one.load(&load).await.unwrap();
    assert_eq!(address(&again[0]), address(&kept[0]));
    let three = connect(&place, "three").await;
    let fresh = three.load(&load).await.unwrap();
    assert_bytes(&fresh[0], &tensors);
    assert_eq!((next.reader.opened(), next.committed()), (0, bytes));

    drop((kept, other, again, fresh));
    until("the leases to end", async || next.leases() == 0).await;
    // It is a cache now, as anything that was read.
    next.hotset.optimise_cache(Tier::Ram, 0.0).await.unwrap();
    until("the bytes", async || next.committed() == Bytes::ZERO).await;
    let reloaded = one.load(&load).await.unwrap();
    assert_bytes(&reloaded[0], &tensors);
    assert_eq!(next.reader.opened(), 1);
    drop(reloaded);
    next.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_lost_alone_comes_back_to_its_own_memory() {
    let library = Library::new();
    library.single("one", 1, 900);
    let place = tempfile::tempdir().unwrap();
    let server = Server::start(&library, &place, Bytes::mib(4)).await;
    let client = connect(&place, "worker").await;
    let mut events = client.events();
    let load = LoadOptions::new(["one"]).on("ram");
    let kept = client.load(&load).await.unwrap();
    let bytes = server.committed();
    // The bridge closes and opens again; the system goes on.
    soon("close", server.bridge.close()).await;
    client.closed().await;
    until("the leases to end", async || {
        server.hotset.ledger().leases().is_empty()
    })
    .await;
    let bridge = Bridge::open(server.hotset.clone()).await.unwrap();
    client.reconnect(Duration::from_secs(60)).await.unwrap();
    assert!(adopted(&mut events).await.resident);
    let committed = || server.hotset.ledger().view(Tier::Ram).unwrap().committed;
    assert_eq!(committed(), bytes, "it was in the books all the time");
    let again = client.load(&load).await.unwrap();
    assert_eq!(address(&again[0]), address(&kept[0]));
    drop((again, kept, client));
    soon("close", bridge.close()).await;
    let hotset = Arc::into_inner(server.hotset).unwrap();
    soon("drain", hotset.drain()).await;
}

/// Memory as a server would have left it, with these bytes.
fn memory(bytes: &[u8]) -> Arc<Slab> {
    let mut writer = Slab::create("forged", Bytes(bytes.len() as u64)).unwrap();
    writer.spare().copy_from_slice(bytes);
    writer.advance(bytes.len());
    writer.seal().unwrap()
}

async fn tell(client: &Client, component: &str, descriptor: OwnedFd) -> u64 {
    let memory = MappedMemory {
        component: component.into(),
        content: String::new(),
        tier: "ram".into(),
        bytes: 1,
    };
    let counted = client.still_mapped(vec![memory], vec![descriptor]).await;
    counted.unwrap().mappings[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_offers_is_believed_of_nobody() {
    let library = Library::new();
    let tensors = library.single("one", 1, 900);
    let place = tempfile::tempdir().unwrap();
    let server = Server::start(&library, &place, Bytes::mib(16)).await;
    let (liar, honest) = (
        connect(&place, "liar").await,
        connect(&place, "honest").await,
    );
    let mut events = liar.events();
    let component = server
        .hotset
        .catalogue()
        .models()
        .next()
        .unwrap()
        .components[0]
        .id
        .to_string();
    let mut image = std::fs::read(library.path("one.safetensors")).unwrap();
    image.resize(image.len().next_multiple_of(4096), 0);

    // Bytes that nobody can change, but one of them is another one.
    let mut spoilt = image.clone();
    spoilt[image.len() / 2] ^= 1;
    let forged = memory(&spoilt);
    let descriptor = forged.read_only_descriptor().unwrap();
    let held = forged.held();
    drop(forged);
    let number = tell(&liar, &component, descriptor).await;
    // Whoever wants the component meanwhile waits, and then gets what the file has.
    let leases = soon("load", honest.load(&LoadOptions::new(["one"]).on("ram")))
        .await
        .unwrap();
    assert_bytes(&leases[0], &tensors);
    let outcome = adopted(&mut events).await;
    assert!(
        !outcome.resident && outcome.mapping == number,
        "{outcome:?}"
    );
    assert!(outcome.reason.unwrap().contains("other bytes"));
    // It is counted all the same, by what the kernel says of it, until it is let go.
    let own = leases[0].mapping().unwrap().as_slice().len() as u64;
    assert_eq!(server.committed(), Bytes(own + held.get()));
    let left = liar.unmapped(vec![number]).await.unwrap();
    assert_eq!((left.bytes, server.committed()), (0, Bytes(own)));
    drop(leases);
    until("the lease to end", async || server.leases() == 0).await;
    server.hotset.optimise_cache(Tier::Ram, 0.0).await.unwrap();
    until("the bytes", async || server.committed() == Bytes::ZERO).await;

    // Whoever has offered that keeps nobody waiting a second time.
    let right = memory(&image);
    let descriptor = right.read_only_descriptor().unwrap();
    drop(right);
    tell(&liar, &component, descriptor).await;
    let outcome = adopted(&mut events).await;
    assert!(outcome.reason.unwrap().contains("earlier offer"));
    assert_eq!(server.hotset.status().await.counters.adoptions, 0);

    // What is no memory of a server is refused, and the connection goes on.
    let file = std::fs::File::open("/dev/zero").unwrap().into();
    let named = MappedMemory {
        component,
        tier: "ram".into(),
        ..MappedMemory::default()
    };
    let error = liar.still_mapped(vec![named], vec![file]).await;
    assert_eq!(error.unwrap_err().code(), Some("malformed"));
    liar.ping().await.unwrap();
    drop((liar, honest));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_somebody_may_still_write_is_counted_and_no_more() {
    let library = Library::new();
    library.single("one", 1, 900);
    let place = tempfile::tempdir().unwrap();
    let server = Server::start(&library, &place, Bytes::mib(16)).await;
    let client = connect(&place, "liar").await;
    let mut events = client.events();
    let mut image = std::fs::read(library.path("one.safetensors")).unwrap();
    image.resize(image.len().next_multiple_of(4096), 0);
    let component = server
        .hotset
        .catalogue()
        .models()
        .next()
        .unwrap()
        .components[0]
        .id
        .to_string();
    // The right bytes, but this process has them mapped for writing.
    let alive = memory(&image);
    tell(&client, &component, alive.read_only_descriptor().unwrap()).await;
    let outcome = adopted(&mut events).await;
    assert!(!outcome.resident, "{outcome:?}");
    assert!(outcome.reason.unwrap().contains("may still write"));
    assert_eq!(server.committed(), alive.held());
    drop(client);
    until("the bytes", async || server.committed() == Bytes::ZERO).await;
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_counted_and_keeps_others_out_until_it_is_let_go() {
    let library = Library::new();
    library.single("one", 1, 900);
    library.single("two", 2, 900);
    let place = tempfile::tempdir().unwrap();
    let server = Server::start(&library, &place, Bytes::mib(1)).await;
    let client = connect(&place, "survivor").await;
    let large = memory(&vec![7; 3 << 20]);
    let number = tell(&client, "gone/model", large.read_only_descriptor().unwrap()).await;
    assert_eq!(server.committed(), large.held());
    let options = LoadOptions::new(["two"]).within(Duration::from_millis(50));
    let error = client.load(&options).await.unwrap_err();
    assert_eq!(error.code(), Some("timed-out"), "{error}");
    client.unmapped(vec![number]).await.unwrap();
    client.load(&LoadOptions::new(["two"])).await.unwrap();
    drop(client);
    server.end().await;
}
