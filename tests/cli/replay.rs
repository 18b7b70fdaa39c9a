//! `hotset replay`: tables in, figures and a plot out.

use crate::{Home, assert_refused};

/// A few components often, the others seldom, of three sizes.
fn tables(home: &Home) -> (String, String) {
    let components: String = (0..24)
        .map(|n| {
            let kind = if n % 3 == 0 { "checkpoint" } else { "lora" };
            format!(
                "C{n},{kind},{}\n",
                [2_130_000_000_u64, 144_000_000, 228_000_000][n % 3]
            )
        })
        .collect();
    let requests: String = (0..1_200_u64)
        .map(|n| {
            let (base, adapter) = (n * n % 7 % 8 * 3, n * 31 % 97 % 24);
            format!("{},s{},C{base}|C{adapter}\n", n * 40, n % 5)
        })
        .collect();
    let write = |name: &str, text: String| {
        let path = home.write(name, &text);
        path.to_str().map(str::to_owned).unwrap_or_default()
    };
    (
        write(
            "requests.csv",
            format!("t_s,session,components\n{requests}"),
        ),
        write("components.csv", format!("id,kind,bytes\n{components}")),
    )
}

#[test]
fn all_policies_are_above_the_bound() {
    let home = Home::new();
    let (requests, components) = tables(&home);
    let plot = home.path().join("cmr.svg");
    let document = home.json(&[
        "replay",
        &requests,
        "--components",
        &components,
        "--ram",
        "3GiB,6GiB",
        "--bound",
        "--plot",
        plot.to_str().unwrap(),
        "--json",
    ]);
    let runs = document["runs"].as_array().unwrap();
    let bounds = document["bound"].as_array().unwrap();
    assert_eq!((runs.len(), bounds.len()), (2 * 14, 2));
    for run in runs {
        let bound = bounds
            .iter()
            .find(|b| b["capacity_bytes"] == run["capacity_bytes"]);
        let least = bound.unwrap()["cmr"].as_f64().unwrap();
        let cmr = run["cmr"].as_f64().unwrap();
        // What is prefetched is paid for while nobody waits.
        assert!(
            cmr >= least - 1e-6 || run["policy"] == "hotset-prefetch",
            "{run} {least}"
        );
        assert!(cmr <= 1.0 && least > 0.0);
    }
    let names: Vec<&str> = runs
        .iter()
        .filter_map(|run| run["policy"].as_str())
        .collect();
    let svg = std::fs::read_to_string(plot).unwrap();
    for name in [
        "lru",
        "gdsf",
        "s3-fifo",
        "hotset",
        "hotset-prefetch",
        "belady-size",
    ] {
        assert!(names.contains(&name) && svg.contains(name), "{name}");
    }
    assert!(svg.contains("bound"));
}

#[test]
fn draws_are_compared_in_pairs() {
    let home = Home::new();
    let (requests, components) = tables(&home);
    let document = home.json(&[
        "replay",
        &requests,
        "--components",
        &components,
        "--ram",
        "4GiB",
        "--policy",
        "lru,gdsf",
        "--draws",
        "4",
        "--stress",
        "one-hit",
        "--json",
    ]);
    assert_eq!(document["runs"].as_array().unwrap().len(), 8);
    let compared = document["compared"].as_array().unwrap();
    assert_eq!(compared[0]["of_lru"]["mean"], 1.0);
    let interval = compared[1]["of_lru"]["interval"].as_f64().unwrap();
    assert!(interval > 0.0, "{compared:?}");
    assert_eq!(document["bound"].as_array().unwrap().len(), 0);
}

#[test]
fn wrong_wishes_are_named() {
    let home = Home::new();
    let (requests, components) = tables(&home);
    let base = [
        "replay",
        requests.as_str(),
        "--components",
        components.as_str(),
    ];
    for (more, word) in [
        (["--policy", "lruu"], "s3-fifo"),
        (["--stress", "heat"], "relabel"),
        (["--warmup", "1"], "share"),
    ] {
        let run = home.run(&[base.as_slice(), more.as_slice()].concat());
        assert_refused(&run, 2, &[word]);
    }
}
