use super::*;
use proptest::prelude::*;

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn sample() -> Vec<u8> {
    let mut file = b"GGUF".to_vec();
    file.extend(3_u32.to_le_bytes());
    file.extend(2_u64.to_le_bytes());
    file.extend(2_u64.to_le_bytes());
    file.extend(text("general.architecture"));
    file.extend(8_u32.to_le_bytes());
    file.extend(text("llama"));
    file.extend(text("tokens"));
    file.extend(9_u32.to_le_bytes());
    file.extend(8_u32.to_le_bytes());
    file.extend(1_u64.to_le_bytes());
    file.extend(text("a"));
    for (name, kind, start) in [("a", 0_u32, 0_u64), ("b", 2, 128)] {
        file.extend(text(name));
        file.extend(1_u32.to_le_bytes());
        file.extend(32_u64.to_le_bytes());
        file.extend(kind.to_le_bytes());
        file.extend(start.to_le_bytes());
    }
    file.resize(file.len().next_multiple_of(32) + 128 + 18, 0);
    file
}

#[test]
fn a_header_is_read_and_every_cut_is_seen() {
    let file = sample();
    let header = parse(&file, file.len() as u64).unwrap();
    assert_eq!(header.metadata["general.architecture"], "llama");
    let seen: Vec<_> = header
        .tensors
        .iter()
        .map(|t| (&*t.name, t.dtype.name(), t.end))
        .collect();
    assert_eq!(seen, [("a", "F32", 128), ("b", "Q4_0", 146)]);
    for len in 0..file.len() {
        assert!(parse(&file[..len], len as u64).is_err(), "{len}");
    }
}

#[test]
fn what_comes_in_pieces_reads_as_what_comes_at_once() {
    let file = sample();
    let whole = parse(&file, file.len() as u64).unwrap();
    let mut pairs = Pairs::default();
    let short = (0..file.len()).find(|&len| match pairs.advance(&file[..len]) {
        Err(GgufError::Truncated { .. }) => false,
        done => done.is_ok(),
    });
    assert!(short.is_some());
    let tensors = pairs.tensors(&file, file.len() as u64).unwrap();
    assert_eq!(pairs.with(tensors), whole);
}

#[test]
fn what_cannot_be_is_refused() {
    let refuse = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut file = sample();
        change(&mut file);
        parse(&file, file.len() as u64).unwrap_err()
    };
    assert!(matches!(refuse(&|f| f[0] = b'X'), GgufError::Magic));
    assert!(matches!(
        refuse(&|f| f[4..8].copy_from_slice(&3_u32.to_be_bytes())),
        GgufError::Version { .. }
    ));
    assert!(matches!(
        refuse(&|f| f[24..32].copy_from_slice(&u64::MAX.to_le_bytes())),
        GgufError::Invalid { .. }
    ));
    assert!(matches!(
        refuse(&|f| f[8..16].copy_from_slice(&u64::MAX.to_le_bytes())),
        GgufError::Invalid { .. }
            | GgufError::Truncated { .. }
            | GgufError::DuplicateKey { .. }
            | GgufError::UnknownType { .. }
    ));
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), len in any::<u64>()) {
        let _ = parse(&bytes, len);
    }

    #[test]
    fn no_damage_makes_it_panic(at in 0..300_usize, with in any::<[u8; 8]>()) {
        let mut file = sample();
        let at = at.min(file.len() - 8);
        file[at..at + 8].copy_from_slice(&with);
        let _ = parse(&file, file.len() as u64);
    }
}
