//! Tests in processes of their own, in which the doubles are what the dynamic loader finds.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use crate::{BOARD_VARIABLE, Machine};

/// Says to a process which part of which test it is.
const ROLE_VARIABLE: &str = "HOTSET_DOUBLE_ROLE";
/// The role of the process that runs the test's body.
const BODY: &str = "body";

/// A test in a process of its own.
#[derive(Debug, Clone, Copy)]
pub struct Isolated {
    /// The GPUs of the machine.
    pub gpus: usize,
    /// Whether there is a `libcuda.so.1`.
    pub cuda: bool,
    /// Whether there is a `libnvidia-ml.so.1`.
    pub nvml: bool,
    /// What the test does wrongly on purpose: a part of each line of the report, in its order.
    pub misuse: &'static [&'static str],
}

impl Default for Isolated {
    fn default() -> Self {
        Self {
            gpus: 1,
            cuda: true,
            nvml: true,
            misuse: &[],
        }
    }
}

/// Runs a test's body in a process of its own, and fails where it fails, where the driver was used wrongly, or where it
/// left anything behind. `test` is [`this_test!`](crate::this_test).
///
/// # Panics
/// As said.
pub fn run(test: &str, isolated: Isolated, body: impl FnOnce(&Machine)) {
    if std::env::var_os(ROLE_VARIABLE).is_some() {
        let machine = Machine::of_environment().expect("the machine that the test made");
        // The others are `in_role`'s.
        if std::env::var(ROLE_VARIABLE).as_deref() == Ok(BODY) {
            body(&machine);
            machine.assert_nothing_left();
        }
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let machine = Machine::create(&folder.path().join("machine"), isolated.gpus);
    let libraries = folder.path().join("lib");
    std::fs::create_dir(&libraries).expect("a folder for the libraries");
    for (there, names, double) in [
        (
            isolated.cuda,
            ["libcuda.so", "libcuda.so.1"],
            "hotset_double_cuda",
        ),
        (
            isolated.nvml,
            ["libnvidia-ml.so", "libnvidia-ml.so.1"],
            "hotset_double_nvml",
        ),
    ] {
        if there {
            for name in names {
                symlink(built(double), libraries.join(name)).expect("a link to the double");
            }
        }
    }
    let said = this_test_again(test)
        .env(BOARD_VARIABLE, folder.path().join("machine"))
        .env("LD_LIBRARY_PATH", &libraries)
        .env(ROLE_VARIABLE, BODY)
        .output()
        .expect("this test's own binary");
    // Captured by the test harness, and shown where the test fails or somebody asks.
    println!("{}", String::from_utf8_lossy(&said.stdout));
    eprintln!("{}", String::from_utf8_lossy(&said.stderr));
    let misuse = machine.misuse();
    let lines: Vec<&str> = misuse.lines().collect();
    let expected = lines.len() == isolated.misuse.len()
        && lines
            .iter()
            .zip(isolated.misuse)
            .all(|(line, part)| line.contains(part));
    assert!(expected, "the driver was used wrongly:\n{misuse}");
    let status = said.status;
    assert!(status.success(), "the test failed in its process: {status}");
}

/// From [`run`]'s body: runs the test once more, in one more process on the same machine, for its part in
/// [`in_role`]. The arguments go to it by its environment.
///
/// # Panics
/// Where the other process fails.
pub fn run_role(test: &str, role: &str, environment: &[(&str, String)]) {
    let status = this_test_again(test)
        .env(ROLE_VARIABLE, role)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .status()
        .expect("this test's own binary");
    assert!(status.success(), "`{role}` failed in its process: {status}");
}

/// Beside [`run`]: what a process does that [`run_role`] started in this role; nothing in any other.
pub fn in_role(role: &str, part: impl FnOnce()) {
    if std::env::var(ROLE_VARIABLE).as_deref() == Ok(role) {
        part();
    }
}

fn this_test_again(test: &str) -> Command {
    let binary = std::env::current_exe().expect("the path of the test's binary");
    let mut command = Command::new(binary);
    command.args([
        test,
        "--exact",
        "--nocapture",
        "--include-ignored",
        "--test-threads=1",
    ]);
    command
}

/// Where cargo put a double: beside the test's binary, since the test depends on it.
fn built(double: &str) -> PathBuf {
    let binary = std::env::current_exe().expect("the path of the test's binary");
    let folder = binary.parent().expect("a binary is in a folder");
    let file = format!("lib{double}.so");
    [folder.join(&file), folder.join("deps").join(&file)]
        .into_iter()
        .chain(folder.parent().map(|up| up.join(&file)))
        .find(|path| path.exists())
        .unwrap_or_else(|| panic!("{file} is not beside {}", binary.display()))
}
