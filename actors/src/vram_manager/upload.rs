//! Uploads: one component from RAM, from disk through a ring, or from another GPU, as a task of its own.

use std::sync::Arc;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use hotset_core::Bytes;
use hotset_core::catalog::Component;
use hotset_core::decision::EvictCause;
use hotset_core::device::layout::{Copy, DeviceLayout};
use hotset_core::device::{Allocation, Device, DeviceError, Piece};
use hotset_core::io::{OpenComponent, ReadError, ReadOn};
use hotset_core::memory::{
    Charge, Claim, Flight, FlightFailure, FlightState, FlightTicket, HostRange, Memory,
    ResidencyState, Slab, SlabWriter,
};
use hotset_core::plan::rates::Way;
use hotset_core::tensor::TensorTable;
use tokio::sync::Mutex;

use super::VramManagerMessage;
use super::turns::{Ticket, Turn};
use crate::counters::add;
use crate::house::House;
use crate::phases::LoadPhase;
use crate::ram_cache::RamCacheMessage;

/// Host memory through which components are streamed, one at a time.
pub(crate) type Ring = Arc<Mutex<Charge>>;

/// Where an upload's bytes come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// From its slab, which this claim holds or has promised.
    Ram(Claim),
    /// From disk through this ring.
    Ring(Ring),
    /// From the memory of another GPU, where this claim holds it.
    Peer(Claim),
}

/// One component on its way to a GPU.
pub(crate) struct Upload {
    pub(crate) house: Arc<House>,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) component: Arc<Component>,
    pub(crate) ticket: FlightTicket,
}

type Uploaded = (Allocation, Arc<TensorTable>);

impl Upload {
    #[tracing::instrument(name = "upload", skip_all, fields(component = %self.component.id))]
    pub(crate) async fn run(self, source: Source) {
        let began = self.house.ledger.now();
        let outcome = match source {
            Source::Ram(claim) => self.upload_slab(&claim).await,
            Source::Ring(ring) => {
                let charge = ring.lock().await;
                self.upload_ring(charge.bytes()).await
            }
            Source::Peer(claim) => self.copy_peer(&claim).await,
        };
        let counters = &self.house.counters;
        match outcome {
            Ok((allocation, table)) => {
                let took = self.house.ledger.now().saturating_sub(began);
                self.house.phases.record(LoadPhase::Upload, took);
                add(&counters.uploads, 1);
                add(&counters.bytes_uploaded, self.component.bytes.get());
                self.ticket.land(Memory::Device(allocation), table);
            }
            Err(failure) => {
                if !failure.is_passing() {
                    add(&counters.uploads_failed, 1);
                    tracing::warn!(error = %failure, "upload failed");
                }
                if let FlightFailure::Device(error @ DeviceError::Lost { .. }) = &failure {
                    // Sooner than the next measurement.
                    if let Some(slot) = self.house.vram.get(&self.device.describe().gpu) {
                        let _ = slot.cast(VramManagerMessage::Measured(Err(error.clone())));
                    }
                }
                // What was allocated is free before its bytes are promised again.
                self.device.settle().await;
                self.ticket.fail(failure);
            }
        }
    }

    /// Bytes of one batch.
    fn piece(&self) -> u64 {
        self.house.config.load.piece.get().max(1)
    }

