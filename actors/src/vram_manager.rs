//! The VRAM tier of one GPU: admits sets, starts uploads, evicts.
//!
//! It owns no byte: allocations belong to the ledger. Uploads run in tasks that hold their [`FlightTicket`]; they follow
//! the reader's watermark, so that the link works while the disk still does. Loaders talk to it, and it talks to
//! RamCache.
//!
//! It asks the device at intervals how it is. What other processes have taken lowers the budget, and what nobody holds is
//! evicted for them; whoever holds leases is asked when that does not suffice. A device that is lost goes out of service
//! with all its leases; the actor ends, and after its restart tries to bring the device back.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use hotset_core::catalog::Component;
use hotset_core::config::GpuConfig;
use hotset_core::decision::EvictCause;
use hotset_core::device::layout::{Copy, DeviceLayout};
use hotset_core::device::{Allocation, Device, DeviceError, Figures, budget};
use hotset_core::io::{OpenComponent, ReadError, ReadOn};
use hotset_core::memory::{
    Charge, Claim, Flight, FlightFailure, FlightState, FlightTicket, HostRange, Memory,
    ResidencyState, Slab, SlabWriter,
};
use hotset_core::tensor::TensorTable;
use hotset_core::{Bytes, GpuIndex, RequestId, SessionId, Tier};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

use crate::admission::{Admission, Request};
use crate::counters::add;
use crate::house::{GpuEvent, House, Shortage};
use crate::ram_cache::{RamCacheMessage, wake_on};

/// Host memory through which components are streamed, one at a time.
pub(crate) type Ring = Arc<Mutex<Charge>>;

/// Where an upload's bytes come from.
#[derive(Debug)]
pub(crate) enum Source {
    /// From its slab, which this claim holds or has promised.
    Ram(Claim),
    /// From disk through this ring.
    Ring(Ring),
}

/// What the VRAM tier of one GPU is asked.
#[derive(Debug)]
pub(crate) enum VramManagerMessage {
    /// Memory for a set.
    Reserve(Request),
    /// Upload this component, which is promised; nothing where it is there or under way.
    Upload(Arc<Component>, Source),
    /// Bytes came back, or a pin was lifted.
    Woken,
    /// Evict down to this share of the budget.
    Relieve {
        /// What may stay.
        keep: f64,
        /// Why.
        cause: EvictCause,
        /// How many bytes are coming back.
        reply: Option<RpcReplyPort<Bytes>>,
    },
    /// An allocation found less memory than the books say: evict what nobody holds, until this much comes back.
    MakeRoom {
        /// How much.
        missing: Bytes,
        /// Why.
        cause: EvictCause,
        /// How many bytes are coming back.
        reply: RpcReplyPort<Bytes>,
    },
    /// How the device is.
    Measured(Result<Figures, DeviceError>),
    /// Whether a lost device could be brought back.
    Recovered(Result<(), DeviceError>),
    /// The state.
    Observe(RpcReplyPort<VramView>),
}

/// The state of a VRAM tier beside its books.
#[derive(Debug, Clone, Default)]
pub(crate) struct VramView {
    /// How many sets wait.
    pub(crate) waiting: usize,
    /// What the device said last.
    pub(crate) figures: Option<Figures>,
}

pub(crate) struct VramManager;

pub(crate) struct State {
    house: Arc<House>,
    tier: Tier,
    device: Arc<dyn Device>,
    config: GpuConfig,
    admission: Admission,
    figures: Option<Figures>,
    /// What leases hold beyond the budget, so that their holders are asked once for each change.
    wanted: Bytes,
    _wake: AbortOnDropHandle<()>,
    _measuring: AbortOnDropHandle<()>,
}

#[ractor::actor(message = VramManagerMessage, state = State, arguments = (Arc<House>, GpuIndex))]
impl VramManager {
    async fn pre_start(
        &self,
        myself: ActorRef<VramManagerMessage>,
        (house, gpu): (Arc<House>, GpuIndex),
    ) -> Result<State, ActorProcessingErr> {
        let device = house
            .devices
            .get(&gpu)
            .cloned()
            .ok_or_else(|| format!("there is no device for GPU {gpu}"))?;
        let config = house
            .config
            .gpu
            .get(gpu.0 as usize)
            .cloned()
            .unwrap_or_default();
        let tier = Tier::Vram(gpu);
        let mut admission = Admission::new(
            house.clone(),
            tier,
            config.high_watermark,
            config.low_watermark,
        );
        match device.lost() {
            None => house.ledger.set_service(tier, None),
            // Until it is back, loads are refused instead of waiting.
            Some(reason) => house.ledger.set_service(tier, Some(reason)),
        }
        admission.trim();
        let wake = wake_on(&house, tier, myself.clone(), || VramManagerMessage::Woken);
        let measuring = watch_device(house.config.monitor.gpu_interval, device.clone(), myself);
        Ok(State {
            figures: house.first_figures.get(&gpu).cloned(),
            house,
            tier,
            device,
            config,
            admission,
            wanted: Bytes::ZERO,
            _wake: wake,
            _measuring: measuring,
        })
    }

