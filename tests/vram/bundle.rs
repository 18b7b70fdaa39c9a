//! The bundle for machines with a GPU, run where there is nothing but the doubles of the driver.

use crate::*;

/// `scripts/gpu-bundle --check` names the archive in `HOTSET_BUNDLE`; nothing is checked without one.
#[test]
fn the_bundle_needs_nothing_but_a_driver() {
    let Some(archive) = std::env::var_os("HOTSET_BUNDLE") else {
        eprintln!("SKIPPED: no HOTSET_BUNDLE; scripts/gpu-bundle --check makes one");
        return;
    };
    run(this_test!(), gpus(1), |machine| {
        set_room(machine, 6 << 10);
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let unpacked = Command::new("tar")
            .arg("xzf")
            .arg(&archive)
            .arg("--strip-components=1")
            .current_dir(folder.path())
            .status()
            .unwrap();
        assert!(unpacked.success());
        let kept = ["LD_LIBRARY_PATH", hotset_double_machine::BOARD_VARIABLE];
        let mut command = Command::new(folder.path().join("run"));
        command
            .env_clear()
            .envs(kept.map(|name| (name, std::env::var_os(name).unwrap())))
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", folder.path())
            .env("HOTSET_BENCH_SIZE", "64MiB")
            .env("HOTSET_CHECK_BYTES", "67108864")
            .current_dir("/");
        // Where PyPI can be reached, an interpreter with what the bundle's own package needs, and without torch.
        let python = clients::python().ok();
        if let Some(python) = &python {
            command.env("HOTSET_PYTHON", python);
        }
        let said = command.output().unwrap();
        let text = String::from_utf8_lossy(&said.stdout);
        println!("{text}");
        assert!(
            said.status.success(),
            "{text}\n{}",
            String::from_utf8_lossy(&said.stderr)
        );
        let report = std::fs::read_to_string(folder.path().join("report.md")).unwrap();
        for part in [
            "test result: ok",
            "raw copy from pinned memory",
            "read back and equal to the files",
            "components in vram:0, from",
            "check with PyTorch",
            "says NVML",
        ] {
            assert!(report.contains(part), "no `{part}` in:\n{report}");
        }
        let attached = !report.contains("give --python");
        assert!(
            attached || python.is_none(),
            "Python does not attach:\n{report}"
        );
    });
}
