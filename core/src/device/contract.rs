//! What every [`Device`] must do, run against each implementation.

use std::sync::Arc;

use super::{Device, DeviceError};
use crate::memory::{HostRange, Slab};
use crate::units::Bytes;

/// These bytes in host memory.
pub(crate) fn host_bytes(contents: &[u8]) -> HostRange {
    let mut writer = Slab::create("contract", Bytes(contents.len() as u64)).unwrap();
    writer.spare().copy_from_slice(contents);
    writer.advance(contents.len());
    HostRange::new(writer.seal().unwrap(), 0, contents.len() as u64).unwrap()
}

/// Runs the contract. The device must be empty and keep its bytes.
pub(crate) async fn check<D: Device>(device: Arc<D>) {
    let description = device.describe();
    let granularity = description.granularity.get();
    let free_at_start = device.free().unwrap();

    let first = device.clone().allocate(Bytes(1)).await.unwrap();
    assert_eq!(first.bytes().get(), granularity, "rounded up");
    let second = device.clone().allocate(Bytes(granularity)).await.unwrap();
    assert_ne!(first.address(), second.address());

    device.upload(&first, 3, host_bytes(b"abc")).await.unwrap();
    device.upload(&second, 0, host_bytes(b"xyz")).await.unwrap();
    assert_eq!(device.download(&first, 3, 3).await.unwrap(), b"abc");
    assert_eq!(device.download(&second, 0, 3).await.unwrap(), b"xyz");

    let outside = device
        .upload(&first, granularity - 1, host_bytes(b"ab"))
        .await;
    assert!(matches!(outside, Err(DeviceError::OutOfRange { .. })));
    let wrapped = device.download(&first, u64::MAX, 2).await;
    assert!(matches!(wrapped, Err(DeviceError::OutOfRange { .. })));
    let too_much = device.clone().allocate(description.memory + Bytes(1)).await;
    assert!(matches!(too_much, Err(DeviceError::OutOfMemory { .. })));

    drop((first, second));
    assert_eq!(device.free().unwrap(), free_at_start, "all came back");
}
