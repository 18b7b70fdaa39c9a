use super::*;
use crate::catalog::{BaseModel, Tokenizer};
use crate::plan::test_utils::{adapter, catalogue, component, model};

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Named backwards on purpose: the order of use must not come from the order of naming.
fn pipeline(name: &str, architecture: &str, first: u8) -> Model {
    let part = |part, kind, n| component(name, part, kind, first + n, 100);
    model(
        name,
        Kind::Pipeline,
        Some(architecture),
        vec![
            part("vae", Kind::Vae, 0),
            part("unet", Kind::Unet, 1),
            part("text_encoder_2", Kind::TextEncoder, 2),
            part("text_encoder", Kind::TextEncoder, 3),
        ],
    )
}

fn order(graph: &DependencyGraph) -> Vec<String> {
    graph.order().iter().map(|c| c.id.to_string()).collect()
}

#[test]
fn a_pipeline_is_ordered_by_first_use() {
    let catalogue = catalogue([pipeline("base", "sdxl", 1)]);
    let graph = resolve(&catalogue, &[], &names(&["base"]), true).unwrap();
    assert_eq!(
        order(&graph),
        [
            "base/text_encoder_2",
            "base/text_encoder",
            "base/unet",
            "base/vae"
        ]
    );
}

#[test]
fn an_adapter_brings_its_base_and_comes_after_it() {
    let catalogue = catalogue([
        pipeline("base", "sdxl", 1),
        pipeline("other", "sd-1", 10),
        adapter("style", Kind::Lora, 20, Some("sdxl"), None),
    ]);
    let graph = resolve(&catalogue, &[], &names(&["style"]), true).unwrap();
    let order = order(&graph);
    let place = |name: &str| order.iter().position(|id| id == name).unwrap();
    assert_eq!(order.len(), 5);
    assert!(place("base/unet") < place("style/lora"));
    assert!(
        graph
            .edges()
            .any(|(_, after, why)| why == Edge::Adapts && after.kind == Kind::Lora)
    );
    let alone = resolve(&catalogue, &[], &names(&["style"]), false).unwrap();
    assert_eq!(alone.len(), 1);
}

#[test]
fn the_base_is_found_by_name_where_it_is_stated() {
    let catalogue = catalogue([
        pipeline("sdxl/one", "sdxl", 1),
        pipeline("sdxl/two", "sdxl", 10),
        adapter("style", Kind::Lora, 20, Some("sdxl"), Some("somebody/two")),
    ]);
    let graph = resolve(&catalogue, &[], &names(&["style"]), true).unwrap();
    assert!(order(&graph).contains(&"sdxl/two/unet".to_owned()));
    assert!(!order(&graph).contains(&"sdxl/one/unet".to_owned()));
}

#[test]
fn a_base_that_is_missing_ambiguous_or_wrong_is_told_with_what_to_do() {
    let missing = catalogue([
        pipeline("other", "sd-1", 10),
        adapter("style", Kind::Lora, 20, Some("sdxl"), None),
    ]);
    let error = resolve(&missing, &[], &names(&["style"]), true).unwrap_err();
    assert!(matches!(error, ResolveError::BaseMissing { .. }), "{error}");

    let both = catalogue([
        pipeline("one", "sdxl", 1),
        pipeline("two", "sdxl", 10),
        pipeline("flux", "flux", 30),
        adapter("style", Kind::Lora, 20, Some("sdxl"), None),
    ]);
    let error = resolve(&both, &[], &names(&["style"]), true).unwrap_err();
    assert!(error.to_string().contains("one, two"), "{error}");
    // Naming one of them settles it; so it does where both are named.
    for set in [&["style", "two"][..], &["one", "two", "style"]] {
        assert!(resolve(&both, &[], &names(set), true).is_ok());
    }
    let error = resolve(&both, &[], &names(&["flux", "style"]), true).unwrap_err();
    assert!(
        matches!(error, ResolveError::BaseIncompatible { .. }),
        "{error}"
    );
    assert!(error.to_string().contains("sdxl") && error.to_string().contains("flux"));
}