    fn check_cancelled(&self) -> Result<(), FlightFailure> {
        if self.ticket.cancelled().is_cancelled() || self.house.stop.is_cancelled() {
            Err(FlightFailure::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Follows the slab's watermark to the end of the image.
    async fn upload_slab(&self, claim: &Claim) -> Result<Uploaded, FlightFailure> {
        let (slab, table, mut rising) = match claim.state() {
            ResidencyState::Absent => return Err(FlightFailure::Interrupted),
            ResidencyState::Resident { held, table } => match held.memory() {
                Memory::Host(slab) => (slab.clone(), table, None),
                Memory::Device(_) => return Err(FlightFailure::Interrupted),
            },
            ResidencyState::Loading(flight) => {
                let mut rising = Rising::new(self, flight);
                let (slab, table) = rising.image().await?;
                (slab, table, Some(rising))
            }
        };
        let layout = DeviceLayout::new(&table, self.piece());
        let allocation = self.allocate(layout.bytes).await?;
        let mut copies = Copies::new(self, &allocation);
        let image_end = layout
            .copies
            .last()
            .map_or(0, |copy| copy.from + copy.bytes);
        let mut done = 0;
        while done < image_end {
            self.check_cancelled()?;
            if let Some(rising) = &mut rising {
                copies.meanwhile(rising.past(&slab, done)).await?;
            }
            // As much as is there, so that nothing waits for the rest of a tensor.
            let end = (slab.filled().len() as u64)
                .min(image_end)
                .min(done + self.piece());
            copies
                .begin(&slab, layout.copies_within(done, end), 0)
                .await?;
            done = end;
        }
        copies.finish().await?;
        drop(copies);
        if let Some(mut rising) = rising {
            // Until the reader has checked the files once more, these bytes may be a mixture.
            rising.landed().await?;
        }
        Ok((allocation, layout.table))
    }

    /// Reads and uploads in turns through two halves of a ring: while one is uploaded, the other is read.
    async fn upload_ring(&self, ring: Bytes) -> Result<Uploaded, FlightFailure> {
        let failed = |error| FlightFailure::Read(Arc::new(error));
        self.check_cancelled()?;
        let _permit = self.house.reads.acquire().await;
        let mut open = self
            .house
            .reader
            .open(self.component.clone())
            .await
            .map_err(failed)?;
        let image_bytes = open.image_bytes().get();
        let half = Bytes((ring.get() / 2).max(1));
        let label = self.component.id.to_string();
        let (arena, near) = (&self.house.arena, self.device.describe().node);
        let mut spare = arena.slab_near(&label, half, near)?;
        let mut full = arena.slab_near(&label, half, near)?;
        let layout = DeviceLayout::new(open.table(), self.piece());
        let allocation = self.allocate(layout.bytes).await?;
        let mut copies = Copies::new(self, &allocation);
        let mut start = 0;
        // Reads until the half is full or the image ends.
        (open, full) = fill(open, full, image_bytes).await.map_err(failed)?;
        while start < image_bytes {
            self.check_cancelled()?;
            let end = start + full.filled().get();
            let upload = async {
                let mut done = start;
                while done < end {
                    let until = end.min(done + self.piece());
                    let batch = layout.copies_within(done, until);
                    copies.begin(full.slab(), batch, start).await?;
                    done = until;
                }
                copies.finish().await
            };
            let read = fill(open, spare, image_bytes.saturating_sub(end));
            let (uploaded, read) = tokio::join!(upload, read);
            uploaded?;
            let (reopened, next) = read.map_err(failed)?;
            open = reopened;
            // The upload has ended, so nobody else holds the half.
            spare = full.rewind().map_err(|_| FlightFailure::Interrupted)?;
            full = next;
            start = end;
        }
        drop(copies);
        Ok((allocation, layout.table))
    }

    /// Copies it from another GPU, where it lies in the same way. Where that fails, this way is closed, and whoever wants
    /// the component begins again and takes another.
    async fn copy_peer(&self, claim: &Claim) -> Result<Uploaded, FlightFailure> {
        self.check_cancelled()?;
        let ResidencyState::Resident { held, table } = claim.state() else {
            return Err(FlightFailure::Interrupted);
        };
        let Memory::Device(from) = held.memory() else {
            return Err(FlightFailure::Interrupted);
        };
        let end = table
            .iter()
            .map(|tensor| tensor.offset + tensor.bytes)
            .max();
        let bytes = Bytes(end.unwrap_or(0));
        let to = self.allocate(bytes).await?;
        let mut measured = self.house.moving(Way::Peer {
            from: from.gpu(),
            to: to.gpu(),
        });
        match self.device.copy_peer(&to, from, bytes.get()).await {
            Ok(()) => {
                measured.moved = bytes;
                add(&self.house.counters.bytes_from_peers, bytes.get());
                self.ticket.progress(bytes);
                Ok((to, table))
            }
            Err(error @ DeviceError::Lost { gpu, .. }) if gpu == to.gpu() => Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, from = %from.gpu(), to = %to.gpu(), "no copies between two GPUs");
                self.house.close_link(from.gpu(), to.gpu());
                Err(FlightFailure::Interrupted)
            }
        }
    }

    /// Memory for the component, within what was promised. Where the device has less than the books say, what nobody holds
    /// goes, and it is tried once more.
    async fn allocate(&self, bytes: Bytes) -> Result<Allocation, FlightFailure> {
        let refused = match self.device.clone().allocate(bytes).await {
            Err(DeviceError::OutOfMemory { wanted, free, .. }) => (wanted, free),
            other => return Ok(other?),
        };
        let (wanted, free) = refused;
        if self.ticket.urgency().is_prefetch() {
            // Nothing goes for a guess where the device itself is short; who has joined meanwhile begins again.
            return Err(FlightFailure::Interrupted);
        }
        tracing::warn!(%wanted, %free, "a GPU has less memory than it should; making room");
        if let Some(slot) = self.house.vram.get(&self.device.describe().gpu) {
            let call = slot.call(|reply| VramManagerMessage::MakeRoom {
                // Free memory may lie in pieces that are too small.
                missing: wanted,
                cause: EvictCause::OutOfMemory { wanted, free },
                reply,
            });
            // Where it does not answer, trying once more does no harm.
            let _ = call.await;
        }
        self.device.settle().await;
        Ok(self.device.clone().allocate(bytes).await?)
    }
}

/// The batches of one upload that are under way.
struct Copies<'a> {
    upload: &'a Upload,
    ticket: Option<Ticket>,
    to: &'a Allocation,
    moving: FuturesUnordered<BoxFuture<'a, Result<u64, DeviceError>>>,
    moved: Bytes,
}

