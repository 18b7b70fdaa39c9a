//! A component that is being read through the queue.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use super::disk::Service;
use super::image::{Extent, ImagePlan};
use super::opened::Opened;
use super::queue::{Done, StreamId, Task, Way};
use super::urgency::Urgency;
use super::{OpenComponent, ReadError, ReadOn};
use crate::catalog::IMAGE_ALIGN;
use crate::memory::{SlabPiece, SlabWriter};
use crate::tensor::TensorTable;
use crate::units::Bytes;

/// From this share on a piece counts as cached: what is missing of it is read ahead by the kernel while the rest is
/// copied.
const CACHED_SHARE: f64 = 0.9;

/// So many times of what can be in flight wait in the queue: the disk must not run dry while this task waits for a
/// processor. A piece that waits costs nothing.
const AHEAD: u64 = 8;

/// See the module's page.
pub(super) struct OpenStream {
    name: String,
    files: Vec<Arc<Opened>>,
    extents: Vec<Extent>,
    table: Arc<TensorTable>,
    bytes: Bytes,
    /// Bytes of each file that are still to come. Its identity is checked when none are.
    left: Vec<u64>,
    /// The next byte of the image to ask for.
    cursor: u64,
    /// The extent in which the cursor is.
    extent: usize,

    urgency: Urgency,
    queue: Arc<Service>,
    id: StreamId,
    results: mpsc::UnboundedReceiver<Done>,
    reply: mpsc::UnboundedSender<Done>,
    /// Pieces that were asked for and have not come; never many, see `top_up`.
    out: usize,
    out_bytes: u64,
}

impl OpenStream {
    /// Opens the files behind a plan once more as the queue needs them. Blocks.
    pub(super) fn new(
        name: String,
        plan: ImagePlan,
        queue: Arc<Service>,
        urgency: Urgency,
        direct: bool,
    ) -> Self {
        let mut left = vec![0; plan.files.len()];
        for extent in &plan.extents {
            if let Some(left) = left.get_mut(extent.file) {
                *left += extent.end - extent.start;
            }
        }
        let files = plan
            .files
            .into_iter()
            .map(|(source, file)| Arc::new(Opened::new(source, file, direct)))
            .collect();
        let (reply, results) = mpsc::unbounded_channel();
        Self {
            name,
            files,
            extents: plan.extents,
            table: plan.table,
            bytes: plan.bytes,
            left,
            cursor: 0,
            extent: 0,
            id: queue.open(urgency.clone()),
            urgency,
            queue,
            results,
            reply,
            out: 0,
            out_bytes: 0,
        }
    }

    /// Asks for pieces until enough of them wait to keep the disk busy, or memory or image end.
    fn top_up(&mut self, into: &mut SlabWriter, most: Bytes) -> Result<(), ReadError> {
        let most = usize::try_from(most.get()).unwrap_or(usize::MAX).max(1);
        let enough = self.queue.limits().in_flight.saturating_mul(AHEAD);
        while self.out_bytes < enough
            && let Some(extent) = self.extents.get(self.extent)
        {
            let next = self
                .extents
                .get(self.extent + 1)
                .map_or(self.bytes.get(), |next| next.image_offset);
            if self.cursor >= next {
                self.extent += 1;
                continue;
            }
            let room = usize::try_from(next - self.cursor).unwrap_or(usize::MAX);
            let Some(piece) = into.lend(most.min(room)) else {
                break;
            };
            let index = extent.file;
            let at = extent.start + (self.cursor - extent.image_offset);
            let wanted = extent.end.saturating_sub(at).min(piece.len() as u64) as usize;
            self.cursor += piece.len() as u64;
            self.ask(into, piece, index, at, wanted)?;
        }
        Ok(())
    }

    fn ask(
        &mut self,
        into: &mut SlabWriter,
        mut piece: SlabPiece,
        index: usize,
        offset: u64,
        wanted: usize,
    ) -> Result<(), ReadError> {
        let Some(file) = self.files.get(index).filter(|_| wanted > 0) else {
            // Padding alone; used memory may hold old bytes.
            piece.bytes().fill(0);
            into.take_back(piece);
            return Ok(());
        };
        let aligned = [piece.bytes().as_ptr() as u64, offset, piece.len() as u64]
            .iter()
            .all(|n| n.is_multiple_of(IMAGE_ALIGN));
        let direct = aligned && file.direct().is_some();
        let cached = || {
            file.cached_share(offset, wanted as u64)
                .is_some_and(|share| share >= CACHED_SHARE)
        };
        let cold = piece.is_cold();
        let way = match (direct, cached()) {
            (true, true) if self.queue.prefers_cache() => Way::Cached,
            (true, _) if cold && self.queue.has_ring() => Way::Cold,
            (true, _) => Way::Direct,
            (false, true) => Way::Cached,
            (false, false) => Way::Buffered,
        };
        self.out += 1;
        self.out_bytes += piece.len() as u64;
        self.queue.push(Task {
            piece,
            file: file.clone(),
            index,
            offset,
            wanted,
            done: 0,
            way,
            cold,
            failures: 0,
            stream: self.id,
            guessed: false,
            reply: self.reply.clone(),
        });
        Ok(())
    }

    /// Takes a piece that came.
    fn take(&mut self, done: Done, into: &mut SlabWriter) -> Result<(), ReadError> {
        let Done {
            piece,
            index,
            wanted,
            result,
        } = done;
        self.out -= 1;
        self.out_bytes -= piece.len() as u64;
        result?;
        if let (Some(left), Some(file)) = (self.left.get_mut(index), self.files.get(index)) {
            *left = left.saturating_sub(wanted as u64);
            if *left == 0 {
                // Before the last piece of the file counts: the watermark never passes the end of a file that changed.
                file.check("while it was read")?;
            }
        }
        into.take_back(piece);
        Ok(())
    }

    async fn read_on(&mut self, into: &mut SlabWriter, most: Bytes) -> Result<(), ReadError> {
        let before = into.filled();
        loop {
            self.top_up(into, most)?;
            if into.filled() > before || self.out == 0 {
                return Ok(());
            }
            let urgency = self.urgency.clone();
            let done = tokio::select! {
                biased;
                () = urgency.called_off() => None,
                done = self.results.recv() => done,
            };
            let Some(done) = done else {
                return Err(ReadError::Interrupted {
                    component: self.name.clone(),
                });
            };
            self.take(done, into)?;
            while let Ok(done) = self.results.try_recv() {
                self.take(done, into)?;
            }
        }
    }
}

impl OpenComponent for OpenStream {
    fn image_bytes(&self) -> Bytes {
        self.bytes
    }

    fn table(&self) -> &Arc<TensorTable> {
        &self.table
    }

    fn read(
        mut self: Box<Self>,
        mut into: SlabWriter,
        most: Bytes,
    ) -> BoxFuture<'static, Result<ReadOn, ReadError>> {
        async move {
            match self.read_on(&mut into, most).await {
                Ok(()) => Ok((self as Box<dyn OpenComponent>, into)),
                Err(error) => {
                    self.stop(into).await;
                    Err(error)
                }
            }
        }
        .boxed()
    }

    fn stop(mut self: Box<Self>, into: SlabWriter) -> BoxFuture<'static, ()> {
        async move {
            // What nobody has begun never comes.
            self.out -= self.queue.close(self.id);
            while self.out > 0 && self.results.recv().await.is_some() {
                self.out -= 1;
            }
            drop(into);
        }
        .boxed()
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.queue.close(self.id);
    }
}
