//! docs/protocol.md is true: its tables are those of the types, and its transcript is what a server says.

mod examples;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hotset::Bytes;
use hotset::bridge::Bridge;
use hotset::bridge::wire::{ClientMessage, ServerMessage};
use serde_json::Value;

use crate::library::{Library, Rig, soon};

/// Set (to `1`) to write the page anew instead of comparing it.
const WRITE: &str = "HOTSET_WRITE_DOCS";
const BORDER: &str = "<!-- From here on";

fn page() -> (PathBuf, String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/protocol.md");
    let text = std::fs::read_to_string(&path).unwrap();
    (path, text)
}

/// The type of a field, in words.
fn kind(schema: &Value) -> String {
    if let Some(reference) = schema["$ref"].as_str() {
        let name = reference.rsplit('/').next().unwrap();
        return format!("[{name}](#{})", name.to_lowercase());
    }
    if let Some(any) = schema["anyOf"].as_array() {
        let parts: Vec<_> = any.iter().map(kind).collect();
        return parts.join(" or ");
    }
    let one = |name: &str| match name {
        "array" => format!("array of {}", kind(&schema["items"])),
        "integer" => "unsigned integer".to_owned(),
        "string" => "text".to_owned(),
        "null" => "nil".to_owned(),
        other => other.to_owned(),
    };
    match &schema["type"] {
        Value::String(name) => one(name),
        Value::Array(names) => {
            let names: Vec<_> = names.iter().filter_map(Value::as_str).map(one).collect();
            names.join(" or ")
        }
        _ => "any".to_owned(),
    }
}

fn fields(text: &mut String, schema: &Value) {
    let Some(properties) = schema["properties"].as_object() else {
        text.push_str("No further fields.\n\n");
        return;
    };
    let required: Vec<&str> = schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    text.push_str("| field | type | | meaning |\n|---|---|---|---|\n");
    for (name, field) in properties {
        // The one field that is not text, numbers and the like.
        let kind = match (name.as_str(), kind(field).as_str()) {
            ("tensors", "array of unsigned integer") => "binary".to_owned(),
            (_, kind) => kind.to_owned(),
        };
        let meaning = field["description"].as_str().unwrap_or_default();
        let needed = if required.contains(&name.as_str()) {
            "always"
        } else {
            "may be left out"
        };
        let meaning = meaning.replace('\n', " ").replace('|', "\\|");
        writeln!(text, "| `{name}` | {kind} | {needed} | {meaning} |").unwrap();
    }
    text.push('\n');
}

/// The example of a type, as the page shows it.
fn example<'a>(examples: &'a str, kind: &str) -> &'a str {
    let word = format!("\"type\": \"{kind}\"");
    let mut found = examples.lines().filter(|line| line.contains(&word));
    match (found.next(), found.next()) {
        (Some(one), None) => one,
        other => panic!("one example of `{kind}`: {other:?}"),
    }
}

/// Writes an example as a client would that has read the page alone: a binary field is shown as hexadecimal bytes.
fn packed(value: &Value) -> rmpv::Value {
    match value {
        Value::Object(fields) => rmpv::Value::Map(
            fields
                .iter()
                .map(|(key, value)| {
                    let bytes = value.as_str().filter(|_| key == "tensors").map(|shown| {
                        let bytes = shown.split(' ');
                        bytes
                            .map(|hex| u8::from_str_radix(hex, 16).unwrap())
                            .collect()
                    });
                    let value = match bytes {
                        Some(bytes) => rmpv::Value::Binary(bytes),
                        None => packed(value),
                    };
                    (key.as_str().into(), value)
                })
                .collect(),
        ),
        Value::Array(items) => rmpv::Value::Array(items.iter().map(packed).collect()),
        Value::Number(number) if number.is_u64() => number.as_u64().unwrap().into(),
        Value::Number(number) => number.as_f64().unwrap().into(),
        Value::String(text) => text.as_str().into(),
        Value::Bool(flag) => (*flag).into(),
        Value::Null => rmpv::Value::Nil,
    }
}

/// Every example is read by the types, and written again with all that it shows.
#[test]
fn the_examples_are_messages() {
    fn check(line: &str, again: impl Fn(&[u8]) -> Result<Vec<u8>, hotset::bridge::FrameError>) {
        let shown = packed(&serde_json::from_str(line).unwrap());
        let mut payload = Vec::new();
        rmpv::encode::write_value(&mut payload, &shown).unwrap();
        let frame = again(&payload).unwrap_or_else(|error| panic!("{line}: {error}"));
        let written = rmpv::decode::read_value(&mut &frame[4..]).unwrap();
        assert!(
            fits(&json(&shown), &json(&written)),
            "{line}\nis written as {written}"
        );
    }
    let lines = |examples: &'static str| examples.lines().filter(|line| !line.is_empty());
    assert_eq!(
        lines(examples::CLIENT).count(),
        ClientMessage::schemas().len()
    );
    assert_eq!(
        lines(examples::SERVER).count(),
        ServerMessage::schemas().len()
    );
    for line in lines(examples::CLIENT) {
        check(line, |payload| {
            let (id, message) = ClientMessage::decode(payload)?;
            message.encode(id)
        });
    }
    for line in lines(examples::SERVER) {
        check(line, |payload| {
            let (id, message) = ServerMessage::decode(payload)?;
            message.encode(id)
        });
    }
}

