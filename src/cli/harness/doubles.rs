//! GPUs that are none: doubles of NVIDIA's libraries, which hotset's own tests bring, so that GPUs can be lost while processes run.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use super::faults::GpuFault;

/// The GPUs of the machine, and what each has for hotset, in MiB: less than the library.
pub(super) const GPUS: usize = 2;
const MIB: u64 = 24;
/// How long a fault lasts.
const LASTS: Duration = Duration::from_millis(300);

/// A machine with doubled GPUs. Everything that is started with its [`environment`](Self::environment) sees them.
pub(super) struct Doubles {
    program: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    machine: PathBuf,
    libraries: PathBuf,
}

impl Doubles {
    /// Makes a machine in a folder of the run, with the doubles that a build of hotset's tests has left in `built`
    /// (`target/release`, `target/debug`).
    pub(super) fn make(built: &Path, folder: &Path) -> Result<Self, String> {
        let find = |name: &str| {
            ["", "deps", "examples"]
                .iter()
                .map(|part| built.join(part).join(name))
                .find(|path| path.exists())
                .ok_or_else(|| format!("no {name} in {}", built.display()))
        };
        let libraries = folder.join("doubles");
        let failed = |error: io::Error| format!("{}: {error}", libraries.display());
        std::fs::create_dir_all(&libraries).map_err(failed)?;
        for (double, name) in [
            ("libhotset_double_cuda.so", "libcuda.so"),
            ("libhotset_double_nvml.so", "libnvidia-ml.so"),
        ] {
            let double = std::path::absolute(find(double)?).map_err(failed)?;
            for name in [name.to_owned(), format!("{name}.1")] {
                symlink(&double, libraries.join(name)).map_err(failed)?;
            }
        }
        let machine = folder.join("machine");
        let program = find("double-faults")?;
        let failed = |error: io::Error| format!("{}: {error}", program.display());
        let mut started = Command::new(&program)
            .arg(&machine)
            .args([GPUS.to_string(), MIB.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (Some(commands), Some(answers)) = (started.stdin.take(), started.stdout.take()) else {
            return Err("its input and output are missing".into());
        };
        let mut doubles = Self {
            program: started,
            commands,
            answers: BufReader::new(answers),
            machine,
            libraries,
        };
        match doubles.answer().map_err(failed)?.as_str() {
            "ready" => Ok(doubles),
            other => Err(format!("it said `{other}`")),
        }
    }

    /// What makes a process see the GPUs.
    pub(super) fn environment(&self) -> [(&'static str, OsString); 2] {
        [
            ("HOTSET_DOUBLE", self.machine.clone().into()),
            ("LD_LIBRARY_PATH", self.libraries.clone().into()),
        ]
    }

    fn tell(&mut self, command: &str) -> io::Result<()> {
        writeln!(self.commands, "{command}")
    }

    fn answer(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// What a driver does by itself: takes back what processes had that are gone.
    pub(super) fn reap(&mut self) -> io::Result<()> {
        self.tell("reap")
    }

    /// How many bytes are allocated on all GPUs, and what was done wrongly.
    pub(super) fn left(&mut self) -> io::Result<(u64, String)> {
        self.reap()?;
        self.tell("left")?;
        let line = self.answer()?;
        let (bytes, misuse) = line.split_once(' ').unwrap_or((&line, ""));
        let bytes = bytes.parse().map_err(|_| io::ErrorKind::InvalidData)?;
        Ok((bytes, misuse.to_owned()))
    }

    /// Does it to a GPU for a moment, and makes good what does not pass by itself.
    pub(super) async fn inject(&mut self, fault: GpuFault, gpu: usize) -> io::Result<()> {
        let (begin, end) = match fault {
            GpuFault::Lose => (format!("lost {gpu} 1"), Some(format!("lost {gpu} 0"))),
            GpuFault::Sticky => (format!("sticky {gpu} 700"), Some(format!("sticky {gpu} 0"))),
            GpuFault::OutOfMemory => (format!("refuse {gpu} 4"), Some(format!("refuse {gpu} 0"))),
            GpuFault::Foreign => (
                format!("foreign {gpu} {MIB}"),
                Some(format!("foreign {gpu} 0")),
            ),
            GpuFault::Hang => (format!("hang {gpu} 1"), Some(format!("hang {gpu} 0"))),
            GpuFault::Xid => (format!("xid {gpu} 13"), None),
        };
        self.tell(&begin)?;
        if let Some(end) = end {
            tokio::time::sleep(LASTS).await;
            self.tell(&end)?;
        }
        Ok(())
    }
}

impl Drop for Doubles {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}
