//! What a server of the run's own is made of: its process, its files, its disks and its control group.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::ChaosArgs;
use super::doubles::Doubles;
use super::group::Group;
use super::library::Library;
use super::server::{Place, Server, configuration};

/// Room for the index and the decisions.
const STATE_DISK: &str = "8m";
/// Room for the part of the library that is on a full disk now and then.
const SMALL_DISK: &str = "12m";

/// See the module's page.
pub(super) struct OwnServer {
    pub(super) place: Place,
    pub(super) server: Server,
    pub(super) group: Option<Group>,
    pub(super) library: Library,
    pub(super) http: u16,
    /// Small file systems for its state and for a part of its library, which can be filled.
    pub(super) disks: Vec<Mount>,
    pub(super) doubles: Option<Doubles>,
    _home: Home,
}

/// A folder that goes with the run, or stays.
enum Home {
    Temporary(#[expect(dead_code, reason = "it is removed with its value")] tempfile::TempDir),
    Kept,
}

/// Why a part of it cannot be had, for the report.
pub(super) struct Missing {
    pub(super) group: Option<String>,
    pub(super) disks: Option<String>,
    pub(super) doubles: Option<String>,
}

impl OwnServer {
    /// Makes everything in a new folder and starts the server, with these further arguments.
    pub(super) fn make(args: &ChaosArgs, arguments: &[&str]) -> io::Result<(Self, Missing)> {
        let (folder, home) = match &args.keep {
            Some(folder) => {
                std::fs::create_dir_all(folder)?;
                (std::path::absolute(folder)?, Home::Kept)
            }
            None => {
                let home = tempfile::tempdir()?;
                (home.path().to_owned(), Home::Temporary(home))
            }
        };
        let (state, models, small) = (
            folder.join("state"),
            folder.join("models"),
            folder.join("small"),
        );
        let mut missing = Missing {
            group: None,
            disks: None,
            doubles: None,
        };
        let mut disks = Vec::new();
        for (at, size) in [(&state, STATE_DISK), (&small, SMALL_DISK)] {
            std::fs::create_dir_all(at)?;
            match Mount::make(at, size) {
                Ok(mount) => disks.push(mount),
                Err(reason) => missing.disks = Some(reason),
            }
        }
        let library = Library::make(&models, &small)?;
        let group = Group::make()
            .map_err(|reason| missing.group = Some(reason))
            .ok();
        // Free now; should another process take it in between, the server says so and does without.
        let http = std::net::TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port();
        let doubles = args.doubles.as_ref().and_then(|built| {
            Doubles::make(built, &folder)
                .map_err(|reason| missing.doubles = Some(reason))
                .ok()
        });
        let place = Place {
            config: folder.join("hotset.toml"),
            log: folder.join("serve.log"),
            arguments: arguments.iter().map(|text| (*text).to_owned()).collect(),
            environment: doubles.iter().flat_map(Doubles::environment).collect(),
            home: folder.clone(),
        };
        let mut config = configuration(&folder, &[&models, &small], http);
        if doubles.is_some() {
            // One that is given up is tried again soon: what is to be seen is that it comes back.
            config.push_str("[cuda]\nheadroom = \"0\"\n[supervision]\nretry = \"500ms\"\n");
        } else if !args.gpus {
            config.push_str(
                "[[gpu]]\ndevice = \"sim\"\nheadroom = \"0\"\n[gpu.sim]\nmemory = \"32MiB\"\ngranularity = \"64KiB\"\n",
            );
        }
        std::fs::write(&place.config, config)?;
        let server = Server::start(&place, group.as_ref())?;
        let own = Self {
            place,
            server,
            group,
            library,
            http,
            disks,
            doubles,
            _home: home,
        };
        Ok((own, missing))
    }

    /// Where its clients find it.
    pub(super) fn socket(&self) -> PathBuf {
        self.place.home.join("run/hotset.sock")
    }

    /// Keeps the file of decisions small, as one who rotates logs does.
    pub(super) fn rotate(&self) -> io::Result<()> {
        const LONG: u64 = 2 << 20;
        let path = self.place.home.join("state/decisions.jsonl");
        match std::fs::metadata(&path) {
            Ok(file) if file.len() > LONG => std::fs::OpenOptions::new()
                .write(true)
                .open(&path)?
                .set_len(0),
            _ => Ok(()),
        }
    }
}

/// A mounted file system, unmounted when it is dropped.
pub(super) struct Mount(PathBuf);

impl Mount {
    fn make(at: &Path, size: &str) -> Result<Self, String> {
        let output = Command::new("mount")
            .args(["-t", "tmpfs", "-o"])
            .arg(format!("size={size}"))
            .arg("tmpfs")
            .arg(at)
            .output()
            .map_err(|error| format!("mount: {error}"))?;
        match output.status.success() {
            true => Ok(Self(at.to_owned())),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
