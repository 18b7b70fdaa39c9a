use std::collections::HashMap;
use std::io::Write;

use proptest::prelude::*;
use safetensors::tensor::{SafeTensors, TensorView};

use super::*;

fn one(json: &str, data: u64) -> Result<Header, HeaderError> {
    parse(json.as_bytes(), 8 + json.len() as u64 + data)
}

#[test]
fn a_plain_header_is_read() {
    let header = one(
        r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[2,3],"data_offsets":[4,16]},"a\u00e9":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}   "#,
        16,
    )
    .unwrap();
    assert_eq!(header.metadata["format"], "pt");
    let names: Vec<&str> = header.tensors.iter().map(|t| &*t.name).collect();
    assert_eq!(names, ["aé", "b"]);
    assert_eq!(header.tensors[1].shape, [2, 3]);
    assert_eq!(header.tensors[1].bytes(), 12);
}

#[test]
fn each_way_to_be_wrong_has_its_error() {
    let tensor = |name: &str, dtype: &str, len: u64, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":[{len}],"data_offsets":[{start},{end}]}}"#)
    };
    let two = |a: String, b: String| format!("{{{a},{b}}}");
    let error = |json: &str, data| one(json, data).unwrap_err();
    let u8s = |name, start, end| tensor(name, "U8", end - start, start, end);

    let overlapping = two(u8s("a", 0, 8), u8s("b", 4, 12));
    assert!(matches!(
        error(&overlapping, 12),
        HeaderError::Overlap {
            start: 4,
            end: 8,
            ..
        }
    ));
    let hole = two(u8s("a", 0, 8), u8s("b", 10, 12));
    assert!(matches!(
        error(&hole, 12),
        HeaderError::Hole {
            offset: 10,
            bytes: 2
        }
    ));
    let twice = two(u8s("a", 0, 8), u8s("a", 8, 12));
    assert!(matches!(
        error(&twice, 12),
        HeaderError::DuplicateKey { .. }
    ));
    let whole = two(u8s("a", 0, 8), u8s("b", 8, 12));
    assert!(matches!(error(&whole, 11), HeaderError::BeyondFile { .. }));
    assert!(matches!(
        error(&whole, 13),
        HeaderError::TrailingBytes { .. }
    ));
    let dtype = format!("{{{}}}", tensor("a", "F17", 4, 0, 8));
    assert!(matches!(error(&dtype, 8), HeaderError::UnknownDtype { .. }));
    let size = format!("{{{}}}", tensor("a", "F16", 4, 0, 6));
    assert!(matches!(
        error(&size, 6),
        HeaderError::SizeMismatch {
            have: 6,
            need: 8,
            ..
        }
    ));
    let huge = r#"{"a":{"dtype":"U8","shape":[18446744073709551615,2],"data_offsets":[0,1]}}"#;
    assert!(matches!(error(huge, 1), HeaderError::BadExtent { .. }));
    let missing = r#"{"a":{"dtype":"U8","shape":[]}}"#;
    assert!(matches!(
        error(missing, 0),
        HeaderError::Field {
            field: "data_offsets",
            ..
        }
    ));
    let deep = format!(r#"{{"a":{{"x":{}}}}}"#, "[".repeat(10_000));
    assert!(matches!(error(&deep, 0), HeaderError::Json { .. }));
}

#[test]
fn lengths_are_not_trusted() {
    let mut file = tempfile::tempfile().unwrap();
    assert!(matches!(
        read_header(&file, 0),
        Err(HeaderError::TooShort { file_bytes: 0 })
    ));
    file.write_all(&u64::MAX.to_le_bytes()).unwrap();
    file.write_all(b"{}").unwrap();
    assert!(matches!(
        read_header(&file, 10),
        Err(HeaderError::HeaderTooLong { limit: 2, .. })
    ));
    // The file shrank after its length was taken.
    assert!(matches!(
        read_header(&file, 1000),
        Err(HeaderError::Io { .. })
    ));
}

