//! Traces of other services in their own columns.
//!
//! * GenTD26 (github alibaba/clusterdata, `cluster-trace-v2026-GenAI/lora_request_trace.csv`): a CSV table with `gmt_create`,
//!   `groupId` and `checkpoint_model_version_id`. The published table has only the number of LoRAs; where a column beside
//!   `num_lora` begins with `lora` or `controlnet`, its cells are taken for lists of ids.
//! * Katz (USENIX ATC '25, modelscope/Katz, `diffusion_model_request_trace.json`): a JSON array of objects with `timestamp`, `ip`,
//!   `base_model_id`, `controlnets` and `loras`.
//!
//! Neither says how large anything is.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde_json::Value;

use super::trace::TraceError;
use crate::catalog::Kind;
use crate::units::Bytes;

/// A request as a service recorded it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Recorded {
    /// Since the first request.
    pub(super) at: Duration,
    pub(super) session: String,
    pub(super) components: Vec<String>,
}

/// What a service recorded, in the order of time.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Native {
    pub(super) requests: Vec<Recorded>,
    /// What each component is for.
    pub(super) kinds: BTreeMap<String, Kind>,
}

/// How large a component is taken to be where nothing says so: a single-file SDXL checkpoint in fp16, its ControlNet, and a
/// LoRA of rank 32 for it.
pub(super) const fn assumed_bytes(kind: Kind) -> Bytes {
    match kind {
        Kind::Lora => Bytes(228_000_000),
        Kind::Controlnet => Bytes(2_500_000_000),
        _ => Bytes(6_940_000_000),
    }
}

/// The requests of a trace in one of these forms. `None`: it is in none of them.
pub(super) fn read(text: &str) -> Option<Result<Native, TraceError>> {
    let text = text.trim_start_matches('\u{feff}');
    let start = text.trim_start();
    if start.starts_with('[') {
        return Some(katz(start));
    }
    let head = text.lines().next()?;
    let names = ["gmt_create", "checkpoint_model_version_id"];
    let has = |name: &str| head.split(',').any(|column| column.trim() == name);
    names.into_iter().all(has).then(|| gentd26(text))
}

/// A request with its time since 1970.
type Timed = (Duration, String, Vec<(String, Kind)>);

fn sorted(mut timed: Vec<Timed>) -> Native {
    timed.sort_by_key(|(at, ..)| *at);
    let first = timed.first().map_or(Duration::ZERO, |(at, ..)| *at);
    let mut native = Native::default();
    for (at, session, components) in timed {
        native.requests.push(Recorded {
            at: at.saturating_sub(first),
            session,
            components: components.iter().map(|(id, _)| id.clone()).collect(),
        });
        native.kinds.extend(components);
    }
    native
}

/// `2024-11-15 16:57:50`, or a number of seconds.
fn time(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let at = humantime::parse_rfc3339_weak(text).ok()?;
    at.duration_since(SystemTime::UNIX_EPOCH).ok()
}

/// Ids in a list however it is written.
fn ids(cell: &str) -> impl Iterator<Item = &str> {
    let is_border = |c: char| c.is_whitespace() || "[](){},;|'\"".contains(c);
    let is_id = |id: &&str| !id.is_empty() && !["None", "NULL", "nan"].contains(id);
    cell.split(is_border).filter(is_id)
}

fn gentd26(text: &str) -> Result<Native, TraceError> {
    let mut reader = csv::ReaderBuilder::new()
        .flexible(true)
        .trim(csv::Trim::All)
        .from_reader(text.as_bytes());
    let head = reader.headers().cloned().unwrap_or_default();
    let column = |name: &'static str| {
        let place = head.iter().position(|column| column == name);
        place.ok_or(TraceError::MissingColumn {
            table: "GenTD26",
            column: name,
        })
    };
    let (time_at, base_at) = (
        column("gmt_create")?,
        column("checkpoint_model_version_id")?,
    );
    let group_at = column("groupId").ok();
    let lists: Vec<(usize, Kind)> = head
        .iter()
        .enumerate()
        .filter_map(|(at, name)| match name {
            "num_lora" => None,
            name if name.starts_with("lora") => Some((at, Kind::Lora)),
            name if name.starts_with("controlnet") => Some((at, Kind::Controlnet)),
            _ => None,
        })
        .collect();
    let mut timed = Vec::new();
    for (line, row) in (2..).zip(reader.records()) {
        let bad = |column: &'static str, value: &str| TraceError::BadValue {
            table: "GenTD26",
            line,
            column,
            value: value.to_owned(),
        };
        let row = row.map_err(|error| bad("row", &error.to_string()))?;
        let cell = |at: usize| row.get(at).unwrap_or_default();
        let Some(base) = ids(cell(base_at)).next() else {
            continue;
        };
        let at = time(cell(time_at)).ok_or_else(|| bad("gmt_create", cell(time_at)))?;
        let mut components = vec![(base.to_owned(), Kind::Checkpoint)];
        for (at, kind) in &lists {
            components.extend(ids(cell(*at)).map(|id| (id.to_owned(), *kind)));
        }
        let session = group_at.map_or("", cell).to_owned();
        timed.push((at, session, components));
    }
    Ok(sorted(timed))
}

