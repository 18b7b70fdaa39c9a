//! Searching the catalogue: fields, sizes and free words, ranked.
//!
//! `sdxl vae fp16` finds what has all three words in its name, kind, architecture, dtype or base. `kind:lora base:sdxl
//! size:<200MiB` narrows by fields. A word that nothing contains is matched by its letters in order (`jgrnt`).

use std::sync::Arc;

use memchr::memmem::Finder;
use nucleo_matcher::pattern::{AtomKind, CaseMatching, Normalization, Pattern};
use nucleo_matcher::{Config, Matcher, Utf32Str};
use rayon::prelude::*;

use super::model::Model;
use super::naming::last_segment;
use super::snapshot::Catalogue;
use crate::units::Bytes;

/// The most words of a query that count.
const MAX_WORDS: usize = 16;

/// So many texts at least are matched fuzzily by one thread: fewer are done before another has begun.
const FUZZY_SHARE: usize = 2048;

/// A query that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QueryError {
    /// A field that models do not have.
    #[error(
        "`{field}:` is no field of a model; there are name, path, kind, arch, base, id, dtype, format, variant, is and size"
    )]
    Field {
        /// The field as written.
        field: String,
    },
    /// A size that is none.
    #[error("`size:{text}` is no size: write size:>1GiB, size:<200MiB or size:1GiB..4GiB")]
    Size {
        /// The size as written.
        text: String,
    },
}

/// A query, ready to match.
#[derive(Debug, Clone, Default)]
pub struct Query {
    terms: Vec<Term>,
    words: Vec<String>,
}

#[derive(Debug, Clone)]
enum Term {
    Contains(Field, String),
    Size(u64, u64),
}

#[derive(Debug, Clone, Copy)]
enum Field {
    Name,
    Path,
    Kind,
    Architecture,
    Base,
    ContentId,
    Dtype,
    Format,
    Variant,
    State,
}

/// A model that a query found.
#[derive(Debug, Clone)]
pub struct Hit {
    /// The model.
    pub model: Arc<Model>,
    /// How well it fits; more is better. Comparable within one answer alone.
    pub score: u32,
}

impl Query {
    /// Reads a query.
    ///
    /// # Errors
    /// The field or size that is none.
    pub fn parse(text: &str) -> Result<Self, QueryError> {
        let mut query = Self::default();
        for word in text.split_whitespace().take(MAX_WORDS) {
            // A path or an id has colons of its own: only a plain word before one names a field.
            match word.split_once(':') {
                Some((field, value))
                    if !field.is_empty() && field.bytes().all(|b| b.is_ascii_alphabetic()) =>
                {
                    query.terms.push(term(field, value)?);
                }
                _ => query.words.push(word.to_lowercase()),
            }
        }
        Ok(query)
    }

    /// Whether it asks for nothing, so that everything fits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty() && self.words.is_empty()
    }
}

fn term(field: &str, value: &str) -> Result<Term, QueryError> {
    let field = match field.to_ascii_lowercase().as_str() {
        "name" => Field::Name,
        "path" => Field::Path,
        "kind" => Field::Kind,
        "arch" | "architecture" => Field::Architecture,
        "base" => Field::Base,
        "id" | "content" => Field::ContentId,
        "dtype" => Field::Dtype,
        "format" => Field::Format,
        "variant" => Field::Variant,
        "is" => Field::State,
        "size" => return size(value),
        _ => {
            return Err(QueryError::Field {
                field: field.to_owned(),
            });
        }
    };
    let value = match field {
        Field::Path => value.to_owned(),
        Field::Dtype => long_dtype(&value.to_lowercase()).to_owned(),
        _ => value.to_lowercase(),
    };
    Ok(Term::Contains(field, value))
}

/// People write `fp16`, headers `F16`.
fn long_dtype(word: &str) -> &str {
    match word {
        "fp16" | "float16" | "half" => "f16",
        "fp32" | "float32" => "f32",
        "bfloat16" => "bf16",
        "fp8" => "f8",
        other => other,
    }
}

fn size(text: &str) -> Result<Term, QueryError> {
    let wrong = || QueryError::Size {
        text: text.to_owned(),
    };
    let bytes = |text: &str| text.parse::<Bytes>().map(Bytes::get).map_err(|_| wrong());
    let (least, most) = if let Some(text) = text.strip_prefix(">=") {
        (bytes(text)?, u64::MAX)
    } else if let Some(text) = text.strip_prefix('>') {
        (bytes(text)?.saturating_add(1), u64::MAX)
    } else if let Some(text) = text.strip_prefix("<=") {
        (0, bytes(text)?)
    } else if let Some(text) = text.strip_prefix('<') {
        (0, bytes(text)?.saturating_sub(1))
    } else if let Some((least, most)) = text.split_once("..") {
        (
            if least.is_empty() { 0 } else { bytes(least)? },
            if most.is_empty() {
                u64::MAX
            } else {
                bytes(most)?
            },
        )
    } else {
        (bytes(text)?, bytes(text)?)
    };
    Ok(Term::Size(least, most))
}

