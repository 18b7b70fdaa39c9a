//! One run: workers at a server, faults, and what must hold meanwhile and at the end.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hotset::Bytes;
use hotset::client::{Client, LoadOptions};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use rustix::process::Signal;
use serde_json::Value;
use tokio::sync::mpsc;

use super::faults::{self, Fault};
use super::group::Group;
use super::library::Library;
use super::report::{Findings, Holdings, Life, Report};
use super::server::{Place, Server, configuration, own, signal};
use super::worker::{Said, below};
use super::{ChaosArgs, CliError};

/// The label of this run's own session, and the beginning of its workers'.
const CONTROL: &str = "chaos";
const WORKER: &str = "chaos-worker-";
/// How long what must come may take on a busy machine before it counts as never coming.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a tier may hold more than a budget that has just shrunk.
const OVER: Duration = Duration::from_secs(5);
/// What a quiet server may hold more than it did: caches that fill, a thread that has yet to end.
const SPARE_DESCRIPTORS: u64 = 16;
const SPARE_THREADS: u64 = 2;
const SPARE_MEMORY: u64 = 48 << 20;

/// What may happen in a stretch of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// What clients alone can do.
    Clients,
    /// Everything that a server lives through.
    Survivable,
    /// Its death too.
    All,
}

/// A worker's process.
struct Worker {
    label: String,
    child: Child,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a server of the run's own is made of.
struct OwnServer {
    place: Place,
    server: Server,
    group: Option<Group>,
    library: Library,
    http: u16,
    /// A small file system for its state, which can be filled.
    disk: Option<Mount>,
    _home: tempfile::TempDir,
}

/// A mounted file system, unmounted when it is dropped.
struct Mount(PathBuf);

impl Mount {
    fn make(at: &Path) -> Result<Self, String> {
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"])
            .arg(at)
            .output()
            .map_err(|error| format!("mount: {error}"))?;
        match output.status.success() {
            true => Ok(Self(at.to_owned())),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// See the module's page.
pub(super) struct Run {
    began: Instant,
    seed: u64,
    rng: Xoshiro256PlusPlus,
    findings: Findings,
    socket: PathBuf,
    /// `None` in a soak: then the server is somebody's.
    own: Option<OwnServer>,
    workers: Vec<Worker>,
    wanted: usize,
    python: Option<PathBuf>,
    started: u64,
    lines: (mpsc::UnboundedSender<Said>, mpsc::UnboundedReceiver<Said>),
    /// What each content's bytes are.
    contents: HashMap<String, String>,
    /// Since when a tier holds more than it may.
    over: HashMap<String, Instant>,
}

impl Run {
    fn new(args: &ChaosArgs, socket: PathBuf) -> Self {
        Self {
            began: Instant::now(),
            seed: args.seed,
            rng: Xoshiro256PlusPlus::seed_from_u64(args.seed),
            findings: Findings::default(),
            socket,
            own: None,
            workers: Vec::new(),
            wanted: args.workers.max(1),
            python: args.python.clone(),
            started: 0,
            lines: mpsc::unbounded_channel(),
            contents: HashMap::new(),
            over: HashMap::new(),
        }
    }

    /// Workers at the running server.
    pub(super) async fn soak(
        args: &ChaosArgs,
        socket: PathBuf,
        time: Duration,
    ) -> Result<Report, CliError> {
        let mut run = Self::new(args, socket);
        let pid = peer(&run.socket).map_err(at(&run.socket))?;
        // What fills once and stays is filled before anything is measured.
        run.life(Duration::from_secs(3).min(time / 10), Trouble::Clients)
            .await?;
        let start = run.quiet(pid).await?;
        run.life(time, Trouble::Clients).await?;
        run.end_of_life(pid, start, time).await?;
        run.workers.clear();
        Ok(run.findings.finish(run.seed, run.began.elapsed()))
    }

    /// A server of the run's own.
    pub(super) async fn processes(args: &ChaosArgs) -> Result<Report, CliError> {
        let home = tempfile::tempdir().map_err(at(Path::new("a folder for the run")))?;
        let folder = home.path().to_owned();
        let mut run = Self::new(args, folder.join("run/hotset.sock"));
        let made = run.set_up(home, args.gpus).map_err(at(&folder))?;
        run.own = Some(made);
        let time = Duration::from_secs_f64(args.minutes.clamp(0.05, 1e6) * 60.0);
        let end = run.began + time;
        run.serving().await?;
        // In every other life the server is left alive, so that it can be held to what it held.
        let mut trouble = Trouble::Survivable;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let life = Duration::from_secs(10 + below(&mut run.rng, 40) as u64);
            // A life that would leave too little for another takes it all.
            let life = if left < life * 3 / 2 { left } else { life };
            let warm = Duration::from_secs(3).min(life / 4);
            run.life(warm, Trouble::None).await?;
            let Some(pid) = run.pid() else { break };
            let start = run.quiet(pid).await?;
            let began = Instant::now();
            run.life(life.saturating_sub(warm), trouble).await?;
            // Where it was killed meanwhile, another process has no past to be held to.
            match run.pid() {
                Some(same) if same == pid => run.end_of_life(pid, start, began.elapsed()).await?,
                Some(other) => {
                    run.quiet(other).await?;
                }
                None => break,
            }
            run.finish_server().await?;
            if Instant::now() >= end {
                break;
            }
            trouble = match trouble {
                Trouble::Survivable => Trouble::All,
                _ => Trouble::Survivable,
            };
            run.start_server()?;
            run.serving().await?;
        }
        run.workers.clear();
        run.own = None;
        Ok(run.findings.finish(run.seed, run.began.elapsed()))
    }

    fn set_up(&mut self, home: tempfile::TempDir, gpus: bool) -> io::Result<OwnServer> {
        let folder = home.path();
        let state = folder.join("state");
        std::fs::create_dir_all(&state)?;
        let models = folder.join("models");
        let library = Library::make(&models)?;
        let group = self.or_skip(Fault::ShrinkMemory, Group::make());
        let disk = self.or_skip(Fault::FullDisk, Mount::make(&state));
        // Free now; should another process take it in between, the server says so and does without.
        let http = std::net::TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port();
        let place = Place {
            home: folder.to_owned(),
            config: folder.join("hotset.toml"),
            log: folder.join("serve.log"),
        };
        let mut config = configuration(folder, &models, http);
        if !gpus {
            config.push_str(
                "[[gpu]]\ndevice = \"sim\"\nheadroom = \"0\"\n[gpu.sim]\nmemory = \"32MiB\"\ngranularity = \"64KiB\"\n",
            );
        }
        std::fs::write(&place.config, config)?;
        let server = Server::start(&place, group.as_ref())?;
        Ok(OwnServer {
            place,
            server,
            group,
            library,
            http,
            disk,
            _home: home,
        })
    }

    fn or_skip<T>(&mut self, fault: Fault, made: Result<T, String>) -> Option<T> {
        made.inspect_err(|reason| {
            self.findings.skipped.insert(fault.name(), reason.clone());
        })
        .ok()
    }

    fn violation(&mut self, invariant: &'static str, message: String) {
        self.findings
            .violation(self.began.elapsed(), invariant, message);
    }

    fn pid(&self) -> Option<u32> {
        self.own.as_ref().map(|own| own.server.pid())
    }

    fn start_server(&mut self) -> Result<(), CliError> {
        if let Some(own) = &mut self.own {
            let server = Server::start(&own.place, own.group.as_ref());
            own.server = server.map_err(at(&own.place.log))?;
        }
        Ok(())
    }

    /// Waits until the server hands out a lease.
    async fn serving(&mut self) -> Result<(), CliError> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            self.watch().await?;
            if let Ok(client) = Client::connect_to(&self.socket, CONTROL).await
                && client
                    .load(&LoadOptions::new(["single-0"]).on("ram").within(PATIENCE))
                    .await
                    .is_ok()
            {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.violation(
            "the-server-serves",
            format!("no lease in {} s after its start", PATIENCE.as_secs()),
        );
        Ok(())
    }

    /// Work and, where wanted, faults for so long.
    async fn life(&mut self, time: Duration, trouble: Trouble) -> Result<(), CliError> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.staff()?;
            let pause = Duration::from_millis(20 + below(&mut self.rng, 200) as u64);
            tokio::time::sleep(pause).await;
            self.absorb();
            self.watch().await?;
            self.check().await;
            let (others, deadly) = match trouble {
                Trouble::None => continue,
                Trouble::Clients => (false, false),
                Trouble::Survivable => (true, false),
                Trouble::All => (true, true),
            };
            let fault = Fault::draw(&mut self.rng, others);
            let possible = deadly || !fault.is_deadly();
            if possible && !self.findings.skipped.contains_key(fault.name()) {
                self.findings.fault(fault.name());
                self.inject(fault).await?;
            }
            if let Some(own) = &mut self.own {
                let folder = own.place.home.clone();
                own.library.mend(false).map_err(at(&folder))?;
            }
        }
        Ok(())
    }

