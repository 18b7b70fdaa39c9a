use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};

use proptest::prelude::*;

use super::super::test_utils::{put, safetensors};
use super::super::{Change, FindError, Format, Kind};
use super::*;

fn scan_of(root: &Path) -> ScanReport {
    scan(&ScanOptions::new(vec![root.to_path_buf()]), None, &|_| {})
}

fn names(report: &ScanReport) -> Vec<&str> {
    report.catalogue.models().map(|m| m.name.as_str()).collect()
}

fn model<'a>(report: &'a ScanReport, name: &str) -> &'a Model {
    report.catalogue.find(name).unwrap()
}

fn weights() -> Vec<u8> {
    safetensors(&[("w", &[4, 4])], &[])
}

fn pipeline(root: &Path) {
    let index = serde_json::json!({
        "_class_name": "StableDiffusionXLPipeline",
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "image_encoder": [null, null],
    });
    put(root, "model_index.json", index.to_string());
    put(root, "scheduler/scheduler_config.json", "{}");
    for (part, stem) in [
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("text_encoder_2", "model"),
    ] {
        put(root, &format!("{part}/config.json"), "{}");
        put(root, &format!("{part}/{stem}.safetensors"), weights());
        put(root, &format!("{part}/{stem}.fp16.safetensors"), weights());
    }
    let stem = "unet/diffusion_pytorch_model";
    put(
        root,
        &format!("{stem}.safetensors.index.json"),
        r#"{"weight_map":{"a":"diffusion_pytorch_model-00001-of-00002.safetensors","b":"diffusion_pytorch_model-00002-of-00002.safetensors"}}"#,
    );
    put(
        root,
        &format!("{stem}-00001-of-00002.safetensors"),
        safetensors(&[("a", &[2])], &[]),
    );
    put(
        root,
        &format!("{stem}-00002-of-00002.safetensors"),
        safetensors(&[("b", &[3])], &[]),
    );
}

#[test]
fn a_pipeline_is_one_entry_in_order_of_use() {
    let root = tempfile::tempdir().unwrap();
    pipeline(&root.path().join("sdxl"));
    let report = scan_of(root.path());
    assert_eq!(names(&report), ["sdxl"]);
    let model = model(&report, "sdxl");
    assert_eq!(model.error, None);
    assert_eq!(
        (model.format, model.kind),
        (Format::Diffusers, Kind::Pipeline)
    );
    let parts: Vec<(&str, Kind, u64)> = model
        .components
        .iter()
        .map(|c| (&*c.id.component, c.kind, c.bytes.get()))
        .collect();
    assert_eq!(
        parts,
        [
            ("text_encoder", Kind::TextEncoder, 32),
            ("text_encoder_2", Kind::TextEncoder, 32),
            ("unet", Kind::Unet, 10),
            ("vae", Kind::Vae, 32)
        ]
    );
    assert_eq!(model.component("unet").unwrap().files.len(), 2);
    assert_eq!(model.bytes.get(), 106);
}

