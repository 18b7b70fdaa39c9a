//! Recorded requests, and what the components in them are.
//!
//! Two tables with a head line: requests `t_s,session,components` (ids joined by `|`; the session may be empty) and
//! components `id,kind,bytes` with `load_s` where it was measured. Ids hold no comma, so no quoting is needed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::IntoDeserializer;

use super::native::{self, Native};
use crate::catalog::Kind;
use crate::ids::{ContentId, SessionId};
use crate::units::Bytes;

/// A trace that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// The head line lacks a column.
    #[error("the {table} table has no column `{column}`: its first line must name the columns")]
    MissingColumn {
        /// Which table.
        table: &'static str,
        /// Which column.
        column: &'static str,
    },
    /// A value is not what its column holds.
    #[error("the {table} table has `{value}` as {column} in line {line}")]
    BadValue {
        /// Which table.
        table: &'static str,
        /// Line, counted from one.
        line: usize,
        /// Which column.
        column: &'static str,
        /// What is there.
        value: String,
    },
    /// A request comes before the one above it.
    #[error("the request in line {line} is earlier than the one above it: sort the table by t_s")]
    NotInOrder {
        /// Line, counted from one.
        line: usize,
    },
    /// A request names a component that the components table lacks.
    #[error("the request in line {line} names `{id}`, which the components table does not have")]
    UnknownComponent {
        /// Line, counted from one.
        line: usize,
        /// The component's id.
        id: String,
    },
    /// Requests in hotset's own columns say nothing of the components in them.
    #[error(
        "there is no table of components: give one with id, kind and bytes (--components FILE)"
    )]
    NoComponents,
    /// A component is there twice.
    #[error("the components table has `{id}` again in line {line}")]
    DuplicateComponent {
        /// Line, counted from one.
        line: usize,
        /// The component's id.
        id: String,
    },
}

/// A component of a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceComponent {
    /// Its id in the tables.
    pub id: Arc<str>,
    /// Its identity for policies, made from the id: ordered as the ids are where these are short.
    pub content: ContentId,
    /// What it is for.
    pub kind: Kind,
    /// How many bytes it has.
    pub bytes: Bytes,
    /// How long its load took, in seconds, where that was measured.
    pub load_s: Option<f64>,
}

/// A request of a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceRequest {
    /// When, since the start of the trace.
    pub at: Duration,
    /// Who asked.
    pub session: SessionId,
    /// What for: places in [`Trace::components`], each once.
    pub components: Vec<usize>,
}

/// Requests in the order of time, and their components.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trace {
    pub(super) components: Vec<TraceComponent>,
    pub(super) requests: Vec<TraceRequest>,
}

impl Trace {
    /// Reads both tables.
    ///
    /// # Errors
    /// [`TraceError`] names the first line that can't be read.
    pub fn parse(requests: &str, components: &str) -> Result<Self, TraceError> {
        let components = parse_components(components)?;
        let requests = parse_requests(requests, &components)?;
        Ok(Self {
            components,
            requests,
        })
    }

    /// Reads requests in hotset's own columns, or in those of GenTD26 or Katz (`native.rs` says which), with a table of
    /// components, which the latter can do without: then sizes are assumed by kind.
    ///
    /// # Errors
    /// [`TraceError`] names the first line that can't be read.
    pub fn read(requests: &str, components: Option<&str>) -> Result<Self, TraceError> {
        let Some(native) = native::read(requests) else {
            let components = components.ok_or(TraceError::NoComponents)?;
            return Self::parse(requests, components);
        };
        let native = native?;
        let components = match components {
            Some(table) => parse_components(table)?,
            None => assumed(&native),
        };
        let places = places(&components);
        let mut sessions: HashMap<&str, u64> = HashMap::new();
        let mut requests = Vec::with_capacity(native.requests.len());
        for (line, recorded) in (1..).zip(&native.requests) {
            let next = sessions.len() as u64;
            let session = *sessions.entry(&recorded.session).or_insert(next);
            let mut set = Vec::with_capacity(recorded.components.len());
            for id in &recorded.components {
                let place = places.get(id.as_str());
                let place = place.ok_or_else(|| TraceError::UnknownComponent {
                    line,
                    id: id.clone(),
                })?;
                if !set.contains(place) {
                    set.push(*place);
                }
            }
            requests.push(TraceRequest {
                at: recorded.at,
                session: SessionId(session),
                components: set,
            });
        }
        Ok(Self {
            components,
            requests,
        })
    }

    /// The components.
    #[must_use]
    pub fn components(&self) -> &[TraceComponent] {
        &self.components
    }

    /// The requests.
    #[must_use]
    pub fn requests(&self) -> &[TraceRequest] {
        &self.requests
    }

    /// The bytes of all components that are asked for: what a tier would need to never load anything twice.
    #[must_use]
    pub fn footprint(&self) -> Bytes {
        let mut used = vec![false; self.components.len()];
        for place in self.requests.iter().flat_map(|r| &r.components) {
            used[*place] = true;
        }
        let used = self.components.iter().zip(used).filter(|(_, used)| *used);
        used.map(|(component, _)| component.bytes).sum()
    }

    /// All uses that the trace holds, in the order of time: what a clairvoyant policy is told.
    pub fn uses(&self) -> impl Iterator<Item = (Duration, ContentId)> + '_ {
        self.requests.iter().flat_map(|request| {
            let places = request.components.iter();
            places.map(|place| (request.at, self.components[*place].content))
        })
    }
}

