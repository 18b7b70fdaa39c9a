//! The harness of real processes, and what it found.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use hotset::client::{Client, LoadOptions};
use hotset::core::machine::Cgroup;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::server::{Server, hangup, until};
use crate::{Home, told};

#[test]
fn nothing_is_lost_in_a_short_run() {
    let home = Home::new();
    let output = home.run(&["chaos", "--processes", "--minutes", "0.3", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", told(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["violated"], 0);
    assert!(report["faults_injected"].as_u64().unwrap() > 10, "{report}");
    assert!(report["leases"].as_u64().unwrap() > 50, "{report}");
    // A life that was measured from its beginning to its end.
    assert!(!report["lives"].as_array().unwrap().is_empty(), "{report}");
}

#[test]
fn python_without_the_package_is_refused_before_anything_starts() {
    let home = Home::new();
    for (python, said) in [
        // Fails as an interpreter without the package does, on machines without Python too.
        ("false", "--python false cannot import hotset"),
        ("/nonexistent/python", "No such file"),
    ] {
        let output = home.run(&["chaos", "--processes", "--python", python]);
        assert_eq!(output.status.code(), Some(2), "{}", told(&output));
        assert!(told(&output).contains(said), "{}", told(&output));
    }
}

#[test]
fn sessions_are_back_after_each_kill_of_their_server() {
    let home = Home::new();
    let output = home.run(&[
        "chaos",
        "--processes",
        "--minutes",
        "0.05",
        "--sessions",
        "25",
        "--workers",
        "2",
        "--json",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", told(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let crowd = &report["crowd"];
    assert_eq!(
        (&crowd["sessions"], &crowd["kills"]),
        (&25.into(), &20.into())
    );
    for times in ["serving", "all_reconnected"] {
        assert_eq!(crowd[times]["count"], 20, "{report}");
    }
    assert!(crowd["requests"].as_u64().unwrap() > 100, "{report}");
}

/// A run that is told to stop, however the test ends.
struct Told(std::process::Child);

impl Told {
    fn stop(&mut self, by: rustix::process::Signal) -> std::process::ExitStatus {
        let _ = rustix::process::kill_process(Pid::from_child(&self.0), by);
        self.0.wait().unwrap()
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        // Once it has been waited for, its number may be another's.
        if let Ok(None) = self.0.try_wait() {
            self.stop(rustix::process::Signal::TERM);
        }
    }
}

/// Mounts, processes and control groups are gone with a run that is ended before its time.
#[test]
fn a_run_that_is_told_to_stop_cleans_up() {
    let home = Home::new();
    let folder = home.path().join("kept");
    let kept = folder.to_str().unwrap();
    let mut run = Told(
        home.command(&["chaos", "--processes", "--minutes", "10", "--keep", kept])
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap(),
    );
    let mounts = || {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.lines().filter(|line| line.contains(kept)).count()
    };
    let processes = || {
        let all = std::fs::read_dir("/proc").unwrap();
        let lines = all.filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok());
        let named = |line: &Vec<u8>| line.windows(kept.len()).any(|at| at == kept.as_bytes());
        lines.filter(named).count()
    };
    until("the run, its server and workers", || processes() > 3);
    let pid = Pid::from_child(&run.0);
    // As where its terminal is closed; SIGTERM is the same.
    assert_eq!(run.stop(hangup()).code(), Some(1));
    assert_eq!((mounts(), processes()), (0, 0));
    let groups = Cgroup::of_this_process().and_then(|own| own.folder().map(Path::to_owned));
    if let Some(groups) = groups {
        let left = groups.join(format!("hotset-chaos-{}", pid.as_raw_nonzero()));
        assert!(!left.exists(), "{}", left.display());
    }
}

/// The memfds that a process has open.
fn memories(pid: u32) -> usize {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let memfds = open.filter_map(|entry| {
        let path = entry.unwrap().path();
        let target = std::fs::read_link(&path).ok()?;
        let is = target.to_string_lossy().starts_with("/memfd:");
        is.then(|| std::fs::metadata(&path).ok().map(|file| file.ino()))?
    });
    memfds.collect::<BTreeSet<u64>>().len()
}

/// Sockets, locks of the index, and memory that clients of the dead still map.
#[test]
fn a_killed_server_leaves_nothing_that_its_successor_trips_over() {
    let home = Home::new();
    let library = home.library();
    let database = home.path().join("catalogue.db");
    let setting = format!("catalog.database={}", database.display());
    let arguments = ["--set", &setting];
    let settled = || {
        until("the first scan", || {
            home.json(&["status", "--json"])["catalogue"]["scanning"] == false
        });
    };
    let server = Server::start(&home, &library, &arguments);
    settled();
    let socket = server.socket().to_owned();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let set = LoadOptions::new(["sdxl-demo"]).on("ram");
        let bytes = |leases: &[hotset::client::RemoteLease]| -> Vec<Vec<u8>> {
            let tensors = leases.iter().flat_map(|lease| lease.tensors().unwrap());
            tensors.map(|tensor| tensor.bytes.to_vec()).collect()
        };
        let client = Client::connect_to(&socket, "worker").await.unwrap();
        let held = client.load(&set).await.unwrap();
        let before = bytes(&held);
        server.kill();
        client.closed().await;
        assert!(socket.exists(), "nobody has cleaned up");
        assert_eq!(bytes(&held), before, "what is mapped outlives the server");

        let successor = Server::start(&home, &library, &arguments);
        settled();
        let status = home.json(&["status", "--json"]);
        assert_eq!(
            status["catalogue"]["last_scan"]["inspected"], 0,
            "the index is neither locked nor broken: {status}"
        );
        let client = Client::connect_to(&socket, "worker").await.unwrap();
        let again = client.load(&set).await.unwrap();
        assert_eq!(bytes(&again), before);
        assert_eq!(bytes(&held), before, "nor does its successor touch it");
        drop((held, again, client));
        until("all leases to end", || {
            let status = home.json(&["status", "--json"]);
            status["tiers"][0]["leased"] == 0 && status["arena"]["lingering"] == 0
        });
        let status = home.json(&["status", "--json"]);
        assert_eq!(
            status["arena"]["mappings"],
            memories(successor.id()),
            "the books have each memory that is open, and no other: {status}"
        );
    });
}

/// What cannot be looked at for want of a descriptor is neither gone nor broken, then or after.
#[test]
fn a_server_without_descriptors_forgets_no_model() {
    let home = Home::new();
    let library = home.path().join("library");
    std::fs::create_dir(&library).unwrap();
    for i in 0..4 {
        model(&library.join(format!("m{i}.safetensors")), 1);
    }
    let server = Server::start(&home, &library, &["--set", "catalog.settle=10ms"]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = Client::connect_to(server.socket(), "worker").await.unwrap();
        let listed = async || {
            let page = client.list(hotset::bridge::wire::List {
                limit: 200,
                ..Default::default()
            });
            let models = page.await.unwrap().models;
            let whole = models.iter().filter(|model| model["error"].is_null());
            (models.len(), whole.count())
        };
        assert_eq!(listed().await, (4, 4));
        let pid = Pid::from_raw(server.id().try_into().unwrap());
        let limit = |most| {
            let limits = Rlimit {
                current: most,
                maximum: rustix::process::getrlimit(Resource::Nofile).maximum,
            };
            prlimit(pid, Resource::Nofile, limits).unwrap().current
        };
        let before = limit(Some(3));
        let log = home.path().join("serve.log");
        let mut i = 0;
        until("a look that fails", || {
            // Changes call for one.
            i += 1;
            model(&library.join("m0.safetensors"), 1 + i % 2);
            let log = std::fs::read_to_string(&log).unwrap();
            log.contains("could not be looked at")
        });
        assert_eq!(listed().await.0, 4, "known models are gone");
        limit(before);
        let began = std::time::Instant::now();
        while listed().await != (4, 4) {
            assert!(began.elapsed().as_secs() < 60, "{:?}", listed().await);
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        let set = LoadOptions::new(["m1", "m3"]).on("ram");
        assert_eq!(client.load(&set).await.unwrap().len(), 2);
    });
}

/// A control group for a server; removed when it is dropped.
struct Group(std::path::PathBuf);

impl Group {
    fn make() -> Result<Self, String> {
        let own = Cgroup::of_this_process().ok_or("no control group with a memory controller")?;
        let parent = own.folder().ok_or("no folder of the control group")?;
        let folder = parent.join(format!("hotset-shrink-{}", std::process::id()));
        std::fs::create_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let group = Self(folder);
        let (file, _) = group.files();
        std::fs::OpenOptions::new()
            .write(true)
            .open(&file)
            .map_err(|error| format!("{}: {error}", file.display()))?;
        Ok(group)
    }

    fn files(&self) -> (std::path::PathBuf, std::path::PathBuf) {
        let [limit, used] = match self.0.join("memory.max").exists() {
            true => ["memory.max", "memory.current"],
            false => ["memory.limit_in_bytes", "memory.usage_in_bytes"],
        };
        (self.0.join(limit), self.0.join(used))
    }

    /// What is in use, without cached files, which the kernel drops.
    fn used(&self) -> u64 {
        let used = std::fs::read_to_string(self.files().1).unwrap();
        let stat = std::fs::read_to_string(self.0.join("memory.stat")).unwrap();
        let [active, inactive] = match self.0.join("memory.max").exists() {
            true => ["active_file", "inactive_file"],
            false => ["total_active_file", "total_inactive_file"],
        };
        let cached = stat.lines().filter_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            (name == active || name == inactive).then(|| bytes.parse::<u64>().unwrap())
        });
        used.trim().parse::<u64>().unwrap() - cached.sum::<u64>()
    }

    fn limit(&self, bytes: u64) {
        std::fs::write(self.files().0, bytes.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn model(path: &Path, mib: usize) {
    let bytes = vec![7_u8; mib << 20];
    let tensor =
        safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![bytes.len()], &bytes);
    let file = safetensors::serialize([("t", tensor.unwrap())], None).unwrap();
    std::fs::write(path, file).unwrap();
}

/// As `docs/memory.md` says that it is to be done.
#[test]
fn a_limit_that_falls_in_steps_kills_nobody() {
    let home = Home::new();
    let library = home.path().join("library");
    std::fs::create_dir(&library).unwrap();
    for i in 0..8 {
        model(&library.join(format!("m{i}.safetensors")), 8);
    }
    let group = match Group::make() {
        Ok(group) => group,
        Err(why) => {
            eprintln!("SKIPPED: no control group can be made here: {why}");
            return;
        }
    };
    // It would look again in an hour: the kernel's word alone has to do.
    let settings = ["--set", "ram.budget=64MiB", "--set", "monitor.interval=1h"];
    let server = Server::start_in(&home, &library, &settings, Some(&group.0));
    let committed = || {
        home.json(&["status", "--json"])["tiers"]
            .as_array()
            .unwrap()
            .last()
            .unwrap()["committed"]
            .as_u64()
            .unwrap()
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let client = Client::connect_to(server.socket(), "worker").await.unwrap();
        for i in 0..6 {
            drop(
                client
                    .load(&LoadOptions::new([format!("m{i}")]).on("ram"))
                    .await
                    .unwrap(),
            );
        }
        let before = committed();
        assert!(before >= 48 << 20, "{before}");
        let held = client
            .load(&LoadOptions::new(["m0"]).on("ram"))
            .await
            .unwrap();
        // From more than all that is there, lower by less at each step than what has to stay free.
        for room in [72, 60, 48, 36, 24, 16, 8, 4, 4] {
            group.limit(group.used() + (room << 20));
            std::thread::sleep(std::time::Duration::from_millis(300));
        }
        until("what nobody holds to go", || committed() < before / 2);
        client.ping().await.unwrap();
        assert!(!held[0].tensors().unwrap().is_empty());
    });
}