#[test]
fn files_folders_and_shards_each_make_an_entry() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    put(
        root,
        "loras/style.safetensors",
        safetensors(
            &[("lora_unet_x.lora_down.weight", &[4, 8])],
            &[
                ("ss_base_model_version", "sdxl_base_v1-0"),
                ("ss_sd_model_name", "juggernaut.safetensors"),
            ],
        ),
    );
    put(
        root,
        "llm/config.json",
        r#"{"model_type":"llama","architectures":["LlamaForCausalLM"]}"#,
    );
    put(
        root,
        "llm/model.safetensors.index.json",
        r#"{"weight_map":{"a":"part-a.safetensors","b":"part-b.safetensors"}}"#,
    );
    put(
        root,
        "llm/part-a.safetensors",
        safetensors(&[("a", &[2])], &[]),
    );
    put(
        root,
        "llm/part-b.safetensors",
        safetensors(&[("b", &[2])], &[]),
    );
    put(
        root,
        "numbered-00001-of-00002.safetensors",
        safetensors(&[("a", &[2])], &[]),
    );
    put(
        root,
        "numbered-00002-of-00002.safetensors",
        safetensors(&[("b", &[2])], &[]),
    );
    put(root, "old.ckpt", "whatever");
    put(root, "notes.txt", "no model");
    let report = scan_of(root);
    assert_eq!(names(&report), ["llm", "loras/style", "numbered", "old"]);
    let lora = model(&report, "style");
    assert_eq!(lora.kind, Kind::Lora);
    assert_eq!(&*lora.components[0].id.component, "lora");
    let base = lora.base.as_ref().unwrap();
    assert_eq!(base.architecture.as_deref(), Some("sdxl"));
    assert_eq!(base.name.as_deref(), Some("juggernaut.safetensors"));
    let llm = model(&report, "llm");
    assert_eq!(
        (llm.format, llm.kind, llm.architecture.as_deref()),
        (Format::Transformers, Kind::LanguageModel, Some("llama"))
    );
    assert_eq!(llm.components[0].files.len(), 2);
    assert_eq!(
        model(&report, "numbered").format,
        Format::SafetensorsSharded
    );
    assert!(
        model(&report, "old")
            .error
            .as_ref()
            .unwrap()
            .contains("pickle")
    );
}

#[test]
fn what_is_broken_is_listed_with_its_error_and_the_rest_is_found() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let good = weights();
    put(root, "good.safetensors", &good);
    put(root, "cut.safetensors", &good[..good.len() - 3]);
    put(
        root,
        "long.safetensors",
        [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
    );
    put(root, "empty.safetensors", "");
    put(
        root,
        "missing/m.safetensors.index.json",
        r#"{"weight_map":{"a":"m-00001-of-00002.safetensors","b":"m-00002-of-00002.safetensors"}}"#,
    );
    put(
        root,
        "missing/m-00001-of-00002.safetensors",
        safetensors(&[("a", &[2])], &[]),
    );
    put(
        root,
        "escape/m.safetensors.index.json",
        r#"{"weight_map":{"a":"../good.safetensors"}}"#,
    );
    put(
        root,
        "absolute/m.safetensors.index.json",
        r#"{"weight_map":{"a":"/etc/passwd"}}"#,
    );
    put(root, "half-00001-of-00002.safetensors", &good);
    put(root, "noindex/model_index.json", "{ not json");
    put(
        root,
        "evil/model_index.json",
        r#"{"../good":["diffusers","UNet2DConditionModel"]}"#,
    );
    put(
        root,
        "nopart/model_index.json",
        r#"{"unet":["diffusers","UNet2DConditionModel"]}"#,
    );
    put(root, "deepjson/config.json", "[".repeat(100_000));
    put(root, "deepjson/model.safetensors", &good);
    symlink(root, root.join("loop")).unwrap();
    symlink(root.join("nowhere"), root.join("dangling.safetensors")).unwrap();
    symlink("self.safetensors", root.join("self.safetensors")).unwrap();
    let report = scan_of(root);
    let error = |name: &str| model(&report, name).error.clone().unwrap_or_default();
    assert_eq!(model(&report, "good").error, None);
    for (name, says) in [
        ("cut", "cut off"),
        ("long", "claims"),
        ("empty", "too few"),
        ("missing/m", "m-00002-of-00002"),
        ("escape/m", "outside"),
        ("absolute/m", "outside"),
        ("half", "1 of 2 shards"),
        ("noindex", "not valid JSON"),
        ("evil", "no name of a folder"),
        ("nopart", "`unet`"),
        ("deepjson", "not valid JSON"),
    ] {
        assert!(error(name).contains(says), "{name}: {}", error(name));
        assert!(model(&report, name).components.is_empty());
    }
    assert_eq!(report.catalogue.len(), 12, "{:?}", names(&report));
    let loops = report
        .problems
        .iter()
        .filter(|p| matches!(p, ScanProblem::SymlinkLoop { .. }));
    assert_eq!(loops.count(), 2);
    assert!(
        report
            .problems
            .iter()
            .any(|p| matches!(p, ScanProblem::DanglingLink { .. }))
    );
}

