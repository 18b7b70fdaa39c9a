//! Making a catalogue entry of a unit's files: headers and configurations, each read once. The result is an entry, whatever
//! the files hold: what cannot be used becomes an entry with its error.

use std::sync::Arc;

use serde_json::Value;

use super::config_json::{self, MAX_CONFIG_BYTES};
use super::contents::Known;
use super::hub;
use super::identify::{self, Clues, Identity};
use super::layout::{Part, PipelinePart, Shape, Unit};
use super::model::{Facts, Format, Kind, Model, Presence, SourceFile};
use super::read::{ReadPart, read_part};
use super::weights::Container;
use crate::ids::ModelName;
use crate::units::Bytes;

/// Why an entry cannot be loaded.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reason {
    pub(super) text: String,
    /// Bytes or files are missing that may still come.
    pub(super) incomplete: bool,
    /// It says nothing of the files, and may be gone when they are looked at again.
    pub(super) passes: bool,
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Self {
            text,
            incomplete: false,
            passes: false,
        }
    }
}

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl Reason {
    /// What is missing.
    pub(super) fn missing(text: String) -> Self {
        Self {
            text,
            incomplete: true,
            passes: false,
        }
    }
}

/// Makes the catalogue entry of a unit.
pub(super) fn inspect(unit: &Unit, name: ModelName, known: &Known<'_>) -> Model {
    let mut model = Model {
        name,
        path: unit.path.clone(),
        format: format_of(unit),
        kind: Kind::Unknown,
        architecture: None,
        bytes: Bytes::ZERO,
        components: Vec::new(),
        base: None,
        error: None,
        facts: Facts::default(),
        inputs: unit.inputs().into_iter().cloned().collect(),
        presence: Presence::Present,
    };
    let filled = match &unit.shape {
        Shape::Weights(part) => weights(&mut model, part, None, known),
        Shape::Folder { config, part, .. } => folder(&mut model, config, part, known),
        Shape::Pipeline {
            class,
            parts,
            error,
            ..
        } => match error {
            Some(error) => Err(error.as_str().into()),
            None => pipeline(&mut model, class.as_deref(), parts, known),
        },
    };
    if let Err(reason) = filled {
        model.components.clear();
        model.error = Some(reason.text.into());
        if reason.passes {
            model.presence = Presence::Unread;
        } else if reason.incomplete {
            model.presence = Presence::Incomplete;
        }
    }
    if model.bytes.is_zero() {
        model.bytes = match model.components.is_empty() {
            true => model.inputs.iter().map(|file| file.identity.size).sum(),
            false => model.components.iter().map(|c| c.bytes).sum(),
        };
    }
    if let Some(location) = hub::locate(&unit.path) {
        model.facts.repo = Some(location.repo.into());
        model.facts.revision = Some(location.revision.into());
    }
    model
}

fn format_of(unit: &Unit) -> Format {
    match &unit.shape {
        Shape::Pipeline { .. } => Format::Diffusers,
        Shape::Folder { adapter: true, .. } => Format::Peft,
        Shape::Folder { .. } => Format::Transformers,
        Shape::Weights(part) => match part.container {
            Container::Safetensors if part.is_sharded() => Format::SafetensorsSharded,
            Container::Safetensors => Format::Safetensors,
            Container::Gguf => Format::Gguf,
            Container::Pickle => Format::Pickle,
            Container::Onnx => Format::Onnx,
        },
    }
}

fn folder(
    model: &mut Model,
    config: &SourceFile,
    part: &Part,
    known: &Known<'_>,
) -> Result<(), Reason> {
    let config = config_json::read(&config.path, MAX_CONFIG_BYTES).map_err(|error| Reason {
        passes: error.passes(),
        ..Reason::from(error.to_string())
    })?;
    weights(model, part, Some(&config), known)
}

