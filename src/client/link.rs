//! The connection itself: sends requests, hands replies to who waits for them, and knows memory by its numbers.
//!
//! A task of its own reads. Memory numbers are forgotten when `released` is read and not before: a reply that the server wrote earlier
//! may still name them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use hotset_core::Bytes;
use hotset_core::device::Export;
use tokio::net::UnixStream;
use tokio::sync::{Notify, broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use super::ClientError;
use super::lease::{Memory, RemoteLease, Table};
use super::mapping::{Identity, Mapping};
use crate::bridge::channel::{ChannelError, Inbox, Outbox, halves};
use crate::bridge::wire::{
    self, ClientMessage, Empty, Hello, Leased, MAX_REPLY_BYTES, Release, ServerMessage,
    StillMapped, Unmapped, Welcome,
};

/// Requests that may wait to be written, in bytes: a server that does not read is lost.
const MAX_BEHIND: usize = 64 << 20;
/// Mappings that one message tells of: as many descriptors as travel at once.
const MAPPED_AT_ONCE: usize = 128;
/// How long the answer to a request is looked for before the thread sleeps. What is resident is answered sooner, and to be woken
/// costs as much again as the answer.
const LOOKED_FOR: Duration = Duration::from_micros(100);

/// What comes for a request.
#[derive(Debug)]
pub(super) enum Reply {
    Message(ServerMessage),
    Leased(Result<Vec<RemoteLease>, ClientError>),
    /// Some of them; more follow.
    Part(Result<Vec<RemoteLease>, ClientError>),
}

#[derive(Debug, Default)]
struct Known {
    /// Who waits, by request; `None` once the connection is lost.
    waiting: HashMap<u64, mpsc::UnboundedSender<Reply>>,
    memories: HashMap<u64, (Memory, u32)>,
    /// The memory of each lease.
    leases: HashMap<u64, u64>,
    tables: HashMap<u64, Arc<Table>>,
    lost: Option<Arc<str>>,
    /// What outlives this connection: memory that was mapped over it, and what it was told of when it began.
    mapped: Vec<Weak<Mapping>>,
}

/// What was dropped, and is still to be told to the server. Its lock is held for one push, since drops may come from anywhere.
#[derive(Debug, Default)]
struct Ended {
    leases: Vec<u64>,
    /// Numbers of mappings of an earlier server.
    mappings: Vec<u64>,
}

/// See the module's page.
#[derive(Debug)]
pub(super) struct Link {
    outbox: Arc<Outbox>,
    known: Mutex<Known>,
    ended: Mutex<Ended>,
    next: AtomicU64,
    welcome: OnceLock<Welcome>,
    events: broadcast::Sender<ServerMessage>,
    /// Somebody heard that it is lost.
    told_lost: AtomicBool,
    /// Told when leases were dropped.
    dropped: Arc<Notify>,
    /// Told when a request was sent whose answer is waited for.
    asked: Arc<Notify>,
    /// The connection is lost.
    gone: CancellationToken,
    /// Ends the reading task with the last handle.
    closed: CancellationToken,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

impl Link {
    /// Connects, says hello, and tells of what is mapped of an earlier server.
    pub(super) async fn open(
        path: &Path,
        hello: Hello,
        events: broadcast::Sender<ServerMessage>,
        mapped: Vec<Arc<Mapping>>,
    ) -> Result<Arc<Self>, ClientError> {
        let stream = UnixStream::connect(path).await;
        let (inbox, outbox) = stream
            .and_then(|stream| halves(stream, MAX_REPLY_BYTES, MAX_BEHIND))
            .map_err(|source| ClientError::Connect {
                path: path.to_owned(),
                source,
            })?;
        let link = Arc::new(Self {
            outbox: Arc::new(outbox),
            known: Mutex::default(),
            ended: Mutex::default(),
            next: AtomicU64::new(1),
            welcome: OnceLock::new(),
            events,
            told_lost: AtomicBool::new(false),
            dropped: Arc::new(Notify::new()),
            asked: Arc::new(Notify::new()),
            gone: CancellationToken::new(),
            closed: CancellationToken::new(),
        });
        tokio::spawn(read(
            Arc::downgrade(&link),
            link.outbox.clone(),
            inbox,
            link.dropped.clone(),
            link.asked.clone(),
            link.closed.clone(),
        ));
        let (_, mut replies) = link.ask(&ClientMessage::Hello(hello))?;
        match link.reply(&mut replies).await? {
            Reply::Message(ServerMessage::Welcome(welcome)) => {
                // This is the only place that sets it.
                let _ = link.welcome.set(welcome);
                link.tell_mapped(&mapped).await?;
                Ok(link)
            }
            Reply::Message(other) => Err(super::unexpected(other)),
            Reply::Leased(_) | Reply::Part(_) => Err(ClientError::Protocol {
                reason: "leases in answer to `hello`".into(),
            }),
        }
    }

    /// Tells a new server of what an earlier one left in this process.
    async fn tell_mapped(self: &Arc<Self>, mapped: &[Arc<Mapping>]) -> Result<(), ClientError> {
        self.lock().mapped = mapped.iter().map(Arc::downgrade).collect();
        for some in mapped.chunks(MAPPED_AT_ONCE) {
            let (mut memories, mut descriptors, mut told) = (Vec::new(), Vec::new(), Vec::new());
            for mapping in some {
                if let Some((memory, descriptor)) = mapping.told() {
                    memories.push(memory);
                    descriptors.push(descriptor);
                    told.push(mapping);
                }
            }
            let message = ClientMessage::StillMapped(StillMapped { memories });
            let (_, mut replies) = self.ask_with(&message, descriptors)?;
            match self.reply(&mut replies).await? {
                Reply::Message(ServerMessage::Counted(counted)) => {
                    for (mapping, number) in told.into_iter().zip(counted.mappings) {
                        mapping.counted(Arc::downgrade(self), number);
                    }
                }
                // It is mapped all the same, and the connection good.
                Reply::Message(ServerMessage::Error(error)) => {
                    tracing::warn!(error = error.message, "what is still mapped is not counted");
                }
                _ => {
                    return Err(ClientError::Protocol {
                        reason: "no count in answer to `still-mapped`".into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// What this process still maps that came over this connection, or was mapped when it began.
    pub(super) fn mapped(&self) -> Vec<Arc<Mapping>> {
        let mut known = self.lock();
        known.mapped.retain(|mapping| mapping.strong_count() > 0);
        known.mapped.iter().filter_map(Weak::upgrade).collect()
    }

    /// Whether it is lost; `Some(true)` where somebody has heard of it.
    pub(super) fn is_lost(&self) -> Option<bool> {
        let lost = self.lock().lost.is_some() || self.gone.is_cancelled();
        lost.then(|| self.told_lost.load(Ordering::Relaxed))
    }

    /// The error of a lost connection.
    pub(super) fn lost_error(&self) -> ClientError {
        self.told_lost.store(true, Ordering::Relaxed);
        let reason = self.lock().lost.clone();
        ClientError::Lost {
            reason: reason.unwrap_or_else(|| "it was closed".into()),
        }
    }

    pub(super) fn welcome(&self) -> &Welcome {
        static NONE: OnceLock<Welcome> = OnceLock::new();
        self.welcome.get().unwrap_or_else(|| {
            // `open` gives nobody a link without it.
            NONE.get_or_init(|| Welcome {
                version: 0,
                server: String::new(),
                instance: String::new(),
                session: 0,
                limits: wire::Limits {
                    request_bytes: 0,
                    reply_bytes: 0,
                    names: 0,
                    text_bytes: 0,
                    requests: 0,
                    behind_bytes: 0,
                    quota_bytes: None,
                },
            })
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request; gives its number and where its replies come.
    pub(super) fn ask(
        &self,
        message: &ClientMessage,
    ) -> Result<(u64, mpsc::UnboundedReceiver<Reply>), ClientError> {
        self.ask_with(message, Vec::new())
    }

    /// The same, with descriptors.
    pub(super) fn ask_with(
        &self,
        message: &ClientMessage,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(u64, mpsc::UnboundedReceiver<Reply>), ClientError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = message.encode(id)?;
        // Bounded by what the server sends for one request: it leaves progress out for a reader that is behind.
        let (sender, receiver) = mpsc::unbounded_channel();
        {
            let mut known = self.lock();
            if known.lost.is_some() {
                drop(known);
                return Err(self.lost_error());
            }
            known.waiting.insert(id, sender);
        }
        if let Err(error) = self.outbox.send_with(frame, descriptors) {
            self.lock().waiting.remove(&id);
            self.told_lost.store(true, Ordering::Relaxed);
            return Err(error.into());
        }
        self.asked.notify_one();
        Ok((id, receiver))
    }

    /// Sends a request whose reply nobody waits for.
    pub(super) fn tell(&self, message: &ClientMessage) -> Result<(), ClientError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.outbox.send(message.encode(id)?)?;
        Ok(())
    }

    /// The next reply; the error where the connection is lost first.
    pub(super) async fn reply(
        &self,
        replies: &mut mpsc::UnboundedReceiver<Reply>,
    ) -> Result<Reply, ClientError> {
        replies.recv().await.ok_or_else(|| self.lost_error())
    }

    /// A lease was dropped.
    pub(super) fn release(&self, lease: u64) {
        self.ended().leases.push(lease);
        // The leases of a set are dropped one after the other, and go in one message.
        self.dropped.notify_one();
    }

    /// A mapping that the server counts is gone.
    pub(super) fn unmapped(&self, number: u64) {
        self.ended().mappings.push(number);
        self.dropped.notify_one();
    }

    fn ended(&self) -> std::sync::MutexGuard<'_, Ended> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_dropped(&self) {
        let Ended { leases, mappings } = std::mem::take(&mut *self.ended());
        // On a lost connection they have ended already.
        if !leases.is_empty() {
            let _ = self.tell(&ClientMessage::Release(Release { leases }));
        }
        if !mappings.is_empty() {
            let _ = self.tell(&ClientMessage::Unmapped(Unmapped { mappings }));
        }
    }

    /// Waits until the connection is lost.
    pub(super) async fn lost(&self) -> ClientError {
        self.gone.cancelled().await;
        self.lost_error()
    }

    fn lose(&self, reason: &str) {
        let gone = {
            let mut known = self.lock();
            known.lost.get_or_insert_with(|| reason.into());
            known.waiting.clear();
            known.leases.clear();
            std::mem::take(&mut known.memories)
        };
        self.gone.cancel();
        // Without the lock: to unmap gigabytes takes long.
        drop(gone);
    }

    /// Hands a message to who waits for it.
    fn dispatch(self: &Arc<Self>, id: u64, message: ServerMessage, descriptors: Vec<OwnedFd>) {
        let last = !matches!(
            message,
            ServerMessage::Planned(_)
                | ServerMessage::Progress(_)
                | ServerMessage::Leased(Leased { more: true, .. })
        );
        match message {
            ServerMessage::Leased(leased) => {
                let leases = self.take(leased, descriptors);
                let waiting = match last {
                    true => self.lock().waiting.remove(&id),
                    false => self.lock().waiting.get(&id).cloned(),
                };
                // Where nobody waits any more, dropping them releases them.
                if let Some(waiting) = waiting {
                    let _ = waiting.send(match last {
                        true => Reply::Leased(leases),
                        false => Reply::Part(leases),
                    });
                }
            }
            ServerMessage::Released(released) => {
                let gone: Vec<Memory> = {
                    let mut known = self.lock();
                    let leases = released.leases.into_iter();
                    leases.filter_map(|lease| known.forget(lease)).collect()
                };
                // Without the lock: to unmap gigabytes takes long.
                drop(gone);
            }
            ServerMessage::Ping(_) => {
                let _ = self.tell(&ClientMessage::Pong(Empty {}));
            }
            ServerMessage::Goodbye(goodbye) => {
                self.lock().lost.get_or_insert_with(|| {
                    format!("{} ({})", goodbye.message, goodbye.code).into()
                });
                let _ = self.events.send(ServerMessage::Goodbye(goodbye));
            }
            ServerMessage::Catalogue(_)
            | ServerMessage::Decision(_)
            | ServerMessage::Granted(_)
            | ServerMessage::Pressure(_)
            | ServerMessage::Adopted(_)
            | ServerMessage::Revoke(_) => {
                // Nobody has to listen.
                let _ = self.events.send(message);
            }
            message => {
                let mut known = self.lock();
                let waiting = if last {
                    known.waiting.remove(&id)
                } else {
                    known.waiting.get(&id).cloned()
                };
                drop(known);
                if let Some(waiting) = waiting {
                    let _ = waiting.send(Reply::Message(message));
                }
            }
        }
    }

    /// Makes leases out of what came.
    fn take(
        self: &Arc<Self>,
        leased: Leased,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Vec<RemoteLease>, ClientError> {
        let mut guard = self.lock();
        let known = &mut *guard;
        for table in leased.tables {
            let new = Arc::new(Table::new(table.tensors));
            known.tables.insert(table.table, new);
        }
        let mut descriptors = descriptors.into_iter();
        for memory in leased.memories {
            let mapped = match (memory.descriptor, memory.reason) {
                (true, _) => match descriptors.next() {
                    Some(descriptor) if let Some(uuid) = memory.gpu => {
                        Memory::Device(Arc::new(Export {
                            descriptor,
                            mapped: Bytes(memory.mapped),
                            offset: memory.offset,
                            bytes: Bytes(memory.bytes),
                            uuid,
                        }))
                    }
                    Some(descriptor) => known.map(descriptor, memory.offset, memory.bytes),
                    None => Memory::Elsewhere("its descriptor did not arrive".into()),
                },
                (false, reason) => Memory::Elsewhere(reason.unwrap_or_default().into()),
            };
            known.memories.insert(memory.memory, (mapped, 0));
        }
        let mut leases = Vec::with_capacity(leased.leases.len());
        let mut unknown = None;
        for leased in leased.leases {
            let table = known.tables.get(&leased.table).cloned();
            let memory = known.memories.get_mut(&leased.memory);
            let (Some(table), Some((memory, held))) = (table, memory) else {
                unknown = Some(leased.component);
                continue;
            };
            *held += 1;
            let memory = memory.clone();
            if let Memory::Mapped(mapping) = &memory {
                mapping.leased(&leased);
            }
            known.leases.insert(leased.lease, leased.memory);
            leases.push(RemoteLease {
                link: self.clone(),
                leased,
                memory,
                table,
            });
        }
        // Dropping leases takes no lock, but sends.
        drop(guard);
        match unknown {
            None => Ok(leases),
            Some(component) => Err(ClientError::Protocol {
                reason: format!("the memory or the table of {component} has an unknown number"),
            }),
        }
    }
}

impl Known {
    /// Maps memory, unless this process maps it already: it was leased by an earlier server, and this one took it over.
    fn map(&mut self, descriptor: OwnedFd, offset: u64, bytes: u64) -> Memory {
        self.mapped.retain(|mapping| mapping.strong_count() > 0);
        if !self.mapped.is_empty()
            && let Some(identity) = Identity::of(&descriptor, offset, bytes)
        {
            let mut there = self.mapped.iter().filter_map(Weak::upgrade);
            if let Some(mapping) = there.find(|mapping| mapping.is(identity)) {
                return Memory::Mapped(mapping);
            }
        }
        match Mapping::new(descriptor, offset, bytes) {
            Ok(mapping) => {
                let mapping = Arc::new(mapping);
                self.mapped.push(Arc::downgrade(&mapping));
                Memory::Mapped(mapping)
            }
            Err(reason) => Memory::Elsewhere(reason.into()),
        }
    }

    /// A lease has ended. Gives the memory that nobody leases any more, to be dropped without the lock.
    fn forget(&mut self, lease: u64) -> Option<Memory> {
        let memory = self.leases.remove(&lease)?;
        let (_, held) = self.memories.get_mut(&memory)?;
        *held = held.saturating_sub(1);
        match *held {
            0 => self.memories.remove(&memory).map(|(memory, _)| memory),
            _ => None,
        }
    }
}

/// Reads until the connection is lost or nobody holds it any more.
async fn read(
    link: Weak<Link>,
    outbox: Arc<Outbox>,
    mut inbox: Inbox,
    dropped: Arc<Notify>,
    asked: Arc<Notify>,
    closed: CancellationToken,
) {
    let mut flushing = std::pin::pin!(outbox.flush());
    let reason = loop {
        let received = tokio::select! {
            biased;
            () = closed.cancelled() => return,
            error = &mut flushing => Err(error),
            () = dropped.notified() => {
                let Some(link) = link.upgrade() else { return };
                link.tell_dropped();
                continue;
            }
            () = asked.notified() => {
                // It may have been answered meanwhile, and before the request is out no answer can come.
                let waits = |link: Arc<Link>| !link.lock().waiting.is_empty();
                if outbox.is_behind() || !link.upgrade().is_some_and(waits) {
                    continue;
                }
                match look_for(&mut inbox).await {
                    Ok(false) => continue,
                    Ok(true) => Ok(()),
                    Err(error) => Err(error),
                }
            }
            received = inbox.receive() => received,
        };
        if let Err(error) = received {
            break error.to_string();
        }
        let Some(link) = link.upgrade() else { return };
        let handled = loop {
            let decoded = match inbox.next_frame() {
                Ok(None) => break Ok(()),
                Ok(Some(frame)) => ServerMessage::decode(frame),
                Err(error) => break Err(error.to_string()),
            };
            match decoded {
                Ok((id, message)) => {
                    let count = match &message {
                        ServerMessage::Leased(leased) => leased.descriptors,
                        _ => 0,
                    };
                    let descriptors =
                        inbox.take_descriptors(usize::try_from(count).unwrap_or(usize::MAX));
                    link.dispatch(id, message, descriptors);
                }
                // A later server may send more; what is asked for is answered in known words.
                Err(error) => tracing::debug!(%error, "a message that is not understood"),
            }
        };
        if let Err(reason) = handled {
            break reason;
        }
    };
    if let Some(link) = link.upgrade() {
        link.lose(&reason);
    }
}

/// The right to look for an answer: one connection of a process at a time does, the others sleep at once.
struct Looking;

/// Of the process, as its processors are: what is counted is who keeps one of them busy.
static LOOKING: AtomicBool = AtomicBool::new(false);

impl Looking {
    fn begin() -> Option<Self> {
        // Made only where it is the right's: dropping it gives the right back.
        (!LOOKING.swap(true, Ordering::Relaxed)).then(|| Self)
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        LOOKING.store(false, Ordering::Relaxed);
    }
}

/// Looks for an answer for a moment without sleeping; other tasks run meanwhile. Gives whether something came.
async fn look_for(inbox: &mut Inbox) -> Result<bool, ChannelError> {
    let Some(_looking) = Looking::begin() else {
        return Ok(false);
    };
    let end = Instant::now() + LOOKED_FOR;
    loop {
        match inbox.try_receive() {
            Ok(false) if Instant::now() < end => {
                // The server may have been put on this very processor.
                std::thread::yield_now();
                tokio::task::yield_now().await;
            }
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_looks_at_a_time() {
        let looking = Looking::begin();
        assert!(looking.is_some());
        assert!(Looking::begin().is_none() && Looking::begin().is_none());
        drop(looking);
        assert!(Looking::begin().is_some());
    }
}