#[test]
fn an_unreadable_folder_is_a_problem_and_no_end() {
    let root = tempfile::tempdir().unwrap();
    put(root.path(), "good.safetensors", weights());
    put(root.path(), "closed/x.safetensors", weights());
    let closed = root.path().join("closed");
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o000)).unwrap();
    let readable_all_the_same = std::fs::read_dir(&closed).is_ok();
    let report = scan(
        &ScanOptions::new(vec![root.path().to_path_buf(), root.path().join("gone")]),
        None,
        &|_| {},
    );
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o755)).unwrap();
    if !readable_all_the_same {
        assert_eq!(names(&report), ["good"]);
        assert!(matches!(
            &report.problems[..],
            [ScanProblem::UnreadableFolder { .. }]
        ));
    }
    let report = scan_of(&root.path().join("never-there"));
    assert!(matches!(
        &report.problems[..],
        [ScanProblem::UnreadableFolder { .. }]
    ));
}

#[test]
fn names_are_unique_and_paths_keep_their_bytes() {
    let root = tempfile::tempdir().unwrap();
    let (a, b) = (root.path().join("a/models"), root.path().join("b/models"));
    put(&a, "x.safetensors", weights());
    put(&b, "x.safetensors", weights());
    put(&a, "y.safetensors", weights());
    put(&a, "y.sft", weights());
    for raw in [&b"z\xff.safetensors"[..], b"z\xfe.safetensors"] {
        std::fs::write(a.join(OsStr::from_bytes(raw)), weights()).unwrap();
    }
    let report = scan(&ScanOptions::new(vec![a.clone(), b]), None, &|_| {});
    let names = names(&report);
    let unique: HashSet<&&str> = names.iter().collect();
    assert_eq!(unique.len(), 6, "{names:?}");
    assert!(names.contains(&"y.safetensors") && names.contains(&"y.sft"));
    let raw = a.join(OsStr::from_bytes(b"z\xff.safetensors"));
    assert!(report.catalogue.at_path(&raw).is_some());
    assert!(matches!(
        report.catalogue.find("x"),
        Err(FindError::Ambiguous { .. }) | Err(FindError::NotFound { .. })
    ));
}

#[test]
fn links_to_a_file_share_its_content_id() {
    let root = tempfile::tempdir().unwrap();
    put(root.path(), "a.safetensors", weights());
    symlink("a.safetensors", root.path().join("b.safetensors")).unwrap();
    std::fs::hard_link(
        root.path().join("a.safetensors"),
        root.path().join("c.safetensors"),
    )
    .unwrap();
    put(root.path(), "d.safetensors", weights());
    let report = scan_of(root.path());
    let id = |name: &str| model(&report, name).components[0].content_id;
    assert_eq!(id("a"), id("b"));
    assert_eq!(id("a"), id("c"));
    assert_ne!(id("a"), id("d"));
}

#[test]
fn what_has_not_changed_is_not_read_again() {
    let root = tempfile::tempdir().unwrap();
    pipeline(&root.path().join("sdxl"));
    put(root.path(), "a.safetensors", weights());
    let options = ScanOptions::new(vec![root.path().to_path_buf()]);
    let first = scan(&options, None, &|_| {});
    assert_eq!((first.catalogue.generation(), first.inspected), (1, 2));
    let second = scan(&options, Some(&first.catalogue), &|_| {});
    assert_eq!((second.catalogue.generation(), second.inspected), (1, 0));
    put(
        root.path(),
        "a.safetensors",
        safetensors(&[("w", &[5, 5])], &[]),
    );
    let third = scan(&options, Some(&second.catalogue), &|_| {});
    assert_eq!((third.catalogue.generation(), third.inspected), (2, 1));
    let changes = third.catalogue.changes_since(&first.catalogue);
    assert!(matches!(&changes[..], [Change::Changed(model)] if model.name.as_str() == "a"));
    assert!(matches!(
        &third.catalogue.changes_since(&Catalogue::empty())[..],
        [Change::Added(_), Change::Added(_)]
    ));
    assert!(matches!(
        &Catalogue::empty().changes_since(&first.catalogue)[..],
        [Change::Removed(_), Change::Removed(_)]
    ));
    assert_eq!(model(&third, "a").bytes.get(), 50);
}

