use std::collections::BTreeSet;

use hotset_core::Bytes;
use hotset_core::config::{EvictionPolicyName, GpuConfig, QuotaConfig, SetConfig};

use super::*;

/// The file that is shipped.
const SHIPPED: &str = include_str!("../../config/hotset.toml");

struct Case {
    folder: tempfile::TempDir,
    sources: ConfigSources,
    environment: Vec<(OsString, OsString)>,
}

impl Case {
    fn new(file: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hotset.toml");
        std::fs::write(&path, file).unwrap();
        Self {
            folder,
            sources: ConfigSources {
                file: Some(path),
                overrides: Vec::new(),
            },
            environment: Vec::new(),
        }
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    fn set(mut self, key: &str, value: &str) -> Self {
        self.sources.overrides.push((key.into(), value.into()));
        self
    }

    fn load(&self) -> Result<Loaded, ConfigError> {
        load_with(&self.sources, self.environment.iter().cloned())
    }

    /// The error's message, without the folder.
    fn error(&self) -> String {
        let folder = format!("{}/", self.folder.path().display());
        self.load().unwrap_err().to_string().replace(&folder, "")
    }
}

#[test]
fn the_shipped_file_is_the_default() {
    let loaded = Case::new(SHIPPED).load().unwrap();
    assert_eq!(loaded.config, Config::default());
}

#[test]
fn the_shipped_file_names_every_key_with_its_default() {
    // With the commented keys switched on, but for those whose default is "not set".
    let all: String = SHIPPED
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(code) if code.starts_with('[') || code.contains(" = ") => format!("{code}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let loaded = Case::new(&all).load().unwrap();
    let mut expected = Config {
        gpu: vec![GpuConfig::default()],
        quota: vec![QuotaConfig::default()],
        set: vec![SetConfig {
            name: "portrait".into(),
            models: ["sdxl-base", "portrait-lora", "sdxl-refiner"]
                .map(Into::into)
                .into(),
            order: ["sdxl-base", "sdxl-refiner"].map(Into::into).into(),
            drafts: Vec::new(),
        }],
        ..Config::default()
    };
    let named: BTreeSet<_> = loaded.origins.keys().cloned().collect();
    for (key, _) in keys::flatten(&expected) {
        assert!(
            named.contains(&key),
            "config/hotset.toml does not mention {key}"
        );
    }
    expected.monitor.decisions_file = Some("/var/log/hotset/decisions.jsonl".into());
    expected.catalog.database = Some("/var/cache/hotset/catalogue.db".into());
    expected.predict.folder = Some("/var/cache/hotset/learned".into());
    expected.ram.budget = Some(Bytes::gib(16));
    expected.ram.keep_warm = Some(Bytes::gib(8));
    expected.bridge.socket = Some("/run/hotset/hotset.sock".into());
    expected.sessions.quota = Some(Bytes::gib(16));
    expected.quota[0] = QuotaConfig {
        label: "team-*".into(),
        leased: Some(Bytes::gib(24)),
        loads: Some(4),
    };
    expected.http.listen = Some(([127, 0, 0, 1], 7420).into());
    expected.http.token = Some("a long random text".into());
    expected.gpu[0].budget = Some(Bytes::gib(20));
    expected.gpu[0].select = Some("GPU-8a3c".into());
    assert_eq!(loaded.config, expected);
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let case = Case::new("[ram]\nbudget = '1GiB'\nlow_watermark = 0.5\n[load]\nreads = 2\n")
        .env("HOTSET_RAM__BUDGET", "2GiB")
        .env("HOTSET_LOAD__READS", "3")
        .env("HOTSET_PORT", "tcp://10.0.0.1:80")
        .set("ram.budget", "3GiB");
    let loaded = case.load().unwrap();
    assert_eq!(loaded.config.ram.budget, Some(Bytes::gib(3)));
    assert_eq!(loaded.config.load.reads, 3);
    assert!((loaded.config.ram.low_watermark - 0.5).abs() < 1e-9);
    assert_eq!(
        loaded.origins["ram.budget"].to_string(),
        "--set ram.budget=3GiB"
    );
    assert_eq!(
        loaded.origins["load.reads"].to_string(),
        "environment variable HOTSET_LOAD__READS"
    );
    let low = loaded.origins["ram.low_watermark"].to_string();
    assert!(low.ends_with("hotset.toml:3:1"), "{low}");
}

#[test]
fn gpus_are_layered_one_by_one() {
    let case = Case::new("[[gpu]]\nheadroom = '1GiB'\n[gpu.sim]\nmemory = '8GiB'\n[[gpu]]\n")
        .env("HOTSET_GPU__0__SIM__KEEP_BYTES", "true")
        .set("gpu[1].budget", "4GiB")
        .set("gpu.2.budget", "5GiB");
    let gpus = case.load().unwrap().config.gpu;
    assert_eq!(gpus.len(), 3);
    assert_eq!(gpus[0].headroom, Bytes::gib(1));
    assert_eq!(gpus[0].sim.memory, Bytes::gib(8));
    assert!(gpus[0].sim.keep_bytes);
    assert_eq!(gpus[1].budget, Some(Bytes::gib(4)));
    assert_eq!(gpus[2].budget, Some(Bytes::gib(5)));

    let gap = Case::new("").set("gpu.1.budget", "4GiB").error();
    assert!(gap.contains("the next one is gpu.0"), "{gap}");
}

#[test]
fn folders_are_beside_the_file_or_where_the_command_runs() {
    let case = Case::new("[catalog]\nroots = ['models', '/srv/models']\n");
    assert_eq!(
        case.load().unwrap().config.catalog.roots,
        [case.folder.path().join("models"), "/srv/models".into()]
    );
    let database = Case::new("[catalog]\ndatabase = 'hotset.db'\n");
    assert_eq!(
        database.load().unwrap().config.catalog.database,
        Some(database.folder.path().join("hotset.db"))
    );
    let case = case.set("catalog.roots", "a:/b");
    assert_eq!(
        case.load().unwrap().config.catalog.roots,
        [PathBuf::from("a"), "/b".into()]
    );
    let case = case.set("catalog.roots", "['c']");
    assert_eq!(
        case.load().unwrap().config.catalog.roots,
        [PathBuf::from("c")]
    );
}

#[test]
fn a_wrong_key_is_refused_with_its_place_and_the_nearest() {
    let cases = [
        (
            "[ram]\n  buget = '1GiB'\n",
            "hotset.toml:2:3",
            "`ram.budget`",
        ),
        ("[rma]\n", "hotset.toml:1:2", "`ram`"),
        (
            "[ram]\nthreads = 1\n",
            "hotset.toml:2:1",
            "`catalog.threads`",
        ),
        (
            "[[gpu]]\n[[gpu]]\nsim.memroy = 1\n",
            "hotset.toml:3:5",
            "`gpu.1.sim.memory`",
        ),
        (
            "[load]\nparallel = 1\n",
            "hotset.toml:2:1",
            "`hotset config`",
        ),
    ];
    for (file, place, nearest) in cases {
        let error = Case::new(file).error();
        assert!(error.starts_with(place), "{error}");
        assert!(error.contains("there is no key"), "{error}");
        assert!(error.contains(nearest), "{error}");
    }
    let error = Case::new("").set("ram.budgt", "1GiB").error();
    assert_eq!(
        error,
        "--set ram.budgt=1GiB: there is no key `ram.budgt`; did you mean `ram.budget`?"
    );
    for variable in ["HOTSET_RAM_BUDGET", "HOTSET_RAM__BUGDET"] {
        let error = Case::new("").env(variable, "1GiB").error();
        assert!(
            error.starts_with(&format!("environment variable {variable}")),
            "{error}"
        );
        assert!(error.to_lowercase().contains("did you mean"), "{error}");
    }
}

#[test]
fn a_wrong_value_is_refused_with_its_place() {
    let cases = [
        (
            "[ram]\nbudget = 'much'\n",
            "hotset.toml:2:1",
            "`much` is not a size",
        ),
        (
            "[load]\ndeadline = '5 parsecs'\n",
            "hotset.toml:2:1",
            "load.deadline",
        ),
        (
            "[load]\nreads = 'four'\n",
            "hotset.toml:2:1",
            "the default is 4",
        ),
        (
            "[policy]\neviction = 'lur'\n",
            "hotset.toml:2:1",
            "did you mean `lru`?",
        ),
        ("ram = 3\n", "hotset.toml:1:7", "a section, [ram]"),
        ("[gpu]\nbudget = 3\n", "hotset.toml:1:1", "[[gpu]]"),
        ("[ram\n", "hotset.toml:1:", "not TOML"),
        (
            "[load]\npiece = '5000'\n",
            "hotset.toml:2:1",
            "the next one is 8192",
        ),
        ("[ram]\nlow_watermark = 0.99\n", "hotset.toml:2:1", "0.95"),
    ];
    for (file, place, words) in cases {
        let error = Case::new(file).error();
        assert!(error.starts_with(place), "{error}");
        assert!(error.contains(words), "{error}");
    }
    let error = Case::new("")
        .env("HOTSET_CATALOG__WATCH", "perhaps")
        .error();
    assert!(
        error.starts_with(
            "environment variable HOTSET_CATALOG__WATCH: wrong value for `catalog.watch`"
        ),
        "{error}"
    );
    let error = Case::new("").set("ram", "16GiB").error();
    assert!(error.contains("it is a section"), "{error}");
}

#[test]
fn the_shipped_file_names_every_eviction_policy() {
    for policy in EvictionPolicyName::ALL {
        let name = serde_json::to_string(&policy).unwrap();
        assert!(
            SHIPPED.contains(&name),
            "config/hotset.toml does not name {name}"
        );
    }
}

#[test]
fn the_file_is_looked_for_where_it_should_be() {
    let case = Case::new("[policy]\neviction = 'lru'\n[load]\nreads = 7\n");
    let path = case.sources.file.clone().unwrap();
    let named = ConfigSources::default();
    let env =
        |name: &str, value: &Path| [(OsString::from(name), OsString::from(value))].into_iter();
    let loaded = load_with(&named, env("HOTSET_CONFIG", &path)).unwrap();
    assert_eq!(loaded.file, Some(path.clone()));
    assert_eq!(loaded.config.policy.eviction, EvictionPolicyName::Lru);

    let home = tempfile::tempdir().unwrap();
    std::fs::create_dir(home.path().join("hotset")).unwrap();
    std::fs::copy(&path, home.path().join("hotset/hotset.toml")).unwrap();
    let loaded = load_with(&named, env("XDG_CONFIG_HOME", home.path())).unwrap();
    assert_eq!(loaded.config.load.reads, 7);

    let missing = home.path().join("none.toml");
    let error = load_with(&named, env("HOTSET_CONFIG", &missing)).unwrap_err();
    assert!(error.to_string().contains("$HOTSET_CONFIG"), "{error}");
}

#[test]
fn sets_have_names_and_models() {
    let case = Case::new("[[set]]\nname = 'one'\nmodels = ['a', 'b']\norder = ['b', 'a']\n");
    let set = &case.load().unwrap().config.set[0];
    // Names are no paths.
    assert_eq!(set.models, ["a", "b"]);
    let error = |text: &str| Case::new(text).error();
    assert!(error("[[set]]\nmodels = ['a']\n").contains("give the set a name"));
    assert!(error("[[set]]\nname = 'one'\n").contains("name at least one model"));
    let twice = "[[set]]\nname = 'x'\nmodels = ['a']\n[[set]]\nname = 'x'\nmodels = ['b']\n";
    assert!(error(twice).contains("there is another set `x`"));
    let stranger = "[[set]]\nname = 'x'\nmodels = ['a']\norder = ['b']\n";
    assert!(error(stranger).contains("`b` is not among the models"));
    assert!(error("[set]\nname = 'x'\n").contains("one [[set]] section for each set"));
    let slip = error("[[set]]\nname = 'x'\nmodel = ['a']\n");
    assert!(slip.contains("set.0.models"), "{slip}");
}
