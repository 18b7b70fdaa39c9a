//! Other processes' way in: the server's end against the Rust client, and against bare bytes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hotset::bridge::Bridge;
use hotset::bridge::frame::FrameBuffer;
use hotset::bridge::wire::{
    ClientMessage, Empty, Hello, List, Load, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, Release,
    ServerMessage, Set, Subscribe,
};
use hotset::client::{Client, ClientError, LoadOptions, RemoteEvent, RemoteLease};
use hotset::{Bytes, Config, Hotset};
use tempfile::TempDir;

use crate::library::{GatedReader, Library, Rig, Tensors, soon, until};

/// A system with its bridge open.
struct Served {
    hotset: Arc<Hotset>,
    bridge: Bridge,
    reader: Arc<GatedReader>,
    place: TempDir,
}

impl Served {
    async fn start(config: Config) -> Self {
        Self::start_at(config, tempfile::tempdir().unwrap()).await
    }

    /// With its socket where an earlier one was.
    async fn start_at(mut config: Config, place: TempDir) -> Self {
        config.bridge.socket = Some(place.path().join("run/hotset.sock"));
        let Rig { hotset, reader, .. } = Rig::start(config).await;
        let hotset = Arc::new(hotset);
        let bridge = Bridge::open(hotset.clone()).await.unwrap();
        Self {
            hotset,
            bridge,
            reader,
            place,
        }
    }

    fn socket(&self) -> PathBuf {
        self.place.path().join("run/hotset.sock")
    }

    async fn client(&self, label: &str) -> Client {
        Client::connect_to(&self.socket(), label).await.unwrap()
    }

    fn leases(&self) -> usize {
        self.hotset.ledger().leases().values().sum()
    }

    async fn no_leases(&self) {
        until("leases to end", async || self.leases() == 0).await;
    }

    async fn end(self) -> TempDir {
        soon("close", self.bridge.close()).await;
        let hotset = Arc::into_inner(self.hotset).expect("the bridge keeps nothing");
        soon("drain", hotset.drain()).await;
        self.place
    }
}

/// A client without the client library.
struct Raw {
    stream: UnixStream,
    frames: FrameBuffer,
    next: u64,
}