impl<'a> Copies<'a> {
    fn new(upload: &'a Upload, to: &'a Allocation) -> Self {
        let turns = upload.house.turns.get(&to.gpu());
        Self {
            ticket: turns.map(|turns| turns.ticket(upload.ticket.urgency().clone())),
            upload,
            to,
            moving: FuturesUnordered::new(),
            moved: Bytes::ZERO,
        }
    }

    /// Begins copies out of a slab whose first byte is image byte `start`, as one batch, when it is this upload's turn.
    async fn begin(
        &mut self,
        slab: &Arc<Slab>,
        batch: impl Iterator<Item = Copy>,
        start: u64,
    ) -> Result<(), FlightFailure> {
        let mut pieces = Vec::new();
        let mut bytes = 0;
        for copy in batch {
            let at = copy.from - start;
            let from = HostRange::new(slab.clone(), at, at + copy.bytes)
                .ok_or(FlightFailure::Interrupted)?;
            pieces.push(Piece { to: copy.to, from });
            bytes += copy.bytes;
        }
        if pieces.is_empty() {
            return Ok(());
        }
        let turn = self.turn().await?;
        let (device, to) = (&self.upload.device, self.to);
        // A guess has one batch at a time: that says nothing of the link.
        let guess = self.upload.ticket.urgency().is_prefetch();
        let mut measured = (!guess).then(|| self.upload.house.moving(Way::Link(to.gpu())));
        let mut moving = async move {
            device.upload_all(to, pieces).await?;
            if let Some(measured) = &mut measured {
                measured.moved = Bytes(bytes);
            }
            drop((turn, measured));
            Ok(bytes)
        }
        .boxed();
        // Begun now, and not when the first of the others has ended.
        match (&mut moving).now_or_never() {
            Some(moved) => self.count(moved?),
            None => self.moving.push(moving),
        }
        Ok(())
    }

