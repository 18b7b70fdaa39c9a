//! What every [`Device`] must do, run against each implementation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Device, DeviceError};
use crate::memory::{HostRange, Slab};
use crate::units::Bytes;

/// These bytes in host memory.
pub(crate) fn host_bytes(contents: &[u8]) -> HostRange {
    HostRange::new(host_slab(contents), 0, contents.len() as u64).unwrap()
}

/// These bytes as a slab.
pub(crate) fn host_slab(contents: &[u8]) -> Arc<Slab> {
    let mut writer = Slab::create("contract", Bytes(contents.len() as u64)).unwrap();
    writer.spare().copy_from_slice(contents);
    writer.advance(contents.len());
    writer.seal().unwrap()
}

/// Says when it is dropped.
struct Confirm(Arc<AtomicBool>);

impl Drop for Confirm {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Runs the contract. The device must be empty and keep its bytes.
pub(crate) async fn check<D: Device>(device: Arc<D>) {
    let description = device.describe();
    let granules = description.granules;
    let part = granules.footprint(Bytes(1)).get();
    let page = granules.page;
    let three_pages = Bytes(page.get() * 3);
    let at_start = device.figures().await.unwrap();
    assert!(at_start.free <= description.memory);
    assert_eq!(at_start.allocated, Bytes::ZERO);

    let first = device.clone().allocate(Bytes(1)).await.unwrap();
    assert_eq!(first.bytes().get(), part, "rounded up");
    let second = device.clone().allocate(Bytes(part)).await.unwrap();
    assert_ne!(first.address(), second.address());
    assert_ne!(first.id(), second.id());
    let large = device
        .clone()
        .allocate(Bytes(page.get() * 2 + 1))
        .await
        .unwrap();
    assert_eq!(large.bytes(), three_pages, "whole pages");
    let during = device.figures().await.unwrap();
    assert_eq!(during.allocated, Bytes(2 * part) + three_pages);
    assert!(during.free <= at_start.free.saturating_sub(three_pages));

    device.upload(&first, 3, host_bytes(b"abc")).await.unwrap();
    device.upload(&second, 0, host_bytes(b"xyz")).await.unwrap();
    // Several at once, from the first byte to the last.
    let contents: Vec<u8> = (0..large.bytes().get()).map(|i| (i % 251) as u8).collect();
    let slab = host_slab(&contents);
    let (half, end) = (contents.len() as u64 / 2, contents.len() as u64);
    let (a, b) = tokio::join!(
        device.upload(&large, 0, HostRange::new(slab.clone(), 0, half).unwrap()),
        device.upload(&large, half, HostRange::new(slab, half, end).unwrap()),
    );
    a.unwrap();
    b.unwrap();
    let back = device.download(&large, 0, large.bytes().get()).await;
    assert!(back.unwrap() == contents, "contents differ");
    assert_eq!(device.download(&first, 3, 3).await.unwrap(), b"abc");
    assert_eq!(device.download(&second, 0, 3).await.unwrap(), b"xyz");

    let outside = device.upload(&first, part - 1, host_bytes(b"ab")).await;
    assert!(matches!(outside, Err(DeviceError::OutOfRange { .. })));
    let wrapped = device.download(&first, u64::MAX, 2).await;
    assert!(matches!(wrapped, Err(DeviceError::OutOfRange { .. })));
    let too_much = device.clone().allocate(description.memory + Bytes(1)).await;
    assert!(matches!(too_much, Err(DeviceError::OutOfMemory { .. })));

    let confirmed = Arc::new(AtomicBool::new(false));
    large.keep_until_freed(Box::new(Confirm(confirmed.clone())));
    drop((first, second, large));
    device.settle().await;
    assert!(
        confirmed.load(Ordering::SeqCst),
        "nobody said that it is free"
    );
    let at_end = device.figures().await.unwrap();
    assert_eq!(at_end.free, at_start.free, "all came back");
    assert_eq!(at_end.allocated, Bytes::ZERO);
    assert_eq!(device.lost(), None);
    device.recover().await.unwrap();
}
