//! What can happen, how often, and how it is done.

use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::RngCore;
use serde_json::json;
use tokio::net::{TcpStream, UnixStream};

use super::library::Harm;
use super::worker::below;

/// Longest that a disturbing client waits for anything.
const PATIENCE: Duration = Duration::from_millis(500);

/// Something that happens to the server, its clients or its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    KillWorker,
    PauseWorker,
    KillServer,
    KillServerAndSpoilIndex,
    PauseServer,
    GarbageOnSocket,
    GarbageOnHttp,
    SilentConnections,
    SlowReader,
    FewDescriptors,
    Harm(Harm),
    ManyFiles,
    ShrinkMemory,
    FullDisk,
    Gpu(GpuFault),
}

/// What happens to a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GpuFault {
    /// It falls off the bus, and comes back.
    Lose,
    /// Every call fails until its context is made anew.
    Sticky,
    /// It has no memory, whatever the books say.
    OutOfMemory,
    /// Other processes take it.
    Foreign,
    /// Calls do not return.
    Hang,
    /// The driver reports an error of a program.
    Xid,
}

/// Who may be harmed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reach {
    /// The server is the run's own.
    pub(super) own_server: bool,
    /// GPUs are doubles.
    pub(super) doubles: bool,
}

impl Fault {
    /// Faults that come from clients alone, and how often each.
    const OF_CLIENTS: [(Self, usize); 5] = [
        (Self::KillWorker, 20),
        (Self::PauseWorker, 8),
        (Self::GarbageOnSocket, 10),
        (Self::SilentConnections, 4),
        (Self::SlowReader, 5),
    ];
    /// The others, which a server of the run's own has to bear.
    const OF_ALL: [(Self, usize); 12] = [
        (Self::GarbageOnHttp, 6),
        (Self::KillServer, 3),
        (Self::KillServerAndSpoilIndex, 1),
        (Self::PauseServer, 3),
        (Self::FewDescriptors, 3),
        (Self::Harm(Harm::Truncate), 4),
        (Self::Harm(Harm::Replace), 4),
        (Self::Harm(Harm::Delete), 3),
        (Self::Harm(Harm::HalfWrite), 3),
        (Self::ManyFiles, 2),
        (Self::ShrinkMemory, 2),
        (Self::FullDisk, 1),
    ];

    /// Those of GPUs, where they are doubles.
    const OF_GPUS: [(Self, usize); 6] = [
        (Self::Gpu(GpuFault::Lose), 2),
        (Self::Gpu(GpuFault::Sticky), 3),
        (Self::Gpu(GpuFault::OutOfMemory), 4),
        (Self::Gpu(GpuFault::Foreign), 3),
        (Self::Gpu(GpuFault::Hang), 2),
        (Self::Gpu(GpuFault::Xid), 2),
    ];

    pub(super) fn draw(rng: &mut Xoshiro256PlusPlus, reach: Reach) -> Self {
        let only = |wanted: bool, faults: &'static [(Self, usize)]| match wanted {
            true => faults,
            false => &[],
        };
        let own = only(reach.own_server, &Self::OF_ALL);
        let gpus = only(reach.doubles, &Self::OF_GPUS);
        let all = || Self::OF_CLIENTS.iter().chain(own).chain(gpus);
        let total: usize = all().map(|(_, weight)| weight).sum();
        let mut at = below(rng, total);
        for (fault, weight) in all() {
            match at.checked_sub(*weight) {
                Some(rest) => at = rest,
                None => return *fault,
            }
        }
        Self::KillWorker
    }

    /// Whether the server ends with it.
    pub(super) const fn is_deadly(self) -> bool {
        matches!(self, Self::KillServer | Self::KillServerAndSpoilIndex)
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::KillWorker => "kill-worker",
            Self::PauseWorker => "pause-worker",
            Self::KillServer => "kill-server",
            Self::KillServerAndSpoilIndex => "kill-server-and-spoil-index",
            Self::PauseServer => "pause-server",
            Self::GarbageOnSocket => "garbage-on-socket",
            Self::GarbageOnHttp => "garbage-on-http",
            Self::SilentConnections => "silent-connections",
            Self::SlowReader => "slow-reader",
            Self::FewDescriptors => "few-descriptors",
            Self::Harm(Harm::Truncate) => "truncate-file",
            Self::Harm(Harm::Replace) => "replace-file",
            Self::Harm(Harm::Delete) => "delete-file",
            Self::Harm(Harm::HalfWrite) => "half-written-file",
            Self::ManyFiles => "many-files",
            Self::ShrinkMemory => "shrink-memory",
            Self::FullDisk => "full-disk",
            Self::Gpu(GpuFault::Lose) => "lose-gpu",
            Self::Gpu(GpuFault::Sticky) => "sticky-gpu-error",
            Self::Gpu(GpuFault::OutOfMemory) => "gpu-out-of-memory",
            Self::Gpu(GpuFault::Foreign) => "foreign-gpu-use",
            Self::Gpu(GpuFault::Hang) => "gpu-hangs",
            Self::Gpu(GpuFault::Xid) => "xid",
        }
    }
}