#[test]
fn an_incremental_scan_sees_what_a_whole_one_would() {
    let dir = tempfile::tempdir().unwrap();
    let root = std::fs::canonicalize(dir.path()).unwrap();
    let options = ScanOptions::new(vec![root.clone()]);
    pipeline(&root.join("sdxl"));
    put(&root, "a.safetensors", weights());
    put(&root, "more/b.safetensors", weights());
    let mut catalogue = scan(&options, None, &|_| {}).catalogue;
    let mut step = |changed: &[&str], inspected: u64| {
        let paths: Vec<PathBuf> = changed.iter().map(|p| root.join(p)).collect();
        let report = rescan(&options, &catalogue, &paths, &|_| {});
        let whole = scan(&options, None, &|_| {});
        let of = |c: &Catalogue| c.models().map(|m| (**m).clone()).collect::<Vec<_>>();
        assert!(
            of(&report.catalogue) == of(&whole.catalogue),
            "{changed:?}: {:?}",
            names(&report)
        );
        assert_eq!(report.inspected, inspected, "{changed:?}");
        catalogue = report.catalogue;
    };
    put(&root, "c.safetensors", weights());
    step(&["c.safetensors"], 1);
    std::fs::remove_file(root.join("a.safetensors")).unwrap();
    step(&["a.safetensors"], 0);
    std::fs::remove_file(root.join("sdxl/vae/diffusion_pytorch_model.safetensors")).unwrap();
    step(&["sdxl/vae/diffusion_pytorch_model.safetensors"], 1);
    std::fs::rename(root.join("more"), root.join("moved")).unwrap();
    step(&["more", "moved"], 1);
    std::fs::remove_dir_all(root.join("sdxl")).unwrap();
    step(&["sdxl"], 0);
    put(&root, "new/llm/config.json", "{}");
    put(&root, "new/llm/model.safetensors", weights());
    step(&["new/llm/model.safetensors"], 1);
    step(&[], 0);
}

#[test]
fn a_misspelt_name_is_met_with_the_nearest() {
    let root = tempfile::tempdir().unwrap();
    put(root.path(), "sd/juggernaut.safetensors", weights());
    let report = scan_of(root.path());
    let error = report.catalogue.find("jugernaut").unwrap_err();
    assert!(error.to_string().contains("`sd/juggernaut`"), "{error}");
}

#[test]
fn the_parts_of_a_checkpoint_are_components_of_their_own() {
    let root = tempfile::tempdir().unwrap();
    let file = safetensors(
        &[
            ("first_stage_model.decoder.conv_in.weight", &[2]),
            ("model.diffusion_model.input_blocks.0.0.weight", &[3]),
            ("model.diffusion_model.out.weight", &[4]),
            ("model_ema.decay", &[5]),
            ("conditioner.embedders.0.transformer.x", &[6]),
            ("conditioner.embedders.1.model.x", &[7]),
        ],
        &[],
    );
    let data = file.len() as u64 - 2 * 27;
    put(root.path(), "xl.safetensors", file);
    let report = scan_of(root.path());
    let model = model(&report, "xl");
    assert_eq!(model.kind, Kind::Checkpoint);
    let seen: Vec<(&str, u64, u32)> = model
        .components
        .iter()
        .map(|c| (&*c.id.component, c.bytes.get(), c.tensors))
        .collect();
    assert_eq!(
        seen,
        [
            ("text_encoder", 12, 1),
            ("text_encoder_2", 14, 1),
            ("unet", 14, 2),
            ("vae", 4, 1)
        ]
    );
    let unet = model.component("unet").unwrap().selection.as_ref().unwrap();
    assert!(unet.holds("model.diffusion_model.out.weight") && !unet.holds("model_ema.decay"));
    let covered: u64 = unet.ranges.iter().map(|r| r.end - r.start).sum();
    assert_eq!(covered, 14);
    assert!(unet.ranges.iter().all(|r| r.start >= data));
    assert_eq!(model.bytes.get(), 44);
}

