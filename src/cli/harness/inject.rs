//! How each fault is done to the run's server, its clients and its files.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use hotset::Bytes;
use hotset::client::Client;
use rustix::process::Signal;
use serde_json::Value;

use super::doubles;
use super::faults::{self, Fault};
use super::run::{CONTROL, PATIENCE, Run, at};
use super::server::signal;
use super::worker::below;
use crate::cli::CliError;

/// What a shrinking limit leaves above what is in use, step by step. The first is more than all that the server could have promised
/// to loads under way, and each step is smaller than what it keeps free at the one before; see `docs/memory.md`.
const SHRINKING: [Bytes; 6] = [
    Bytes::mib(48),
    Bytes::mib(40),
    Bytes::mib(32),
    Bytes::mib(24),
    Bytes::mib(16),
    Bytes::mib(16),
];
/// Time from when the server has answered after a step to the next, and at the last one.
const STEP: Duration = Duration::from_millis(300);

impl Run {
    pub(super) async fn inject(&mut self, fault: Fault) -> Result<(), CliError> {
        let socket = self.socket.clone();
        match fault {
            Fault::KillWorker => self.kill_worker().await,
            Fault::PauseWorker => {
                let worker = below(&mut self.rng, self.workers.len().max(1));
                if let Some(worker) = self.workers.get(worker) {
                    let pid = worker.child.id();
                    self.pause(pid, 300).await;
                }
            }
            Fault::GarbageOnSocket => faults::garbage_on_socket(&socket, &mut self.rng).await,
            Fault::GarbageOnHttp => {
                if let Some(own) = &self.own {
                    let port = own.http;
                    faults::garbage_on_http(port, &mut self.rng).await;
                }
            }
            Fault::SilentConnections => {
                let count = 1 + below(&mut self.rng, 4000);
                faults::silent_connections(&socket, count).await;
            }
            Fault::SlowReader => faults::slow_reader(&socket).await,
            Fault::KillServer | Fault::KillServerAndSpoilIndex => self.kill_server(fault).await?,
            Fault::PauseServer => {
                if let Some(pid) = self.pid() {
                    self.pause(pid, 500).await;
                }
            }
            Fault::FewDescriptors => self.few_descriptors().await,
            Fault::ShrinkMemory => self.shrink_memory().await,
            Fault::Harm(harm) => {
                let victim = below(&mut self.rng, 64);
                if let Some(own) = &mut self.own {
                    let folder = own.place.home.clone();
                    own.library.harm(victim, harm).map_err(at(&folder))?;
                }
            }
            Fault::ManyFiles => {
                if let Some(own) = &self.own {
                    let folder = own.place.home.join("models/many");
                    many_files(&folder).map_err(at(&folder))?;
                }
            }
            Fault::FullDisk => self.full_disk().await?,
            Fault::Gpu(fault) => {
                let gpu = below(&mut self.rng, doubles::GPUS);
                if let Some(own) = &mut self.own
                    && let Some(doubles) = &mut own.doubles
                {
                    let injected = doubles.inject(fault, gpu).await;
                    injected.map_err(at(&own.place.home))?;
                }
            }
        }
        Ok(())
    }

    async fn pause(&mut self, pid: u32, most_ms: usize) {
        let time = Duration::from_millis(20 + below(&mut self.rng, most_ms) as u64);
        if signal(pid, Signal::STOP).is_ok() {
            tokio::time::sleep(time).await;
            let _ = signal(pid, Signal::CONT);
        }
    }

