//! Frames and descriptors over a Unix stream socket, without blocking: what both ends of a connection have in common.
//!
//! The runtime watches a socket for what comes in, and for room to write only while something waits to be written. A socket that is
//! watched for both, as tokio's own is, wakes its owner each time that the other end reads: a wake-up for nothing with each message, as
//! dear as the one that brings the answer.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use super::frame::{FrameBuffer, FrameError};

/// Descriptors in one `sendmsg`. The kernel takes 253.
const DESCRIPTORS_AT_ONCE: usize = 128;
/// Descriptors that may have come in without a message that names them: those of one long message.
const DESCRIPTORS_AHEAD: usize = 1024;
/// What one read takes at most.
const READ_BYTES: usize = 64 << 10;

/// How long to wait for room where there is nothing left to watch for it with.
const BLIND: Duration = Duration::from_millis(5);

thread_local! {
    /// Where a read puts what came in. A thread reads one socket at a time, so connections need none of their own: a thousand that say
    /// nothing would keep 64 MiB.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into_boxed_slice());
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The other end is gone.
    #[error("the connection is closed")]
    Closed,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// What came is no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// More descriptors than any message names.
    #[error("more than {limit} descriptors came that no message names")]
    Descriptors {
        /// The bound.
        limit: usize,
    },
    /// The reader at the other end does not keep up.
    #[error("{bytes} bytes wait for a reader that does not read; {limit} may")]
    SlowReader {
        /// What waits.
        bytes: usize,
        /// The bound.
        limit: usize,
    },
}

/// The halves of a connection: one that takes frames of at most `longest` bytes, and one behind which at most `behind` bytes wait.
///
/// # Errors
/// Where the runtime cannot watch the socket.
pub(crate) fn halves(
    stream: tokio::net::UnixStream,
    longest: usize,
    behind: usize,
) -> io::Result<(Inbox, Outbox)> {
    let socket = Arc::new(stream.into_std()?);
    let inbox = Inbox {
        socket: watch(socket.clone(), Interest::READABLE)?,
        frames: FrameBuffer::new(longest),
        descriptors: VecDeque::new(),
    };
    let outbox = Outbox {
        socket,
        queue: Mutex::default(),
        left: Notify::new(),
        limit: behind,
    };
    Ok((inbox, outbox))
}

/// Has the runtime watch a socket.
fn watch(socket: Arc<UnixStream>, interest: Interest) -> io::Result<AsyncFd<Arc<UnixStream>>> {
    // SAFETY: the `AsyncFd` owns a share of the socket, which keeps its one descriptor open, and the same, until all shares are gone.
    let watched = unsafe { AsyncFd::register_with_interest(socket, interest) };
    Ok(watched?)
}

/// The receiving half.
#[derive(Debug)]
pub(crate) struct Inbox {
    socket: AsyncFd<Arc<UnixStream>>,
    frames: FrameBuffer,
    descriptors: VecDeque<OwnedFd>,
}

impl Inbox {
    /// Waits until more has come in. Safe to drop at any time: nothing is lost.
    pub(crate) async fn receive(&mut self) -> Result<(), ChannelError> {
        let Self {
            socket,
            frames,
            descriptors,
        } = self;
        let read = socket
            .async_io(Interest::READABLE, |socket| {
                receive_some(socket, frames, descriptors)
            })
            .await?;
        self.received(read)
    }

    /// Takes what has come in already; `false` where that is nothing. Asks the kernel, whatever the runtime knows of the socket.
    pub(crate) fn try_receive(&mut self) -> Result<bool, ChannelError> {
        let Self {
            socket,
            frames,
            descriptors,
        } = self;
        match receive_some(socket.get_ref(), frames, descriptors) {
            Ok(read) => self.received(read).map(|()| true),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                _ => Err(error.into()),
            },
        }
    }

    fn received(&self, read: usize) -> Result<(), ChannelError> {
        if read == 0 {
            return Err(ChannelError::Closed);
        }
        if self.descriptors.len() > DESCRIPTORS_AHEAD {
            return Err(ChannelError::Descriptors {
                limit: DESCRIPTORS_AHEAD,
            });
        }
        Ok(())
    }

    /// Reads on and throws it away, until the other end is gone: a client that is stuck in writing gets to reading.
    pub(crate) async fn discard(&mut self) {
        let limit = self.frames.limit();
        while self.receive().await.is_ok() {
            self.frames = FrameBuffer::new(limit);
            self.descriptors.clear();
        }
    }

    /// The payload of the next frame that is whole already.
    pub(crate) fn next_frame(&mut self) -> Result<Option<&[u8]>, ChannelError> {
        Ok(self.frames.next_frame()?)
    }

    /// The next descriptors that came in, as many as the message at hand names; fewer where fewer came.
    pub(crate) fn take_descriptors(&mut self, count: usize) -> Vec<OwnedFd> {
        let count = count.min(self.descriptors.len());
        self.descriptors.drain(..count).collect()
    }
}

