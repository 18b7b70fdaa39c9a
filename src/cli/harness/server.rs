//! The server under test: a process, what it holds, and its end.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};

use super::group::Group;

/// Sends a signal to a process that is ours.
pub(super) fn signal(pid: u32, signal: Signal) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(kill_process(pid, signal)?)
}

/// A running `hotset serve`; killed when it is dropped.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    log: PathBuf,
    /// Where this life's part of the log begins.
    begins: u64,
}

/// Where a server finds what is its own.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) home: PathBuf,
    pub(super) config: PathBuf,
    pub(super) log: PathBuf,
    /// Further arguments.
    pub(super) arguments: Vec<String>,
    /// What its processes are told by their environment.
    pub(super) environment: Vec<(&'static str, OsString)>,
}

impl Server {
    /// Starts one.
    pub(super) fn start(place: &Place, group: Option<&Group>) -> io::Result<Self> {
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&place.log)?;
        let begins = log.seek(SeekFrom::End(0))?;
        let child = Command::new(std::env::current_exe()?)
            .arg("--config")
            .arg(&place.config)
            .arg("serve")
            .args(&place.arguments)
            .envs(place.environment.iter().cloned())
            .env("HOME", &place.home)
            .env_remove("XDG_RUNTIME_DIR")
            .env_remove("XDG_CACHE_HOME")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        if let Some(group) = group {
            group.take(child.id())?;
        }
        Ok(Self {
            child,
            log: place.log.clone(),
            begins,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, where it did.
    pub(super) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// As the out-of-memory killer does it.
    pub(super) fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// Asks it to end, and waits for that; `None` where it does not end in time, and then it is killed.
    pub(super) async fn terminate(&mut self, patience: Duration) -> io::Result<Option<ExitStatus>> {
        signal(self.pid(), Signal::TERM)?;
        let began = Instant::now();
        while began.elapsed() < patience {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.kill()?;
        Ok(None)
    }

    /// How many descriptors it has.
    pub(super) fn open_descriptors(&self) -> io::Result<u64> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.pid()))?.count() as u64)
    }

    /// Sets how many descriptors it may have from now on; gives what it was before.
    pub(super) fn limit_descriptors(&self, most: Option<u64>) -> io::Result<Option<u64>> {
        let pid = i32::try_from(self.pid()).ok().and_then(Pid::from_raw);
        let limits = Rlimit {
            current: most,
            maximum: rustix::process::getrlimit(Resource::Nofile).maximum,
        };
        Ok(prlimit(pid, Resource::Nofile, limits)?.current)
    }

    /// What this life wrote about a panic.
    pub(super) fn panics(&self) -> io::Result<Vec<String>> {
        let mut log = File::open(&self.log)?;
        log.seek(SeekFrom::Start(self.begins))?;
        let mut text = Vec::new();
        log.read_to_end(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        Ok(text
            .lines()
            .filter(|line| line.contains("panicked at"))
            .map(str::to_owned)
            .collect())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The configuration of a server under test: little memory for many models, so that everything is always in motion.
pub(super) fn configuration(home: &Path, roots: &[&Path], http: u16) -> String {
    let toml = |path: &Path| toml::Value::String(path.to_string_lossy().into_owned()).to_string();
    let roots: Vec<String> = roots.iter().map(|root| toml(root)).collect();
    // So few decisions in memory that they are all there before anything is measured.
    format!(
        "[catalog]\nroots = [{}]\nsettle = \"100ms\"\ndatabase = {}\n\
         [ram]\nbudget = \"40MiB\"\n\
         [monitor]\ndecisions = 500\ndecisions_file = {}\n\
         [bridge]\nsocket = {}\n\
         [http]\nlisten = \"127.0.0.1:{http}\"\n",
        roots.join(", "),
        toml(&home.join("state/catalogue.db")),
        toml(&home.join("state/decisions.jsonl")),
        toml(&home.join("run/hotset.sock")),
    )
}
