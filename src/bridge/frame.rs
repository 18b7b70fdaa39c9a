//! Frames: a length of four bytes, little-endian, then one MessagePack map. Nothing here trusts a length before it is checked.

use serde::{Deserialize, Serialize};

/// Why bytes are no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The frame is longer than it may be. What follows it cannot be found.
    #[error("a frame of {bytes} bytes is too long; the limit is {limit}")]
    TooLong {
        /// What its length says.
        bytes: usize,
        /// What it may be.
        limit: usize,
    },
    /// It has no readable `id` and `type`.
    #[error("a frame is no MessagePack map with `id` and `type`: {reason}")]
    Head {
        /// What is wrong.
        reason: String,
    },
    /// There is no such message.
    #[error("there is no message of type `{kind}`")]
    UnknownType {
        /// The request's number.
        id: u64,
        /// What it calls itself.
        kind: String,
    },
    /// The fields do not suit the type.
    #[error("the body of `{kind}` is malformed: {reason}")]
    Body {
        /// The request's number.
        id: u64,
        /// The type.
        kind: String,
        /// What is wrong.
        reason: String,
    },
    /// A message could not be written.
    #[error("a message cannot be encoded: {reason}")]
    Encode {
        /// What is wrong.
        reason: String,
    },
}

/// Bytes of a frame before its payload.
pub(crate) const PREFIX: usize = 4;
/// What is kept of a buffer when it is empty: a long frame must not occupy its memory for ever.
const KEPT: usize = 64 << 10;

/// What every message has.
#[derive(Debug, Deserialize)]
pub(crate) struct Head<'a> {
    #[serde(default)]
    pub(crate) id: u64,
    #[serde(rename = "type")]
    pub(crate) kind: &'a str,
}

/// How deep a message may nest; documents are the deepest, at less than ten. The reader calls itself for each level.
const DEEPEST: usize = 32;

/// Reads a payload, or a part of it, nested no deeper than messages are.
pub(crate) fn read<'a, T: Deserialize<'a>>(
    payload: &'a [u8],
) -> Result<T, rmp_serde::decode::Error> {
    let mut reader = rmp_serde::Deserializer::from_read_ref(payload);
    reader.set_max_depth(DEEPEST);
    T::deserialize(&mut reader)
}

/// Reads the head of a payload.
pub(crate) fn split(payload: &[u8]) -> Result<Head<'_>, FrameError> {
    if let Some(head) = in_front(payload) {
        return Ok(head);
    }
    read(payload).map_err(|error| FrameError::Head {
        reason: error.to_string(),
    })
}

/// The head where it comes first, as [`join`] writes it: the rest need not be walked through for it.
fn in_front(payload: &[u8]) -> Option<Head<'_>> {
    let mut rest = payload;
    if rmp::decode::read_map_len(&mut rest).ok()? < 2 {
        return None;
    }
    let mut rest = text(rest).and_then(|(key, rest)| (key == "id").then_some(rest))?;
    let id = rmp::decode::read_int(&mut rest).ok()?;
    let rest = text(rest).and_then(|(key, rest)| (key == "type").then_some(rest))?;
    let (kind, _) = text(rest)?;
    Some(Head { id, kind })
}

/// A string at the start, and what follows it.
fn text(bytes: &[u8]) -> Option<(&str, &[u8])> {
    rmp::decode::read_str_from_slice(bytes).ok()
}

