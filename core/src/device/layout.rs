//! Where each tensor of a component goes in device memory.
//!
//! In its file a tensor is aligned to 8 bytes at best; kernels want more. So the device holds no image of the file, but
//! the tensors alone, each on a border of [`DEVICE_TENSOR_ALIGN`], in the order of the file, so that an upload can
//! follow a reader from front to back.

use std::sync::Arc;

use crate::catalog::DEVICE_TENSOR_ALIGN;
use crate::tensor::{TensorEntry, TensorTable};
use crate::units::Bytes;

/// One piece of an upload: image bytes `from..from + bytes` go to device offset `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy {
    /// First byte in the image.
    pub from: u64,
    /// First byte in the allocation.
    pub to: u64,
    /// How many bytes; never zero.
    pub bytes: u64,
}

/// A component's layout in device memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceLayout {
    /// What to copy, in rising order of `from`.
    pub copies: Vec<Copy>,
    /// The tensors, with offsets into the allocation.
    pub table: Arc<TensorTable>,
    /// Size of the allocation, before the device's granularity.
    pub bytes: Bytes,
}

impl DeviceLayout {
    /// The layout for these tensors. No single copy is longer than `longest` bytes, which must not be zero.
    #[must_use]
    pub fn new(image: &TensorTable, longest: u64) -> Self {
        let mut entries: Vec<TensorEntry> = image.iter().cloned().collect();
        entries.sort_by_key(|entry| entry.offset);
        let mut copies: Vec<Copy> = Vec::with_capacity(entries.len());
        let mut end = 0_u64;
        for entry in &mut entries {
            let (from, to) = (entry.offset, end.next_multiple_of(DEVICE_TENSOR_ALIGN));
            entry.offset = to;
            end = to + entry.bytes;
            let mut done = 0;
            while done < entry.bytes {
                // Neighbours that keep their distance go in one copy.
                if let Some(last) = copies.last_mut()
                    && last.bytes < longest
                    && last.from + last.bytes == from + done
                    && last.to + last.bytes == to + done
                {
                    let more = (entry.bytes - done).min(longest - last.bytes);
                    last.bytes += more;
                    done += more;
                    continue;
                }
                let bytes = (entry.bytes - done).min(longest);
                copies.push(Copy {
                    from: from + done,
                    to: to + done,
                    bytes,
                });
                done += bytes;
            }
        }
        let table = TensorTable::new(entries).unwrap_or_default();
        Self {
            copies,
            table: Arc::new(table),
            bytes: Bytes(end),
        }
    }

    /// The parts of the copies whose source lies in image bytes `start..end`, in the same order.
    pub fn copies_within(&self, start: u64, end: u64) -> impl Iterator<Item = Copy> {
        let first = self
            .copies
            .partition_point(|copy| copy.from + copy.bytes <= start);
        self.copies[first..]
            .iter()
            .take_while(move |copy| copy.from < end)
            .map(move |copy| {
                let from = copy.from.max(start);
                Copy {
                    from,
                    to: copy.to + (from - copy.from),
                    bytes: (copy.from + copy.bytes).min(end) - from,
                }
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype;
    use proptest::prelude::*;

    fn table(sizes: &[u64]) -> TensorTable {
        let mut offset = 104;
        let entries = sizes
            .iter()
            .enumerate()
            .map(|(i, &bytes)| {
                let entry = TensorEntry {
                    name: format!("t{i}").into(),
                    dtype: Dtype::U8,
                    shape: vec![bytes as usize],
                    offset,
                    bytes,
                };
                offset += bytes;
                entry
            })
            .collect();
        TensorTable::new(entries).unwrap()
    }

    #[test]
    fn neighbours_that_stay_aligned_go_in_one_copy() {
        let layout = DeviceLayout::new(&table(&[512, 256, 10, 4]), 1 << 20);
        assert_eq!(
            layout.copies,
            [
                Copy {
                    from: 104,
                    to: 0,
                    bytes: 778
                },
                Copy {
                    from: 882,
                    to: 1024,
                    bytes: 4
                },
            ]
        );
        assert_eq!(layout.bytes, Bytes(1028));
    }

    proptest! {
        #[test]
        fn every_byte_is_copied_once_to_its_aligned_place(
            sizes in proptest::collection::vec(0_u64..2000, 0..20),
            longest in 1_u64..700,
        ) {
            let image = table(&sizes);
            let layout = DeviceLayout::new(&image, longest);
            let source: Vec<u8> = (0..104 + sizes.iter().sum::<u64>()).map(|i| (i % 251) as u8).collect();
            let mut device = vec![0; layout.bytes.get() as usize];
            for copy in &layout.copies {
                prop_assert!(copy.bytes > 0 && copy.bytes <= longest);
                let (from, to, n) = (copy.from as usize, copy.to as usize, copy.bytes as usize);
                device[to..to + n].copy_from_slice(&source[from..from + n]);
            }
            prop_assert!(layout.copies.is_sorted_by_key(|copy| copy.from));
            for entry in image.iter() {
                let placed = layout.table.get(&entry.name).unwrap();
                prop_assert_eq!(placed.offset % DEVICE_TENSOR_ALIGN, 0);
                let n = entry.bytes as usize;
                prop_assert_eq!(
                    &device[placed.offset as usize..placed.offset as usize + n],
                    &source[entry.offset as usize..entry.offset as usize + n]
                );
            }
            // The same in windows of any length.
            let mut windowed = vec![0; device.len()];
            let mut start = 0;
            while start < source.len() as u64 {
                let end = (start + longest).min(source.len() as u64);
                for copy in layout.copies_within(start, end) {
                    let (from, to, n) = (copy.from as usize, copy.to as usize, copy.bytes as usize);
                    prop_assert!(n > 0 && copy.from >= start && copy.from + copy.bytes <= end);
                    windowed[to..to + n].copy_from_slice(&source[from..from + n]);
                }
                start = end;
            }
            prop_assert_eq!(&windowed, &device);
            let bound: u64 = sizes.iter().map(|n| n + DEVICE_TENSOR_ALIGN).sum();
            prop_assert!(layout.bytes.get() <= bound);
        }
    }
}
