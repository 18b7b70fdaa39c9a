//! What must hold while a server works, when it is quiet, and at its end.

use std::path::Path;
use std::time::{Duration, Instant};

use hotset::client::Client;
use serde_json::Value;

use super::holdings::{Holdings, whereabouts};
use super::report::Life;
use super::run::{CONTROL, PATIENCE, Run, WORKER, at};
use crate::cli::CliError;

/// How long a tier may hold more than a budget that has just shrunk.
const OVER: Duration = Duration::from_secs(5);
/// Memory of its own that a quiet server may have more than at its start: what the allocator has not given back of pages that are
/// in use in part, up to 10 MiB on sixteen cores, and tables of the past that have a bound of their own.
const SPARE_MEMORY: u64 = 16 << 20;
/// The same for each tier: the labels from which its policy learns.
const SPARE_FOR_TIER: u64 = 8 << 20;

impl Run {
    /// The server must be there unless this run ended it.
    pub(super) async fn watch(&mut self) -> Result<(), CliError> {
        let Some(own) = &mut self.own else {
            return Ok(());
        };
        let path = own.place.log.clone();
        if let Some(status) = own.server.ended().map_err(at(&path))? {
            let panics = own.server.panics().unwrap_or_default().join("; ");
            self.violation(
                "the-server-lives",
                format!("it ended by itself with {status} {panics}"),
            );
            self.start_server()?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    pub(super) async fn status(&self) -> Option<Value> {
        let ask = async {
            let client = Client::connect_to(&self.socket, CONTROL).await.ok()?;
            client.status().await.ok()
        };
        tokio::time::timeout(PATIENCE, ask).await.ok().flatten()
    }

    /// What every status must show, whatever goes on.
    pub(super) async fn check(&mut self) {
        let Some(status) = self.status().await else {
            // A server without descriptors to spare cannot take a connection; that it serves again is seen elsewhere.
            return;
        };
        for tier in status["tiers"].as_array().into_iter().flatten() {
            let name = tier["tier"].as_str().unwrap_or_default().to_owned();
            let figure = |key: &str| tier[key].as_u64().unwrap_or(0);
            let (budget, committed) = (figure("budget"), figure("committed"));
            let (leased, evicting) = (figure("leased"), figure("evicting"));
            if leased > committed || evicting > committed {
                self.violation(
                    "status-adds-up",
                    format!("{name}: leased {leased}, evicting {evicting}, committed {committed}"),
                );
            }
            // A budget that shrinks takes nothing from those who lease; the rest has to go.
            if committed > budget.max(leased) {
                let since = *self.over.entry(name.clone()).or_insert_with(Instant::now);
                if since.elapsed() > OVER {
                    self.violation(
                        "no-tier-over-its-budget",
                        format!(
                            "{name}: {committed} committed of {budget} for {:.1} s",
                            since.elapsed().as_secs_f64()
                        ),
                    );
                    self.over.remove(&name);
                }
            } else {
                self.over.remove(&name);
            }
        }
    }

    /// Sends the workers home, and waits until nothing is left of them.
    pub(super) async fn quiet(&mut self, pid: u32) -> Result<Holdings, CliError> {
        self.workers.clear();
        if let Some(own) = &mut self.own {
            let folder = own.place.home.clone();
            own.library.mend(true).map_err(at(&folder))?;
        }
        if let Some(own) = &mut self.own
            && let Some(doubles) = &mut own.doubles
        {
            doubles.reap().map_err(at(&own.place.home))?;
        }
        let began = Instant::now();
        let mut left = String::from("no status");
        let mut last = Value::Null;
        while began.elapsed() < PATIENCE {
            self.absorb();
            if let Some(status) = self.status().await {
                left = leftovers(&status, self.own.is_some());
                if left.is_empty() {
                    // The connection that asked has to go as well.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    return Holdings::of(pid, &status).map_err(at(Path::new("/proc")));
                }
                last = status;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.violation(
            "quiet-leaves-nothing",
            format!(
                "{} s after the last worker: {left}; its threads: {}",
                PATIENCE.as_secs(),
                whereabouts(pid)
            ),
        );
        // Where it is gone, what it holds is nothing.
        Ok(Holdings::of(pid, &last).unwrap_or_default())
    }

    /// Holds a server to what it held when it began.
    pub(super) async fn end_of_life(
        &mut self,
        pid: u32,
        start: Holdings,
        time: Duration,
    ) -> Result<(), CliError> {
        let mut end = self.quiet(pid).await?;
        let began = Instant::now();
        // Threads that have nothing to do end after some seconds, and so does what the allocator keeps.
        let spare = |end: &Holdings| SPARE_MEMORY + end.tiers * SPARE_FOR_TIER;
        let mut grown = end.growth(&start, spare(&end));
        while !grown.is_empty() && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(200)).await;
            end = self.quiet(pid).await?;
            grown = end.growth(&start, spare(&end));
        }
        if !grown.is_empty() {
            self.violation("holdings-return", grown.join("; "));
        }
        self.findings.lives.push(Life {
            seconds: time.as_secs_f64(),
            returned_after_s: began.elapsed().as_secs_f64(),
            start,
            end,
        });
        Ok(())
    }

    /// Ends the server as an operator does.
    pub(super) async fn finish_server(&mut self) -> Result<(), CliError> {
        let Some(own) = &mut self.own else {
            return Ok(());
        };
        let path = own.place.log.clone();
        let status = own.server.terminate(PATIENCE).await.map_err(at(&path))?;
        let panics = own.server.panics().map_err(at(&path))?;
        for panic in panics {
            self.violation("no-panic", panic);
        }
        match status {
            Some(status) if status.success() => {}
            Some(status) => self.violation("the-end-is-clean", format!("it ended with {status}")),
            None => self.violation(
                "the-end-is-clean",
                format!("it did not end within {} s", PATIENCE.as_secs()),
            ),
        }
        if let Some(own) = &mut self.own
            && let Some(doubles) = &mut own.doubles
        {
            let (bytes, misuse) = doubles.left().map_err(at(&own.place.home))?;
            if bytes > 0 {
                let left = format!("{bytes} bytes of GPUs outlived it");
                self.violation("the-end-is-clean", left);
            }
            if !misuse.is_empty() {
                self.violation("the-driver-is-used-rightly", misuse);
            }
        }
        if self.socket.exists() {
            self.violation(
                "the-end-is-clean",
                "the socket's file is still there".into(),
            );
        }
        Ok(())
    }
}

/// What is held for clients that are gone; nothing, once it is quiet.
/// `alone`: nobody else uses the server.
fn leftovers(status: &Value, alone: bool) -> String {
    let mut left = Vec::new();
    let sessions = status["sessions"].as_array().into_iter().flatten();
    let labels = sessions.filter_map(|session| session["label"].as_str());
    for label in labels.filter(|label| label.starts_with(WORKER)) {
        left.push(format!("session {label}"));
    }
    if !alone {
        return left.join(", ");
    }
    if status["loads"].as_u64() != Some(0) {
        left.push(format!("{} loads", status["loads"]));
    }
    // The memory of leases that ended with their clients.
    if status["arena"]["lingering"].as_u64() != Some(0) {
        left.push(format!("{} lingering", status["arena"]["lingering"]));
    }
    for tier in status["tiers"].as_array().into_iter().flatten() {
        for key in ["waiting", "evicting", "leased"] {
            if tier[key].as_u64().is_some_and(|n| n > 0) {
                left.push(format!("{} {key} {}", tier["tier"], tier[key]));
            }
        }
        let listed: u64 = tier["components"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|component| component["bytes"].as_u64())
            .sum();
        if tier["committed"].as_u64() != Some(listed) {
            left.push(format!(
                "{}: {} committed for components of {listed}",
                tier["tier"], tier["committed"]
            ));
        }
    }
    if status["health"]["state"] != "green" {
        left.push(format!("health {}", status["health"]));
    }
    left.join(", ")
}