impl Term {
    fn fits(&self, model: &Model) -> bool {
        let has = |text: &str, value: &str| text.to_lowercase().contains(value);
        let maybe = |text: Option<&str>, value: &str| text.is_some_and(|text| has(text, value));
        match self {
            Self::Size(least, most) => (*least..=*most).contains(&model.bytes.get()),
            Self::Contains(field, value) => match field {
                Field::Name => has(model.name.as_str(), value),
                Field::Path => model.path.to_string_lossy().contains(value),
                Field::Kind => model.kind.as_str() == value,
                Field::Architecture => maybe(model.architecture.as_deref(), value),
                Field::Base => model.base.as_ref().is_some_and(|base| {
                    maybe(base.architecture.as_deref(), value) || maybe(base.name.as_deref(), value)
                }),
                Field::ContentId => model
                    .components
                    .iter()
                    .any(|c| c.content_id.to_string().contains(value)),
                Field::Dtype => model
                    .facts
                    .dtypes
                    .iter()
                    .any(|(dtype, _)| has(dtype, value)),
                Field::Format => model.format.as_str() == value,
                Field::Variant => maybe(model.facts.variant.as_deref(), value),
                Field::State => match value.as_str() {
                    "loadable" => model.is_loadable(),
                    "broken" => model.error.is_some(),
                    _ => false,
                },
            },
        }
    }
}

/// All that free words are looked for in.
pub(super) struct Haystack {
    /// In lower case: the name first, then what the model is.
    text: Box<str>,
    /// What [`letters`] says of the text.
    letters: u64,
}

pub(super) fn haystack(model: &Model) -> Haystack {
    let mut text = model.name.as_str().to_lowercase();
    let mut add = |word: &str| {
        if !word.is_empty() {
            text.push('\n');
            text.push_str(&word.to_lowercase());
        }
    };
    add(model.kind.as_str());
    add(model.format.as_str());
    add(model.architecture.as_deref().unwrap_or_default());
    add(model.facts.variant.as_deref().unwrap_or_default());
    add(model.facts.quantization.as_deref().unwrap_or_default());
    add(model.facts.dialect.as_deref().unwrap_or_default());
    for (dtype, _) in &model.facts.dtypes {
        add(dtype);
        match &**dtype {
            "F16" => add("fp16"),
            "F32" => add("fp32"),
            "F8_E4M3" | "F8_E5M2" => add("fp8"),
            _ => {}
        }
    }
    if let Some(base) = &model.base {
        add(base.architecture.as_deref().unwrap_or_default());
        add(base.name.as_deref().unwrap_or_default());
    }
    Haystack {
        letters: letters(&text),
        text: text.into(),
    }
}

/// How well a word fits a haystack; 0: not at all.
fn word_score(haystack: &str, word: &str, finder: &Finder<'_>) -> u32 {
    let Some(at) = finder.find(haystack.as_bytes()) else {
        return 0;
    };
    let name_end = haystack.find('\n').unwrap_or(haystack.len());
    let before = haystack[..at].chars().next_back();
    let starts_word = before.is_none_or(|c| !c.is_alphanumeric());
    let after = haystack[at + word.len()..].chars().next();
    let ends_word = after.is_none_or(|c| !c.is_alphanumeric());
    let mut score = 10;
    score += if starts_word { 20 } else { 0 };
    score += if starts_word && ends_word { 20 } else { 0 };
    // In a field of its own it says what the model is, in the name only what somebody called it.
    score += if at > name_end { 15 } else { 0 };
    let last = last_segment(&haystack[..name_end]);
    score
        + if at < name_end && last.starts_with(word) {
            10
        } else {
            0
        }
}