/// Writes a whole frame: its length, then the body's map with `id` and `type` put in front.
pub(crate) fn join(id: u64, kind: &str, body: &impl Serialize) -> Result<Vec<u8>, FrameError> {
    let failed = |reason: String| FrameError::Encode { reason };
    let body = rmp_serde::to_vec_named(body).map_err(|error| failed(error.to_string()))?;
    let mut fields = body.as_slice();
    let count =
        rmp::decode::read_map_len(&mut fields).map_err(|error| failed(error.to_string()))?;
    let mut frame = Vec::with_capacity(body.len() + kind.len() + 32);
    frame.extend_from_slice(&[0; PREFIX]);
    // Writing into a vector cannot fail.
    let written = rmp::encode::write_map_len(&mut frame, count.saturating_add(2))
        .and_then(|_| rmp::encode::write_str(&mut frame, "id"))
        .and_then(|()| rmp::encode::write_uint(&mut frame, id))
        .and_then(|_| rmp::encode::write_str(&mut frame, "type"))
        .and_then(|()| rmp::encode::write_str(&mut frame, kind));
    written.map_err(|error| failed(error.to_string()))?;
    frame.extend_from_slice(fields);
    let length = u32::try_from(frame.len() - PREFIX).map_err(|_| FrameError::TooLong {
        bytes: frame.len(),
        limit: u32::MAX as usize,
    })?;
    frame[..PREFIX].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// Bytes that came in, cut into frames.
#[derive(Debug)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    /// Where the next frame begins.
    start: usize,
    limit: usize,
}