    /// Starts the workers that are missing.
    fn staff(&mut self) -> Result<(), CliError> {
        self.workers
            .retain_mut(|worker| !matches!(worker.child.try_wait(), Ok(Some(_))));
        while self.workers.len() < self.wanted {
            self.started += 1;
            let label = format!("{WORKER}{}-{}", std::process::id(), self.started);
            let worker = self.hire(&label).map_err(at(Path::new("a worker")))?;
            self.workers.push(worker);
        }
        Ok(())
    }

    fn hire(&self, label: &str) -> io::Result<Worker> {
        let mut command = match &self.python {
            Some(python) if self.started.is_multiple_of(3) => {
                let mut command = Command::new(python);
                command.args(["-c", include_str!("worker.py")]);
                command
            }
            _ => {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg("chaos-worker");
                command
            }
        };
        let mut child = command
            .arg("--socket")
            .arg(&self.socket)
            .args(["--label", label])
            .args(["--seed", &(self.seed ^ self.started << 20).to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        if let Some(output) = child.stdout.take() {
            let lines = self.lines.0.clone();
            // Ends with the worker's output.
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    if let Ok(said) = serde_json::from_str(&line) {
                        let _ = lines.send(said);
                    }
                }
            });
        }
        Ok(Worker {
            label: label.to_owned(),
            child,
        })
    }

