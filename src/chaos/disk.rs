//! The simulated disk: real bytes, but in virtual time and with faults, on the runtime's own thread.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use hotset_core::io::{ImagePlan, OpenComponent, ReadError, ReadOn, Reader, Urgency};
use hotset_core::memory::SlabWriter;
use hotset_core::tensor::TensorTable;
use tokio::time::Instant;

use crate::{Bytes, Component};

#[derive(Debug, Default)]
pub(super) struct Faults {
    /// The next reads that fail, and by which error of the system.
    pub(super) errors: u32,
    pub(super) error: i32,
    pub(super) short: u32,
    pub(super) panics: u32,
    pub(super) stalled_until: Option<Instant>,
    /// A disk that lies: its bytes are wrong, and it says that they are right.
    pub(super) lies: bool,
    /// What was done to files that are not whole since, by their names.
    pub(super) damage: BTreeMap<String, &'static str>,
    /// How often reads met with each kind of fault.
    pub(super) met: BTreeMap<&'static str, u64>,
    /// Reads under way, with their urgency.
    reading: BTreeMap<u64, (Arc<str>, Urgency)>,
    next: u64,
}

impl Faults {
    /// The most reads of one component at the same time that somebody waits for.
    pub(super) fn most_at_once(&self) -> Option<(String, usize)> {
        let mut counts = BTreeMap::new();
        for (name, urgency) in self.reading.values() {
            if !urgency.is_called_off() {
                *counts.entry(name.as_ref()).or_insert(0) += 1;
            }
        }
        let most: Option<(&str, usize)> = counts.into_iter().max_by_key(|(_, count)| *count);
        most.map(|(name, count)| (name.to_owned(), count))
    }

    fn note(&mut self, kind: &'static str) {
        *self.met.entry(kind).or_default() += 1;
    }

    /// A file was not as it was scanned.
    fn note_damage(&mut self, component: &Component) {
        if let Some(kind) = self.damage.get(component.id.model.as_str()).copied() {
            self.note(kind);
        }
    }

    pub(super) fn reading(&self) -> usize {
        self.reading.len()
    }
}

/// See the module's page.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk(Arc<Mutex<Faults>>);

impl Disk {
    pub(super) fn faults(&self) -> MutexGuard<'_, Faults> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A seek, and a disk of 5 MB/s, so that small files take as long as large ones do.
const SEEK: Duration = Duration::from_millis(2);
const PER_KIB: Duration = Duration::from_micros(200);

impl Reader for Disk {
    fn name(&self) -> &'static str {
        "simulated"
    }

    fn open(
        &self,
        component: Arc<Component>,
    ) -> BoxFuture<'static, Result<Box<dyn OpenComponent>, ReadError>> {
        self.open_as(component, Urgency::default())
    }

    fn open_as(
        &self,
        component: Arc<Component>,
        urgency: Urgency,
    ) -> BoxFuture<'static, Result<Box<dyn OpenComponent>, ReadError>> {
        let disk = self.clone();
        async move {
            let name = format!("{} {:?}", component.id, component.content_id).into();
            let number = {
                let mut faults = disk.faults();
                faults.next += 1;
                let number = faults.next;
                faults.reading.insert(number, (name, urgency));
                number
            };
            let reading = Reading { disk, number };
            reading.disk.clone().pass(Bytes::kib(4)).await;
            let plan = ImagePlan::open(&component)
                .inspect_err(|_| reading.disk.faults().note_damage(&component))?;
            Ok(Box::new(Open {
                component,
                plan,
                cursor: 0,
                extent: 0,
                reading,
            }) as Box<dyn OpenComponent>)
        }
        .boxed()
    }
}

impl Disk {
    /// The time that this takes, stalls included.
    async fn pass(self, bytes: Bytes) {
        tokio::time::sleep(SEEK + PER_KIB * (bytes.get() >> 10) as u32).await;
        let now = Instant::now();
        let stalled = self.faults().stalled_until.filter(|until| *until > now);
        if let Some(until) = stalled {
            self.faults().note("stall-disk");
            tokio::time::sleep_until(until).await;
        }
    }
}

/// Counts a read for as long as it is under way.
struct Reading {
    disk: Disk,
    number: u64,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.disk.faults().reading.remove(&self.number);
    }
}

struct Open {
    component: Arc<Component>,
    plan: ImagePlan,
    cursor: u64,
    extent: usize,
    reading: Reading,
}

impl Open {
    fn piece(&mut self, into: &mut SlabWriter, most: u64) -> Result<(), ReadError> {
        let Some(extent) = self.plan.extents.get(self.extent) else {
            return Ok(());
        };
        let (source, file) = &self.plan.files[extent.file];
        let at = extent.start + (self.cursor - extent.image_offset);
        let (most, lies) = {
            let mut faults = self.reading.disk.faults();
            if faults.panics > 0 {
                faults.panics -= 1;
                faults.note("read-panics");
                drop(faults);
                std::panic::resume_unwind(Box::new("a read of the simulation panics"));
            }
            if faults.errors > 0 {
                faults.errors -= 1;
                let error = faults.error;
                faults.note(if error == libc::ENOSPC {
                    "no-space"
                } else {
                    "read-errors"
                });
                return Err(ReadError::Io {
                    path: source.path.to_path_buf(),
                    offset: at,
                    source: io::Error::from_raw_os_error(error),
                });
            }
            let short = faults.short > 0;
            faults.short = faults.short.saturating_sub(1);
            if short {
                faults.note("short-reads");
            }
            (if short { 512 } else { most }, faults.lies)
        };
        let next = self.plan.next_offset(self.extent);
        let spare = into.spare();
        let room = most.min(spare.len() as u64).min(next - self.cursor) as usize;
        let moved = if at < extent.end {
            let wanted = room.min((extent.end - at) as usize);
            let read = file.read_at(&mut spare[..wanted], at);
            let read = read.map_err(|error| ReadError::Io {
                path: source.path.to_path_buf(),
                offset: at,
                source: error,
            })?;
            if read == 0 {
                self.reading.disk.faults().note_damage(&self.component);
                return Err(ReadError::Truncated {
                    path: source.path.to_path_buf(),
                    offset: at,
                    missing: Bytes(extent.end - at),
                });
            }
            if lies {
                spare[read - 1] ^= 1;
            }
            read
        } else {
            spare[..room].fill(0);
            room
        };
        self.cursor += moved as u64;
        if self.cursor == next {
            self.extent += 1;
        }
        if self.extent == self.plan.extents.len() {
            // The files are still those that were scanned.
            ImagePlan::open(&self.component)
                .inspect_err(|_| self.reading.disk.faults().note_damage(&self.component))?;
        }
        into.advance(moved);
        Ok(())
    }
}

impl OpenComponent for Open {
    fn image_bytes(&self) -> Bytes {
        self.plan.bytes
    }

    fn table(&self) -> &Arc<TensorTable> {
        &self.plan.table
    }

    fn read(
        mut self: Box<Self>,
        mut into: SlabWriter,
        most: Bytes,
    ) -> BoxFuture<'static, Result<ReadOn, ReadError>> {
        async move {
            self.reading.disk.clone().pass(most).await;
            self.piece(&mut into, most.get())?;
            Ok((self as Box<dyn OpenComponent>, into))
        }
        .boxed()
    }
}
