//! Commands against a running server, and the server's end.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::{Home, assert_refused, told};

/// Long enough for any step on a busy machine; only ever reached by a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until something holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < PATIENCE, "waited for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A running `hotset serve`; killed when it is dropped.
pub(crate) struct Server {
    child: Option<Child>,
    socket: PathBuf,
}

impl Server {
    /// Serves a folder, at the default place of this home, with further arguments.
    pub(crate) fn start(home: &Home, library: &Path, arguments: &[&str]) -> Self {
        Self::start_in(home, library, arguments, None)
    }

    /// The same in a control group.
    pub(crate) fn start_in(
        home: &Home,
        library: &Path,
        arguments: &[&str],
        group: Option<&Path>,
    ) -> Self {
        let mut all = vec!["--models", library.to_str().unwrap(), "serve"];
        all.extend(arguments);
        let log = std::fs::File::create(home.path().join("serve.log")).unwrap();
        let mut command = home.command(&all);
        if let Some(group) = group {
            // The shell moves itself into the group and becomes the server.
            let server = command;
            let mut shell = Command::new("sh");
            shell
                .args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#])
                .arg(group)
                .arg(server.get_program())
                .args(server.get_args())
                .current_dir(home.path())
                .env_clear()
                .env("HOME", home.path())
                .env("PATH", std::env::var_os("PATH").unwrap_or_default());
            command = shell;
        }
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let server = Self {
            child: Some(child),
            socket: home.path().join(".local/state/hotset/hotset.sock"),
        };
        until("the socket", || server.answers());
        server
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    fn answers(&self) -> bool {
        std::os::unix::net::UnixStream::connect(&self.socket).is_ok()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// As the system's own out-of-memory killer would.
    pub(crate) fn kill(mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Waits for its end.
    fn ended(mut self) -> Output {
        self.child.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The end of a terminal; SIGTERM where this process is to outlive that, as do those that it starts (`nohup cargo test`).
pub(crate) fn hangup() -> rustix::process::Signal {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mut lines = status.lines();
    let ignored = lines.find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    match u64::from_str_radix(ignored.trim(), 16).unwrap() & 1 {
        0 => rustix::process::Signal::HUP,
        _ => rustix::process::Signal::TERM,
    }
}

/// A process that does not outlive its test.
pub(crate) struct Ending(pub(crate) Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whoever started it may be gone, with everything that it could say something to.
#[test]
fn a_server_drains_when_its_terminal_is_gone() {
    let home = Home::new();
    let library = home.library();
    let arguments = ["--models", library.to_str().unwrap(), "serve"];
    let mut command = home.command(&arguments);
    command.env("RUST_LOG", "debug");
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let heard = std::io::BufReader::new(child.stderr.take().unwrap());
    let server = Server {
        child: Some(child),
        socket: home.path().join(".local/state/hotset/hotset.sock"),
    };
    let mut lines = std::io::BufRead::lines(heard);
    assert!(lines.next().is_some(), "it logs");
    // Nobody reads from now on.
    drop(lines);
    until("the socket", || server.answers());
    let loaded = home.json(&["load", "sdxl-demo", "--json"]);
    assert_eq!(
        loaded["components"].as_array().unwrap().len(),
        4,
        "{loaded}"
    );
    let pid = rustix::process::Pid::from_raw(server.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, hangup()).unwrap();
    let ended = server.ended();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
}

#[test]
fn commands_ask_the_running_server() {
    let home = Home::new();
    let library = home.library();
    let server = Server::start(&home, &library, &[]);
    // No folder is named: all of this comes from the server.
    let listed = home.json(&["ls", "lora", "--json"]);
    assert_eq!(listed["models"][0]["name"], "loras/ink-sketch");
    let text = home.run(&["ls"]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("pipelines/sdxl-demo"), "{text}");
    let plan = home.json(&["plan", "sdxl-demo", "--json"]);
    assert_eq!(plan["fit"], "now");

    let printed = home.path().join("held.json");
    let mut holder = Ending(
        home.command(&["load", "sdxl-demo", "--hold", "--digest", "--json"])
            .stdout(std::fs::File::create(&printed).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    until("the leases", || {
        let status = home.json(&["status", "--json"]);
        let sessions = status["sessions"].as_array().unwrap();
        sessions.iter().any(|session| session["leases"] == 4)
    });
    let shown = home.json(&["show", "sdxl-demo", "--json"]);
    assert_eq!(shown["resident"]["unet"][0], "ram", "{shown}");
    let shown = home.run(&["show", "sdxl-demo"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("unet is resident in ram"), "{shown}");
    let why = home.json(&["why", "sdxl-demo", "--json"]);
    assert_eq!(why["decisions"][0]["act"], "admit");
    let why = home.run(&["why", "sdxl-demo/unet"]);
    let why = String::from_utf8_lossy(&why.stdout).into_owned();
    assert!(why.contains("admitted 4 component(s)"), "{why}");
    let usage = home.json(&["analyse", "--json"]);
    assert_eq!(usage["hot"].as_array().unwrap().len(), 4);
    let top = home.run(&["top", "--count", "2", "--every", "10ms"]);
    let top = String::from_utf8_lossy(&top.stdout).into_owned();
    assert_eq!(top.matches("health: green").count(), 2, "{top}");

    // The bytes that another process maps are those that a system of one's own reads.
    let own = home.json(&[
        "--models",
        library.to_str().unwrap(),
        "load",
        "sdxl-demo",
        "--digest",
        "--json",
    ]);
    holder.0.kill().unwrap();
    let held: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&printed).unwrap()).unwrap();
    assert_eq!(held["components"], own["components"]);
    until("the holder's leases to end", || {
        let status = home.json(&["status", "--json"]);
        let sessions = status["sessions"].as_array().unwrap();
        sessions.iter().all(|session| session["leases"] == 0)
    });

    // A second server finds the first, and a client ends it.
    let second = home.run(&["--models", library.to_str().unwrap(), "serve"]);
    assert_refused_serving(&second);
    let drained = home.run(&["drain"]);
    assert_eq!(drained.status.code(), Some(0), "{}", told(&drained));
    let socket = server.socket().to_owned();
    let output = server.ended();
    assert_eq!(output.status.code(), Some(0));
    assert!(!socket.exists());
    assert_refused(&home.run(&["why"]), 1, &["hotset serve"]);
}

fn assert_refused_serving(output: &Output) {
    assert_refused(output, 1, &["another server listens", "bridge.socket"]);
}

#[test]
fn a_killed_server_leaves_no_hindrance() {
    let home = Home::new();
    let library = home.library();
    let server = Server::start(&home, &library, &[]);
    let socket = server.socket().to_owned();
    assert!(
        Command::new("kill")
            .arg("-0")
            .arg(server.id().to_string())
            .status()
            .unwrap()
            .success()
    );
    server.kill();
    assert!(socket.exists());
    // Commands that can do without go on alone.
    let listed = home.json(&["--models", library.to_str().unwrap(), "ls", "--json"]);
    assert!(!listed["models"].as_array().unwrap().is_empty());
    let _again = Server::start(&home, &library, &[]);
    let listed = home.json(&["ls", "--json"]);
    assert!(!listed["models"].as_array().unwrap().is_empty());
}

#[test]
fn what_is_granted_is_recorded_for_replay() {
    let home = Home::new();
    let library = home.library();
    let _server = Server::start(&home, &library, &[]);
    let requests = home.path().join("requests.csv");
    let arguments = [
        "record",
        "requests.csv",
        "--components",
        "components.csv",
        "--anonymise",
    ];
    let mut recorder = Ending(
        home.command(&arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    // The subscription is there once a load is written down.
    until("a recorded request", || {
        home.json(&["load", "sdxl-demo", "--json"]);
        let written = std::fs::read_to_string(&requests).unwrap_or_default();
        written.lines().count() > 3
    });
    // What was recorded before is not written over.
    assert_refused(&home.run(&arguments), 1, &["requests.csv"]);
    let signalled = Command::new("kill")
        .arg(recorder.0.id().to_string())
        .status();
    assert!(signalled.unwrap().success());
    assert!(recorder.0.wait().unwrap().success());
    let written = std::fs::read_to_string(&requests).unwrap();
    assert!(!written.contains("sdxl"), "{written}");
    let replayed = home.json(&[
        "replay",
        "requests.csv",
        "--components",
        "components.csv",
        "--policy",
        "lru,hotset",
        "--json",
    ]);
    assert_eq!(replayed["components"], 4);
    assert_eq!(replayed["requests"], written.lines().count() - 1);
}