    #[ractor::message(VramManagerMessage::Measured(measured))]
    fn measured(
        &self,
        myself: ActorRef<VramManagerMessage>,
        measured: Result<Figures, DeviceError>,
        state: &mut State,
    ) {
        match measured {
            Ok(figures) => state.measured(figures),
            Err(DeviceError::Lost { reason, .. }) => {
                state.lost(&reason);
                // The supervisor starts it again, and it tries to bring the device back.
                myself.stop(Some(format!("its GPU is lost: {reason}")));
            }
            Err(error) => tracing::warn!(%error, "a GPU does not say how it is"),
        }
    }

    #[ractor::message(VramManagerMessage::Recovered(recovered))]
    fn recovered(
        &self,
        myself: ActorRef<VramManagerMessage>,
        recovered: Result<(), DeviceError>,
        state: &mut State,
    ) {
        let tier = state.tier;
        match recovered {
            Ok(()) => {
                state.house.ledger.set_service(tier, None);
                let _ = state.house.gpu_events.send(GpuEvent::Back { tier });
            }
            Err(error) => {
                let reason = error.to_string();
                state
                    .house
                    .ledger
                    .set_service(tier, Some(reason.clone().into()));
                myself.stop(Some(reason));
            }
        }
    }

    #[ractor::message(VramManagerMessage::MakeRoom { missing, cause, reply })]
    fn make_room(
        &self,
        missing: Bytes,
        cause: EvictCause,
        reply: RpcReplyPort<Bytes>,
        state: &mut State,
    ) {
        let _ = reply.send(state.admission.evict_up_to(missing, &cause));
    }

    #[ractor::message(VramManagerMessage::Reserve(request))]
    fn reserve(&self, request: Request, state: &mut State) {
        state.admission.submit(request);
    }

    #[ractor::message(VramManagerMessage::Upload(component, source))]
    fn upload(&self, component: Arc<Component>, source: Source, state: &mut State) {
        if let Some(ticket) = state.house.ledger.start(state.tier, &component.content_id) {
            let upload = Upload {
                house: state.house.clone(),
                device: state.device.clone(),
                component,
                ticket,
            };
            // Not tied to the actor: an upload outlives its restart.
            state.house.tasks.spawn(upload.run(source));
        }
    }

    #[ractor::message(VramManagerMessage::Woken)]
    fn woken(&self, state: &mut State) {
        state.admission.retry();
    }

    #[ractor::message(VramManagerMessage::Relieve { keep, cause, reply })]
    fn relieve(
        &self,
        keep: f64,
        cause: EvictCause,
        reply: Option<RpcReplyPort<Bytes>>,
        state: &mut State,
    ) {
        let surplus = state
            .house
            .ledger
            .view(state.tier)
            .map_or(Bytes::ZERO, |view| {
                view.committed
                    .saturating_sub(view.evicting)
                    .saturating_sub(view.budget.share(keep))
            });
        let freed = state.admission.evict_up_to(surplus, &cause);
        if let Some(reply) = reply {
            let _ = reply.send(freed);
        }
    }

    #[ractor::message(VramManagerMessage::Observe(reply))]
    fn observe(&self, reply: RpcReplyPort<VramView>, state: &mut State) {
        let _ = reply.send(VramView {
            waiting: state.admission.waiting(),
            figures: state.figures.clone(),
        });
    }
}

impl State {
    /// Keeps within what others leave.
    fn measured(&mut self, figures: Figures) {
        let allowed = budget::allowed(&self.config, &figures);
        let cause = EvictCause::Foreign {
            foreign: figures.foreign,
            allowed,
        };
        let ledger = &self.house.ledger;
        if ledger.view(self.tier).map(|view| view.budget) != Some(allowed) {
            ledger.open_tier(self.tier, allowed);
        }
        self.figures = Some(figures);
        let missing = self.admission.keep_within_budget(&cause);
        if missing > self.wanted {
            let leases = self.house.ledger.leases_in(self.tier);
            tracing::warn!(tier = %self.tier, %missing, leases = leases.len(), "others took memory that leases hold");
            let _ = self.house.gpu_events.send(GpuEvent::Wanted {
                tier: self.tier,
                missing,
                leases,
            });
            // Clients that let go when they are asked hear of it like of any other shortage. Nobody's load is behind it.
            let _ = self.house.shortages.send(Shortage {
                tier: self.tier,
                session: SessionId(0),
                request: RequestId(0),
                missing,
            });
        }
        self.wanted = missing;
        // What was lowered may have risen again.
        self.admission.retry();
    }

    /// Takes the tier out of service, with everything that was in it.
    fn lost(&self, reason: &Arc<str>) {
        let ledger = &self.house.ledger;
        ledger.set_service(self.tier, Some(reason.clone()));
        let leases = ledger.revoke_tier(self.tier, reason);
        tracing::error!(tier = %self.tier, %reason, leases = leases.len(), "a GPU is out of service");
        let _ = self.house.gpu_events.send(GpuEvent::Lost {
            tier: self.tier,
            reason: reason.clone(),
            leases,
        });
    }
}

