//! Single flight: one movement of a component's bytes into a tier, however many sessions wait for it.

use std::sync::{Arc, OnceLock};

use crate::watch;
use tokio_util::sync::CancellationToken;

use super::ledger::{Charge, EntryKey, Held, Ledger, Memory};
use super::slab::Slab;
use crate::device::DeviceError;
use crate::io::{ReadError, Urgency};
use crate::memory::SlabError;
use crate::tensor::TensorTable;
use crate::units::Bytes;

/// Why a component's bytes did not arrive. The same value goes to everyone who waited.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FlightFailure {
    /// The files could not be read.
    #[error(transparent)]
    Read(#[from] Arc<ReadError>),
    /// The device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Host memory could not be had.
    #[error(transparent)]
    Slab(#[from] SlabError),
    /// Nobody waited any more.
    #[error("the load was cancelled, since nobody waited for it any more")]
    Cancelled,
    /// The task that moved the bytes ended without a word; trying again may help.
    #[error("the task that moved the bytes was interrupted")]
    Interrupted,
}

impl FlightFailure {
    /// Whether the same load may well succeed at once when it is tried again.
    #[must_use]
    pub const fn is_passing(&self) -> bool {
        matches!(self, Self::Cancelled | Self::Interrupted)
    }
}

/// How far a flight is.
#[derive(Debug, Clone)]
pub enum FlightState {
    /// Bytes are promised, and nobody moves them yet.
    Waiting,
    /// Under way: this much of the image is there.
    Moving(Bytes),
    /// All there.
    Landed,
    /// It failed; the promise is taken back.
    Failed(FlightFailure),
}

/// A slab that is being filled, with the tensors that it will hold.
#[derive(Debug, Clone)]
pub struct Image {
    /// The memory; follow its watermark.
    pub slab: Arc<Slab>,
    /// The tensors, with offsets into the image.
    pub table: Arc<TensorTable>,
}

/// One movement of bytes into a tier, as those see it who wait for it.
#[derive(Debug)]
pub struct Flight {
    state: watch::Sender<FlightState>,
    image: OnceLock<Image>,
    cancel: CancellationToken,
    urgency: Urgency,
}

impl Flight {
    pub(super) fn new(urgency: Urgency) -> Arc<Self> {
        Arc::new(Self {
            urgency,
            state: watch::Sender::new(FlightState::Waiting),
            image: OnceLock::new(),
            cancel: CancellationToken::new(),
        })
    }

    /// The state now and its changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<FlightState> {
        self.state.subscribe()
    }

    /// The memory that is being filled, once it is there. RAM flights only.
    #[must_use]
    pub fn image(&self) -> Option<&Image> {
        self.image.get()
    }

    /// How urgent it is; whoever joins may raise it.
    #[must_use]
    pub const fn urgency(&self) -> &Urgency {
        &self.urgency
    }

    pub(super) fn begin(&self) {
        self.state.send_replace(FlightState::Moving(Bytes::ZERO));
    }

    pub(super) fn cancel(&self) {
        self.cancel.cancel();
    }

    pub(super) fn fail(&self, failure: FlightFailure) {
        self.state.send_replace(FlightState::Failed(failure));
    }
}

/// The right and the duty to move one component's bytes; exists once for each flight. Dropping it without
/// [`land`](Self::land) fails the flight, frees the memory and gives the promised bytes back.
#[derive(Debug)]
pub struct FlightTicket {
    ledger: Arc<Ledger>,
    key: EntryKey,
    flight: Arc<Flight>,
    /// The promised bytes, taken over from the reservation. `None` once landed.
    charge: Option<Charge>,
}

impl FlightTicket {
    pub(super) const fn new(
        ledger: Arc<Ledger>,
        key: EntryKey,
        flight: Arc<Flight>,
        charge: Charge,
    ) -> Self {
        Self {
            ledger,
            key,
            flight,
            charge: Some(charge),
        }
    }

    /// How many bytes were promised: the most that may be allocated.
    #[must_use]
    pub fn promised(&self) -> Bytes {
        self.charge.as_ref().map_or(Bytes::ZERO, Charge::bytes)
    }

    /// Cancelled when nobody waits for this flight any more.
    #[must_use]
    pub fn cancelled(&self) -> CancellationToken {
        self.flight.cancel.clone()
    }

    /// How urgent it is, by all who wait for it.
    #[must_use]
    pub fn urgency(&self) -> &Urgency {
        &self.flight.urgency
    }

    /// The memory turned out to take this much, since it comes in whole pages: from now on the books say so.
    pub fn settle(&mut self, held: Bytes) {
        if let Some(charge) = &mut self.charge {
            self.ledger.resize(&self.key, charge, held);
        }
    }

    /// Shows the memory that is about to be filled, so that others can follow its watermark.
    pub fn show(&self, image: Image) {
        // A second image would be a flight that was started twice, which `Ledger::start` rules out.
        let shown = self.flight.image.set(image);
        debug_assert!(shown.is_ok(), "a flight has one image");
    }

    /// Tells that this much is there.
    pub fn progress(&self, moved: Bytes) {
        self.flight.state.send_replace(FlightState::Moving(moved));
    }

    /// The bytes are all there: from now on the component is resident.
    pub fn land(mut self, memory: Memory, table: Arc<TensorTable>) {
        if let Some(charge) = self.charge.take() {
            self.ledger
                .landed(&self.key, Arc::new(Held::new(memory, charge)), table);
            self.flight.state.send_replace(FlightState::Landed);
        }
    }

    /// It failed: everyone who waits gets this failure.
    pub fn fail(mut self, failure: FlightFailure) {
        self.end(failure);
    }

    /// The same where the memory is taken all the same, by others: the bytes stay charged.
    #[must_use]
    pub fn fail_charged(mut self, failure: FlightFailure) -> Option<Charge> {
        let charge = self.charge.take();
        self.ledger.forget(&self.key);
        self.flight.fail(failure);
        charge
    }

    fn end(&mut self, failure: FlightFailure) {
        if let Some(charge) = self.charge.take() {
            self.ledger.forget(&self.key);
            drop(charge);
            self.flight.fail(failure);
        }
    }
}

impl Drop for FlightTicket {
    fn drop(&mut self) {
        self.end(FlightFailure::Interrupted);
    }
}
