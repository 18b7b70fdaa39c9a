//! The story of one read: from a promise to a slab that is whole.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use hotset_core::catalog::Component;
use hotset_core::decision::EvictCause;
use hotset_core::io::{ReadError, Urgency, Verifier};
use hotset_core::machine::NumaNode;
use hotset_core::memory::{FlightFailure, FlightTicket, Image, Slab, SlabError, SlabWriter};
use hotset_core::plan::disk;
use hotset_core::tensor::TensorTable;
use hotset_core::{Bytes, Tier};
use tokio::sync::SemaphorePermit;
use tokio::task::JoinHandle;

use crate::house::House;
use crate::ram_cache::RamCacheMessage;

/// A whole slab and what is in it.
type Read = (Arc<Slab>, Arc<TensorTable>);

/// Reads a component into a slab of its own.
pub(super) async fn run(
    house: &Arc<House>,
    component: &Arc<Component>,
    near: Option<NumaNode>,
    ticket: &mut FlightTicket,
) -> Result<Read, FlightFailure> {
    let urgency = ticket.urgency().clone();
    let cancelled = ticket.cancelled();
    let called_off = async {
        tokio::select! {
            biased;
            () = cancelled.cancelled() => {}
            () = house.stop.cancelled() => {}
        }
        // Whoever reads hears of it, and ends in its own time: a read under way still writes into the slab.
        urgency.call_off();
        std::future::pending::<()>().await;
    };
    let reading = async {
        let read = read(house, component, near, ticket, &urgency).await;
        if urgency.is_called_off() && read.is_err() {
            return Err(FlightFailure::Cancelled);
        }
        read
    };
    tokio::select! {
        biased;
        read = reading => read,
        () = called_off => Err(FlightFailure::Cancelled),
    }
}

async fn read(
    house: &Arc<House>,
    component: &Arc<Component>,
    near: Option<NumaNode>,
    ticket: &mut FlightTicket,
    urgency: &Urgency,
) -> Result<Read, FlightFailure> {
    let failed = |error| FlightFailure::Read(Arc::new(error));
    let _place = place(house, urgency).await?;
    let opened = house.reader.open_as(component.clone(), urgency.clone());
    let mut open = opened.await.map_err(failed)?;
    // The identity check in `open` makes this the size that was promised.
    debug_assert!(open.image_bytes() <= ticket.promised(), "{}", component.id);
    let image_bytes = open.image_bytes();
    let mut writer = slab(house, component, image_bytes, near, urgency).await?;
    ticket.settle(writer.slab().held());
    let table = open.table().clone();
    ticket.show(Image {
        slab: writer.slab().clone(),
        table: table.clone(),
    });
    let mut verifying = Verifying::new(house, component, writer.slab());
    // A guess is read when nobody else reads, and no faster than it may be: that says nothing of the disk.
    let mut moving = (!urgency.is_prefetch()).then(|| house.moving(disk(component)));
    while writer.filled() < image_bytes {
        if urgency.is_called_off() {
            open.stop(writer).await;
            return Err(FlightFailure::Cancelled);
        }
        (open, writer) = open
            .read(writer, house.config.load.piece)
            .await
            .map_err(failed)?;
        verifying.follow();
        ticket.progress(writer.filled());
        if let Some(moving) = &mut moving {
            moving.moved = writer.filled();
        }
    }
    drop(moving);
    verifying.finish(component).await.map_err(failed)?;
    Ok((writer.seal()?, table))
}

/// See [`Break::TwoFlights`](hotset_core::breaks::Break::TwoFlights).
pub(super) async fn twice(house: Arc<House>, component: Arc<Component>) {
    let Ok(mut open) = house.reader.open(component.clone()).await else {
        return;
    };
    let bytes = open.image_bytes();
    let Ok(mut writer) = slab(&house, &component, bytes, None, &Urgency::default()).await else {
        return;
    };
    while writer.filled() < bytes {
        match open.read(writer, house.config.load.piece).await {
            Ok(read) => (open, writer) = read,
            Err(_) => return,
        }
    }
}

