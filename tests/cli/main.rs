//! hotset as its users run it: the binary, its output and its exit status.
// Clippy's own exemption reaches `#[test]` functions only, not what they call.
#![allow(clippy::unwrap_used)]

mod chaos;
mod commands;
mod python;
mod python_client;
mod replay;
mod server;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A folder of its own for one test, in which the binary runs with no configuration but its own.
struct Home {
    folder: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// The library of `hotset demo`, small.
    fn library(&self) -> PathBuf {
        let library = self.path().join("library");
        let made = self.run(&[
            "demo",
            "--scale",
            "tiny",
            "--keep",
            library.to_str().unwrap(),
        ]);
        assert!(made.status.success(), "{}", told(&made));
        library
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hotset"));
        command
            .args(arguments)
            .current_dir(self.path())
            .env_clear()
            .env("HOME", self.path())
            .env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The one JSON document that the command prints.
    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(0), "{}", told(&output));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{error} in the output of {arguments:?}: {}", told(&output))
        })
    }
}

fn told(output: &Output) -> String {
    format!(
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Asserts the exit status, an empty standard output, and words on standard error.
fn assert_refused(output: &Output, status: i32, words: &[&str]) {
    assert_eq!(output.status.code(), Some(status), "{}", told(output));
    assert!(output.stdout.is_empty(), "{}", told(output));
    let error = String::from_utf8_lossy(&output.stderr);
    for word in words {
        assert!(error.contains(word), "`{word}` is missing in: {error}");
    }
}
