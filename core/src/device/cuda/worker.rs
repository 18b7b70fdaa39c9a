//! A thread that makes the driver's calls, one job after the other, so that no async worker ever waits for a driver.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

enum Order<S> {
    Do(Job<S>),
    Stop,
}

/// Since when a thread is in one and the same call, for those who wait for it: a driver may never return.
#[derive(Debug)]
pub(super) struct Pulse {
    base: Instant,
    /// Milliseconds after `base`, and one; 0: it waits for work.
    since: AtomicU64,
}

impl Default for Pulse {
    fn default() -> Self {
        Self {
            base: Instant::now(),
            since: AtomicU64::new(0),
        }
    }
}

impl Pulse {
    fn now(&self) -> u64 {
        u64::try_from(self.base.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
    }

    /// Does a piece of work, and says so meanwhile.
    pub(super) fn during<R>(&self, work: impl FnOnce() -> R) -> R {
        self.since.store(self.now(), Ordering::Release);
        let result = work();
        self.since.store(0, Ordering::Release);
        result
    }

    /// For how long the present piece of work has been going on.
    pub(super) fn busy(&self) -> Duration {
        match self.since.load(Ordering::Acquire) {
            0 => Duration::ZERO,
            since => Duration::from_millis(self.now().saturating_sub(since)),
        }
    }
}

/// A handle of the thread. The queue has no bound of its own: each job belongs to a load, an eviction or a request for
/// figures, and those are bounded where they come from.
pub(super) struct Worker<S> {
    orders: mpsc::Sender<Order<S>>,
}

impl<S> Clone for Worker<S> {
    fn clone(&self) -> Self {
        Self {
            orders: self.orders.clone(),
        }
    }
}

impl<S> std::fmt::Debug for Worker<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Worker")
    }
}

impl<S: 'static> Worker<S> {
    /// Starts a thread of this name, which makes its state, works until it is told to stop, and then ends the state. `pulse`
    /// shows all three.
    ///
    /// # Errors
    /// Where the system has no more threads.
    pub(super) fn start(
        name: String,
        pulse: Arc<Pulse>,
        begin: impl FnOnce() -> Option<S> + Send + 'static,
        end: impl FnOnce(S) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (orders, queue) = mpsc::channel::<Order<S>>();
        std::thread::Builder::new().name(name).spawn(move || {
            let Some(mut state) = pulse.during(begin) else {
                return;
            };
            while let Ok(Order::Do(job)) = queue.recv() {
                pulse.during(|| job(&mut state));
            }
            // Whoever asked after that gets no answer, which is one.
            drop(queue);
            pulse.during(|| end(state));
        })?;
        Ok(Self { orders })
    }

    /// Does something on the thread, sooner or later; never where it has ended.
    pub(super) fn tell(&self, job: impl FnOnce(&mut S) + Send + 'static) {
        let _ = self.orders.send(Order::Do(Box::new(job)));
    }

    /// The same with an answer, which fails where the thread has ended.
    pub(super) fn ask<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut S) -> R + Send + 'static,
    ) -> oneshot::Receiver<R> {
        let (answer, receiver) = oneshot::channel();
        self.tell(move |state| {
            let _ = answer.send(job(state));
        });
        receiver
    }

    /// Drops a value on the thread, for one that must not do it itself; on a new thread where this one has ended.
    pub(super) fn discard(&self, value: impl Send + 'static) {
        let order = Order::Do(Box::new(move |_: &mut S| drop(value)));
        if let Err(mpsc::SendError(order)) = self.orders.send(order) {
            std::thread::spawn(move || drop(order));
        }
    }

    /// Ends the thread after what is queued already.
    pub(super) fn stop(&self) {
        let _ = self.orders.send(Order::Stop);
    }
}
