//! Knowing every model for what it is: formats, layouts on disk, scanning, and the snapshot that readers take.

mod model;

pub use model::{
    BaseModel, Component, DEVICE_TENSOR_ALIGN, FileIdentity, Format, IMAGE_ALIGN, Kind, Model,
    SourceFile,
};
mod tmpstub;
pub use tmpstub::*;