/// Brings the device back where it is lost, and then asks it at intervals how it is. Ends with the manager.
fn watch_device(
    interval: Duration,
    device: Arc<dyn Device>,
    manager: ActorRef<VramManagerMessage>,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        if device.lost().is_some() {
            let recovered = device.recover().await;
            let failed = recovered.is_err();
            let told = manager.send_message(VramManagerMessage::Recovered(recovered));
            if failed || told.is_err() {
                return;
            }
        }
        let mut ticks = tokio::time::interval(interval.max(Duration::from_millis(10)));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            ticks.tick().await;
            let measured = device.figures().await;
            if manager
                .send_message(VramManagerMessage::Measured(measured))
                .is_err()
            {
                return;
            }
        }
    }))
}

/// How many copies of one upload are under way at the same time: one that the link carries, and enough behind it to keep
/// it busy while the news of the first comes here.
const COPIES: usize = 4;

struct Upload {
    house: Arc<House>,
    device: Arc<dyn Device>,
    component: Arc<Component>,
    ticket: FlightTicket,
}

type Uploaded = (Allocation, Arc<TensorTable>);

impl Upload {
    #[tracing::instrument(name = "upload", skip_all, fields(component = %self.component.id))]
    async fn run(self, source: Source) {
        let outcome = match source {
            Source::Ram(claim) => self.upload_slab(&claim).await,
            Source::Ring(ring) => {
                let charge = ring.lock().await;
                self.upload_ring(charge.bytes()).await
            }
        };
        let counters = &self.house.counters;
        match outcome {
            Ok((allocation, table)) => {
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
        let layout = DeviceLayout::new(&table, self.house.config.load.piece.get().max(1));
        let allocation = self.allocate(layout.bytes).await?;
        let mut copies = Copies::new(self, &allocation);
        for copy in &layout.copies {
            self.check_cancelled()?;
            let end = copy.from + copy.bytes;
            if let Some(rising) = &mut rising {
                copies.meanwhile(rising.until(&slab, end)).await?;
            }
            copies.begin(&slab, *copy, 0).await?;
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
        let mut spare = self.house.arena.slab(&label, half)?;
        let mut full = self.house.arena.slab(&label, half)?;
        let layout = DeviceLayout::new(open.table(), self.house.config.load.piece.get().max(1));
        let allocation = self.allocate(layout.bytes).await?;
        let mut copies = Copies::new(self, &allocation);
        let mut start = 0;
        // Reads until the half is full or the image ends.
        (open, full) = fill(open, full, image_bytes).await.map_err(failed)?;
        while start < image_bytes {
            self.check_cancelled()?;
            let end = start + full.filled().get();
            let upload = async {
                for copy in layout.copies_within(start, end) {
                    copies.begin(full.slab(), copy, start).await?;
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

    /// Memory for the component, within what was promised. Where the device has less than the books say, what nobody holds
    /// goes, and it is tried once more.
    async fn allocate(&self, bytes: Bytes) -> Result<Allocation, FlightFailure> {
        let refused = match self.device.clone().allocate(bytes).await {
            Err(DeviceError::OutOfMemory { wanted, free, .. }) => (wanted, free),
            other => return Ok(other?),
        };
        let (wanted, free) = refused;
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

/// The copies of one upload that are under way.
struct Copies<'a> {
    upload: &'a Upload,
    to: &'a Allocation,
    moving: FuturesUnordered<BoxFuture<'a, Result<u64, DeviceError>>>,
    moved: Bytes,
}

impl<'a> Copies<'a> {
    fn new(upload: &'a Upload, to: &'a Allocation) -> Self {
        Self {
            upload,
            to,
            moving: FuturesUnordered::new(),
            moved: Bytes::ZERO,
        }
    }

    /// Begins a copy out of a slab whose first byte is image byte `start`; waits while there are too many already.
    async fn begin(
        &mut self,
        slab: &Arc<Slab>,
        copy: Copy,
        start: u64,
    ) -> Result<(), FlightFailure> {
        while self.moving.len() >= COPIES {
            self.one().await?;
        }
        let at = copy.from - start;
        let from =
            HostRange::new(slab.clone(), at, at + copy.bytes).ok_or(FlightFailure::Interrupted)?;
        let (device, to) = (&self.upload.device, self.to);
        let mut moving = async move {
            device.upload(to, copy.to, from).await?;
            Ok(copy.bytes)
        }
        .boxed();
        // Begun now, and not when the first of the others has ended.
        match (&mut moving).now_or_never() {
            Some(moved) => self.count(moved?),
            None => self.moving.push(moving),
        }
        Ok(())
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
                    let _ = ram.cast(RamCacheMessage::Fetch(self.upload.component.clone()));
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

    async fn until(&mut self, slab: &Slab, end: u64) -> Result<(), FlightFailure> {
        self.wait(|_, _| (slab.filled().len() as u64 >= end).then_some(()))
            .await
    }

    async fn landed(&mut self) -> Result<(), FlightFailure> {
        self.wait(|_, state| matches!(state, FlightState::Landed).then_some(()))
            .await
    }
}