    /// Waits for a turn on the link, while the copies go on: theirs end with them.
    async fn turn(&mut self) -> Result<Option<Turn>, FlightFailure> {
        let Some(ticket) = &self.ticket else {
            return Ok(None);
        };
        let turn = ticket.turn();
        tokio::pin!(turn);
        let cancelled = self.upload.ticket.cancelled();
        loop {
            tokio::select! {
                biased;
                () = cancelled.cancelled() => return Err(FlightFailure::Cancelled),
                turn = &mut turn => return Ok(Some(turn)),
                Some(moved) = self.moving.next() => {
                    self.moved += Bytes(moved?);
                    self.upload.ticket.progress(self.moved);
                }
            }
        }
    }

    /// Waits for something else, while the copies go on.
    async fn meanwhile(
        &mut self,
        other: impl Future<Output = Result<(), FlightFailure>>,
    ) -> Result<(), FlightFailure> {
        tokio::pin!(other);
        loop {
            tokio::select! {
                biased;
                outcome = &mut other => return outcome,
                Some(moved) = self.moving.next() => self.count(moved?),
            }
        }
    }

    /// Waits for all.
    async fn finish(&mut self) -> Result<(), FlightFailure> {
        while !self.moving.is_empty() {
            self.one().await?;
        }
        Ok(())
    }

    async fn one(&mut self) -> Result<(), FlightFailure> {
        if let Some(moved) = self.moving.next().await {
            self.count(moved?);
        }
        Ok(())
    }

    fn count(&mut self, bytes: u64) {
        self.moved += Bytes(bytes);
        self.upload.ticket.progress(self.moved);
    }
}

/// Fills a half of the ring, or reads what is left of the image.
async fn fill(
    mut open: Box<dyn OpenComponent>,
    mut into: SlabWriter,
    left: u64,
) -> Result<ReadOn, ReadError> {
    let wanted = left.min(into.slab().bytes().get());
    while into.filled().get() < wanted {
        let missing = Bytes(wanted - into.filled().get());
        (open, into) = open.read(into, missing).await?;
    }
    Ok((open, into))
}

/// A read that an upload follows.
struct Rising<'a> {
    upload: &'a Upload,
    flight: Arc<Flight>,
}

impl<'a> Rising<'a> {
    const fn new(upload: &'a Upload, flight: Arc<Flight>) -> Self {
        Self { upload, flight }
    }

    /// Waits until the read has come as far as `done` says. Asks for the read at first and after each restart of
    /// RamCache, since the message may have been lost with it.
    async fn wait<T>(
        &mut self,
        mut done: impl FnMut(&Flight, &FlightState) -> Option<T>,
    ) -> Result<T, FlightFailure> {
        let mut states = self.flight.subscribe();
        let ram = &self.upload.house.ram;
        let mut restarts = ram.subscribe();
        let cancelled = self.upload.ticket.cancelled();
        loop {
            let state = states.borrow_and_update().clone();
            if let Some(value) = done(&self.flight, &state) {
                return Ok(value);
            }
            match state {
                FlightState::Failed(failure) => return Err(failure),
                FlightState::Waiting => {
                    // Unavailable now: the restart below sends it again.
                    let _ = ram.cast(RamCacheMessage::Fetch(
                        self.upload.component.clone(),
                        self.upload.device.describe().node,
                    ));
                }
                FlightState::Moving(_) | FlightState::Landed => {}
            }
            tokio::select! {
                biased;
                () = cancelled.cancelled() => return Err(FlightFailure::Cancelled),
                changed = states.changed() => changed.map_err(|_| FlightFailure::Interrupted)?,
                _ = restarts.changed() => {}
            }
        }
    }

    async fn image(&mut self) -> Result<(Arc<Slab>, Arc<TensorTable>), FlightFailure> {
        self.wait(|flight, _| {
            flight
                .image()
                .map(|image| (image.slab.clone(), image.table.clone()))
        })
        .await
    }

    /// Waits until there is more of the image than this.
    async fn past(&mut self, slab: &Slab, done: u64) -> Result<(), FlightFailure> {
        self.wait(|_, _| (slab.filled().len() as u64 > done).then_some(()))
            .await
    }

    async fn landed(&mut self) -> Result<(), FlightFailure> {
        self.wait(|_, state| matches!(state, FlightState::Landed).then_some(()))
            .await
    }
}