#[test]
fn equal_content_is_loaded_once() {
    let catalogue = catalogue([pipeline("one", "sdxl", 1), pipeline("copy", "sdxl", 1)]);
    let graph = resolve(&catalogue, &[], &names(&["one", "copy"]), true).unwrap();
    assert_eq!(graph.len(), 4);
    let twice = resolve(&catalogue, &[], &names(&["one", "one/vae", "one"]), true).unwrap();
    assert_eq!(twice.len(), 4);
}

#[test]
fn wrong_names_are_told_with_what_there_is() {
    let mut broken = pipeline("broken", "sdxl", 10);
    broken.error = Some("vae: the file is truncated; fetch it again".into());
    let catalogue = catalogue([pipeline("base", "sdxl", 1), broken]);
    let error = |set: &[&str]| resolve(&catalogue, &[], &names(set), true).unwrap_err();
    assert_eq!(error(&[]), ResolveError::Empty);
    assert!(matches!(error(&["nothing"]), ResolveError::Find(_)));
    assert!(
        error(&["base/uent"]).to_string().contains("text_encoder, ")
            || error(&["base/uent"]).to_string().contains("unet")
    );
    assert!(error(&["broken"]).to_string().contains("fetch it again"));
    assert!(
        error(&["broken/vae"])
            .to_string()
            .contains("fetch it again")
    );
}

fn declared(name: &str, models: &[&str], order: &[&str]) -> SetConfig {
    SetConfig {
        name: name.into(),
        models: names(models),
        order: names(order),
        drafts: Vec::new(),
    }
}

#[test]
fn declared_sets_are_names_for_their_models_in_their_order() {
    let one = |name: &str, number| {
        let component = component(name, "weights", Kind::LanguageModel, number, 10);
        model(name, Kind::LanguageModel, None, vec![component])
    };
    let catalogue = catalogue([one("a", 1), one("b", 2), one("c", 3)]);
    let sets = [
        declared("pair", &["a", "b"], &["b", "a"]),
        declared("all", &["pair", "c"], &["c", "pair"]),
    ];
    let order = |set: &[&str]| {
        resolve(&catalogue, &sets, &names(set), true).map(|graph| {
            let order = graph.order();
            order
                .iter()
                .map(|c| c.id.model.to_string())
                .collect::<Vec<_>>()
        })
    };
    assert_eq!(order(&["pair"]).unwrap(), ["b", "a"]);
    assert_eq!(order(&["all", "a"]).unwrap(), ["c", "b", "a"]);
    let graph = resolve(&catalogue, &sets, &names(&["pair"]), true).unwrap();
    let dot = graph.dot();
    assert!(
        dot.contains("\"b/weights\" -> \"a/weights\" [label=\"declared to come before\"]"),
        "{dot}"
    );
}

#[test]
fn cycles_are_told_with_their_path() {
    let one = |name: &str, number| {
        let component = component(name, "weights", Kind::LanguageModel, number, 10);
        model(name, Kind::LanguageModel, None, vec![component])
    };
    let catalogue = catalogue([one("a", 1), one("b", 2)]);
    let sets = [
        declared("x", &["y"], &[]),
        declared("y", &["a", "x"], &[]),
        declared("there", &["a", "b"], &["a", "b"]),
        declared("back", &["a", "b"], &["b", "a"]),
    ];
    let error = |set: &[&str]| {
        resolve(&catalogue, &sets, &names(set), true)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        error(&["x"]),
        "declared sets contain each other: x -> y -> x; take one of these out of the `models` of the set before it"
    );
    assert!(
        error(&["there", "back"]).starts_with("no component can be first: "),
        "{}",
        error(&["there", "back"])
    );
}

/// A language model whose tokenizer has so many tokens, or a draft with that tokenizer and perhaps a stated target.
fn speaking(name: &str, kind: Kind, number: u8, tokens: u32, base: Option<&str>) -> Model {
    let weights = component(name, kind.as_str(), kind, number, 100);
    let mut model = model(name, kind, None, vec![weights]);
    model.facts.tokenizer = Some(Tokenizer {
        tokens,
        begin: Some(1),
    });
    model.base = base.map(|name| BaseModel {
        architecture: None,
        name: Some(name.into()),
    });
    model
}

