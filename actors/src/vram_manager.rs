//! The VRAM tier of one GPU: admits sets, starts uploads, evicts.
//!
//! It owns no byte: allocations belong to the ledger. Uploads run in tasks that hold their [`FlightTicket`]; they follow
//! the reader's watermark, so that the link works while the disk still does. Loaders talk to it, and it talks to
//! RamCache.

use std::sync::Arc;

use hotset_core::catalog::Component;
use hotset_core::decision::EvictCause;
use hotset_core::device::layout::DeviceLayout;
use hotset_core::device::{Allocation, Device};
use hotset_core::io::{OpenComponent, ReadError, ReadOn};
use hotset_core::memory::{
    Charge, Claim, Flight, FlightFailure, FlightState, FlightTicket, HostRange, Memory,
    ResidencyState, Slab, SlabWriter,
};
use hotset_core::tensor::TensorTable;
use hotset_core::{Bytes, GpuIndex, Tier};
use ractor::{ActorProcessingErr, ActorRef, RpcReplyPort};
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

use crate::admission::{Admission, Request, Used};
use crate::counters::add;
use crate::house::House;
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
    /// A session uses components here.
    Used(Used),
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
    /// How many sets wait.
    Observe(RpcReplyPort<usize>),
}

pub(crate) struct VramManager;

pub(crate) struct State {
    house: Arc<House>,
    tier: Tier,
    device: Arc<dyn Device>,
    admission: Admission,
    _wake: AbortOnDropHandle<()>,
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
        admission.trim();
        let wake = wake_on(&house, tier, myself, || VramManagerMessage::Woken);
        Ok(State {
            house,
            tier,
            device,
            admission,
            _wake: wake,
        })
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

    #[ractor::message(VramManagerMessage::Used(used))]
    fn used(&self, used: Used, state: &mut State) {
        state.admission.used(&used);
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
    fn observe(&self, reply: RpcReplyPort<usize>, state: &mut State) {
        let _ = reply.send(state.admission.waiting());
    }
}

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
        let allocation = self.device.clone().allocate(layout.bytes).await?;
        let mut moved = Bytes::ZERO;
        for copy in &layout.copies {
            self.check_cancelled()?;
            let end = copy.from + copy.bytes;
            if let Some(rising) = &mut rising {
                rising.until(&slab, end).await?;
            }
            let from =
                HostRange::new(slab.clone(), copy.from, end).ok_or(FlightFailure::Interrupted)?;
            self.device.upload(&allocation, copy.to, from).await?;
            moved += Bytes(copy.bytes);
            self.ticket.progress(moved);
        }
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
        let allocation = self.device.clone().allocate(layout.bytes).await?;
        let (mut start, mut moved) = (0, Bytes::ZERO);
        // Reads until the half is full or the image ends.
        (open, full) = fill(open, full, image_bytes).await.map_err(failed)?;
        while start < image_bytes {
            self.check_cancelled()?;
            let end = start + full.filled().get();
            let upload = async {
                for copy in layout.copies_within(start, end) {
                    let from = HostRange::new(
                        full.slab().clone(),
                        copy.from - start,
                        copy.from - start + copy.bytes,
                    )
                    .ok_or(FlightFailure::Interrupted)?;
                    self.device.upload(&allocation, copy.to, from).await?;
                    moved += Bytes(copy.bytes);
                    self.ticket.progress(moved);
                }
                Ok::<(), FlightFailure>(())
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
        Ok((allocation, layout.table))
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