fn generated() -> String {
    let mut text = String::new();
    let mut shared: BTreeMap<String, Value> = BTreeMap::new();
    for (title, messages, examples) in [
        (
            "Messages of the client",
            ClientMessage::schemas(),
            examples::CLIENT,
        ),
        (
            "Messages of the server",
            ServerMessage::schemas(),
            examples::SERVER,
        ),
    ] {
        writeln!(text, "\n## {title}\n").unwrap();
        for (name, meaning, schema) in messages {
            writeln!(text, "### `{name}`\n\n{meaning}\n").unwrap();
            let schema = schema.to_value();
            fields(&mut text, &schema);
            let example = example(examples, name);
            writeln!(text, "```json\n{example}\n```\n").unwrap();
            if let Some(definitions) = schema["$defs"].as_object() {
                shared.extend(definitions.clone());
            }
        }
    }
    text.push_str("## Parts of messages\n\n");
    for (name, schema) in &shared {
        let meaning = schema["description"].as_str().unwrap_or_default();
        writeln!(text, "### {name}\n\n{meaning}\n").unwrap();
        fields(&mut text, schema);
    }
    text.trim_end().to_owned() + "\n"
}

#[test]
fn the_page_has_every_message() {
    let (path, text) = page();
    let border = text.find(BORDER).unwrap();
    let begin = border + text[border..].find('\n').unwrap() + 1;
    let generated = generated();
    if std::env::var_os(WRITE).is_some_and(|value| value == "1") {
        std::fs::write(path, format!("{}{generated}", &text[..begin])).unwrap();
        return;
    }
    assert!(
        text[begin..] == generated,
        "docs/protocol.md is behind the types; run {WRITE}=1 cargo test --test it protocol"
    );
}

/// Whether a value is as the transcript shows it.
fn fits(shown: &Value, said: &Value) -> bool {
    match (shown, said) {
        (Value::String(any), _) if any == "*" => true,
        (Value::Object(shown), Value::Object(said)) => shown
            .iter()
            .all(|(key, value)| said.get(key).is_some_and(|said| fits(value, said))),
        (Value::Array(shown), Value::Array(said)) => {
            shown.len() == said.len() && shown.iter().zip(said).all(|(a, b)| fits(a, b))
        }
        (shown, said) => shown == said,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_transcript_is_what_a_server_says() {
    let library = Library::new();
    library.single("one", 1, 64);
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("run/hotset.sock");
    let mut config = library.config(Bytes::mib(4));
    config.bridge.socket = Some(socket.clone());
    let Rig { hotset, .. } = Rig::start(config).await;
    let hotset = Arc::new(hotset);
    let bridge = Bridge::open(hotset.clone()).await.unwrap();

    let (_, text) = page();
    let transcript = text.split("```transcript\n").nth(1).unwrap();
    let transcript = transcript.split("```").next().unwrap().to_owned();
    let played = tokio::task::spawn_blocking(move || play(&socket, &transcript));
    let turns = soon("the transcript", played).await.unwrap();
    assert!(turns >= 24, "{turns} turns");
    bridge.close().await;
    let hotset = Arc::into_inner(hotset).unwrap();
    soon("drain", hotset.drain()).await;
}

/// As JSON, for comparing; binary becomes a number of bytes.
fn json(value: &rmpv::Value) -> Value {
    match value {
        rmpv::Value::Binary(bytes) => bytes.len().into(),
        rmpv::Value::Array(items) => items.iter().map(json).collect(),
        rmpv::Value::Map(entries) => entries
            .iter()
            .map(|(key, value)| (key.as_str().unwrap().to_owned(), json(value)))
            .collect(),
        other => serde_json::to_value(other).unwrap(),
    }
}

/// Plays it by the page alone: MessagePack maps behind a length, and nothing of the crate's own types.
fn play(socket: &Path, transcript: &str) -> usize {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut turns = 0;
    for line in transcript.lines() {
        let (direction, shown) = line.split_at(2);
        let shown: Value = serde_json::from_str(shown).unwrap();
        if direction == "> " {
            let payload = rmp_serde::to_vec(&shown).unwrap();
            let length = u32::try_from(payload.len()).unwrap();
            stream.write_all(&length.to_le_bytes()).unwrap();
            stream.write_all(&payload).unwrap();
            continue;
        }
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        let mut payload = vec![0; u32::from_le_bytes(length) as usize];
        stream.read_exact(&mut payload).unwrap();
        let said = rmpv::decode::read_value(&mut payload.as_slice()).unwrap();
        let said = json(&said);
        assert!(
            fits(&shown, &said),
            "the page says {shown}, the server {said}"
        );
        turns += 1;
    }
    turns
}
