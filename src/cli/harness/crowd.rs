//! A server that is killed under the load of many sessions: how soon the next one serves, and how soon all clients are back.

use std::path::Path;
use std::time::{Duration, Instant};

use hotset::client::{Client, LoadOptions};

use super::report::{Crowd, Times};
use super::run::{CONTROL, PATIENCE, Run, WORKER, at};
use super::worker::below;
use super::{ChaosArgs, CliError};

/// Sessions of one worker's process.
const EACH: usize = 10;
/// How often the server is killed.
const KILLS: usize = 20;
/// Models beside those that are loaded, so that the index is that of a real library.
const MODELS: usize = 2_000;
/// Enough for all that the crowd asks for: what is measured is the start, not the wait for others' memory.
const BUDGET: &str = "ram.budget=128MiB";

impl Run {
    /// Kills servers under this load, and measures. Leaves no server and no worker.
    pub(super) async fn crowd(&mut self, args: &ChaosArgs) -> Result<(), CliError> {
        self.open(args, &["--set", BUDGET])?;
        if let Some(own) = &self.own {
            let folder = own.place.home.join("models/many-models");
            own.library.many(&folder, MODELS).map_err(at(&folder))?;
        }
        self.serving().await?;
        let requests = self.findings.requests;
        let mut in_python = 0;
        let mut hired = 0;
        while hired < args.sessions {
            let sessions = EACH.min(args.sessions - hired);
            let label = self.next_label();
            if self.is_python() {
                in_python += sessions;
            }
            let worker = self
                .hire(&label, sessions)
                .map_err(at(Path::new("a worker")))?;
            self.workers.push(worker);
            hired += sessions;
        }
        let (mut serving, mut all_reconnected) = (Times::default(), Times::default());
        // The first scan has found everything, and everybody has come.
        self.all_are_here(args.sessions, Instant::now(), true)
            .await?;
        let mut models = 0;
        for _ in 0..KILLS {
            let pause = Duration::from_millis(1500 + below(&mut self.rng, 1500) as u64);
            self.work_for(pause).await?;
            if let Some(status) = self.status().await {
                models = status["catalogue"]["models"].as_u64().unwrap_or(0);
            }
            let killed = self.replace_server(false)?;
            self.findings.fault("kill-server-with-sessions");
            if let Some(time) = self.first_lease(killed).await? {
                serving.add(time);
            }
            if let Some(time) = self.all_are_here(args.sessions, killed, false).await? {
                all_reconnected.add(time);
            }
        }
        self.findings.crowd = Some(Crowd {
            sessions: args.sessions,
            in_python,
            models: usize::try_from(models).unwrap_or(usize::MAX),
            kills: KILLS,
            serving: serving.summary(),
            all_reconnected: all_reconnected.summary(),
            requests: self.findings.requests - requests,
        });
        if let Some(pid) = self.pid() {
            self.quiet(pid).await?;
        }
        self.finish_server().await?;
        self.own = None;
        Ok(())
    }

    async fn work_for(&mut self, time: Duration) -> Result<(), CliError> {
        let began = Instant::now();
        while began.elapsed() < time {
            self.absorb();
            self.watch().await?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// From the death of a server until the next one has handed out a lease; `None` where it did not in time.
    async fn first_lease(&mut self, killed: Instant) -> Result<Option<Duration>, CliError> {
        while killed.elapsed() < PATIENCE {
            let wanted = LoadOptions::new(["single-0"]).on("ram").within(PATIENCE);
            if let Ok(client) = Client::connect_to(&self.socket, CONTROL).await
                && client.load(&wanted).await.is_ok()
            {
                return Ok(Some(killed.elapsed()));
            }
            self.watch().await?;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        self.violation(
            "the-server-serves",
            format!("no lease in {} s under a crowd", PATIENCE.as_secs()),
        );
        Ok(None)
    }

    /// Waits until as many workers' sessions are open, since `began`. `settled`: no scan is running either.
    async fn all_are_here(
        &mut self,
        sessions: usize,
        began: Instant,
        settled: bool,
    ) -> Result<Option<Duration>, CliError> {
        let mut here = 0;
        while began.elapsed() < 2 * PATIENCE {
            self.absorb();
            if let Some(status) = self.status().await {
                let open = status["sessions"].as_array().into_iter().flatten();
                here = open
                    .filter_map(|session| session["label"].as_str())
                    .filter(|label| label.starts_with(WORKER))
                    .count();
                let scanning = status["catalogue"]["scanning"] == true;
                if here >= sessions && !(settled && scanning) {
                    return Ok(Some(began.elapsed()));
                }
            }
            self.watch().await?;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.violation(
            "clients-come-back",
            format!(
                "{here} of {sessions} sessions after {} s",
                began.elapsed().as_secs()
            ),
        );
        Ok(None)
    }
}