impl FrameBuffer {
    /// An empty buffer for frames of at most `limit` bytes.
    #[must_use]
    pub const fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            start: 0,
            limit,
        }
    }

    /// The longest frame.
    #[must_use]
    pub const fn limit(&self) -> usize {
        self.limit
    }

    /// Adds bytes that came in.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.tidy();
        self.bytes.extend_from_slice(bytes);
    }

    /// Moves what is left to the front, once what was read is more than what is left.
    fn tidy(&mut self) {
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.bytes.shrink_to(KEPT);
            self.start = 0;
        } else if self.start > self.bytes.len() / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }

    /// The payload of the next whole frame; `None` until more bytes come.
    ///
    /// # Errors
    /// [`FrameError::TooLong`], as soon as the length is known. Nothing can be read after it.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let rest = &self.bytes[self.start..];
        let Some(prefix) = rest.first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let bytes = u32::from_le_bytes(*prefix) as usize;
        if bytes > self.limit {
            return Err(FrameError::TooLong {
                bytes,
                limit: self.limit,
            });
        }
        if rest.len() - PREFIX < bytes {
            return Ok(None);
        }
        let from = self.start + PREFIX;
        self.start = from + bytes;
        Ok(Some(&self.bytes[from..from + bytes]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bridge::wire::{
        ClientMessage, Empty, Load, MappedMemory, PlanMix, Release, ServerMessage, Set, StillMapped,
    };

    #[test]
    fn messages_survive_being_cut_anywhere() {
        let load = ClientMessage::Load(Load {
            names: vec!["a".into(), "b/c".into()],
            target: "ram".into(),
            dependencies: true,
            priority: "batch".into(),
            ..Load::default()
        });
        let release = ClientMessage::Release(Release {
            leases: (0..100).collect(),
        });
        let mut stream = load.encode(7).unwrap();
        stream.extend(release.encode(8).unwrap());
        for piece in [1, 2, 3, 7, stream.len()] {
            let mut buffer = FrameBuffer::new(1 << 20);
            let mut seen = Vec::new();
            for bytes in stream.chunks(piece) {
                buffer.extend(bytes);
                while let Some(frame) = buffer.next_frame().unwrap() {
                    seen.push(ClientMessage::decode(frame).unwrap());
                }
            }
            assert_eq!(seen, [(7, load.clone()), (8, release.clone())]);
        }
    }

    #[test]
    fn a_long_frame_is_refused_before_it_is_read() {
        let mut buffer = FrameBuffer::new(100);
        buffer.extend(&101_u32.to_le_bytes());
        assert_eq!(
            buffer.next_frame().unwrap_err(),
            FrameError::TooLong {
                bytes: 101,
                limit: 100
            }
        );
    }

    #[test]
    fn what_is_wrong_with_a_frame_is_told_apart() {
        let frame = ServerMessage::Draining(Empty {}).encode(3).unwrap();
        let unknown = ClientMessage::decode(&frame[PREFIX..]).unwrap_err();
        assert!(matches!(unknown, FrameError::UnknownType { id: 3, kind } if kind == "draining"));
        let body = join(4, "load", &std::collections::BTreeMap::from([("names", 5)])).unwrap();
        let wrong = ClientMessage::decode(&body[PREFIX..]).unwrap_err();
        assert!(matches!(wrong, FrameError::Body { id: 4, .. }), "{wrong}");
        assert!(matches!(
            ClientMessage::decode(&[0xc1]).unwrap_err(),
            FrameError::Head { .. }
        ));
        assert!(matches!(
            ClientMessage::decode(&[]).unwrap_err(),
            FrameError::Head { .. }
        ));
    }

    #[test]
    fn fields_of_a_later_version_are_ignored() {
        let body = std::collections::BTreeMap::from([("later", vec![1, 2]), ("leases", vec![9])]);
        let frame = join(1, "release", &body).unwrap();
        assert_eq!(
            ClientMessage::decode(&frame[PREFIX..]).unwrap(),
            (1, ClientMessage::Release(Release { leases: vec![9] }))
        );
    }

    #[test]
    fn a_head_may_stand_anywhere() {
        let scattered = b"\x83\xa6leases\x91\x05\xa4type\xa7release\xa2id\x07";
        let front = b"\x83\xa2id\x07\xa4type\xa7release\xa6leases\x91\x05";
        assert!(in_front(scattered).is_none() && in_front(front).is_some());
        let expected = (7, ClientMessage::Release(Release { leases: vec![5] }));
        assert_eq!(ClientMessage::decode(scattered).unwrap(), expected);
        assert_eq!(ClientMessage::decode(front).unwrap(), expected);
    }

    proptest::proptest! {
        /// What a hostile client makes of real messages: bytes changed, cut out and put in. libFuzzer does the same for longer
        /// (`fuzz/`).
        #[test]
        fn spoilt_messages_are_errors_or_messages(
            which in 0_usize..4,
            edits in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), 0_u8..4, proptest::prelude::any::<u8>()), 1..12),
        ) {
            let load = Load { names: vec!["a".into(), "b/c".into()], target: "ram".into(), keep_alive: Some("5m".into()), ..Load::default() };
            let still = StillMapped { memories: vec![MappedMemory { component: "a/b".into(), tier: "ram".into(), bytes: 1, ..MappedMemory::default() }] };
            let messages = [
                ClientMessage::Load(load),
                ClientMessage::Release(Release { leases: (0..40).collect() }),
                ClientMessage::StillMapped(still),
                ClientMessage::PlanMix(PlanMix { sets: vec![Set::default(); 3], imagined: vec![1 << 40], ..PlanMix::default() }),
            ];
            let mut bytes = messages[which].encode(7).unwrap().split_off(PREFIX);
            for (at, what, byte) in edits {
                let at = at.index(bytes.len().max(1)).min(bytes.len());
                match what {
                    0 => bytes.insert(at, byte),
                    1 if at < bytes.len() => drop(bytes.remove(at)),
                    2 => bytes.truncate(at),
                    _ if at < bytes.len() => bytes[at] = byte,
                    _ => {}
                }
            }
            // What is understood is written again and read the same.
            if let Ok((id, message)) = ClientMessage::decode(&bytes) {
                let again = message.encode(id).unwrap();
                proptest::prop_assert_eq!(ClientMessage::decode(&again[PREFIX..]).unwrap(), (id, message));
            }
            let _ = ServerMessage::decode(&bytes);
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow() {
        let mut frame = vec![0x83];
        for (key, value) in [("id", &b"\x01"[..]), ("type", b"\xa4ping")] {
            frame.push(0xa0 | key.len() as u8);
            frame.extend_from_slice(key.as_bytes());
            frame.extend_from_slice(value);
        }
        frame.extend_from_slice(b"\xa1x");
        frame.extend(std::iter::repeat_n(0x91, 1 << 20));
        assert!(ClientMessage::decode(&frame).is_err());
    }
}
