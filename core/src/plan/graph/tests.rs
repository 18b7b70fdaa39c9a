use super::*;
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
