//! Against the Python packages `safetensors`, `gguf` and `huggingface_hub` as writers and readers.
//!
//! They are installed into a virtual environment under the target folder. Where that cannot be had the tests say so
//! and pass: set HOTSET_REQUIRE_PYTHON=1 to make that a failure.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use hotset_core::catalog::{ScanOptions, gguf, hub, safetensors, scan};

/// The interpreter that has the packages, or why there is none.
fn python() -> Option<&'static PathBuf> {
    static PYTHON: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = PYTHON.get_or_init(|| {
        let environment = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-peers");
        let python = environment.join("bin/python");
        let has_all = || {
            let check = "import safetensors.numpy, gguf, huggingface_hub, numpy";
            run(Command::new(&python).args(["-c", check])).is_ok()
        };
        if !has_all() {
            run(Command::new("python3")
                .args(["-m", "venv"])
                .arg(&environment))?;
            let packages = ["safetensors", "gguf", "huggingface_hub", "numpy"];
            run(Command::new(&python)
                .args(["-m", "pip", "install", "-q", "--disable-pip-version-check"])
                .args(packages))?;
        }
        match has_all() {
            true => Ok(python),
            false => Err("the packages are installed but cannot be imported".to_owned()),
        }
    });
    match found {
        Ok(python) => Some(python),
        Err(reason) => {
            assert!(
                std::env::var_os("HOTSET_REQUIRE_PYTHON").is_none(),
                "{reason}"
            );
            eprintln!("SKIPPED: the Python packages cannot be had here: {reason}");
            None
        }
    }
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn script(python: &Path, text: &str, folder: &Path) -> serde_json::Value {
    let said = run(Command::new(python).args(["-c", text]).arg(folder)).expect("the script runs");
    serde_json::from_str(&said).expect("the script prints JSON")
}

fn described(name: &str, dtype: &str, shape: Vec<u64>) -> serde_json::Value {
    serde_json::json!([name, dtype, shape])
}

#[test]
fn safetensors_files_are_read_and_refused_as_the_package_does() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let said = script(
        python,
        r#"
import json, pathlib, sys
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
root = pathlib.Path(sys.argv[1])
save_file({"w": np.zeros((3, 4), np.float32), "h": np.ones((2,), np.float16), "i": np.zeros((), np.int64), "e": np.zeros((0, 5), np.uint8)},
          root / "good.safetensors", metadata={"format": "pt", "né": "\"x\"\n"})
good = (root / "good.safetensors").read_bytes()
n = int.from_bytes(good[:8], "little")
bad = {
    "cut": good[:-1], "long": good + b"x", "empty": b"", "short": good[:7], "huge": b"\xff" * 8 + good[8:],
    "nojson": good[:8] + b"x" + good[9:], "dtype": good.replace(b'"F16"', b'"F17"'),
    "shape": good.replace(b"[3,4]", b"[3,5]"), "hole": good.replace(b"[8,56]", b"[9,57]"),
}
verdicts = {}
for name, content in bad.items():
    path = root / f"{name}.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, "np") as f:
            list(f.keys())
        verdicts[name] = True
    except Exception:
        verdicts[name] = False
names = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}
with safe_open(root / "good.safetensors", "np") as f:
    tensors = sorted([k, names[str(f.get_tensor(k).dtype)], list(f.get_tensor(k).shape)] for k in f.keys())
    print(json.dumps({"tensors": tensors, "metadata": f.metadata(), "verdicts": verdicts}))
"#,
        folder.path(),
    );
    let read = |name: &str| {
        let path = folder.path().join(format!("{name}.safetensors"));
        let file = std::fs::File::open(path).unwrap();
        let length = file.metadata().unwrap().len();
        safetensors::read_header(&file, length)
    };
    let header = read("good").unwrap();
    let mut tensors: Vec<serde_json::Value> = header
        .tensors
        .iter()
        .map(|t| {
            let shape = t.shape.iter().map(|&d| d as u64).collect();
            described(&t.name, t.dtype.name(), shape)
        })
        .collect();
    tensors.sort_by_key(|t| t[0].as_str().map(str::to_owned));
    assert_eq!(serde_json::json!(tensors), said["tensors"]);
    assert_eq!(serde_json::json!(header.metadata), said["metadata"]);
    for (name, accepted) in said["verdicts"].as_object().unwrap() {
        assert_eq!(read(name).is_ok(), accepted.as_bool().unwrap(), "{name}");
    }
}