/// An id, whether it is written as text or as a number.
fn id(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn katz(text: &str) -> Result<Native, TraceError> {
    #[derive(Deserialize)]
    struct Row {
        timestamp: Value,
        #[serde(default)]
        ip: Value,
        #[serde(default)]
        base_model_id: Value,
        #[serde(default)]
        controlnets: Option<Vec<Value>>,
        #[serde(default)]
        loras: Option<Vec<Value>>,
    }
    let bad = |line: usize, column: &'static str, value: String| TraceError::BadValue {
        table: "Katz",
        line,
        column,
        value,
    };
    let rows: Vec<Row> = serde_json::from_str(text)
        .map_err(|error| bad(error.line(), "request", error.to_string()))?;
    let mut timed = Vec::with_capacity(rows.len());
    for (number, row) in (1..).zip(rows) {
        let written = id(&row.timestamp);
        let at = written.as_deref().and_then(time);
        let at = at.ok_or_else(|| bad(number, "timestamp", row.timestamp.to_string()))?;
        let kinds = |values: Option<Vec<Value>>, kind| {
            let ids = values.unwrap_or_default();
            ids.iter()
                .filter_map(id)
                .map(|id| (id, kind))
                .collect::<Vec<_>>()
        };
        let mut components: Vec<_> = id(&row.base_model_id)
            .map(|base| (base, Kind::Checkpoint))
            .into_iter()
            .collect();
        components.extend(kinds(row.controlnets, Kind::Controlnet));
        components.extend(kinds(row.loras, Kind::Lora));
        if !components.is_empty() {
            timed.push((at, id(&row.ip).unwrap_or_default(), components));
        }
    }
    Ok(sorted(timed))
}

#[cfg(test)]
mod tests {
    use super::super::trace::Trace;
    use super::*;

    const GENTD26: &str = "gmt_create,predict_type,predict_status,groupId,checkpoint_model_version_id,num_lora,lora_ids\n\
        2024-11-15 16:57:50,TXT_2_IMG,SUCCEED,G0,M0,2,\"['L0', 'L1']\"\n\
        2024-11-15 16:57:40,TXT_2_IMG,SUCCEED,G1,M1,0,\n\
        2024-11-15 16:58:00,TXT_2_IMG,FAILED,G1,,0,\n";

    #[test]
    fn gentd26_is_read_in_its_own_columns() {
        let trace = Trace::read(GENTD26, None).unwrap();
        let requests = trace.requests();
        assert_eq!(requests.len(), 2, "the third names no model");
        assert_eq!(requests[0].at, Duration::ZERO);
        assert_eq!(requests[1].at, Duration::from_secs(10));
        assert_ne!(requests[0].session, requests[1].session);
        let named = |request: usize| -> Vec<(&str, Kind, Bytes)> {
            let places = requests[request].components.iter();
            let components = places.map(|place| &trace.components()[*place]);
            components.map(|c| (&*c.id, c.kind, c.bytes)).collect()
        };
        assert_eq!(
            named(0),
            [("M1", Kind::Checkpoint, assumed_bytes(Kind::Checkpoint))]
        );
        let lora = |id| (id, Kind::Lora, assumed_bytes(Kind::Lora));
        assert_eq!(named(1)[1..], [lora("L0"), lora("L1")]);
        // With a table of sizes, by that.
        let sizes = "id,kind,bytes\nM0,checkpoint,7\nM1,checkpoint,8\nL0,lora,1\nL1,lora,2\n";
        let trace = Trace::read(GENTD26, Some(sizes)).unwrap();
        assert_eq!(trace.footprint(), Bytes(18));
        let error = Trace::read(GENTD26, Some("id,kind,bytes\nM0,checkpoint,7\n")).unwrap_err();
        assert!(
            matches!(error, TraceError::UnknownComponent { .. }),
            "{error}"
        );
        let broken = GENTD26.replace("2024-11-15 16:57:40", "yesterday");
        assert!(matches!(
            Trace::read(&broken, None).unwrap_err(),
            TraceError::BadValue {
                line: 3,
                column: "gmt_create",
                ..
            }
        ));
    }

    #[test]
    fn katz_is_read_in_its_own_form() {
        let text = r#"[
            {"timestamp": 1700000010, "ip": "a", "scene_id": "A", "base_model_id": 3, "controlnets": null, "loras": ["x"]},
            {"timestamp": "2023-11-14 22:13:20", "ip": "b", "scene_id": "B", "base_model_id": "m", "controlnets": ["c"], "loras": []}
        ]"#;
        let trace = Trace::read(text, None).unwrap();
        assert_eq!(trace.requests()[1].at, Duration::from_secs(10));
        let ids: Vec<&str> = trace.components().iter().map(|c| &*c.id).collect();
        assert_eq!(ids, ["3", "c", "m", "x"]);
        assert_eq!(trace.components()[1].kind, Kind::Controlnet);
        assert!(Trace::read("[{\"ip\": 1}]", None).is_err());
        assert!(Trace::read("[", None).is_err());
    }

    #[test]
    fn own_tables_need_sizes() {
        let requests = "t_s,session,components\n0,s,A\n";
        assert_eq!(Trace::read(requests, None), Err(TraceError::NoComponents));
        assert!(Trace::read(requests, Some("id,kind,bytes\nA,vae,1\n")).is_ok());
    }
}
