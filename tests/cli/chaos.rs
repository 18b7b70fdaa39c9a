//! The harness of real processes, and what it found.

use std::collections::BTreeSet;

use hotset::client::{Client, LoadOptions};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::server::{Server, until};
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
        // The limit is on numbers: one more that is free can be had.
        let open = std::fs::read_dir(format!("/proc/{}/fd", server.id())).unwrap();
        let open: BTreeSet<u64> = open
            .map(|entry| {
                entry
                    .unwrap()
                    .file_name()
                    .to_str()
                    .unwrap()
                    .parse()
                    .unwrap()
            })
            .collect();
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
