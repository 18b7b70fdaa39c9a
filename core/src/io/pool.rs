//! Threads that read pieces with plain `pread`, past the page cache or through it.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use super::ReadError;
use super::queue::{Duty, Queue, Task, Way};
use crate::catalog::IMAGE_ALIGN;

/// How often a piece is tried again after a failure that may pass.
const RETRIES: u32 = 4;
/// Wait before it is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// What a piece needs after a read.
pub(super) enum Next {
    /// It is whole.
    Whole,
    /// More of the same.
    More,
    /// The rest comes on another way.
    Turn(Way),
    /// It cannot be read.
    Fail(ReadError),
}

/// Starts this many threads. They end with the queue.
pub(super) fn start(queue: &Arc<Queue>, threads: usize, duty: Duty) -> io::Result<()> {
    for i in 0..threads {
        let queue = queue.clone();
        std::thread::Builder::new()
            .name(format!("hotset-read-{i}"))
            .spawn(move || {
                while let Some(task) = queue.wait_turn(duty) {
                    work(&queue, task);
                }
            })?;
    }
    Ok(())
}

/// Reads one piece, or sends it on another way.
fn work(queue: &Queue, mut task: Task) {
    if task.cold {
        task.piece.populate();
        task.cold = false;
    }
    match task.way {
        Way::Cold => return queue.back(task, Way::Direct),
        Way::Again => {
            let doubled = task.failures.saturating_sub(1);
            std::thread::sleep(FIRST_PAUSE * 2_u32.saturating_pow(doubled));
        }
        Way::Direct | Way::Cached | Way::Buffered => {}
    }
    loop {
        let read = read(&mut task);
        match after(&mut task, read) {
            Next::More => {}
            Next::Whole => return whole(queue, task),
            Next::Turn(way) => return queue.back(task, way),
            Next::Fail(error) => return queue.end(task, Err(error)),
        }
    }
}

/// One read, for what is missing of the piece.
fn read(task: &mut Task) -> io::Result<usize> {
    let file = task.file.clone();
    let offset = task.offset + task.done as u64;
    let direct = matches!(task.way, Way::Direct | Way::Again) && is_aligned(task);
    match file.direct().filter(|_| direct) {
        Some(direct) => {
            let end = direct_end(task);
            FileExt::read_at(direct, &mut task.piece.bytes()[task.done..end], offset)
        }
        None => {
            let end = task.wanted;
            file.buffered()
                .read_at(&mut task.piece.bytes()[task.done..end], offset)
        }
    }
}

/// Whether what is missing begins where a direct read may begin, in the file as in memory.
pub(super) fn is_aligned(task: &mut Task) -> bool {
    let address = task.piece.bytes().as_ptr() as u64;
    [
        address,
        task.offset,
        task.done as u64,
        task.piece.len() as u64,
    ]
    .iter()
    .all(|n| n.is_multiple_of(IMAGE_ALIGN))
}

/// Where a direct read of what is missing ends in the piece: at a border of pages, since it may not end elsewhere.
pub(super) fn direct_end(task: &Task) -> usize {
    task.wanted
        .next_multiple_of(IMAGE_ALIGN as usize)
        .min(task.piece.len())
}

/// What a piece needs after a read ended like this.
pub(super) fn after(task: &mut Task, read: io::Result<usize>) -> Next {
    let direct = matches!(task.way, Way::Direct | Way::Again);
    match read {
        Ok(0) => Next::Fail(task.truncated()),
        Ok(bytes) => {
            task.done += bytes;
            if task.done >= task.wanted {
                Next::Whole
            } else if task.way == Way::Direct && !(task.done as u64).is_multiple_of(IMAGE_ALIGN) {
                // Short in the middle of a page: the file ends here now, or this one read did.
                Next::Turn(Way::Buffered)
            } else {
                Next::More
            }
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Next::More,
        Err(error)
            if direct
                && error.raw_os_error() == Some(libc::EINVAL)
                && task.file.direct().is_some() =>
        {
            tracing::debug!(path = %task.file.source.path.display(), "direct reads are refused");
            task.file.give_up_direct();
            Next::Turn(Way::Buffered)
        }
        Err(error) if passes(&error) && task.failures < RETRIES => {
            task.failures += 1;
            tracing::debug!(path = %task.file.source.path.display(), %error, "trying again");
            Next::Turn(Way::Again)
        }
        Err(error) => Next::Fail(task.failed(error)),
    }
}

/// Whether the same read may succeed soon.
pub(super) fn passes(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    ) || matches!(
        error.raw_os_error(),
        Some(libc::ENOMEM | libc::ENOBUFS | libc::EBUSY)
    )
}

/// Hands over a piece that is all there. Behind the end of the file, memory may hold old bytes.
pub(super) fn whole(queue: &Queue, mut task: Task) {
    let wanted = task.wanted;
    task.piece.bytes()[wanted..].fill(0);
    queue.end(task, Ok(()));
}
