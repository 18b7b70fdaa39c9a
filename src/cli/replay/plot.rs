//! The cost miss ratio over the capacity, one line for each policy, as SVG. Text stays text, so no font is needed to draw it.

use std::path::Path;

use hotset::core::replay::{Comparison, Machine};
use plotters::prelude::*;

use super::PlacedBound;
use crate::cli::CliError;

/// Pixels.
const SIZE: (u32, u32) = (960, 600);
/// Below this a ratio cannot be drawn on a logarithmic axis.
const LEAST: f64 = 1e-4;

/// A policy's points: GB and cost miss ratio.
pub(super) struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// The lines of all policies, and that of the bound where there is one.
pub(super) fn lines(
    compared: &[Comparison],
    machines: &[Machine],
    bounds: &[PlacedBound],
) -> Vec<Line> {
    let gb = |capacity: usize| {
        let machine = machines.get(capacity);
        machine.map_or(0.0, |m| m.vram.unwrap_or(m.ram).as_f64() / 1e9)
    };
    let mut lines: Vec<Line> = Vec::new();
    let mut add = |name: &str, capacity: usize, cmr: f64| {
        let point = (gb(capacity), cmr.max(LEAST));
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line {
                name: name.to_owned(),
                points: vec![point],
            }),
        }
    };
    for row in compared {
        add(&row.policy, row.capacity, row.cmr.mean);
    }
    for capacity in 0..machines.len() {
        let of_capacity = bounds.iter().filter(|b| b.1 == capacity);
        let values: Vec<f64> = of_capacity.map(|(_, _, bound)| bound.cmr).collect();
        if !values.is_empty() {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            add("bound", capacity, mean);
        }
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}

/// Draws the lines.
pub(super) fn write(path: &Path, lines: &[Line]) -> Result<(), CliError> {
    let mut text = String::new();
    draw(&mut text, lines).map_err(|error| CliError::File {
        path: path.to_owned(),
        source: std::io::Error::other(error.to_string()),
    })?;
    std::fs::write(path, text).map_err(|source| CliError::File {
        path: path.to_owned(),
        source,
    })
}

fn draw(text: &mut String, lines: &[Line]) -> Result<(), Box<dyn std::error::Error>> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(LEAST, f64::max);
    let least = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(f64::INFINITY, f64::min);
    let x = (least(|p| p.0) * 0.95).max(LEAST)..most(|p| p.0) * 1.05;
    let y = least(|p| p.1).min(1.0) * 0.8..most(|p| p.1) * 1.2;
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .right_y_label_area_size(150)
        .build_cartesian_2d(x.log_scale(), y.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("capacity, GB")
        .y_desc("cost miss ratio")
        .light_line_style(WHITE)
        .draw()?;
    for (number, line) in lines.iter().enumerate() {
        let color = Palette99::pick(number).to_rgba();
        let own = line.name.starts_with("hotset") || line.name == "bound";
        let style = color.stroke_width(if own { 3 } else { 1 });
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), style))?
            .label(line.name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::Coordinate(SIZE.0 as i32 - 225, 10))
        .background_style(WHITE)
        .draw()?;
    root.present()?;
    Ok(())
}