    /// Kills a worker, and waits until the server holds nothing for it.
    async fn kill_worker(&mut self) {
        if self.workers.is_empty() {
            return;
        }
        let at = below(&mut self.rng, self.workers.len());
        let Ok(client) = Client::connect_to(&self.socket, CONTROL).await else {
            return;
        };
        let mut worker = self.workers.swap_remove(at);
        let Ok(status) = client.status().await else {
            return;
        };
        let held = leases_of(&status, &worker.label);
        let killed = Instant::now();
        if worker.child.kill().is_err() {
            return;
        }
        while killed.elapsed() < PATIENCE {
            let Ok(status) = client.status().await else {
                return;
            };
            if leases_of(&status, &worker.label).is_none() {
                if held.is_some_and(|leases| leases > 0) {
                    self.findings.returned.add(killed.elapsed());
                }
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.violation(
            "leases-end-with-their-client",
            format!(
                "{} was killed {} s ago and is still listed",
                worker.label,
                PATIENCE.as_secs()
            ),
        );
    }

    /// Kills the server and starts another; gives when.
    pub(super) fn replace_server(&mut self, spoil: bool) -> Result<Instant, CliError> {
        let killed = Instant::now();
        let Some(own) = &mut self.own else {
            return Ok(killed);
        };
        let path = own.place.log.clone();
        let panics = own.server.panics().map_err(at(&path))?;
        let killed = Instant::now();
        own.server.kill().map_err(at(&path))?;
        if spoil {
            let index = own.place.home.join("state/catalogue.db");
            std::fs::write(&index, b"this was an index once").map_err(at(&index))?;
        }
        for panic in panics {
            self.violation("no-panic", panic);
        }
        self.start_server()?;
        Ok(killed)
    }

    async fn kill_server(&mut self, fault: Fault) -> Result<(), CliError> {
        let killed = self.replace_server(fault == Fault::KillServerAndSpoilIndex)?;
        if self.serving().await? {
            self.findings.restarted.add(killed.elapsed());
        }
        Ok(())
    }

    /// For a moment the server can open next to nothing.
    async fn few_descriptors(&mut self) {
        let Some(own) = &self.own else { return };
        let Ok(open) = own.server.open_descriptors() else {
            return;
        };
        let few = open + below(&mut self.rng, 8) as u64;
        if let Ok(before) = own.server.limit_descriptors(Some(few)) {
            faults::silent_connections(&self.socket, 20).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            let _ = own.server.limit_descriptors(before);
        }
    }

    /// The server's group is allowed less and less, a little more than it uses at each step. An administrator who cuts below what is in use has the kernel kill the server, whatever it does: the memory of
    /// slabs cannot be swapped out where there is no swap.
    async fn shrink_memory(&mut self) {
        let Some(own) = &self.own else { return };
        let Some(group) = &own.group else { return };
        let mut limit: Option<Bytes> = None;
        for room in SHRINKING {
            let Ok(used) = group.used() else { break };
            let next = used.saturating_add(room);
            let next = limit.map_or(next, |limit| next.min(limit));
            // Where it can be had, the gentle limit goes first. It is below what is in use: nobody is killed for that.
            let _ = group.slow_above(Some(used.saturating_sub(Bytes::mib(8))));
            // Refused where the kernel cannot get the memory back from anybody: then nothing has changed.
            if group.set(Some(next)).is_ok() {
                limit = Some(next);
            }
            // A server that others leave no processor has not seen the step yet.
            let _ = self.status().await;
            tokio::time::sleep(STEP).await;
        }
        let _ = group.slow_above(None);
        let _ = group.set(None);
    }

    /// No room on the file system of the index and the decisions, nor on that of a part of the library, where a download ends in the
    /// middle.
    async fn full_disk(&mut self) -> Result<(), CliError> {
        let Some(own) = &mut self.own else {
            return Ok(());
        };
        let folders: Vec<_> = own
            .disks
            .iter()
            .map(|disk| disk.folder().to_owned())
            .collect();
        for folder in &folders {
            // Ends with ENOSPC, as it should.
            let _ = std::fs::write(folder.join("filler"), vec![0; 32 << 20]);
        }
        own.library.download_fails().map_err(at(&own.place.home))?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        for folder in &folders {
            let filler = folder.join("filler");
            std::fs::remove_file(&filler).map_err(at(&filler))?;
        }
        Ok(())
    }
}

/// The leases of a worker, where its session is listed.
fn leases_of(status: &Value, label: &str) -> Option<u64> {
    // The server adds the process to the label.
    let own = format!("{label} ");
    let mut sessions = status["sessions"].as_array().into_iter().flatten();
    sessions
        .find(|session| {
            let label = session["label"].as_str();
            label.is_some_and(|label| label.starts_with(&own))
        })
        .map(|session| session["leases"].as_u64().unwrap_or(0))
}

/// Makes many small files and removes them, faster than anybody can look at each.
fn many_files(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    for i in 0..500 {
        std::fs::write(
            folder.join(format!("{i}.safetensors")),
            b"\x08\0\0\0\0\0\0\0{}      ",
        )?;
    }
    std::fs::remove_dir_all(folder)
}