fn dtypes() -> impl Strategy<Value = safetensors::Dtype> {
    use safetensors::Dtype;
    prop_oneof![
        Just(Dtype::F16),
        Just(Dtype::BF16),
        Just(Dtype::F32),
        Just(Dtype::U8),
        Just(Dtype::F8_E4M3),
        Just(Dtype::I64),
    ]
}

/// JSON-like noise: far more of it gets past the first brace than of random bytes.
fn noise() -> impl Strategy<Value = Vec<u8>> {
    let pieces = prop_oneof![
        Just("{"),
        Just("}"),
        Just("["),
        Just("]"),
        Just(","),
        Just(":"),
        Just("\"a\""),
        Just("\"dtype\""),
        Just("\"F16\""),
        Just("\"shape\""),
        Just("\"data_offsets\""),
        Just("\"__metadata__\""),
        Just("0"),
        Just("2"),
        Just("-1"),
        Just("1e9"),
        Just("99999999999999999999"),
        Just("null"),
        Just("true"),
        Just(" "),
        Just("\"\\u00"),
        Just("\"\\ud800\\udc00\""),
        Just("\u{1}"),
        Just("\"é\""),
    ];
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..300),
        proptest::collection::vec(pieces, 0..60).prop_map(|p| p.concat().into_bytes()),
    ]
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in noise(), extra in 0..100_u64) {
        let _ = parse(&bytes, 8 + bytes.len() as u64 + extra);
        let _ = parse(&bytes, extra);
    }

    #[test]
    fn what_it_takes_is_json_and_the_reference_takes_it_too(bytes in noise(), extra in 0..20_u64) {
        if parse(&bytes, 8 + bytes.len() as u64 + extra).is_ok() {
            prop_assert!(serde_json::from_slice::<serde_json::Value>(&bytes).is_ok());
            let mut file = (bytes.len() as u64).to_le_bytes().to_vec();
            file.extend(&bytes);
            file.resize(file.len() + extra as usize, 0);
            prop_assert!(SafeTensors::deserialize(&file).is_ok());
        }
    }

    #[test]
    fn what_the_reference_writes_is_read_back(
        tensors in proptest::collection::btree_map(
            "[a-z.\\\\\"é\n_0-9]{1,20}", (dtypes(), proptest::collection::vec(0..5_usize, 0..4)), 0..12),
        metadata in proptest::collection::hash_map("\\PC{0,8}", "\\PC{0,20}", 0..4),
    ) {
        let data: HashMap<&String, Vec<u8>> = tensors
            .iter()
            .map(|(name, (dtype, shape))| {
                (name, vec![7; shape.iter().product::<usize>() * dtype.bitsize() / 8])
            })
            .collect();
        let views: Vec<(&String, TensorView<'_>)> = tensors
            .iter()
            .map(|(name, (dtype, shape))| {
                (name, TensorView::new(*dtype, shape.clone(), &data[name]).unwrap())
            })
            .collect();
        // With no tensor and empty metadata the reference writes broken JSON, so those go without.
        let stated = (!metadata.is_empty()).then(|| metadata.clone());
        let file = safetensors::serialize(views, stated).unwrap();
        let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header = parse(&file[8..8 + header_len], file.len() as u64).unwrap();
        prop_assert_eq!(header.tensors.len(), tensors.len());
        prop_assert_eq!(header.metadata.len(), metadata.len());
        let reference = SafeTensors::deserialize(&file).unwrap();
        for tensor in &header.tensors {
            let view = reference.tensor(&tensor.name).unwrap();
            prop_assert_eq!(format!("{:?}", view.dtype()), tensor.dtype.name());
            prop_assert_eq!(view.shape(), &tensor.shape[..]);
            prop_assert_eq!(view.data().len() as u64, tensor.bytes());
        }
        // Cut off anywhere, it is refused.
        prop_assert!(parse(&file[8..8 + header_len], file.len() as u64 + 1).is_err());
        if file.len() > 8 + header_len {
            prop_assert!(parse(&file[8..8 + header_len], file.len() as u64 - 1).is_err());
        }
    }
}