/// A place among those who read; prefetches have their own until somebody waits for them.
async fn place<'a>(
    house: &'a House,
    urgency: &Urgency,
) -> Result<SemaphorePermit<'a>, FlightFailure> {
    let permit = tokio::select! {
        biased;
        () = urgency.called_off() => return Err(FlightFailure::Cancelled),
        permit = async {
            urgency.demanded().await;
            house.reads.acquire().await
        } => permit,
        permit = house.prefetches.acquire(), if urgency.is_prefetch() => permit,
    };
    // They are never closed.
    permit.map_err(|_| FlightFailure::Interrupted)
}

/// How often memory is asked for again where the machine has none, though the budget has.
const TRIES: u32 = 6;
/// Wait before it is asked again; doubled each time. What is evicted meanwhile takes as long to come back.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// Memory for the image, where blocking is allowed: other warm memory may have to go first, or what nobody holds.
async fn slab(
    house: &House,
    component: &Component,
    bytes: Bytes,
    near: Option<NumaNode>,
    urgency: &Urgency,
) -> Result<SlabWriter, FlightFailure> {
    let mut pause = FIRST_PAUSE;
    for left in (0..TRIES).rev() {
        let (arena, label) = (house.arena.clone(), component.id.to_string());
        let making = house.off_thread(move || arena.slab_near(&label, bytes, near));
        match making.await.map_err(|_| FlightFailure::Interrupted)? {
            // Nothing goes for a guess where the machine itself is short.
            Err(SlabError::NoRoom { .. }) if urgency.is_prefetch() => {
                return Err(FlightFailure::Interrupted);
            }
            Err(SlabError::NoRoom { room, .. }) if left > 0 => {
                relieve(house, bytes.saturating_sub(room));
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
            made => return Ok(made?),
        }
    }
    Err(FlightFailure::Interrupted)
}

/// Asks for memory that nobody holds to be given back to the machine.
fn relieve(house: &House, missing: Bytes) {
    let Some(ram) = house.ledger.sums(Tier::Ram) else {
        return;
    };
    let keep = ram.used().saturating_sub(missing);
    // Lost with a restart, it is asked for again at the next try.
    let _ = house.ram.cast(RamCacheMessage::Relieve {
        keep: keep.as_f64() / ram.budget.as_f64().max(1.0),
        cause: EvictCause::Pressure,
        reply: None,
    });
}

/// Digests a slab in the background while it is filled, where that is wanted and there is a digest to compare with.
struct Verifying<'a> {
    house: &'a House,
    slab: Arc<Slab>,
    idle: Option<Verifier>,
    busy: Option<JoinHandle<Verifier>>,
}

impl<'a> Verifying<'a> {
    fn new(house: &'a House, component: &Component, slab: &Arc<Slab>) -> Self {
        let wanted = house.config.load.verify;
        Self {
            house,
            slab: slab.clone(),
            idle: wanted.then(|| Verifier::new(component)).flatten(),
            busy: None,
        }
    }

    /// Goes on with what has come, if it is not still at work.
    fn follow(&mut self) {
        if let Some(busy) = &mut self.busy
            && let Some(Ok(verifier)) = busy.now_or_never()
        {
            self.busy = None;
            self.idle = Some(verifier);
        }
        if let Some(mut verifier) = self.idle.take() {
            let slab = self.slab.clone();
            self.busy = Some(self.house.off_thread(move || {
                verifier.follow(&slab);
                verifier
            }));
        }
    }

    /// Waits until all is digested.
    async fn finish(mut self, component: &Component) -> Result<(), ReadError> {
        self.idle = match self.idle.take() {
            None => self.rest(component).await?,
            idle => idle,
        };
        // What came while it was at work.
        self.follow();
        match self.rest(component).await? {
            Some(verifier) => verifier.finish(),
            None => Ok(()),
        }
    }

    /// Waits until it is not at work.
    async fn rest(&mut self, component: &Component) -> Result<Option<Verifier>, ReadError> {
        match self.busy.take() {
            None => Ok(None),
            Some(busy) => busy.await.map(Some).map_err(|_| ReadError::Interrupted {
                component: component.id.to_string(),
            }),
        }
    }
}