impl Raw {
    fn connect(served: &Served) -> Self {
        let stream = UnixStream::connect(served.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        Self {
            stream,
            frames: FrameBuffer::new(MAX_REPLY_BYTES),
            next: 0,
        }
    }

    fn hello(served: &Served, keep_alive_ms: u64) -> Self {
        let mut raw = Self::connect(served);
        raw.say(ClientMessage::Hello(Hello {
            versions: vec![7, 1],
            label: "raw".into(),
            keep_alive_ms,
            ..Hello::default()
        }));
        assert!(matches!(raw.hear(), Some((1, ServerMessage::Welcome(_)))));
        raw
    }

    fn say(&mut self, message: ClientMessage) -> u64 {
        self.next += 1;
        self.write(&message.encode(self.next).unwrap());
        self.next
    }

    fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next message; `None` at the end of the connection.
    fn hear(&mut self) -> Option<(u64, ServerMessage)> {
        loop {
            if let Some(frame) = self.frames.next_frame().unwrap() {
                return Some(ServerMessage::decode(frame).unwrap());
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(read) => self.frames.extend(&bytes[..read]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn error(&mut self) -> (u64, String) {
        match self.hear() {
            Some((id, ServerMessage::Error(error))) => (id, error.code),
            other => panic!("{other:?} is no error"),
        }
    }
}

/// Bare clients block, so they run beside the system.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    soon("the client", tokio::task::spawn_blocking(work))
        .await
        .unwrap()
}

fn assert_bytes(lease: &RemoteLease, expected: &Tensors) {
    let tensors = lease.tensors().unwrap();
    assert_eq!(tensors.len(), expected.len());
    for tensor in tensors {
        assert_eq!(tensor.dtype, "F16");
        assert!(tensor.bytes == expected[tensor.name], "{}", tensor.name);
        assert_eq!(tensor.shape, [tensor.bytes.len() as u64 / 2]);
    }
}

fn refused(error: &ClientError) -> &str {
    error.code().unwrap_or_else(|| panic!("{error}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_is_leased_mapped_and_given_back() {
    let library = Library::new();
    let tensors = library.pipeline("base", 1, 300);
    let served = Served::start(library.config(Bytes::mib(8))).await;
    let client = served.client("worker").await;
    assert_eq!(client.welcome().version, 1);
    let set = LoadOptions::new(["base"]).on("ram");
    let leases = soon("load", client.load(&set)).await.unwrap();
    assert_eq!(leases.len(), 4);
    for lease in &leases {
        let name = lease.leased().component.rsplit('/').next().unwrap();
        assert_bytes(lease, &tensors[name]);
    }
    // A second load of the same names memory and tables that this connection knows, with no new descriptor.
    let again = soon("load", client.load(&set)).await.unwrap();
    for (first, second) in leases.iter().zip(&again) {
        assert_ne!(first.leased().lease, second.leased().lease);
        assert_eq!(first.leased().memory, second.leased().memory);
        assert!(Arc::ptr_eq(
            first.mapping().unwrap(),
            second.mapping().unwrap()
        ));
    }
    assert_eq!(served.leases(), 8);
    let status = client.status().await.unwrap();
    let label = status["sessions"][0]["label"].as_str().unwrap();
    assert!(label.starts_with("worker (pid "), "{label}");
    drop(leases);
    until("the first leases to end", async || served.leases() == 4).await;
    drop(again);
    served.no_leases().await;
    // Let go and taken again: new numbers, the same bytes, nothing read twice.
    let leases = soon("load", client.load(&set)).await.unwrap();
    for lease in &leases {
        let name = lease.leased().component.rsplit('/').next().unwrap();
        assert_bytes(lease, &tensors[name]);
    }
    assert_eq!(served.reader.opened(), 4);
    // The mapping outlives lease, connection and server.
    let kept = leases[0].mapping().unwrap().clone();
    let copy = kept.as_slice().to_vec();
    drop((leases, client));
    served.no_leases().await;
    served.end().await;
    assert!(kept.as_slice() == copy);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_share_one_load_and_leases_end_with_their_connection() {
    let library = Library::new();
    let tensors = library.single("one", 1, 900);
    let served = Served::start(library.config(Bytes::mib(4))).await;
    let mut clients = Vec::new();
    for i in 0..16 {
        let client = served.client(&format!("worker {i}")).await;
        clients.push(tokio::spawn(async move {
            let leases = client.load(&LoadOptions::new(["one"])).await.unwrap();
            (client, leases)
        }));
    }
    let mut held = Vec::new();
    for client in clients {
        held.push(soon("load", client).await.unwrap());
    }
    assert_eq!(served.reader.opened(), 1, "single flight");
    assert_eq!(served.leases(), 16);
    for (_, leases) in &held {
        assert_bytes(&leases[0], &tensors);
    }
    let (client, leases) = held.pop().unwrap();
    drop((client, leases));
    until("one client's leases to end", async || served.leases() == 15).await;
    drop(held);
    served.no_leases().await;
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_tells_its_progress_and_can_be_cancelled() {
    let library = Library::new();
    library.single("one", 1, 512);
    let served = Served::start(library.config(Bytes::mib(4))).await;
    served.reader.close();
    let client = served.client("worker").await;
    let mut loading = client.loading(&LoadOptions::new(["one"])).unwrap();
    let first = soon("the plan", loading.next()).await.unwrap();
    assert!(matches!(first, RemoteEvent::Planned(plan) if plan["tier"] == "ram"));
    served.reader.pass(2);
    soon("progress", async {
        loop {
            match loading.next().await.unwrap() {
                RemoteEvent::Progress(now) if now.done > 0 => {
                    assert_eq!(now.components.len(), 1);
                    assert!(now.done < now.total);
                    break;
                }
                RemoteEvent::Progress(_) => {}
                other => panic!("{other:?}"),
            }
        }
    })
    .await;
    loading.cancel();
    let error = soon("the end", async {
        loop {
            match loading.next().await {
                Ok(RemoteEvent::Progress(_)) => {}
                Ok(other) => panic!("{other:?}"),
                Err(error) => break error,
            }
        }
    })
    .await;
    assert_eq!(refused(&error), "cancelled");
    // A loading that is dropped is cancelled as well.
    let loading = client.loading(&LoadOptions::new(["one"])).unwrap();
    drop(loading);
    served.reader.open_wide();
    served.no_leases().await;
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalogue_is_listed_shown_planned_and_followed() {
    let library = Library::new();
    library.pipeline("base", 1, 64);
    library.single("loras/ink", 2, 64);
    let served = Served::start(library.config(Bytes::mib(4))).await;
    let client = served.client("worker").await;
    let all = client.list(List::default()).await.unwrap();
    assert_eq!((all.total, all.models.len()), (2, 2));
    let one = List {
        query: "ink".into(),
        ..List::default()
    };
    let found = client.list(one).await.unwrap();
    assert_eq!(found.models[0]["name"], "loras/ink");
    let page = List {
        offset: 1,
        limit: 1,
        ..List::default()
    };
    assert_eq!(client.list(page).await.unwrap().models.len(), 1);
    let shown = client.show("base").await.unwrap();
    let order = shown["dependencies"]["loading_order"].as_array().unwrap();
    assert_eq!(order.len(), 4);
    // A path is looked up, for programs that know files and not names.
    let path = library.path("base").to_string_lossy().into_owned();
    assert_eq!(client.show(&path).await.unwrap()["name"], "base");
    let plan = client
        .plan(Set {
            names: vec!["base".into()],
            target: "ram".into(),
            dependencies: true,
            split: false,
        })
        .await
        .unwrap();
    assert_eq!(plan["fit"], "now");

    let mut events = client.events();
    client.subscribe(&["catalogue", "decisions"]).await.unwrap();
    library.single("later", 3, 64);
    client.scan().await.unwrap();
    let event = soon("the change", events.recv()).await.unwrap();
    let ServerMessage::Catalogue(event) = event else {
        panic!("{event:?}")
    };
    assert_eq!(
        (&*event.changes[0].change, &*event.changes[0].name),
        ("added", "later")
    );
    let leases = client.load(&LoadOptions::new(["later"])).await.unwrap();
    let event = soon("the decision", events.recv()).await.unwrap();
    let ServerMessage::Decision(event) = event else {
        panic!("{event:?}")
    };
    assert_eq!(event.decision["act"], "admit");
    let why = client.why("later", 10).await.unwrap();
    assert_eq!(why[0].1, event.sentence);
    let usage = client.analyse().await.unwrap();
    assert_eq!(usage["hot"][0]["uses"], 1);
    drop(leases);
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_come_in_parts_where_they_are_asked_for() {
    let library = Library::new();
    let tensors = library.pipeline("pipe", 1, 64);
    let served = Served::start(library.config(Bytes::mib(8))).await;
    let client = served.client("worker").await;
    let options = LoadOptions::new(["pipe"]).on("ram").in_parts();
    let mut loading = client.loading(&options).unwrap();
    let (mut leases, mut parts) = (Vec::new(), 0);
    loop {
        match soon("an event", loading.next()).await.unwrap() {
            RemoteEvent::Part(some) => {
                parts += 1;
                leases.extend(some);
            }
            RemoteEvent::Leased(rest) => {
                leases.extend(rest);
                break;
            }
            _ => {}
        }
    }
    assert_eq!((leases.len(), parts), (4, 4), "each when it is there");
    for lease in &leases {
        let (_, part) = lease.leased().component.rsplit_once('/').unwrap();
        for (name, bytes) in &tensors[part] {
            let tensor = lease.tensor(name).unwrap().unwrap();
            assert!(tensor.bytes == bytes, "{part} {name}");
        }
    }
    drop(leases);
    served.no_leases().await;
    // And all at once where they are not.
    assert_eq!(
        client
            .load(&LoadOptions::new(["pipe"]).on("ram"))
            .await
            .unwrap()
            .len(),
        4
    );
    served.no_leases().await;
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_codes() {
    let library = Library::new();
    library.single("one", 1, 64);
    library.single("two", 3, 64);
    library.single("large", 2, 4 << 10);
    let mut config = library.config(Bytes::mib(8));
    config.sessions.quota = Some(Bytes::kib(100));
    let served = Served::start(config).await;
    let client = served.client("worker").await;
    let load = async |names: &[&str], target: &str| {
        let options = LoadOptions::new(names.iter().copied()).on(target);
        client.load(&options).await
    };
    let path = library.path("one.safetensors");
    for (names, target, code) in [
        (vec!["on"], "ram", "not-found"),
        (vec![], "ram", "unresolved"),
        (vec!["one"], "vram:3", "no-such-tier"),
        (vec!["one"], "attic", "no-such-tier"),
        (vec![path.to_str().unwrap()], "ram", "names-only"),
        (vec!["large"], "ram", "quota"),
        (vec!["one/none"], "ram", "not-found"),
    ] {
        let error = load(&names, target).await.unwrap_err();
        assert_eq!(refused(&error), code, "{names:?}: {error}");
    }
    let ClientError::Refused(error) = client.show("on").await.unwrap_err() else {
        panic!("it is refused")
    };
    assert_eq!(error.nearest, ["one"]);
    // The quota counts what is held, once.
    let held = load(&["one"], "ram").await.unwrap();
    drop(load(&["one"], "ram").await.unwrap());
    let ClientError::Refused(error) = load(&["two"], "ram").await.unwrap_err() else {
        panic!("it is refused")
    };
    assert_eq!(error.code, "quota");
    assert!(
        error.retry_after_ms.is_some(),
        "it fits once `one` is released"
    );
    drop(held);
    served.no_leases().await;
    drop(load(&["two"], "ram").await.unwrap());
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_malformed_is_refused_and_the_connection_goes_on() {
    let library = Library::new();
    library.single("one", 1, 64);
    let served = Served::start(library.config(Bytes::mib(4))).await;
    let (mut raw, mut unknown, mut version) = (
        Raw::connect(&served),
        Raw::connect(&served),
        Raw::connect(&served),
    );
    let mut open = Raw::hello(&served, 0);
    beside(move || {
        // Hello comes first, in a version that both speak.
        raw.say(ClientMessage::Ping(Empty {}));
        assert_eq!(raw.error(), (1, "hello-first".into()));
        assert!(matches!(raw.hear(), Some((0, ServerMessage::Goodbye(_)))));
        assert!(raw.hear().is_none());
        version.say(ClientMessage::Hello(Hello {
            versions: vec![99],
            ..Hello::default()
        }));
        assert_eq!(version.error(), (1, "version".into()));
        unknown.write(&[3, 0, 0, 0, 0xc1, 0xc1, 0xc1]);
        assert_eq!(unknown.error(), (0, "malformed".into()));

        // Afterwards, a frame that is wrong is answered, and the next one is taken.
        open.write(&[3, 0, 0, 0, 0xc1, 0xc1, 0xc1]);
        assert_eq!(open.error(), (0, "malformed".into()));
        let mut wrong = ServerMessage::Draining(Empty {}).encode(9).unwrap();
        open.write(&wrong);
        assert_eq!(open.error(), (9, "unknown-type".into()));
        wrong = b"\x83\xa2id\x0b\xa4type\xa4load\xa5names\x05".to_vec();
        open.write(&(wrong.len() as u32).to_le_bytes());
        open.write(&wrong);
        assert_eq!(open.error(), (11, "malformed".into()));
        let id = open.say(ClientMessage::Load(Load {
            names: vec!["x".repeat(5000)],
            target: "ram".into(),
            priority: "batch".into(),
            ..Load::default()
        }));
        assert_eq!(open.error(), (id, "malformed".into()));
        let id = open.say(ClientMessage::Release(Release {
            leases: vec![1, 2, 3],
        }));
        let Some((answered, ServerMessage::Released(released))) = open.hear() else {
            panic!("unknown leases are no error");
        };
        assert_eq!((answered, released.leases.len()), (id, 0));
        let id = open.say(ClientMessage::Subscribe(Subscribe {
            topics: vec!["weather".into()],
        }));
        assert_eq!(open.error(), (id, "not-found".into()));
        // A frame that is too long cannot be skipped.
        open.write(&(MAX_REQUEST_BYTES as u32 + 1).to_le_bytes());
        let Some((0, ServerMessage::Goodbye(goodbye))) = open.hear() else {
            panic!("a farewell");
        };
        assert_eq!(goodbye.code, "protocol");
        assert!(open.hear().is_none());
    })
    .await;
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_dropped_and_others_are_served() {
    let library = Library::new();
    for i in 0..50 {
        library.single(&format!("model-{i}"), i, 16);
    }
    let mut config = library.config(Bytes::mib(8));
    config.bridge.max_behind = Bytes::kib(64);
    let served = Served::start(config).await;
    let mut slow = Raw::hello(&served, 0);
    let flooded = beside(move || {
        // Far more answers than the socket and the bound hold.
        for _ in 0..10_000 {
            let list = ClientMessage::List(List::default()).encode(5).unwrap();
            if slow.stream.write_all(&list).is_err() {
                break;
            }
        }
        let mut last = None;
        while let Some((_, message)) = slow.hear() {
            last = Some(message);
        }
        last
    });
    let client = served.client("beside it").await;
    soon("an answer", client.load(&LoadOptions::new(["model-7"])))
        .await
        .unwrap();
    let Some(ServerMessage::Goodbye(goodbye)) = flooded.await else {
        panic!("the reason is the last message");
    };
    assert_eq!(goodbye.code, "slow-reader");
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_breaks_its_promise_of_life_is_dropped() {
    let library = Library::new();
    library.single("one", 1, 64);
    let served = Served::start(library.config(Bytes::mib(4))).await;
    let mut hung = Raw::hello(&served, 20);
    hung.say(ClientMessage::Load(Load {
        names: vec!["one".into()],
        target: "ram".into(),
        priority: "interactive".into(),
        ..Load::default()
    }));
    let heard = beside(move || std::iter::from_fn(|| hung.hear()).collect::<Vec<_>>()).await;
    assert!(matches!(heard[0].1, ServerMessage::Leased(_)));
    assert!(matches!(heard[1].1, ServerMessage::Ping(_)));
    let Some((0, ServerMessage::Goodbye(goodbye))) = heard.last() else {
        panic!("{heard:?}");
    };
    assert_eq!(goodbye.code, "silent");
    served.no_leases().await;
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn preemptible_leases_are_asked_back_for_others() {
    let library = Library::new();
    library.single("one", 1, 900);
    library.single("two", 2, 900);
    let mut config = library.config(Bytes::mib(1));
    config.bridge.grace = Duration::from_millis(100);
    let served = Served::start(config).await;
    // One that lets go when it is asked to.
    let polite = served.client("polite").await;
    let mut events = polite.events();
    let held = polite
        .load(&LoadOptions::new(["one"]).preemptible())
        .await
        .unwrap();
    let other = served.client("other").await;
    let waiting = tokio::spawn({
        let other = other.clone();
        async move { other.load(&LoadOptions::new(["two"]).preemptible()).await }
    });
    let ServerMessage::Revoke(revoke) = soon("revoke", events.recv()).await.unwrap() else {
        panic!("it is asked back");
    };
    assert_eq!(revoke.leases, [held[0].leased().lease]);
    drop(held);
    let second = soon("the other load", waiting).await.unwrap().unwrap();
    // One that does not: its connection ends, and its leases with it.
    let third = soon("the third load", polite.load(&LoadOptions::new(["one"]))).await;
    assert_eq!(third.unwrap().len(), 1);
    let error = soon("the end", async {
        loop {
            if let Err(error) = other.ping().await {
                break error;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(error.to_string().contains("revoked"), "{error}");
    drop(second);
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn device_memory_that_cannot_be_shared_says_so() {
    let library = Library::new();
    library.single("one", 1, 64);
    let config = library.config_with_gpu(Bytes::mib(4), Bytes::mib(4));
    let served = Served::start(config).await;
    let client = served.client("worker").await;
    let leases = client
        .load(&LoadOptions::new(["one"]).on("vram"))
        .await
        .unwrap();
    assert_eq!(leases[0].leased().tier, "vram:0");
    let error = leases[0].tensors().unwrap_err();
    assert!(error.to_string().contains("load to ram"), "{error}");
    drop(leases);
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_says_goodbye_when_it_ends() {
    let library = Library::new();
    library.single("one", 1, 64);
    let served = Served::start(library.config(Bytes::mib(4))).await;
    let client = served.client("worker").await;
    let mut events = client.events();
    let leases = client.load(&LoadOptions::new(["one"])).await.unwrap();
    client.drain().await.unwrap();
    soon("the request", served.bridge.drain_requested()).await;
    let socket = served.socket();
    served.end().await;
    let farewell = soon("the farewell", events.recv()).await.unwrap();
    assert!(matches!(farewell, ServerMessage::Goodbye(goodbye) if goodbye.code == "draining"));
    let lost = client.ping().await.unwrap_err();
    assert!(
        matches!(&lost, ClientError::Lost { reason } if reason.contains("draining")),
        "{lost}"
    );
    assert_eq!(leases[0].tensors().unwrap().len(), 4, "mappings stay valid");
    let error = Client::connect_to(&socket, "later").await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
}