#[test]
fn a_draft_brings_the_target_whose_tokens_it_has() {
    let llama = speaking("llama-3-70b", Kind::LanguageModel, 1, 128_256, None);
    let qwen = speaking("qwen", Kind::LanguageModel, 2, 152_064, None);
    let eagle = speaking("eagle", Kind::DraftModel, 3, 128_256, None);
    let catalogue = |more: &[Model]| {
        let all = [llama.clone(), qwen.clone(), eagle.clone()];
        catalogue(all.into_iter().chain(more.iter().cloned()))
    };
    let plain = catalogue(&[]);
    let graph = resolve(&plain, &[], &names(&["eagle"]), true).unwrap();
    assert_eq!(
        order(&graph),
        ["llama-3-70b/language-model", "eagle/draft-model"]
    );
    assert!(graph.edges().all(|(_, _, why)| why == Edge::Drafts));
    assert_eq!(graph.edges().count(), 1);
    // Of several, the one that is named, in the set or by the draft.
    let small = speaking("llama-3-8b", Kind::LanguageModel, 4, 128_256, None);
    let stated = speaking(
        "stated",
        Kind::DraftModel,
        5,
        128_256,
        Some("meta/llama-3-8b"),
    );
    let several = catalogue(&[small, stated]);
    let error = |set: &[&str]| resolve(&several, &[], &names(set), true).unwrap_err();
    let text = error(&["eagle"]).to_string();
    assert!(text.contains("llama-3-70b, llama-3-8b"), "{text}");
    assert!(text.contains("128256 tokens"), "{text}");
    let graph = resolve(&several, &[], &names(&["stated"]), true).unwrap();
    assert!(order(&graph).contains(&"llama-3-8b/language-model".to_owned()));
    // Other tokens are refused, and what would do is named.
    let text = error(&["qwen", "eagle"]).to_string();
    for part in ["qwen (152064 tokens", "llama-3-70b", "128256"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_declared_draft_has_the_tokens_of_its_target() {
    let one = |name, number, tokens| speaking(name, Kind::LanguageModel, number, tokens, None);
    let catalogue = catalogue([
        one("large", 1, 152_064),
        one("small", 2, 151_936),
        one("other", 3, 32_000),
    ]);
    let set = |models: &[&str], draft: &str| SetConfig {
        drafts: names(&[draft]),
        ..declared("chat", models, &[])
    };
    let resolve = |set| resolve(&catalogue, &[set], &names(&["chat"]), true);
    let graph = resolve(set(&["small", "large"], "small")).unwrap();
    // What is padding makes no other tokenizer.
    assert_eq!(
        order(&graph),
        ["large/language-model", "small/language-model"]
    );
    let error = resolve(set(&["other", "large"], "other")).unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("in the set chat: other is made for a tokenizer of 32000 tokens"),
        "{text}"
    );
    assert!(text.contains("large (152064 tokens"), "{text}");
}

#[test]
fn a_base_of_which_a_part_is_named_gets_what_its_adapter_works_on() {
    let catalogue = catalogue([
        pipeline("base", "sdxl", 1),
        adapter("style", Kind::Lora, 20, Some("sdxl"), None),
        adapter("edges", Kind::Controlnet, 21, Some("sdxl"), None),
    ]);
    let of = |set: &[&str]| order(&resolve(&catalogue, &[], &names(set), true).unwrap());
    let with_lora = of(&["base/vae", "style"]);
    for part in ["text_encoder", "text_encoder_2", "unet", "vae"] {
        assert!(with_lora.contains(&format!("base/{part}")), "{with_lora:?}");
    }
    // It is used together with the UNet, so it comes before the VAE.
    let place = |id: &str| with_lora.iter().position(|known| known == id).unwrap();
    assert!(place("base/unet") < place("style/lora"));
    assert!(place("style/lora") < place("base/vae"));
    // A ControlNet has nothing to do with text.
    assert_eq!(
        of(&["base/vae", "edges"]),
        ["base/unet", "edges/controlnet", "base/vae"]
    );
    // Whoever declares another order gets it.
    let sets = [declared("late", &["base", "style"], &["base", "style"])];
    let graph = resolve(&catalogue, &sets, &names(&["late"]), true).unwrap();
    assert_eq!(order(&graph).last().unwrap(), "style/lora");
}

#[test]
fn a_controlnet_for_another_architecture_is_refused_with_what_would_do() {
    let catalogue = catalogue([
        pipeline("flux", "flux", 1),
        pipeline("base", "sdxl", 10),
        adapter("edges", Kind::Controlnet, 21, Some("sdxl"), None),
        speaking("chat", Kind::LanguageModel, 22, 32_000, None),
    ]);
    let error = resolve(&catalogue, &[], &names(&["flux", "edges"]), true).unwrap_err();
    assert_eq!(
        error.to_string(),
        "edges is made for sdxl, but the set has flux (flux); name base instead, or leave the adapter out"
    );
    // What is for text is no base for images.
    let graph = resolve(&catalogue, &[], &names(&["chat", "edges"]), true).unwrap();
    assert!(order(&graph).contains(&"base/unet".to_owned()));
}

#[test]
fn a_stated_name_does_not_stand_against_the_architecture() {
    let catalogue = catalogue([
        pipeline("model", "sd-1", 1),
        pipeline("base", "sdxl", 10),
        adapter("style", Kind::Lora, 20, Some("sdxl"), Some("model")),
    ]);
    let graph = resolve(&catalogue, &[], &names(&["style"]), true).unwrap();
    assert!(order(&graph).contains(&"base/unet".to_owned()));
}

#[test]
fn what_is_wrong_in_a_declared_set_is_told_with_the_way_there() {
    let catalogue = catalogue([
        pipeline("sd", "sd-1", 1),
        adapter("style", Kind::Lora, 20, Some("sdxl"), None),
    ]);
    let sets = [
        declared("all", &["inner"], &[]),
        declared("inner", &["style"], &[]),
        declared("typo", &["stile"], &[]),
    ];
    let error = |set: &[&str]| resolve(&catalogue, &sets, &names(set), true).unwrap_err();
    assert_eq!(
        error(&["all"]).to_string(),
        "in the set all -> inner: style needs a base model (sdxl), and the catalogue has none (it has sd (sd-1)); \
         add one to a scanned folder, or name the base in the set"
    );
    let typo = error(&["typo"]);
    assert!(typo.to_string().starts_with("in the set typo: "), "{typo}");
    assert!(matches!(typo.cause(), ResolveError::Find(_)));
}

#[test]
fn of_what_is_used_at_the_same_time_the_longest_way_comes_first() {
    let part = |part, kind, n, kib| component("base", part, kind, n, kib);
    let parts = vec![
        part("text_encoder", Kind::TextEncoder, 1, 250),
        part("text_encoder_2", Kind::TextEncoder, 2, 9500),
        part("text_encoder_3", Kind::TextEncoder, 3, 1400),
        part("transformer", Kind::Transformer, 4, 12000),
        part("vae", Kind::Vae, 5, 160),
    ];
    let base = model("base", Kind::Pipeline, Some("sd-3"), parts);
    let catalogue = catalogue([base, pipeline("other", "sdxl", 10)]);
    let graph = resolve(&catalogue, &[], &names(&["base", "other"]), true).unwrap();
    let parts = |order: Vec<Arc<Component>>| -> Vec<String> {
        order.iter().map(|c| c.id.to_string()).collect()
    };
    let order = parts(graph.order());
    let first: Vec<&str> = order.iter().take(5).map(String::as_str).collect();
    assert_eq!(
        first,
        [
            "base/text_encoder_2",
            "base/text_encoder_3",
            "base/text_encoder",
            "base/transformer",
            "base/vae"
        ]
    );
    // What is there already is handed out first, where it is used first.
    let there = graph.order_by(|c| match &*c.id.component {
        "text_encoder_3" | "vae" => 0.0,
        _ => c.bytes.as_f64(),
    });
    assert_eq!(
        parts(there)[..2],
        ["base/text_encoder_3", "base/text_encoder_2"]
    );
}