    /// Takes in what workers said.
    fn absorb(&mut self) {
        while let Ok(said) = self.lines.1.try_recv() {
            match said {
                Said::Connected { after_ms } => {
                    if let Some(ms) = after_ms {
                        let time = Duration::from_secs_f64(ms / 1e3);
                        self.findings.reconnected.add(time);
                    }
                }
                Said::Lost => {}
                Said::Asked => self.findings.requests += 1,
                Said::Refused { code } => {
                    *self.findings.refusals.entry(code).or_default() += 1;
                }
                Said::Wrong { invariant, message } => {
                    self.violation("workers-see-no-wrong", format!("{invariant}: {message}"));
                }
                Said::Leased {
                    component,
                    content,
                    digest,
                    bytes,
                } => {
                    self.findings.leases += 1;
                    self.findings.checked_bytes += bytes;
                    if let Some(digest) = digest {
                        self.compare(&component, content, digest);
                    }
                }
            }
        }
    }

    fn compare(&mut self, component: &str, content: String, digest: String) {
        let allowed = self
            .own
            .as_ref()
            .and_then(|own| own.library.allows(component, &digest));
        if allowed == Some(false) {
            self.violation(
                "leased-bytes-are-the-files",
                format!("{component} was leased with bytes that its file never had"),
            );
        }
        // A content id names bytes: the same one, the same bytes, in whatever model.
        let known = self
            .contents
            .entry(content.clone())
            .or_insert(digest.clone());
        if *known != digest {
            self.violation(
                "content-names-bytes",
                format!("{component}: the content {content} was seen with other bytes"),
            );
        }
    }

