//! Each command once: what it prints, and how it ends.

use std::collections::BTreeSet;
use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Home, assert_refused, told};

fn names(models: &Value) -> BTreeSet<String> {
    models
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn the_demo_loads_evicts_and_says_why() {
    let home = Home::new();
    let output = home.run(&["demo", "--scale", "tiny"]);
    assert_eq!(output.status.code(), Some(0), "{}", told(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    for words in [
        "Before",
        "After",
        "vram:0",
        "evicted pipelines/sdxl-demo/",
        "least recently used",
    ] {
        assert!(text.contains(words), "`{words}` is missing in: {text}");
    }

    let shown = home.json(&["demo", "--scale", "tiny", "--json"]);
    assert!(shown["models"].as_array().unwrap().len() >= 6);
    for model in shown["models"].as_array().unwrap() {
        assert!(model["error"].is_null(), "{model}");
    }
    let evictions = shown["evictions"].as_array().unwrap();
    assert!(!evictions.is_empty());
    assert_eq!(evictions[0]["act"], "evict");
    assert!(evictions[0]["tier"] == "vram:0", "{}", evictions[0]);
}

#[test]
fn the_catalogue_is_scanned_listed_and_shown() {
    let home = Home::new();
    let library = home.library();
    let library = library.to_str().unwrap();

    let scan = home.json(&["scan", library, "--json"]);
    assert!(scan["files"].as_u64().unwrap() > 6, "{}", scan["files"]);
    assert!(scan["elapsed_s"].is_f64());
    let pipeline = scan["models"]
        .as_array()
        .unwrap()
        .iter()
        .find(|model| model["name"] == "pipelines/sdxl-demo")
        .unwrap();
    for key in [
        "path",
        "name",
        "format",
        "kind",
        "architecture",
        "bytes",
        "components",
        "error",
    ] {
        assert!(pipeline.get(key).is_some(), "{key} is missing");
    }
    assert_eq!(pipeline["format"], "diffusers");
    assert_eq!(pipeline["kind"], "pipeline");
    let component = &pipeline["components"][0];
    for key in ["name", "kind", "bytes", "content_id", "files"] {
        assert!(component.get(key).is_some(), "{key} is missing");
    }

    let listed = home.json(&["--models", library, "ls", "--json"]);
    assert_eq!(names(&listed["models"]), names(&scan["models"]));
    let loras = home.json(&["--models", library, "ls", "lora", "--json"]);
    assert_eq!(
        names(&loras["models"]),
        BTreeSet::from(["loras/ink-sketch".to_owned()])
    );

    let shown = home.json(&["--models", library, "show", "sdxl-demo", "--json"]);
    let order = shown["dependencies"]["loading_order"].as_array().unwrap();
    assert_eq!(order.len(), 4, "{shown}");
    let graph = home.json(&[
        "--models",
        library,
        "show",
        "sdxl-demo",
        "--graph",
        "--json",
    ]);
    let order = graph["components"].as_array().unwrap();
    assert_eq!(order.len(), shown["components"].as_array().unwrap().len());
    assert_eq!(graph["edges"][0]["why"], "used before");
    let dot = home.run(&["--models", library, "show", "sdxl-demo", "--dot"]);
    assert!(dot.stdout.starts_with(b"digraph set {"), "{dot:?}");
    let text = home.run(&["--models", library, "show", "sdxl-demo"]);
    assert!(
        String::from_utf8_lossy(&text.stdout).contains("loading order"),
        "{}",
        told(&text)
    );
}

#[test]
fn a_set_is_planned_and_loaded() {
    let home = Home::new();
    let library = home.library();
    let library = library.to_str().unwrap();

    let plan = home.json(&["--models", library, "plan", "ink-sketch", "--json"]);
    assert_eq!(plan["tier"], "ram");
    assert_eq!(plan["fit"], "now");
    let planned = plan["steps"].as_array().unwrap().len();

    let loaded = home.json(&["--models", library, "load", "sdxl-demo", "--json"]);
    let components = loaded["components"].as_array().unwrap();
    assert_eq!(components.len(), 4);
    assert!(planned >= 1);
    assert!(
        components
            .iter()
            .all(|c| c["tier"] == "ram" && c["bytes"].as_u64() > Some(0))
    );
    assert!(loaded["bytes_per_s"].as_f64() > Some(0.0));

    // The bytes that were leased on a device are those that were leased in host memory.
    let digests = |loaded: &Value| -> Vec<String> {
        loaded["components"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|component| component["tensors"].as_array().unwrap())
            .map(|tensor| format!("{} {}", tensor["name"], tensor["sha256"].as_str().unwrap()))
            .collect()
    };
    let in_ram = home.json(&[
        "--models",
        library,
        "load",
        "sdxl-demo",
        "--digest",
        "--json",
    ]);
    let on_gpu = home.json(&[
        "--models",
        library,
        "load",
        "sdxl-demo",
        "--digest",
        "--json",
        "--set",
        "gpu.0.device=sim",
    ]);
    assert_eq!(on_gpu["components"][0]["tier"], "vram:0");
    assert!(!digests(&in_ram).is_empty());
    assert_eq!(digests(&in_ram), digests(&on_gpu));
}

#[test]
fn what_no_gpu_has_room_for_is_split_and_its_blocks_are_told_in_their_order() {
    let home = Home::new();
    let library = home.library();
    let models = ["--models", library.to_str().unwrap()];
    let gpu = [
        "--set",
        "gpu.0.device=sim",
        "--set",
        "gpu.0.headroom=0",
        "--set",
        "gpu.0.budget=2MiB",
        "--set",
        "gpu.0.sim.granularity=64KiB",
    ];
    let with = |command: &[&'static str]| [&models[..], command, &gpu].concat();
    let refused = home.run(&with(&["load", "tiny-llama"]));
    assert_refused(&refused, 1, &["2.0 MiB", "it fits where it may be split"]);
    let plan = home.run(&with(&["plan", "tiny-llama", "--split"]));
    let told = String::from_utf8_lossy(&plan.stdout);
    assert!(
        told.contains("blocks in vram:0 (") && told.contains("blocks in ram, to be streamed ("),
        "{told}"
    );
    let loaded = home.json(&with(&["load", "tiny-llama", "--split", "--json"]));
    let parts: Vec<&Value> = loaded["components"]
        .as_array()
        .unwrap()
        .iter()
        .map(|component| &component["part"])
        .collect();
    let [first, rest] = parts[..] else {
        panic!("{loaded}")
    };
    let blocks = |part: &Value| part["blocks"].as_array().unwrap().len() as u64;
    assert_eq!(
        (&first["of"], first["first"].as_u64()),
        (&rest["of"], Some(0))
    );
    assert_eq!(rest["first"].as_u64(), Some(blocks(first)));
    assert_eq!(
        Some(blocks(first) + blocks(rest)),
        rest["of_blocks"].as_u64()
    );
}

#[test]
fn what_cannot_be_loaded_is_refused_with_the_reason() {
    let home = Home::new();
    let library = home.library();
    let library = library.to_str().unwrap();
    let none = home.run(&["--models", library, "load", "sdxl-dmeo"]);
    assert_refused(&none, 1, &["error:", "sdxl-dmeo"]);
    let small = home.run(&[
        "--models",
        library,
        "load",
        "sdxl-demo",
        "--set",
        "ram.budget=64KiB",
    ]);
    assert_refused(&small, 1, &["error:", "64.0 KiB"]);
}

#[test]
fn wrong_usage_is_told_with_what_to_do() {
    let home = Home::new();
    assert_refused(&home.run(&["lod"]), 2, &["load"]);
    assert_refused(&home.run(&["ls"]), 2, &["--models DIR", "catalog.roots"]);
    assert_refused(&home.run(&["--set", "ram.budget", "ls"]), 2, &["KEY=VALUE"]);
}

#[test]
fn a_wrong_configuration_is_refused_with_its_place_and_the_nearest_key() {
    let home = Home::new();
    let file = home.write(
        "wrong.toml",
        "[catalog]\nroots = ['.']\n\n[ram]\nbugdet = '1GiB'\n",
    );
    let file = file.to_str().unwrap();
    let refused = home.run(&["--config", file, "ls"]);
    assert_refused(
        &refused,
        2,
        &[
            "wrong.toml:5:1",
            "`ram.bugdet`",
            "did you mean `ram.budget`?",
        ],
    );
    let refused = home
        .command(&["ls"])
        .env("HOTSET_RAM__BUDGET", "lots")
        .output()
        .unwrap();
    assert_refused(&refused, 2, &["HOTSET_RAM__BUDGET", "`lots` is not a size"]);
    let refused = home.run(&["--config", "missing.toml", "ls"]);
    assert_refused(&refused, 2, &["missing.toml", "--config"]);
}

#[test]
fn the_configuration_in_force_is_shown_with_its_origins() {
    let home = Home::new();
    home.write("hotset.toml", "[ram]\nbudget = '1GiB'\n");
    let shown = home.json(&[
        "--config",
        "hotset.toml",
        "config",
        "--json",
        "--set",
        "load.reads=2",
    ]);
    let setting = |key: &str| {
        shown["settings"]
            .as_array()
            .unwrap()
            .iter()
            .find(|setting| setting["key"] == key)
            .unwrap()
            .clone()
    };
    assert_eq!(setting("ram.budget")["value"], 1 << 30);
    assert_eq!(setting("ram.budget")["origin"]["line"], 2);
    assert_eq!(setting("load.reads")["origin"]["from"], "flag");
    assert!(setting("load.piece")["origin"].is_null());
    let text = home.run(&["config"]);
    assert!(
        String::from_utf8_lossy(&text.stdout).contains("8.0 MiB"),
        "{}",
        told(&text)
    );
}

#[test]
fn status_is_green() {
    let home = Home::new();
    let library = home.library();
    let status = home.json(&["--models", library.to_str().unwrap(), "status", "--json"]);
    assert_eq!(status["health"]["state"], "green", "{status}");
    assert_eq!(status["tiers"][0]["tier"], "ram");
}

#[test]
fn serve_drains_when_it_is_told_to_stop() {
    let home = Home::new();
    let library = home.library();
    for signal in ["-TERM", "-INT"] {
        let mut server = home
            .command(&["--models", library.to_str().unwrap(), "serve"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0; 7];
        server
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut first)
            .unwrap();
        assert_eq!(&first, b"serving");
        // What comes after the first line goes on being read, so that the server never waits for us.
        let mut rest = server.stdout.take().unwrap();
        let reader = std::thread::spawn(move || rest.read_to_end(&mut Vec::new()));
        let id = server.id().to_string();
        let sent = std::process::Command::new("kill")
            .args([signal, &id])
            .status()
            .unwrap();
        assert!(sent.success());
        let asked = Instant::now();
        let output = server.wait_with_output().unwrap();
        reader.join().unwrap().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", told(&output));
        assert!(asked.elapsed() < Duration::from_secs(10));
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("draining"),
            "{}",
            told(&output)
        );
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let home = Home::new();
    let mut shown = home
        .command(&["config"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(shown.stdout.take());
    let output = shown.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", told(&output));
    assert!(output.stderr.is_empty(), "{}", told(&output));
}

#[test]
fn bench_attach_measures_each_kind_of_client() {
    let home = Home::new();
    let report = home.json(&[
        "bench",
        "attach",
        "--components",
        "3",
        "--tensors",
        "4",
        "--size",
        "64KiB",
        "--connections",
        "2",
        "--sessions",
        "3",
        "--requests",
        "30",
        "--time",
        "50ms",
        "--file",
        "0",
        "--python",
        "/nonexistent/python",
        "--json",
    ]);
    assert_eq!(report["embedded"]["count"], 30, "{report}");
    for who in ["embedded", "bridge", "killed"] {
        assert!(report[who]["p50_us"].as_f64().unwrap() > 0.0, "{report}");
        assert!(report[who]["count"].as_u64().unwrap() > 0, "{report}");
    }
    assert!(report["bridge"]["requests_per_s"].as_f64().unwrap() > 0.0);
    // What cannot be measured is said, and is no failure.
    let missing = report["python_missing"].as_str().unwrap();
    assert!(report["python"].is_null() && missing.contains("/nonexistent/python"));
}

#[test]
fn bench_load_states_its_rate_beside_the_disks_own() {
    let home = Home::new();
    let arguments = [
        "bench", "load", "--size", "32MiB", "--rounds", "1", "--all", "--folder", ".", "--json",
    ];
    let output = home.run(&arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("page cache") || said.contains("no direct reads") {
        eprintln!("SKIPPED: the temporary folder is in memory: {said}");
        return;
    }
    assert_eq!(output.status.code(), Some(0), "{}", told(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for key in ["load_gbps", "raw_gbps", "ratio", "cpu_s_per_gb"] {
        assert!(
            report[key].as_f64().is_some_and(|n| n >= 0.0),
            "{key}: {report}"
        );
    }
    assert_eq!(report["peers"], serde_json::json!([]));
    let files: Vec<_> = report["shapes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|shape| shape["files"].as_u64().unwrap())
        .collect();
    assert_eq!(files, [1, 40, 300]);
    assert_eq!(
        std::fs::read_dir(home.path()).unwrap().count(),
        0,
        "its files are removed"
    );
}