/// A frame of the bridge, however wrong what is in it.
fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_le_bytes().to_vec();
    frame.extend_from_slice(payload);
    frame
}

fn message(value: &serde_json::Value) -> Vec<u8> {
    frame(&rmp_serde::to_vec_named(value).unwrap_or_default())
}

fn noise(rng: &mut Xoshiro256PlusPlus, most: usize) -> Vec<u8> {
    let mut bytes = vec![0; 1 + below(rng, most)];
    rng.fill_bytes(&mut bytes);
    bytes
}

/// Writes what no client of ours writes. The answers do not matter, nor do errors: the server may end the connection whenever
/// it likes.
pub(super) async fn garbage_on_socket(socket: &Path, rng: &mut Xoshiro256PlusPlus) {
    let hello = message(&json!({"id": 1, "type": "hello", "versions": [1], "label": "nonsense"}));
    let mut sent = Vec::new();
    if below(rng, 3) > 0 {
        sent.extend_from_slice(&hello);
    }
    for _ in 0..1 + below(rng, 8) {
        sent.extend(match below(rng, 9) {
            0 => noise(rng, 4096),
            1 => frame(&noise(rng, 4096)),
            2 => u32::MAX.to_le_bytes().to_vec(),
            3 => frame(&[]),
            4 => message(&json!({"id": 1, "type": "load", "names": vec!["x"; 400]})),
            5 => message(&json!({"id": 7, "type": "release", "leases": [0, 1, u64::MAX]})),
            6 => message(&json!({"id": 7, "type": "cancel", "request": u64::MAX})),
            7 => message(&json!({"id": 1, "type": "show", "name": "../../etc/passwd"})),
            _ => hello.clone(),
        });
    }
    // Half a frame at the end, now and then.
    if below(rng, 2) == 0 {
        sent.truncate(sent.len() - sent.len().min(3));
    }
    if let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, UnixStream::connect(socket)).await
        && let Ok(stream) = stream.into_std()
        && stream.set_nonblocking(false).is_ok()
        && stream.set_read_timeout(Some(PATIENCE)).is_ok()
        && stream.set_write_timeout(Some(PATIENCE)).is_ok()
    {
        talk(stream, sent).await;
    }
}

/// Writes, reads some of what is answered, and goes away.
async fn talk(mut stream: impl Read + Write + Send + 'static, sent: Vec<u8>) {
    let talk = move || {
        // The peer may end the connection whenever it likes.
        let _ = stream.write_all(&sent);
        let _ = stream.read(&mut [0; 4096]);
    };
    let _ = tokio::task::spawn_blocking(talk).await;
}

/// The same, for the HTTP face.
pub(super) async fn garbage_on_http(port: u16, rng: &mut Xoshiro256PlusPlus) {
    let sent = match below(rng, 6) {
        0 => noise(rng, 4096),
        1 => b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n".to_vec(),
        2 => b"POST /v2/repository/models/x/load HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n{\"a\":".to_vec(),
        3 => b"POST /v2/repository/models/..%2f..%2fetc/load HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{".to_vec(),
        4 => format!("GET /{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "a".repeat(100_000)).into_bytes(),
        _ => b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(50),
    };
    if let Ok(Ok(stream)) =
        tokio::time::timeout(PATIENCE, TcpStream::connect(("127.0.0.1", port))).await
        && let Ok(stream) = stream.into_std()
        && stream.set_nonblocking(false).is_ok()
        && stream.set_read_timeout(Some(PATIENCE)).is_ok()
        && stream.set_write_timeout(Some(PATIENCE)).is_ok()
    {
        talk(stream, sent).await;
    }
}

/// Connects so often, says nothing, and goes away. Gives how many connections there were.
pub(super) async fn silent_connections(socket: &Path, count: usize) -> usize {
    let mut open = Vec::with_capacity(count);
    let fill = async {
        for _ in 0..count {
            match UnixStream::connect(socket).await {
                Ok(stream) => open.push(stream),
                Err(_) => break,
            }
        }
    };
    let _ = tokio::time::timeout(2 * PATIENCE, fill).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    open.len()
}

/// Asks for much, and reads none of it.
pub(super) async fn slow_reader(socket: &Path) {
    let hello = message(&json!({"id": 1, "type": "hello", "versions": [1], "label": "slow"}));
    let subscribe = message(
        &json!({"id": 2, "type": "subscribe", "topics": ["decisions", "catalogue", "pressure"]}),
    );
    let mut sent = [hello, subscribe].concat();
    for id in 3..3000 {
        sent.extend(message(&json!({"id": id, "type": "list"})));
    }
    if let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, UnixStream::connect(socket)).await
        && let Ok(mut stream) = stream.into_std()
        && stream.set_nonblocking(false).is_ok()
        && stream.set_write_timeout(Some(PATIENCE)).is_ok()
    {
        let flood = move || {
            // Ends when the server reads no more, or has ended the connection.
            let _ = stream.write_all(&sent);
            std::thread::sleep(PATIENCE);
        };
        let _ = tokio::task::spawn_blocking(flood).await;
    }
}