#[test]
fn a_hub_cache_gives_one_entry_for_each_revision() {
    let root = tempfile::tempdir().unwrap();
    let repo = root.path().join("models--org--name");
    let blob = "ab".repeat(32);
    put(&repo, &format!("blobs/{blob}"), weights());
    put(&repo, "refs/main", "1111111111");
    for revision in ["1111111111", "2222222222"] {
        let snapshot = repo.join("snapshots").join(revision);
        put(
            &snapshot,
            "config.json",
            r#"{"architectures":["BertModel"],"model_type":"bert"}"#,
        );
        symlink(
            format!("../../blobs/{blob}"),
            snapshot.join("model.safetensors"),
        )
        .unwrap();
    }
    let report = scan_of(root.path());
    assert_eq!(names(&report), ["org/name@11111111", "org/name@22222222"]);
    let model = model(&report, "org/name@11111111");
    assert_eq!(model.kind, Kind::EmbeddingModel);
    assert_eq!(
        model.components[0].content_id.to_string(),
        format!("sha256:{blob}")
    );
    assert_eq!(model.facts.repo.as_deref(), Some("org/name"));
    let cached = crate::catalog::hub::repositories(root.path()).unwrap();
    assert_eq!((cached.len(), cached[0].revisions.len()), (1, 2));
}

#[test]
fn a_download_under_way_is_not_listed() {
    let root = tempfile::tempdir().unwrap();
    put(root.path(), "a.safetensors", weights());
    put(root.path(), "a.safetensors.aria2", "");
    put(root.path(), "b.safetensors.part", weights());
    put(root.path(), "c.safetensors", weights());
    assert_eq!(names(&scan_of(root.path())), ["c"]);
    std::fs::remove_file(root.path().join("a.safetensors.aria2")).unwrap();
    assert_eq!(names(&scan_of(root.path())), ["a", "c"]);
}

/// JSON of any shape, with the words that the readers look for.
fn json() -> impl Strategy<Value = serde_json::Value> {
    let word = prop_oneof![
        Just("weight_map"),
        Just("architectures"),
        Just("model_type"),
        Just("_class_name"),
        Just("unet"),
        Just("diffusers"),
        Just("quantization_config"),
        Just("../../etc/passwd"),
        Just("model-00001-of-00002.safetensors"),
        Just("\u{0}\u{202e}"),
    ]
    .prop_map(str::to_owned);
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        word.clone().prop_map(Into::into),
    ];
    leaf.prop_recursive(4, 40, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(serde_json::Value::Array),
            proptest::collection::vec((word.clone(), inner), 0..6)
                .prop_map(|members| serde_json::Value::Object(members.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The stable twin of the fuzz target `index`.
    #[test]
    fn no_index_and_no_configuration_harms_the_scan(values in proptest::collection::vec(json(), 3), cut in 0..40_usize) {
        let root = tempfile::tempdir().unwrap();
        put(root.path(), "whole.safetensors", weights());
        let names = ["m/model.safetensors.index.json", "m/config.json", "p/model_index.json"];
        for (name, value) in names.iter().zip(&values) {
            let text = value.to_string();
            // Every other one is cut off somewhere.
            let end = if cut % 2 == 0 { text.len() } else { text.floor_char_boundary(text.len().saturating_sub(cut)) };
            put(root.path(), name, &text[..end]);
        }
        put(root.path(), "m/model-00001-of-00002.safetensors", weights());
        let report = scan_of(root.path());
        prop_assert_eq!(&model(&report, "whole").error, &None);
        for found in report.catalogue.models() {
            for file in &found.inputs {
                prop_assert!(file.path.starts_with(root.path()), "{}", file.path.display());
            }
        }
    }
}