/// A table's lines with their numbers, and where its columns are.
struct Table<'a> {
    name: &'static str,
    columns: Vec<&'a str>,
    lines: Vec<(usize, Vec<&'a str>)>,
}

impl<'a> Table<'a> {
    fn new(name: &'static str, text: &'a str) -> Self {
        let cells = |line: &'a str| line.split(',').map(str::trim).collect::<Vec<_>>();
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut lines = (1..)
            .zip(text.lines())
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(number, line)| (number, cells(line)));
        Self {
            name,
            columns: lines.next().map(|(_, cells)| cells).unwrap_or_default(),
            lines: lines.collect(),
        }
    }

    fn column(&self, column: &'static str) -> Result<usize, TraceError> {
        let place = self.columns.iter().position(|name| *name == column);
        place.ok_or(TraceError::MissingColumn {
            table: self.name,
            column,
        })
    }

    fn bad(&self, line: usize, column: &'static str, value: &str) -> TraceError {
        TraceError::BadValue {
            table: self.name,
            line,
            column,
            value: value.to_owned(),
        }
    }
}

fn parse_components(text: &str) -> Result<Vec<TraceComponent>, TraceError> {
    let table = Table::new("components", text);
    let (id_at, kind_at, bytes_at) = (
        table.column("id")?,
        table.column("kind")?,
        table.column("bytes")?,
    );
    let load_at = table.column("load_s").ok();
    let mut seen = HashMap::new();
    let mut components = Vec::with_capacity(table.lines.len());
    for (line, cells) in &table.lines {
        let cell = |at: usize| cells.get(at).copied().unwrap_or_default();
        let id = cell(id_at);
        if id.is_empty() {
            return Err(table.bad(*line, "id", id));
        }
        if seen.insert(id, ()).is_some() {
            return Err(TraceError::DuplicateComponent {
                line: *line,
                id: id.to_owned(),
            });
        }
        let kind: Result<Kind, serde::de::value::Error> =
            Kind::deserialize(cell(kind_at).into_deserializer());
        let load_s = match load_at.map(cell).filter(|text| !text.is_empty()) {
            None => None,
            Some(text) => Some(
                text.parse::<f64>()
                    .ok()
                    .filter(|s| s.is_finite() && *s >= 0.0)
                    .ok_or_else(|| table.bad(*line, "load_s", text))?,
            ),
        };
        components.push(TraceComponent {
            id: id.into(),
            content: content_of(id),
            // Other services name kinds otherwise; that is no reason to refuse their traces.
            kind: kind.unwrap_or_default(),
            bytes: cell(bytes_at)
                .parse()
                .map(Bytes)
                .map_err(|_| table.bad(*line, "bytes", cell(bytes_at)))?,
            load_s,
        });
    }
    Ok(components)
}

fn parse_requests(
    text: &str,
    components: &[TraceComponent],
) -> Result<Vec<TraceRequest>, TraceError> {
    let table = Table::new("requests", text);
    let (at_at, session_at, set_at) = (
        table.column("t_s")?,
        table.column("session")?,
        table.column("components")?,
    );
    let places = places(components);
    let mut sessions: HashMap<&str, u64> = HashMap::new();
    let mut requests: Vec<TraceRequest> = Vec::with_capacity(table.lines.len());
    for (line, cells) in &table.lines {
        let cell = |at: usize| cells.get(at).copied().unwrap_or_default();
        let at = cell(at_at)
            .parse::<f64>()
            .ok()
            .and_then(|s| Duration::try_from_secs_f64(s).ok())
            .ok_or_else(|| table.bad(*line, "t_s", cell(at_at)))?;
        if requests.last().is_some_and(|last| last.at > at) {
            return Err(TraceError::NotInOrder { line: *line });
        }
        let next = sessions.len() as u64;
        let session = *sessions.entry(cell(session_at)).or_insert(next);
        let mut set = Vec::new();
        for id in cell(set_at)
            .split('|')
            .map(str::trim)
            .filter(|id| !id.is_empty())
        {
            let place = places.get(id).ok_or_else(|| TraceError::UnknownComponent {
                line: *line,
                id: id.to_owned(),
            })?;
            if !set.contains(place) {
                set.push(*place);
            }
        }
        requests.push(TraceRequest {
            at,
            session: SessionId(session),
            components: set,
        });
    }
    Ok(requests)
}

fn places(components: &[TraceComponent]) -> HashMap<&str, usize> {
    let components = components.iter().enumerate();
    components
        .map(|(place, component)| (&*component.id, place))
        .collect()
}

/// The components of a recording, with sizes by their kinds.
fn assumed(native: &Native) -> Vec<TraceComponent> {
    let kinds = native.kinds.iter();
    kinds
        .map(|(id, kind)| TraceComponent {
            id: id.as_str().into(),
            content: content_of(id),
            kind: *kind,
            bytes: native::assumed_bytes(*kind),
            load_s: None,
        })
        .collect()
}

/// Ids of up to 31 bytes as they are, with their length at the end; longer ones by their digest.
pub(super) fn content_of(id: &str) -> ContentId {
    let mut digest = [0; 32];
    if id.len() < digest.len() {
        digest[..id.len()].copy_from_slice(id.as_bytes());
        digest[31] = id.len() as u8;
        ContentId::File(digest)
    } else {
        ContentId::Blake3(*blake3::hash(id.as_bytes()).as_bytes())
    }
}
