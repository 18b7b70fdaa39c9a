//! What a client of the bridge may send: frames cut anywhere, and messages of every type.
#![no_main]

use hotset::bridge::frame::FrameBuffer;
use hotset::bridge::wire::{ClientMessage, MAX_REQUEST_BYTES, ServerMessage};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // As a stream, in pieces of a length that the input chooses.
    let piece = usize::from(bytes.first().copied().unwrap_or(1)).max(1);
    let mut frames = FrameBuffer::new(MAX_REQUEST_BYTES);
    'stream: for part in bytes.chunks(piece) {
        frames.extend(part);
        loop {
            match frames.next_frame() {
                Err(_) => break 'stream,
                Ok(None) => break,
                Ok(Some(frame)) => assert!(frame.len() <= MAX_REQUEST_BYTES),
            }
        }
    }
    // As one payload: what is understood is written back and read the same.
    if let Ok((id, message)) = ClientMessage::decode(bytes) {
        let frame = message.encode(id).expect("what was read can be written");
        assert_eq!(ClientMessage::decode(&frame[4..]).expect("and read again"), (id, message));
    }
    let _ = ServerMessage::decode(bytes);
});