impl Catalogue {
    /// The models that fit a query, best first, at most `limit`. With nothing asked for, all of them by name.
    #[must_use]
    pub fn search(&self, query: &Query, limit: usize) -> Vec<Hit> {
        let haystacks = if query.words.is_empty() {
            &[]
        } else {
            self.haystacks()
        };
        let words: Vec<(&str, Finder<'_>)> = query
            .words
            .iter()
            .map(|word| (word.as_str(), Finder::new(word.as_bytes())))
            .collect();
        let mut hits: Vec<(u32, usize)> = Vec::new();
        for (i, model) in self.models().enumerate() {
            let Some(score) = haystacks.get(i).map_or(Some(0), |haystack| {
                words.iter().try_fold(0, |sum, (word, finder)| {
                    match word_score(&haystack.text, word, finder) {
                        0 => None,
                        score => Some(sum + score),
                    }
                })
            }) else {
                continue;
            };
            if query.terms.iter().all(|term| term.fits(model)) {
                hits.push((score, i));
            }
        }
        if hits.is_empty() && !query.words.is_empty() {
            hits = self.fuzzy(query);
        }
        self.ranked(hits, limit)
    }

    fn fuzzy(&self, query: &Query) -> Vec<(u32, usize)> {
        let text = query.words.join(" ");
        let pattern = Pattern::new(
            &text,
            CaseMatching::Ignore,
            Normalization::Smart,
            AtomKind::Fuzzy,
        );
        let wanted = letters(&text);
        let matching = || (Matcher::new(Config::DEFAULT.match_paths()), Vec::new());
        let mut hits: Vec<(u32, usize)> = self
            .haystacks()
            .par_iter()
            .enumerate()
            .with_min_len(FUZZY_SHARE)
            // Most names lack one of the letters, and seeing that is far cheaper than matching.
            .filter(|(_, haystack)| wanted & !haystack.letters == 0)
            .map_init(matching, |(matcher, buffer), (i, haystack)| {
                let utf32 = Utf32Str::new(&haystack.text, buffer);
                Some((pattern.score(utf32, matcher)?, i))
            })
            .flatten_iter()
            .collect();
        let models: Vec<&Arc<Model>> = self.models().collect();
        hits.retain(|(_, i)| {
            models
                .get(*i)
                .is_some_and(|model| query.terms.iter().all(|term| term.fits(model)))
        });
        hits
    }

    fn ranked(&self, mut hits: Vec<(u32, usize)>, limit: usize) -> Vec<Hit> {
        let models: Vec<&Arc<Model>> = self.models().collect();
        let order = |a: &(u32, usize), b: &(u32, usize)| {
            let length = |i: usize| models.get(i).map_or(0, |m| m.name.as_str().len());
            b.0.cmp(&a.0)
                .then_with(|| match a.0 {
                    0 => std::cmp::Ordering::Equal,
                    _ => length(a.1).cmp(&length(b.1)),
                })
                .then_with(|| a.1.cmp(&b.1))
        };
        if limit > 0 && hits.len() > limit {
            hits.select_nth_unstable_by(limit - 1, order);
        }
        hits.truncate(limit);
        hits.sort_unstable_by(order);
        hits.into_iter()
            .filter_map(|(score, i)| {
                models.get(i).map(|model| Hit {
                    model: Arc::clone(model),
                    score,
                })
            })
            .collect()
    }
}

/// Which ASCII letters and digits a text has, as bits.
fn letters(text: &str) -> u64 {
    text.bytes().fold(0, |bits, byte| {
        let bit = match byte {
            b'a'..=b'z' => byte - b'a',
            b'A'..=b'Z' => byte - b'A',
            b'0'..=b'9' => byte - b'0' + 26,
            _ => return bits,
        };
        bits | 1 << bit
    })
}

#[cfg(test)]
mod tests {
    use super::super::scan::{ScanOptions, scan};
    use super::super::test_utils::{put, safetensors};
    use super::*;

    fn library() -> (tempfile::TempDir, Catalogue) {
        let root = tempfile::tempdir().unwrap();
        let vae = safetensors(
            &[
                ("encoder.conv_in.weight", &[8, 3, 3, 3]),
                ("decoder.conv_in.weight", &[8, 4, 3, 3]),
                ("decoder.mid.block_1.conv1.weight", &[8]),
            ],
            &[],
        );
        put(root.path(), "vae/sdxl_vae_fix.safetensors", &vae);
        put(root.path(), "vae/other.safetensors", &vae);
        let lora = |dim| {
            safetensors(
                &[("lora_unet_x_attn2_to_k.lora_down.weight", &[4, dim])],
                &[],
            )
        };
        put(root.path(), "loras/ink.safetensors", lora(2048));
        put(root.path(), "loras/juggernaut.safetensors", lora(768));
        let options = ScanOptions::new(vec![root.path().to_path_buf()]);
        let catalogue = scan(&options, None, &|_| {}).catalogue;
        (root, catalogue)
    }

    #[test]
    fn words_and_fields_find_what_is_meant() {
        let (_root, catalogue) = library();
        let find = |text: &str| -> Vec<String> {
            let hits = catalogue.search(&Query::parse(text).unwrap(), 10);
            hits.iter().map(|hit| hit.model.name.to_string()).collect()
        };
        assert_eq!(find("sdxl vae fp16"), ["vae/sdxl_vae_fix"]);
        assert_eq!(find("kind:lora base:sdxl"), ["loras/ink"]);
        assert_eq!(find("lora sd-1"), ["loras/juggernaut"]);
        assert_eq!(find("jgrnt"), ["loras/juggernaut"]);
        assert_eq!(find("kind:vae size:<1KiB").len(), 0);
        assert_eq!(find("dtype:fp16").len(), 4);
        assert_eq!(find("").len(), 4);
        assert!(matches!(
            Query::parse("colour:red"),
            Err(QueryError::Field { .. })
        ));
        assert!(matches!(
            Query::parse("size:big"),
            Err(QueryError::Size { .. })
        ));
    }
}