/// A frame on its way out.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    descriptors: VecDeque<OwnedFd>,
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Outgoing>,
    bytes: usize,
}

/// The sending half: writes at once where the socket takes it, and keeps a bounded rest for later.
#[derive(Debug)]
pub(crate) struct Outbox {
    socket: Arc<UnixStream>,
    queue: Mutex<Queue>,
    /// Told when something was left for [`flush`](Self::flush).
    left: Notify,
    limit: usize,
}

impl Outbox {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a frame, now or when the socket takes it.
    pub(crate) fn send(&self, bytes: Vec<u8>) -> Result<(), ChannelError> {
        self.send_with(bytes, Vec::new())
    }

    /// Sends a frame with descriptors.
    pub(crate) fn send_with(
        &self,
        bytes: Vec<u8>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), ChannelError> {
        let mut queue = self.lock();
        let waiting = queue.bytes;
        // One frame may be longer than what may wait, if nothing does.
        if waiting > 0 && waiting + bytes.len() > self.limit {
            return Err(ChannelError::SlowReader {
                bytes: waiting + bytes.len(),
                limit: self.limit,
            });
        }
        queue.bytes += bytes.len();
        queue.frames.push_back(Outgoing {
            bytes,
            sent: 0,
            descriptors: descriptors.into(),
        });
        if waiting == 0 && self.write(&mut queue)? {
            return Ok(());
        }
        self.left.notify_one();
        Ok(())
    }

    /// Sends a frame whatever waits: the last one of a connection. Its error tells nobody anything.
    pub(crate) fn send_last(&self, bytes: Vec<u8>) {
        let mut queue = self.lock();
        queue.bytes += bytes.len();
        queue.frames.push_back(Outgoing {
            bytes,
            sent: 0,
            descriptors: VecDeque::new(),
        });
    }

    /// Whether something waits for the reader: what can be left out should be.
    pub(crate) fn is_behind(&self) -> bool {
        self.lock().bytes > 0
    }

