//! The VRAM tier on NVIDIA GPUs, with doubles for `libcuda.so.1` and `libnvidia-ml.so.1`: everything of hotset is real,
//! from the file to the driver's call. Each test runs in a process of its own, and fails where the driver is used wrongly
//! or anything is left behind.
// Clippy's own exemption reaches `#[test]` functions only, not what they call.
#![allow(clippy::unwrap_used)]

#[path = "../it/library.rs"]
#[allow(dead_code)]
mod library;

mod binary;
mod bundle;
mod clients;
mod faults;
mod memory;
mod peers;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use hotset::bridge::Bridge;
use hotset::bridge::wire::ServerMessage;
use hotset::client::{Client, LoadOptions, RemoteLease};
use hotset::core::device::FigureSource;
use hotset::core::device::cuda::{Cuda, Imported};
use hotset::core::policy::EvictionPolicy;
use hotset::{
    Act, ActorName, Bytes, ComponentSet, Config, EvictCause, GpuEvent, GpuIndex, Health, Hotset,
    Lease, LoadError, Session, Target, Tier, TierStatus,
};
use hotset_double_machine::{Call, Isolated, Machine, in_role, run, run_role, this_test};

use library::{Gambler, Library, Tensors, assert_tensors, outcome, soon, until};

const GPU: Tier = Tier::Vram(GpuIndex(0));

/// Runs a body that needs tokio.
fn block_on(body: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(body);
}

fn gpus(gpus: usize) -> Isolated {
    Isolated {
        gpus,
        ..Isolated::default()
    }
}

/// A machine whose GPUs have so many MiB for hotset, beside the driver's and the context's.
fn set_room(machine: &Machine, mib: u64) {
    for i in 0..machine.gpus() {
        let gpu = machine.gpu(i);
        let taken = gpu.reserved.load(SeqCst) + gpu.context.load(SeqCst);
        gpu.total.store(taken + (mib << 20), SeqCst);
    }
}

fn config(library: &Library) -> Config {
    let mut config = library.config(Bytes::mib(64));
    config.cuda.detect = true;
    config.cuda.headroom = Bytes::ZERO;
    config.monitor.gpu_interval = Duration::from_millis(20);
    config
}

async fn start(config: Config) -> Hotset {
    let start = Hotset::builder().config(config).start();
    soon("the start", start).await.unwrap()
}

async fn tier(hotset: &Hotset, tier: Tier) -> TierStatus {
    let tiers = hotset.status().await.tiers;
    tiers
        .into_iter()
        .find(|status| status.tier == tier)
        .unwrap()
}

async fn load(session: &Session, name: &str) -> Vec<Lease> {
    outcome(session.load(ComponentSet::new([name])))
        .await
        .unwrap()
}

/// Everything goes, and is gone when this ends.
async fn end(hotset: Hotset) {
    soon("the drain", hotset.drain()).await;
}