#[test]
fn gguf_files_are_read_as_the_package_writes_them() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let said = script(
        python,
        r#"
import json, pathlib, sys
import numpy as np
import gguf
path = pathlib.Path(sys.argv[1]) / "x.gguf"
w = gguf.GGUFWriter(path, "llama")
w.add_name("tiny")
w.add_context_length(64)
w.add_token_list(["a", "b", "c"])
w.add_tensor("token_embd.weight", np.zeros((4, 64), np.float32))
w.add_tensor("blk.0.attn_q.weight", gguf.quants.quantize(np.zeros((8, 64), np.float32), gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
w.add_tensor("blk.0.attn_norm.weight", np.zeros((64,), np.float16))
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
r = gguf.GGUFReader(path)
print(json.dumps({"tensors": [[t.name, t.tensor_type.name, [int(d) for d in reversed(t.shape)], int(t.data_offset), int(t.n_bytes)] for t in r.tensors]}))
"#,
        folder.path(),
    );
    let file = std::fs::File::open(folder.path().join("x.gguf")).unwrap();
    let length = file.metadata().unwrap().len();
    let header = gguf::read_header(&file, length).unwrap();
    let tensors: Vec<_> = header
        .tensors
        .iter()
        .map(|t| {
            let start = header.data_start + t.start;
            serde_json::json!([*t.name, t.dtype, t.shape, start, t.end - t.start])
        })
        .collect();
    assert_eq!(serde_json::json!(tensors), said["tensors"]);
    assert_eq!(header.metadata["general.architecture"], "llama");
    assert_eq!(header.metadata["llama.context_length"], "64");
}

#[test]
fn a_hub_cache_is_seen_as_the_package_sees_it() {
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let said = script(
        python,
        r#"
import hashlib, json, os, pathlib, sys
import numpy as np
from safetensors.numpy import save
from huggingface_hub import scan_cache_dir
root = pathlib.Path(sys.argv[1])
def put(repo, revision, name, content):
    base = root / ("models--" + repo.replace("/", "--"))
    digest = hashlib.sha256(content).hexdigest()
    blob = base / "blobs" / digest
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link = base / "snapshots" / revision / name
    link.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(os.path.relpath(blob, link.parent), link)
    (base / "refs").mkdir(exist_ok=True)
    (base / "refs" / "main").write_text(revision)
a, b = save({"w": np.zeros(10, np.float32)}), save({"w": np.ones(20, np.float32)})
put("org/one", "1" * 40, "model.safetensors", a)
put("org/one", "1" * 40, "config.json", b"{}")
put("org/one", "2" * 40, "model.safetensors", a)
put("org/one", "2" * 40, "config.json", b'{"x": 1}')
put("two", "3" * 40, "sub/model.safetensors", b)
info = scan_cache_dir(root)
print(json.dumps([{"repo": r.repo_id, "bytes": r.size_on_disk,
    "revisions": sorted([v.commit_hash, v.size_on_disk, v.nb_files if hasattr(v, "nb_files") else len(v.files)] for v in r.revisions)}
    for r in sorted(info.repos, key=lambda r: r.repo_id)]))
"#,
        folder.path(),
    );
    let repos: Vec<_> = hub::repositories(folder.path())
        .unwrap()
        .into_iter()
        .map(|repo| {
            let revisions: Vec<_> = repo
                .revisions
                .iter()
                .map(|r| serde_json::json!([r.revision, r.bytes, r.files]))
                .collect();
            serde_json::json!({"repo": repo.repo, "bytes": repo.bytes, "revisions": revisions})
        })
        .collect();
    assert_eq!(serde_json::json!(repos), said);
    let options = ScanOptions::new(vec![folder.path().to_path_buf()]);
    let catalogue = scan(&options, None, &|_| {}).catalogue;
    let names: Vec<&str> = catalogue.models().map(|m| m.name.as_str()).collect();
    assert_eq!(
        names,
        ["org/one@11111111", "org/one@22222222", "two/sub/model"]
    );
    let ids: Vec<_> = catalogue
        .models()
        .map(|m| m.components[0].content_id)
        .collect();
    assert_eq!(ids[0], ids[1]);
    assert_ne!(ids[0], ids[2]);
}