    /// Writes as much as the socket takes; `true` where nothing is left.
    fn write(&self, queue: &mut Queue) -> Result<bool, ChannelError> {
        while let Some(frame) = queue.frames.front_mut() {
            match send_some(&self.socket, frame) {
                Ok(sent) => {
                    frame.sent += sent;
                    queue.bytes -= sent;
                    if frame.sent == frame.bytes.len() {
                        queue.frames.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(ChannelError::Closed);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// Waits until the socket takes more, or its other end is gone.
    async fn writable(&self) -> io::Result<()> {
        // A descriptor of its own, since the runtime watches the other one already.
        let own = self.socket.try_clone().map(Arc::new);
        let Ok(watched) = own.and_then(|own| watch(own, Interest::WRITABLE)) else {
            tokio::time::sleep(BLIND).await;
            return Ok(());
        };
        watched.writable().await.map(drop)
    }

    /// Writes what waits, whenever the socket takes it. Ends with an error alone.
    pub(crate) async fn flush(&self) -> ChannelError {
        loop {
            let empty = match self.write(&mut self.lock()) {
                Ok(empty) => empty,
                Err(error) => return error,
            };
            if empty {
                self.left.notified().await;
            } else if let Err(error) = self.writable().await {
                return error.into();
            }
        }
    }

    /// Waits until nothing is left to write, or the other end is gone.
    pub(crate) async fn drained(&self) {
        loop {
            match self.write(&mut self.lock()) {
                Ok(true) | Err(_) => return,
                Ok(false) => {}
            }
            if self.writable().await.is_err() {
                return;
            }
        }
    }
}

/// One `recvmsg`: bytes, and the descriptors that came with them. Gives how many bytes; none where the other end is gone.
fn receive_some(
    socket: &UnixStream,
    frames: &mut FrameBuffer,
    descriptors: &mut VecDeque<OwnedFd>,
) -> io::Result<usize> {
    SCRATCH.with_borrow_mut(|scratch| {
        let read = receive_into(socket, scratch, descriptors)?;
        frames.extend(&scratch[..read]);
        Ok(read)
    })
}

fn receive_into(
    socket: &UnixStream,
    scratch: &mut [u8],
    descriptors: &mut VecDeque<OwnedFd>,
) -> io::Result<usize> {
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_AT_ONCE * 2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(scratch)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            descriptors.extend(more);
        }
    }
    // Those that this process had no room for are gone, and no later message would get its own any more.
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::MFILE.into());
    }
    Ok(received.bytes)
}

/// One `sendmsg`: bytes of the frame, and some of its descriptors with the first of them.
fn send_some(socket: &UnixStream, frame: &mut Outgoing) -> io::Result<usize> {
    let batch = frame.descriptors.len().min(DESCRIPTORS_AT_ONCE);
    let more = frame.descriptors.len() > batch;
    let rest = &frame.bytes[frame.sent..];
    // Each batch needs a byte to travel with; a frame that names descriptors has more bytes than descriptors.
    let bytes = if more { &rest[..1] } else { rest };
    let sent = {
        let borrowed: Vec<_> = frame
            .descriptors
            .iter()
            .take(batch)
            .map(|descriptor| descriptor.as_fd())
            .collect();
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_AT_ONCE))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            let fits = control.push(SendAncillaryMessage::ScmRights(&borrowed));
            debug_assert!(fits, "the space is for this many");
        }
        rustix::net::sendmsg(
            socket.as_fd(),
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )?
    };
    frame.descriptors.drain(..batch);
    Ok(sent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bridge::wire::{ClientMessage, Empty, MAX_REQUEST_BYTES, Release};

    type Half = (Inbox, Outbox);

    fn pair(behind: usize) -> (Half, Half) {
        let (here, there) = tokio::net::UnixStream::pair().unwrap();
        let half = |stream| halves(stream, MAX_REQUEST_BYTES, behind).unwrap();
        (half(here), half(there))
    }

    async fn next(inbox: &mut Inbox) -> Vec<u8> {
        loop {
            if let Some(frame) = inbox.next_frame().unwrap() {
                return frame.to_vec();
            }
            inbox.receive().await.unwrap();
        }
    }

    #[tokio::test]
    async fn descriptors_arrive_with_their_message_however_many() {
        let ((_, outbox), (mut inbox, _)) = pair(1 << 20);
        let leases = Release {
            leases: (0..400).collect(),
        };
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let frame = ClientMessage::Release(leases).encode(1).unwrap();
        let many: Vec<_> = std::iter::repeat_with(file).take(300).collect();
        outbox.send_with(frame.clone(), many).unwrap();
        outbox.send_with(frame.clone(), vec![file()]).unwrap();
        let sending = async { outbox.drained().await };
        let receiving = async {
            assert_eq!(next(&mut inbox).await, frame[4..]);
            assert_eq!(inbox.take_descriptors(300).len(), 300);
            assert_eq!(next(&mut inbox).await, frame[4..]);
            assert_eq!(inbox.take_descriptors(9).len(), 1);
        };
        tokio::join!(sending, receiving);
    }

    #[tokio::test]
    async fn what_waits_for_a_reader_is_bounded() {
        let ((_, outbox), _there) = pair(10_000);
        let frame = ClientMessage::Ping(Empty {}).encode(1).unwrap();
        let refused = (0..1_000_000).find_map(|_| outbox.send(frame.clone()).err());
        assert!(matches!(
            refused,
            Some(ChannelError::SlowReader { limit: 10_000, .. })
        ));
    }

    #[tokio::test]
    async fn an_end_that_closes_is_noticed_on_both_sides() {
        let ((mut inbox, outbox), there) = pair(100);
        drop(there);
        let frame = ClientMessage::Ping(Empty {}).encode(1).unwrap();
        assert!(matches!(outbox.send(frame), Err(ChannelError::Closed)));
        assert!(matches!(
            inbox.receive().await.unwrap_err(),
            ChannelError::Closed
        ));
    }

    #[tokio::test]
    async fn what_waits_goes_out_as_it_is_read() {
        let ((_, outbox), (mut inbox, _)) = pair(1 << 30);
        let leases = Release {
            leases: (0..10_000).map(|lease| lease << 32).collect(),
        };
        let frame = ClientMessage::Release(leases).encode(1).unwrap();
        for _ in 0..200 {
            outbox.send(frame.clone()).unwrap();
        }
        assert!(outbox.is_behind(), "no socket takes that much at once");
        let reading = async {
            for _ in 0..200 {
                assert_eq!(next(&mut inbox).await, frame[4..]);
            }
        };
        tokio::select! {
            error = outbox.flush() => panic!("{error}"),
            () = reading => {}
        }
        assert!(!outbox.is_behind());
    }
}