/// A server that runs out of descriptors half-way through a set must not keep the first half, nor give its memory numbers that
/// the client never hears of.
#[test]
fn a_set_that_runs_out_of_descriptors_leaves_nothing() {
    let home = Home::new();
    let library = home.library();
    let server = Server::start(&home, &library, &[]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let holder = Client::connect_to(server.socket(), "holder").await.unwrap();
        let set = LoadOptions::new(["sdxl-demo"]).on("ram");
        let held = holder.load(&set).await.unwrap();
        assert_eq!(held.len(), 4);

        let client = Client::connect_to(server.socket(), "unlucky")
            .await
            .unwrap();
        client.ping().await.unwrap();
        let pid = Pid::from_raw(server.id().try_into().unwrap());
        let limit = |most| {
            let limits = Rlimit {
                current: Some(most),
                maximum: rustix::process::getrlimit(Resource::Nofile).maximum,
            };
            prlimit(pid, Resource::Nofile, limits)
                .unwrap()
                .current
                .unwrap()
        };
        // The limit is on numbers: one more that is free can be had. What is open for a moment only, as a descriptor is that was just sent
        // to the holder, is not in each of many looks.
        let look = || -> BTreeSet<u64> {
            let open = std::fs::read_dir(format!("/proc/{}/fd", server.id())).unwrap();
            let number = |entry: std::io::Result<std::fs::DirEntry>| {
                entry.unwrap().file_name().to_str().unwrap().parse()
            };
            open.map(|entry| number(entry).unwrap()).collect()
        };
        let mut open = look();
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            open = &open & &look();
        }
        let one_free = (0..).find(|number| !open.contains(number)).unwrap() + 1;
        let before = limit(one_free);
        let refused = client.load(&set).await.unwrap_err();
        assert_eq!(refused.code(), Some("internal"), "{refused}");
        limit(before);

        let leases = client.load(&set).await.unwrap();
        for lease in &leases {
            assert!(!lease.tensors().unwrap().is_empty());
        }
        let status = client.status().await.unwrap();
        let sessions = status["sessions"].as_array().unwrap();
        let unlucky = sessions
            .iter()
            .find(|session| session["label"].as_str().unwrap().starts_with("unlucky"));
        assert_eq!(unlucky.unwrap()["leases"], 4, "{status}");
    });
    drop(runtime);
    until("all leases to end", || {
        let status = home.json(&["status", "--json"]);
        status["tiers"][0]["leased"] == 0
    });
}