    /// The server must be there unless this run ended it.
    async fn watch(&mut self) -> Result<(), CliError> {
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

    async fn status(&self) -> Option<Value> {
        let ask = async {
            let client = Client::connect_to(&self.socket, CONTROL).await.ok()?;
            client.status().await.ok()
        };
        tokio::time::timeout(PATIENCE, ask).await.ok().flatten()
    }

    /// What every status must show, whatever goes on.
    async fn check(&mut self) {
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

    async fn inject(&mut self, fault: Fault) -> Result<(), CliError> {
        let socket = self.socket.clone();
        match fault {
            Fault::KillWorker => self.kill_worker().await,
            Fault::PauseWorker => {
                let worker = below(&mut self.rng, self.workers.len().max(1));
                if let Some(worker) = self.workers.get(worker) {
                    self.pause(worker.child.id(), 300).await;
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
                let count = 1 + below(&mut self.rng, 2000);
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
            Fault::FullDisk => {
                if let Some(Mount(folder)) = self.own.as_ref().and_then(|own| own.disk.as_ref()) {
                    let filler = folder.join("filler");
                    // Ends with ENOSPC, as it should.
                    let _ = std::fs::write(&filler, vec![0; 16 << 20]);
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    std::fs::remove_file(&filler).map_err(at(&filler))?;
                }
            }
        }
        Ok(())
    }

    async fn pause(&self, pid: u32, most_ms: usize) {
        let mut rng = self.rng.clone();
        let time = Duration::from_millis(20 + below(&mut rng, most_ms) as u64);
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
        let killed = Instant::now();
        if worker.child.kill().is_err() {
            return;
        }
        while killed.elapsed() < PATIENCE {
            let Ok(status) = client.status().await else {
                return;
            };
            let sessions = status["sessions"].as_array().into_iter().flatten();
            let mut labels = sessions.filter_map(|session| session["label"].as_str());
            // The server adds the process to the label.
            let own = format!("{} ", worker.label);
            if !labels.any(|label| label.starts_with(&own)) {
                self.findings.returned.add(killed.elapsed());
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

    async fn kill_server(&mut self, fault: Fault) -> Result<(), CliError> {
        let Some(own) = &mut self.own else {
            return Ok(());
        };
        let path = own.place.log.clone();
        let panics = own.server.panics().map_err(at(&path))?;
        let killed = Instant::now();
        own.server.kill().map_err(at(&path))?;
        if fault == Fault::KillServerAndSpoilIndex {
            let index = own.place.home.join("state/catalogue.db");
            std::fs::write(&index, b"this was an index once").map_err(at(&index))?;
        }
        for panic in panics {
            self.violation("no-panic", panic);
        }
        self.start_server()?;
        self.serving().await?;
        self.findings.restarted.add(killed.elapsed());
        Ok(())
    }

    /// For a moment the server can open next to nothing.
    async fn few_descriptors(&mut self) {
        let Some(own) = &self.own else { return };
        let Ok(now) = super::server::own(own.server.pid()) else {
            return;
        };
        let few = now.descriptors + below(&mut self.rng, 8) as u64;
        if let Ok(before) = own.server.limit_descriptors(Some(few)) {
            let clients = faults::silent_connections(&self.socket, 20);
            clients.await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            let _ = own.server.limit_descriptors(before);
        }
    }

    /// For a moment the server's group allows little more than it uses without its slabs.
    async fn shrink_memory(&mut self) {
        let Some(group) = self.own.as_ref().and_then(|own| own.group.as_ref()) else {
            return;
        };
        let Ok(used) = group.used() else { return };
        let less = Bytes(used.get().saturating_sub(8 << 20));
        // Refused where the kernel cannot get the memory back from anybody: then nothing has changed.
        if group.set(Some(less)).is_ok() {
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        let _ = group.set(None);
    }

    /// Sends the workers home, and waits until nothing is left of them.
    async fn quiet(&mut self, pid: u32) -> Result<Holdings, CliError> {
        self.workers.clear();
        if let Some(own) = &mut self.own {
            let folder = own.place.home.clone();
            own.library.mend(true).map_err(at(&folder))?;
        }
        let began = Instant::now();
        let mut left = String::from("no status");
        while began.elapsed() < PATIENCE {
            self.absorb();
            if let Some(status) = self.status().await {
                left = leftovers(&status, self.own.is_some());
                if left.is_empty() {
                    return holdings(pid, &status).map_err(at(Path::new("/proc")));
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.violation(
            "quiet-leaves-nothing",
            format!("{} s after the last worker: {left}", PATIENCE.as_secs()),
        );
        let status = self.status().await.unwrap_or_default();
        holdings(pid, &status).map_err(at(Path::new("/proc")))
    }

    /// Holds a server to what it held when it began.
    async fn end_of_life(
        &mut self,
        pid: u32,
        start: Holdings,
        time: Duration,
    ) -> Result<(), CliError> {
        let mut end = self.quiet(pid).await?;
        let began = Instant::now();
        let more = |end: &Holdings| {
            end.descriptors > start.descriptors + SPARE_DESCRIPTORS
                || end.threads > start.threads + SPARE_THREADS
                || end.anonymous_bytes > start.anonymous_bytes + SPARE_MEMORY
        };
        while more(&end) && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(200)).await;
            end = self.quiet(pid).await?;
        }
        if more(&end) {
            self.violation(
                "holdings-return",
                format!("the server began with {start:?} and ended with {end:?}"),
            );
        }
        self.findings.lives.push(Life {
            seconds: time.as_secs_f64(),
            start,
            end,
        });
        Ok(())
    }

    /// Ends the server as an operator does.
    async fn finish_server(&mut self) -> Result<(), CliError> {
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

fn holdings(pid: u32, status: &Value) -> io::Result<Holdings> {
    let own = own(pid)?;
    let tiers = status["tiers"].as_array().into_iter().flatten();
    let vram = tiers
        .filter(|tier| tier["tier"] != "ram")
        .filter_map(|tier| tier["committed"].as_u64());
    Ok(Holdings {
        descriptors: own.descriptors,
        threads: own.threads,
        anonymous_bytes: own.anonymous_bytes,
        vram_bytes: vram.sum(),
    })
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

/// The process that listens on a socket.
fn peer(socket: &Path) -> io::Result<u32> {
    let stream = UnixStream::connect(socket)?;
    let credentials = rustix::net::sockopt::socket_peercred(&stream)?;
    Ok(credentials.pid.as_raw_nonzero().get().unsigned_abs())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> CliError {
    let path = path.to_owned();
    move |source| CliError::File { path, source }
}
