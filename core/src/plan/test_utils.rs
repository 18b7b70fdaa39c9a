//! Models and components that exist in memory alone.

use std::path::Path;
use std::sync::Arc;

use crate::catalog::{
    BaseModel, Catalogue, Component, Facts, FileIdentity, Format, Kind, Model, Presence, SourceFile,
};
use crate::ids::{ComponentId, ContentId};
use crate::units::Bytes;

/// A component of this many KiB; equal numbers are equal content.
pub(super) fn component(
    model: &str,
    name: &str,
    kind: Kind,
    number: u8,
    kib: u64,
) -> Arc<Component> {
    Arc::new(Component {
        id: ComponentId {
            model: model.into(),
            component: name.into(),
        },
        kind,
        architecture: None,
        dtype: None,
        bytes: Bytes::kib(kib),
        tensors: 0,
        content_id: ContentId::File([number; 32]),
        files: vec![SourceFile {
            path: Path::new("/nowhere").into(),
            identity: FileIdentity {
                device: 0,
                inode: u64::from(number),
                size: Bytes::kib(kib),
                mtime_ns: 0,
            },
        }],
        selection: None,
        part: None,
    })
}

/// A model of these components.
pub(super) fn model(
    name: &str,
    kind: Kind,
    architecture: Option<&str>,
    components: Vec<Arc<Component>>,
) -> Model {
    Model {
        name: name.into(),
        path: Path::new("/models").join(name).into(),
        format: Format::Safetensors,
        kind,
        architecture: architecture.map(Into::into),
        bytes: components.iter().map(|c| c.bytes).sum(),
        components,
        base: None,
        error: None,
        facts: Facts::default(),
        inputs: Vec::new(),
        presence: Presence::Present,
    }
}

/// An adapter for a base of this architecture and name.
pub(super) fn adapter(
    name: &str,
    kind: Kind,
    number: u8,
    architecture: Option<&str>,
    base: Option<&str>,
) -> Model {
    Model {
        base: Some(BaseModel {
            architecture: architecture.map(Into::into),
            name: base.map(Into::into),
        }),
        ..model(
            name,
            kind,
            architecture,
            vec![component(name, kind.as_str(), kind, number, 64)],
        )
    }
}

/// A catalogue of these models.
pub(super) fn catalogue(models: impl IntoIterator<Item = Model>) -> Catalogue {
    Catalogue::new(1, models.into_iter().map(Arc::new).collect())
}