/// An entry with one set of weights.
fn weights(
    model: &mut Model,
    part: &Part,
    config: Option<&Value>,
    known: &Known<'_>,
) -> Result<(), Reason> {
    let clues = Clues {
        config,
        ..Clues::default()
    };
    if config.is_some() {
        // What the configuration tells stands even where the weights cannot be used.
        take(model, identify::identify(known.signatures, &clues));
    }
    let read = read_part(part, &mut model.inputs, known)?;
    let clues = Clues {
        metadata: Some(&read.metadata),
        outline: Some(&read.contents.outline),
        ..clues
    };
    let identity = known.identify(&read.contents, &clues);
    model.facts.tokenizer = identify::tokenizer(identity.kind, &clues);
    read.facts(&mut model.facts);
    let components = match identity.kind {
        Kind::Checkpoint => read.split(&model.name, &identity, known),
        _ => Vec::new(),
    };
    model.components = if components.is_empty() {
        let name = match identity.kind {
            Kind::Unknown => "weights",
            kind => kind.as_str(),
        };
        vec![Arc::new(read.whole(&model.name, name, &identity))]
    } else {
        components.into_iter().map(Arc::new).collect()
    };
    take(model, identity);
    Ok(())
}

/// Puts what was identified into the entry.
fn take(model: &mut Model, identity: Identity) {
    model.kind = identity.kind;
    model.architecture = identity.architecture;
    model.base = identity.base;
    let facts = &mut model.facts;
    facts.variant = identity.variant;
    facts.dialect = identity.dialect;
    facts.rank = identity.rank;
    facts.evidence = identity.evidence;
    // A container with quantised types of its own says more of them than keys do.
    facts.quantization = facts.quantization.take().or(identity.quantization);
}

fn pipeline(
    model: &mut Model,
    class: Option<&str>,
    parts: &[PipelinePart],
    known: &Known<'_>,
) -> Result<(), Reason> {
    model.kind = Kind::Pipeline;
    model.architecture = class
        .and_then(identify::architecture_of_pipeline)
        .map(Arc::from);
    let mut facts = Facts::default();
    for part in parts {
        let Some(weights) = &part.part else {
            return Err(Reason::missing(format!(
                "component `{}` ({}) has no weights in {}; fetch the model again",
                part.name,
                part.class,
                model.path.join(&*part.name).display()
            )));
        };
        let config = match &part.config {
            Some(file) => {
                Some(config_json::read(&file.path, MAX_CONFIG_BYTES).map_err(|e| e.to_string())?)
            }
            None => None,
        };
        let read: ReadPart =
            read_part(weights, &mut model.inputs, known).map_err(|reason| Reason {
                text: format!("component `{}`: {}", part.name, reason.text),
                ..reason
            })?;
        let mut identity = known.identify(
            &read.contents,
            &Clues {
                config: config.as_ref(),
                class: Some(&part.class),
                metadata: Some(&read.metadata),
                outline: Some(&read.contents.outline),
            },
        );
        let encodes_text = part.name.starts_with("text_encoder");
        if encodes_text
            && matches!(
                identity.kind,
                Kind::LanguageModel | Kind::VisionLanguageModel | Kind::Unknown
            )
        {
            identity.kind = Kind::TextEncoder;
        }
        if matches!(identity.kind, Kind::Unet | Kind::Transformer) {
            // The class of a pipeline for SD 1 and SD 2 is the same; their UNets are not.
            model.architecture = model.architecture.take().or(identity.architecture.clone());
            facts.variant = facts.variant.take().or(identity.variant.clone());
        }
        read.facts(&mut facts);
        let component = read.whole(&model.name, &part.name, &identity);
        model.components.push(Arc::new(component));
    }
    if model.components.is_empty() {
        return Err(Reason::missing(format!(
            "none of the components that {} names has weights; fetch the model again",
            model.path.join("model_index.json").display()
        )));
    }
    model.facts = facts;
    Ok(())
}
