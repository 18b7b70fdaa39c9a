//! Inside a control group that allows less than is loaded in turn: nothing is killed for it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hotset::core::machine::Cgroup;
use hotset::{Bytes, ComponentSet, Config, Hotset, Target};

/// What the group may use.
const LIMIT: Bytes = Bytes::gib(2);
/// Models that are loaded in turn: 6 GiB in all.
const MODELS: u64 = 8;
const MODEL: Bytes = Bytes::mib(768);
/// Tells the process that it is the one inside.
const INSIDE: &str = "HOTSET_TEST_INSIDE_A_GROUP";

/// A control group below this process's own; removed when dropped.
struct Group {
    folder: PathBuf,
    limit: &'static str,
    peak: &'static str,
    kills: &'static str,
}

impl Group {
    /// Makes one, or says why it may not.
    fn make() -> Result<Self, String> {
        let own = Cgroup::of_this_process().ok_or("no control group with a memory controller")?;
        let parent = own.folder().ok_or("no folder of the control group")?;
        let folder = parent.join(format!("hotset-test-{}", std::process::id()));
        let failed = |error| format!("{}: {error}", folder.display());
        fs::create_dir(&folder).map_err(failed)?;
        let old = folder.join("memory.limit_in_bytes").exists();
        let group = Self {
            limit: if old {
                "memory.limit_in_bytes"
            } else {
                "memory.max"
            },
            peak: if old {
                "memory.max_usage_in_bytes"
            } else {
                "memory.peak"
            },
            kills: if old {
                "memory.oom_control"
            } else {
                "memory.events"
            },
            folder,
        };
        let failed = |error| format!("{}: {error}", group.folder.display());
        fs::write(group.folder.join(group.limit), LIMIT.get().to_string()).map_err(failed)?;
        Ok(group)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(name)).unwrap_or_default()
    }

    fn kills(&self) -> u64 {
        self.read(self.kills)
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "))
            .and_then(|n| n.trim().parse().ok())
            .unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.folder);
    }
}

/// A safetensors file of one tensor that takes no room on the disk.
fn sparse(path: &Path) {
    let data = MODEL.get() - 4096;
    let mut header = serde_json::to_vec(
        &serde_json::json!({"t": {"dtype": "U8", "shape": [data], "data_offsets": [0, data]}}),
    )
    .unwrap();
    header.resize(4096 - 8, b' ');
    let file = fs::File::create(path).unwrap();
    file.set_len(MODEL.get()).unwrap();
    file.write_all_at(&(header.len() as u64).to_le_bytes(), 0)
        .unwrap();
    file.write_all_at(&header, 8).unwrap();
}

#[test]
fn more_than_the_group_may_hold_is_loaded_in_turn() {
    if let Some(library) = std::env::var_os(INSIDE) {
        return inside(Path::new(&library));
    }
    let group = match Group::make() {
        Ok(group) => group,
        Err(why) => {
            eprintln!("SKIPPED: no control group can be made here: {why}");
            return;
        }
    };
    let library = tempfile::tempdir().unwrap();
    for i in 0..MODELS {
        sparse(&library.path().join(format!("model-{i}.safetensors")));
    }
    // The shell moves itself into the group and becomes the test.
    let output = Command::new("sh")
        .args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#])
        .arg(&group.folder)
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "memory_limit::more_than_the_group_may_hold_is_loaded_in_turn",
            "--nocapture",
        ])
        .env(INSIDE, library.path())
        .output()
        .unwrap();
    let told = format!(
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{told}");
    assert_eq!(group.kills(), 0, "{told}");
    let peak: u64 = group.read(group.peak).trim().parse().unwrap_or(0);
    assert!(peak <= LIMIT.get(), "{peak} bytes");
    eprintln!("at most {} of {LIMIT} were used", Bytes(peak));
}

/// Inside of the group: a system with nothing configured but its folder.
fn inside(library: &Path) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut config = Config::default();
        config.catalog.roots = vec![library.to_owned()];
        config.catalog.watch = false;
        config.catalog.digest_rate = Bytes::ZERO;
        let hotset = Hotset::builder().config(config).start().await.unwrap();
        let ram = hotset.ledger().views()[0].clone();
        assert!(
            ram.budget <= LIMIT && ram.budget >= MODEL,
            "the group was not noticed: {}",
            ram.budget
        );
        let session = hotset.session("test").await.unwrap();
        for round in 0..2 {
            for i in 0..MODELS {
                let set = ComponentSet::new([format!("model-{i}")]).on(Target::Ram);
                let leases = session.load(set).leases().await.unwrap();
                let slab = leases[0].slab().unwrap();
                assert_eq!(slab.filled().len() as u64, MODEL.get());
                println!("round {round}: model {i} is there, {} held", slab.held());
            }
        }
        drop(session);
        hotset.drain().await;
    });
}
