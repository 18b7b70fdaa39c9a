//! Direct reads through io_uring: one thread keeps as many pieces at the disk as the queue allows.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, types};
use rustix::event::{EventfdFlags, PollFlags};

use super::pool::{Next, after, direct_end, is_aligned, whole};
use super::queue::{Duty, Limits, Queue, Task, Turn, Way};

/// Entries of the ring: more pieces than this are never under way.
const ENTRIES: u32 = 64;
/// The number of the one entry that is no read.
const WAKE: u64 = u64::MAX;

/// A ring that the kernel has agreed to, and what wakes its thread.
pub(super) struct Ring {
    ring: IoUring,
    wake: Arc<OwnedFd>,
}

impl Ring {
    /// Asks the kernel for a ring that can read.
    pub(super) fn new() -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::PollAdd::CODE) {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            ring,
            wake: Arc::new(wake),
        })
    }

    /// A queue whose direct reads this ring does, on a thread that ends with the queue.
    pub(super) fn start(self, limits: Limits) -> io::Result<Arc<Queue>> {
        let wake = self.wake.clone();
        let waker = Box::new(move || {
            // Full means that the thread has been woken already.
            let _ = rustix::io::write(&wake, &1_u64.to_ne_bytes());
        });
        let queue = Arc::new(Queue::new(limits, Some(waker)));
        let reads = Reads {
            ring: self.ring,
            wake: self.wake,
            queue: queue.clone(),
            under_way: HashMap::new(),
            next: 0,
        };
        std::thread::Builder::new()
            .name("hotset-ring".into())
            .spawn(move || reads.run())?;
        Ok(queue)
    }
}

struct Reads {
    ring: IoUring,
    wake: Arc<OwnedFd>,
    queue: Arc<Queue>,
    /// What the kernel writes into, by the number of the entry.
    under_way: HashMap<u64, Task>,
    next: u64,
}

impl Drop for Reads {
    fn drop(&mut self) {
        // Empty but after a failure of the ring. The kernel may still write here: better to lose the memory than to let
        // it serve another slab. Who waits for these pieces waits until their deadline.
        for (_, task) in self.under_way.drain() {
            std::mem::forget(task);
        }
    }
}

impl Reads {
    fn run(mut self) {
        if let Err(error) = self.serve() {
            tracing::error!(%error, "the ring failed; threads read from now on");
            self.queue.lose_ring();
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        self.listen()?;
        loop {
            let mut ended = false;
            while self.under_way.len() + 1 < ENTRIES as usize {
                match self.queue.turn(Duty::Ring) {
                    Turn::Take(task) => self.begin(task)?,
                    Turn::Wait(None) => break,
                    Turn::Wait(Some(rest)) if self.under_way.is_empty() => self.rest(rest)?,
                    Turn::Wait(Some(_)) => break,
                    Turn::End => {
                        ended = true;
                        break;
                    }
                }
            }
            if ended && self.under_way.is_empty() {
                return Ok(());
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The completion queue is full, or memory is short: what is there is taken first.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => {}
                Err(error) => return Err(error),
            }
            let completed: Vec<(u64, i32)> = self
                .ring
                .completion()
                .map(|entry| (entry.user_data(), entry.result()))
                .collect();
            for (number, result) in completed {
                if number == WAKE {
                    let mut count = [0; 8];
                    let _ = rustix::io::read(&self.wake, &mut count);
                    self.listen()?;
                } else if let Some(task) = self.under_way.remove(&number) {
                    self.ended(task, result)?;
                }
            }
        }
    }

    /// Waits this long, or until it is woken, while there is nothing to read but what has to wait for its rate.
    fn rest(&self, rest: Duration) -> io::Result<()> {
        let mut polled = [rustix::event::PollFd::new(&self.wake, PollFlags::IN)];
        let rest = rustix::time::Timespec::try_from(rest).ok();
        match rustix::event::poll(&mut polled, rest.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => Ok(()),
            Ok(_) => {
                let mut count = [0; 8];
                let _ = rustix::io::read(&self.wake, &mut count);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for wake-ups beside the reads.
    fn listen(&mut self) -> io::Result<()> {
        let poll = opcode::PollAdd::new(types::Fd(self.wake.as_raw_fd()), libc::POLLIN as u32)
            .build()
            .user_data(WAKE);
        // SAFETY: the entry has no memory of ours, and the descriptor lives as long as the ring.
        unsafe { self.push(&poll) }
    }

    /// Puts an entry into the ring.
    ///
    /// # Safety
    /// What the entry points to has to live until it completes.
    unsafe fn push(&mut self, entry: &io_uring::squeue::Entry) -> io::Result<()> {
        // SAFETY: as the caller promises.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }

    fn begin(&mut self, mut task: Task) -> io::Result<()> {
        let Some(fd) = task.file.direct_fd().filter(|_| is_aligned(&mut task)) else {
            self.queue.back(task, Way::Buffered);
            return Ok(());
        };
        let (done, end) = (task.done, direct_end(&task));
        let offset = task.offset + done as u64;
        let into = &mut task.piece.bytes()[done..end];
        // A piece is far below 4 GiB; what were beyond would come with the next read.
        let len = u32::try_from(into.len()).unwrap_or(!0xfff);
        let number = self.next;
        self.next = (self.next + 1) % WAKE;
        let read = opcode::Read::new(types::Fd(fd), into.as_mut_ptr(), len)
            .offset(offset)
            .build()
            .user_data(number);
        // Kept before the kernel hears of it, so that no way out of here leaves it writing into memory that is gone.
        self.under_way.insert(number, task);
        // SAFETY: the task, with the memory and the descriptor, stays in `under_way` until the entry completes.
        unsafe { self.push(&read) }
    }

    fn ended(&mut self, mut task: Task, result: i32) -> io::Result<()> {
        let read = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
        match after(&mut task, read) {
            Next::Whole => whole(&self.queue, task),
            Next::More => return self.begin(task),
            Next::Turn(way) => self.queue.back(task, way),
            Next::Fail(error) => self.queue.end(task, Err(error)),
        }
        Ok(())
    }
}
