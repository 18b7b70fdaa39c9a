//! Reading with plain `pread` on the runtime's blocking threads: works on every file system.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;

use super::image::{ImagePlan, check_identity};
use super::{OpenComponent, ReadError, ReadOn, Reader, owned};
use crate::catalog::Component;
use crate::memory::SlabWriter;
use crate::tensor::TensorTable;
use crate::units::Bytes;

/// The reader that uses buffered `pread`.
#[derive(Debug, Default, Clone, Copy)]
pub struct PreadReader;

impl Reader for PreadReader {
    fn name(&self) -> &'static str {
        "pread"
    }

    fn open(
        &self,
        component: Arc<Component>,
    ) -> BoxFuture<'static, Result<Box<dyn OpenComponent>, ReadError>> {
        async move {
            let name = component.id.to_string();
            tokio::task::spawn_blocking(move || ImagePlan::open(&component))
                .await
                .map_err(|_| ReadError::Interrupted {
                    component: name.clone(),
                })?
                .map(|plan| {
                    Box::new(OpenFiles {
                        name,
                        plan,
                        cursor: 0,
                        extent: 0,
                    }) as Box<dyn OpenComponent>
                })
        }
        .boxed()
    }
}

struct OpenFiles {
    name: String,
    plan: ImagePlan,
    /// The next byte of the image.
    cursor: u64,
    /// The extent in which the cursor is.
    extent: usize,
}

impl OpenFiles {
    /// Reads into `into`, at most `most` bytes of the image.
    fn read_blocking(&mut self, into: &mut SlabWriter, most: Bytes) -> Result<(), ReadError> {
        let mut left = most.get();
        while left > 0 && self.cursor < self.plan.bytes.get() {
            let extent = &self.plan.extents[self.extent];
            let (source, file) = &self.plan.files[extent.file];
            let at = extent.start + (self.cursor - extent.image_offset);
            let spare = into.spare();
            let room = left.min(spare.len() as u64);
            if room == 0 {
                return Ok(());
            }
            let moved = if at < extent.end {
                // `room` is the length of a slice in memory at most.
                let wanted = room.min(extent.end - at) as usize;
                match file.read_at(&mut spare[..wanted], at) {
                    Ok(0) => {
                        return Err(ReadError::Truncated {
                            path: owned(&source.path),
                            offset: at,
                            missing: Bytes(extent.end - at),
                        });
                    }
                    Ok(read) => read as u64,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        return Err(ReadError::Io {
                            path: owned(&source.path),
                            offset: at,
                            source: error,
                        });
                    }
                }
            } else {
                // Padding up to the next extent's border; used memory may hold old bytes.
                let padding = room.min(self.plan.next_offset(self.extent) - self.cursor);
                spare[..padding as usize].fill(0);
                padding
            };
            self.cursor += moved;
            left -= moved;
            if at + moved == extent.end {
                check_identity(file, source, "while it was read")?;
            }
            if self.cursor == self.plan.next_offset(self.extent) {
                self.extent += 1;
            }
            // Raised last: bytes of a file that changed stay above the watermark, as far as it is known by then.
            into.advance(moved as usize);
        }
        Ok(())
    }
}

impl OpenComponent for OpenFiles {
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
            let name = self.name.clone();
            tokio::task::spawn_blocking(move || {
                self.read_blocking(&mut into, most)?;
                Ok((self as Box<dyn OpenComponent>, into))
            })
            .await
            .map_err(|_| ReadError::Interrupted { component: name })?
        }
        .boxed()
    }
}
