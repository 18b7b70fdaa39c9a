//! Which GPUs are used, and what the binary says of them.

use crate::*;

#[test]
fn gpus_are_chosen_by_ordinal_and_uuid() {
    run(this_test!(), gpus(3), |_| {
        let library = Library::new();
        block_on(async {
            let all = start(config(&library)).await;
            let uuids: Vec<String> = all.status().await.tiers[..3]
                .iter()
                .map(|tier| tier.device.as_ref().unwrap().uuid.clone())
                .collect();
            end(all).await;
            let chosen = async |include: &str, exclude: &str| {
                let mut config = config(&library);
                config.cuda.include = include.to_owned();
                config.cuda.exclude = exclude.to_owned();
                let hotset = start(config).await;
                let tiers = hotset.status().await.tiers;
                let devices = tiers.iter().filter_map(|tier| tier.device.as_ref());
                let found = devices
                    .map(|device| device.uuid.clone())
                    .collect::<Vec<_>>();
                end(hotset).await;
                found
            };
            assert_eq!(chosen("", "").await, uuids);
            assert_eq!(chosen("2, 0", "").await, [&*uuids[0], &uuids[2]]);
            assert_eq!(chosen(&uuids[1], "").await, [&*uuids[1]]);
            assert_eq!(chosen("", &format!("0,{}", uuids[2])).await, [&*uuids[1]]);
            assert!(chosen("7", "").await.is_empty());

            let mut config = config(&library);
            config.gpu = vec![config.cuda.found("GPU-nothing-like-it".into())];
            let error = Hotset::builder().config(config).start().await.unwrap_err();
            let said = error.to_string();
            assert!(
                said.contains("GPU-nothing-like-it") && said.contains(&uuids[0]),
                "{said}"
            );
        });
    });
}

#[test]
fn the_binary_finds_the_gpu_and_says_what_it_knows() {
    run(this_test!(), gpus(1), |machine| {
        machine.gpu(0).foreign.store(300 << 20, SeqCst);
        let output = Command::new(env!("CARGO_BIN_EXE_hotset"))
            .args(["status", "--json", "--vram-headroom", "100MiB"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let vram = &status["tiers"][0];
        assert_eq!(vram["device"]["driver"], "cuda");
        // 1 GiB less the driver's 4 MiB, the context's 32, others' 300 and the headroom.
        assert_eq!(vram["budget"], (1024 - 4 - 32 - 300 - 100) << 20);
        assert_eq!(vram["figures"]["source"], "nvml");
        assert_eq!(vram["figures"]["temperature_c"], 41);
    });
}

#[test]
fn bench_load_measures_the_gpu_beside_raw_copies_and_compares_what_came() {
    run(this_test!(), gpus(1), |machine| {
        let output = Command::new(env!("CARGO_BIN_EXE_hotset"))
            .args(["bench", "load", "--tier", "vram", "--json", "--all"])
            .args(["--size", "24MiB", "--rounds", "1", "--folder"])
            .arg(env!("CARGO_TARGET_TMPDIR"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["tier"], "vram:0");
        assert_eq!(report["source"], "nvml");
        assert_eq!(report["pcie_most"], serde_json::json!([4, 16]));
        let shapes = report["shapes"].as_array().unwrap();
        assert_eq!(shapes.len(), 3);
        for shape in shapes {
            let bytes = shape["bytes"].as_u64().unwrap();
            let compared = shape["compared"].as_u64().unwrap();
            assert!(compared <= bytes && compared > bytes / 100 * 95, "{shape}");
            for figure in ["first", "from_ram", "upload", "raw", "cold", "disk"] {
                assert!(shape[figure]["gbps"]["median"].as_f64().unwrap() > 0.0);
            }
            for ratio in ["upload_over_raw", "from_ram_over_raw", "cold_over_slower"] {
                assert!(shape[ratio]["median"].as_f64().unwrap() > 0.0);
            }
        }
        for figure in ["upload_over_raw", "cold_over_slower"] {
            assert_eq!(report[figure], shapes[0][figure]["median"]);
        }
        // A wrong byte on the way is not passed over in silence: every tensor is read back.
        assert!(machine.calls(Call::cuMemcpyDtoHAsync) >= 3);

        let table = Command::new(env!("CARGO_BIN_EXE_hotset"))
            .args(["bench", "load", "--tier", "vram", "--gpu", "5"])
            .args(["--size", "4MiB", "--folder", env!("CARGO_TARGET_TMPDIR")])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&table.stderr);
        assert!(!table.status.success() && said.contains("vram:5"), "{said}");
    });
}

#[test]
fn status_tells_errors_throttling_mig_and_the_link() {
    run(this_test!(), gpus(1), |machine| {
        let library = Library::new();
        let mut config = config(&library);
        let place = tempfile::tempdir().unwrap();
        let socket = place.path().join("run/hotset.sock");
        config.bridge.socket = Some(socket.clone());
        block_on(async {
            let hotset = Arc::new(start(config).await);
            let bridge = Bridge::open(hotset.clone()).await.unwrap();
            let gpu = machine.gpu(0);
            gpu.pcie_generation.store(1, SeqCst);
            gpu.throttle.store(0x40, SeqCst);
            gpu.ecc_uncorrected.store(3, SeqCst);
            gpu.mig.store(1, SeqCst);
            for xid in [13, 31] {
                gpu.raise_xid(xid);
            }
            // Each is told once by the driver, and stays in status.
            until("both errors to be heard", async || {
                let figures = tier(&hotset, GPU).await.figures;
                figures.is_some_and(|figures| figures.xids == [13, 31])
            })
            .await;
            tokio::time::sleep(Duration::from_millis(60)).await;
            let shown = tokio::task::spawn_blocking(move || {
                Command::new(env!("CARGO_BIN_EXE_hotset"))
                    .arg("status")
                    .env("HOTSET_BRIDGE__SOCKET", socket)
                    .output()
                    .unwrap()
            });
            let shown = shown.await.unwrap();
            let said = String::from_utf8_lossy(&shown.stdout);
            for part in [
                "PCIe 1 x16 of 4 x16",
                "slowed down: hw thermal slowdown",
                "3 uncorrected memory errors",
                "the driver reported Xid 13, 31",
                "divided by MIG",
                "(says NVML)",
            ] {
                assert!(said.contains(part), "no `{part}` in:\n{said}");
            }
            soon("close", bridge.close()).await;
            end(Arc::into_inner(hotset).unwrap()).await;
        });
    });
}

#[test]
fn without_nvml_status_has_the_drivers_own_figures() {
    let without = Isolated {
        nvml: false,
        ..Isolated::default()
    };
    run(this_test!(), without, |machine| {
        machine.gpu(0).foreign.store(300 << 20, SeqCst);
        let output = Command::new(env!("CARGO_BIN_EXE_hotset"))
            .args(["status", "--vram-headroom", "100MiB"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
        assert!(said.contains("688.0 MiB free of 1.0 GiB"), "{said}");
        assert!(
            said.contains("(says the driver, since NVML is missing)"),
            "{said}"
        );
    });
}
