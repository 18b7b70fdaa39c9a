//! What NVML says of a GPU, asked on a thread of its own, since it may take long and keeps its handles to itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use tokio::sync::oneshot;

use super::ProcessUse;
use crate::units::Bytes;

/// What NVML says at one time.
#[derive(Debug, Clone, Default)]
pub(super) struct Reading {
    pub(super) total: u64,
    pub(super) free: u64,
    pub(super) processes: Vec<ProcessUse>,
    pub(super) temperature_c: Option<u32>,
    pub(super) throttling: Vec<String>,
    pub(super) pcie: Option<(u32, u32)>,
    pub(super) pcie_most: Option<(u32, u32)>,
    pub(super) ecc_uncorrected: Option<u64>,
    pub(super) mig: Option<bool>,
    /// Events since the last reading.
    pub(super) xids: Vec<u64>,
}

/// NVML's answer.
#[derive(Debug, Clone)]
pub(super) enum Answer {
    /// It is not here, or does not know the device.
    Absent,
    /// The figures.
    Read(Box<Reading>),
    /// The device is gone.
    Gone(String),
}

/// Asks NVML about one GPU. The thread ends with it.
#[derive(Debug)]
pub(super) struct NvmlWatch {
    questions: Option<mpsc::Sender<oneshot::Sender<Answer>>>,
    /// How long an answer may take before NVML counts as absent.
    patience: Duration,
    /// It has not answered the last question: it may never.
    silent: Arc<AtomicBool>,
}

impl NvmlWatch {
    /// Starts to watch the device that one of these names means.
    pub(super) fn start(gpu: String, names: Vec<String>, patience: Duration) -> Self {
        let (questions, queue) = mpsc::channel();
        let silent = Arc::new(AtomicBool::new(false));
        let answered = silent.clone();
        let thread = std::thread::Builder::new()
            .name(format!("nvml-{gpu}"))
            .spawn(move || {
                if let Err(error) = watch(&names, &queue, &answered) {
                    tracing::info!(%error, gpu, "no NVML; the CUDA driver's own figures are used");
                }
            });
        Self {
            questions: thread.is_ok().then_some(questions),
            patience,
            silent,
        }
    }

    /// What it says now.
    pub(super) async fn ask(&self) -> Answer {
        let (answer, receiver) = oneshot::channel();
        let Some(questions) = &self.questions else {
            return Answer::Absent;
        };
        if self.silent.load(Ordering::Acquire) || questions.send(answer).is_err() {
            return Answer::Absent;
        }
        match tokio::time::timeout(self.patience, receiver).await {
            Ok(answer) => answer.unwrap_or(Answer::Absent),
            Err(_) => {
                tracing::error!("NVML does not answer; the CUDA driver's own figures are used");
                self.silent.store(true, Ordering::Release);
                Answer::Absent
            }
        }
    }
}

fn watch(
    names: &[String],
    queue: &mpsc::Receiver<oneshot::Sender<Answer>>,
    silent: &AtomicBool,
) -> Result<(), NvmlError> {
    let nvml = Nvml::init()?;
    let mut found = Err(NvmlError::NotFound);
    for name in names {
        found = nvml.device_by_uuid(name.as_str());
        if found.is_ok() {
            break;
        }
    }
    let device = found?;
    // Without events, Xid errors show as what they do.
    let events = nvml.create_event_set().ok().and_then(|set| {
        device
            .register_events(EventTypes::CRITICAL_XID_ERROR, set)
            .ok()
    });
    while let Ok(answer) = queue.recv() {
        let mut xids = Vec::new();
        while let Some(Ok(event)) = events.as_ref().map(|events| events.wait(0)) {
            xids.push(match event.event_data {
                Some(XidError::Value(xid)) => xid,
                Some(XidError::Unknown) | None => 0,
            });
        }
        let read = read(&device).map(|reading| Reading { xids, ..reading });
        let _ = answer.send(match read {
            Ok(reading) => Answer::Read(Box::new(reading)),
            Err(error @ (NvmlError::GpuLost | NvmlError::ResetRequired)) => {
                Answer::Gone(error.to_string())
            }
            Err(error) => {
                tracing::warn!(%error, "NVML does not tell a GPU's memory");
                Answer::Absent
            }
        });
        // Also after it was given up: here it is again.
        silent.store(false, Ordering::Release);
    }
    Ok(())
}

/// All figures; only those of memory are indispensable.
fn read(device: &nvml_wrapper::Device<'_>) -> Result<Reading, NvmlError> {
    let memory = device.memory_info()?;
    let processes = device.running_compute_processes().unwrap_or_default();
    // Idle and set by the user are no trouble.
    let harmless = ThrottleReasons::GPU_IDLE | ThrottleReasons::APPLICATIONS_CLOCKS_SETTING;
    let throttling = device
        .current_throttle_reasons()
        .map(|reasons| reasons.difference(harmless))
        .unwrap_or(ThrottleReasons::empty());
    Ok(Reading {
        // The driver keeps some for itself on an idle GPU, which is nobody's use.
        total: memory.total.saturating_sub(memory.reserved),
        free: memory.free,
        processes: processes
            .iter()
            .map(|process| ProcessUse {
                pid: process.pid,
                bytes: match process.used_gpu_memory {
                    UsedGpuMemory::Used(bytes) => Some(Bytes(bytes)),
                    UsedGpuMemory::Unavailable => None,
                },
            })
            .collect(),
        temperature_c: device.temperature(TemperatureSensor::Gpu).ok(),
        throttling: throttling
            .iter_names()
            .map(|(name, _)| name.to_lowercase().replace('_', " "))
            .collect(),
        pcie: device
            .current_pcie_link_gen()
            .and_then(|generation| Ok((generation, device.current_pcie_link_width()?)))
            .ok(),
        pcie_most: device
            .max_pcie_link_gen()
            .and_then(|generation| Ok((generation, device.max_pcie_link_width()?)))
            .ok(),
        ecc_uncorrected: device
            .total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile)
            .ok(),
        mig: device.mig_mode().ok().map(|mode| mode.current != 0),
        xids: Vec::new(),
    })
}
