//! The Python package and Triton's own client: their tests, in an environment where both are installed as users install them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::told;

/// Set (to `1`) where the tests must not be skipped.
const REQUIRED: &str = "HOTSET_REQUIRE_PYTHON";

/// An environment with the package, kept under `target`. The reason where there can be none.
fn environment() -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-client");
    let python = folder.join("bin/python");
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("python");
    let run = |command: &mut Command| -> Result<(), String> {
        let output = command
            .output()
            .map_err(|error| format!("{command:?}: {error}"))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("{command:?}: {}", told(&output))),
        }
    };
    let complete = folder.join("complete-2");
    if !complete.exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
        run(Command::new(&python)
            .args(["-m", "pip", "install", "--quiet"])
            .args([
                "msgpack",
                "numpy",
                "ml_dtypes",
                "safetensors",
                "setuptools>=68",
                "tritonclient[http]",
            ]))?;
        std::fs::write(&complete, "").map_err(|error| error.to_string())?;
    }
    // A copy, since building in place would leave files in the sources.
    let copy = folder.join("package");
    let _ = std::fs::remove_dir_all(&copy);
    run(Command::new("cp").arg("-r").arg(&package).arg(&copy))?;
    // Without isolation: the build needs setuptools alone, which is there, and no network.
    run(Command::new(&python)
        .args(["-m", "pip", "install", "--quiet", "--force-reinstall"])
        .args(["--no-deps", "--no-build-isolation"])
        .arg(&copy))?;
    Ok(python)
}

#[test]
fn python_and_triton_clients_are_served() {
    let python = match environment() {
        Ok(python) => python,
        Err(reason) if std::env::var_os(REQUIRED).is_some_and(|value| value == "1") => {
            panic!(
                "the tests of the Python package are required ({REQUIRED}=1) and cannot run: {reason}"
            )
        }
        Err(reason) => {
            eprintln!("SKIPPED, the Python package needs python3 with venv, and PyPI: {reason}");
            return;
        }
    };
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/tests");
    for test in ["test_bridge.py", "test_http.py"] {
        let output = Command::new(&python)
            .arg(tests.join(test))
            .env("HOTSET_BINARY", env!("CARGO_BIN_EXE_hotset"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .current_dir(&tests)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", told(&output));
    }
}
