//! One run: workers at a server, faults, and what must hold meanwhile and at the end.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hotset::client::{Client, LoadOptions};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use tokio::sync::mpsc;

use super::faults::{Fault, GpuFault, Reach};
use super::holdings::whereabouts;
use super::own::OwnServer;
use super::report::{Findings, Report};
use super::server::Server;
use super::worker::{Said, below};
use super::{ChaosArgs, CliError};

/// The label of this run's own session, and the beginning of its workers'.
pub(super) const CONTROL: &str = "chaos";
pub(super) const WORKER: &str = "chaos-worker-";
/// How long what must come may take on a busy machine before it counts as never coming.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
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
pub(super) struct Worker {
    pub(super) label: String,
    pub(super) child: Child,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// See the module's page.
pub(super) struct Run {
    pub(super) began: Instant,
    pub(super) seed: u64,
    pub(super) rng: Xoshiro256PlusPlus,
    pub(super) findings: Findings,
    pub(super) socket: PathBuf,
    // Where a run is told to stop they are dropped in this order: workers first, then what they work on.
    pub(super) workers: Vec<Worker>,
    /// `None` in a soak: then the server is somebody's.
    pub(super) own: Option<OwnServer>,
    wanted: usize,
    python: Option<PathBuf>,
    started: u64,
    lines: (mpsc::UnboundedSender<Said>, mpsc::UnboundedReceiver<Said>),
    /// What each content's bytes are.
    contents: HashMap<String, String>,
    /// Since when a tier holds more than it may.
    pub(super) over: HashMap<String, Instant>,
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
        let mut run = Self::new(args, PathBuf::new());
        if args.sessions > 0 {
            run.crowd(args).await?;
        }
        run.open(args, &[])?;
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

    /// Makes the server of the run's own, for as long as `own` is there.
    pub(super) fn open(&mut self, args: &ChaosArgs, arguments: &[&str]) -> Result<(), CliError> {
        let made = OwnServer::make(args, arguments);
        let (own, missing) = made.map_err(at(Path::new("a folder for the run")))?;
        // What lies on doubled GPUs counts in the server's group, and is no business of the host's limit.
        let doubled = own.doubles.is_some();
        let doubled = doubled.then(|| "the memory of doubled GPUs counts in the group".to_owned());
        for (fault, reason) in [
            (Fault::ShrinkMemory, missing.group.or(doubled)),
            (Fault::FullDisk, missing.disks),
            (Fault::Gpu(GpuFault::Lose), missing.doubles),
        ] {
            if let Some(reason) = reason {
                self.findings.skipped.insert(fault.name(), reason);
            }
        }
        self.socket = own.socket();
        self.own = Some(own);
        Ok(())
    }

    pub(super) fn violation(&mut self, invariant: &'static str, message: String) {
        self.findings
            .violation(self.began.elapsed(), invariant, message);
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.own.as_ref().map(|own| own.server.pid())
    }

    pub(super) fn start_server(&mut self) -> Result<(), CliError> {
        if let Some(own) = &mut self.own {
            let server = Server::start(&own.place, own.group.as_ref());
            own.server = server.map_err(at(&own.place.log))?;
        }
        Ok(())
    }

    /// Waits until the server hands out a lease; gives whether it did.
    pub(super) async fn serving(&mut self) -> Result<bool, CliError> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            self.watch().await?;
            if let Ok(client) = Client::connect_to(&self.socket, CONTROL).await
                && client
                    .load(&LoadOptions::new(["single-0"]).on("ram").within(PATIENCE))
                    .await
                    .is_ok()
            {
                return Ok(true);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let doing = self.pid().map(whereabouts).unwrap_or_default();
        self.violation(
            "the-server-serves",
            format!(
                "no lease in {} s after its start; its threads: {doing}",
                PATIENCE.as_secs()
            ),
        );
        Ok(false)
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
            let own = self.own.as_ref().filter(|_| others);
            let reach = Reach {
                own_server: own.is_some(),
                doubles: own.is_some_and(|own| own.doubles.is_some()),
            };
            let fault = Fault::draw(&mut self.rng, reach);
            let possible = deadly || !fault.is_deadly();
            if possible && !self.findings.skipped.contains_key(fault.name()) {
                self.findings.fault(fault.name());
                self.inject(fault).await?;
            }
            if let Some(own) = &mut self.own {
                let folder = own.place.home.clone();
                own.library.mend(false).map_err(at(&folder))?;
                own.rotate().map_err(at(&folder))?;
                if let Some(doubles) = &mut own.doubles {
                    doubles.reap().map_err(at(&folder))?;
                }
            }
        }
        Ok(())
    }

    /// Starts the workers that are missing.
    fn staff(&mut self) -> Result<(), CliError> {
        self.workers
            .retain_mut(|worker| !matches!(worker.child.try_wait(), Ok(Some(_))));
        while self.workers.len() < self.wanted {
            let label = self.next_label();
            let worker = self.hire(&label, 1).map_err(at(Path::new("a worker")))?;
            self.workers.push(worker);
        }
        Ok(())
    }

    pub(super) fn next_label(&mut self) -> String {
        self.started += 1;
        format!("{WORKER}{}-{}", std::process::id(), self.started)
    }

    /// Whether the worker with the last label is a Python one.
    pub(super) fn is_python(&self) -> bool {
        self.python.is_some() && self.started.is_multiple_of(3)
    }

    /// Starts a worker with so many sessions.
    pub(super) fn hire(&self, label: &str, sessions: usize) -> io::Result<Worker> {
        let mut command = match &self.python {
            Some(python) if self.is_python() => {
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
            .args(["--sessions", &sessions.to_string()])
            .envs(
                self.own
                    .iter()
                    .flat_map(|own| own.place.environment.clone()),
            )
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
    pub(super) fn absorb(&mut self) {
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
}

/// The process that listens on a socket.
fn peer(socket: &Path) -> io::Result<u32> {
    let stream = UnixStream::connect(socket)?;
    let credentials = rustix::net::sockopt::socket_peercred(&stream)?;
    Ok(credentials.pid.as_raw_nonzero().get().unsigned_abs())
}

pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> CliError {
    let path = path.to_owned();
    move |source| CliError::File { path, source }
}
