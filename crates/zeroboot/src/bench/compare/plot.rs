//! The report as one page of HTML with plots in SVG: no script, nothing from elsewhere.

use std::fmt::Write as _;

use super::{Comparison, Line, Series};

const WIDTH: f64 = 860.0;
const LEFT: f64 = 380.0;

pub(super) fn page(comparison: &Comparison) -> String {
    let mut body = String::new();
    let bars = |title: &str, value: fn(&Line) -> f64| bars(title, &comparison.lines, value);
    body += &bars("Wall time of print(1), p50, ms (logarithmic)", |line| line.wall.p50);
    body += &bars("CPU time of print(1), p50, ms (logarithmic)", |line| line.cpu.p50);
    for series in &comparison.series {
        body += &line(series);
    }
    let mut rows = String::new();
    for Line { name, wall, cpu } in &comparison.lines {
        let cells = [wall.p50, wall.p95, wall.p99, cpu.p50].map(|value| format!("<td>{value:.2}</td>")).concat();
        rows += &format!("<tr><th>{}</th><td>{}</td>{cells}</tr>\n", escape(name), wall.n);
    }
    let list = |items: Vec<String>| items.iter().map(|item| format!("<li>{}</li>\n", escape(item))).collect::<String>();
    let at_once = list(
        comparison
            .at_once
            .iter()
            .map(|(name, count, took)| format!("{count} forks of a bare warm Python at once: {name}: {took:.0} ms"))
            .collect(),
    );
    let absent = list(comparison.absent.iter().map(|(name, reason)| format!("{name}: {reason}")).collect());
    format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>zeroboot bench compare</title>\n\
         <style>body{{font:15px sans-serif;max-width:60em;margin:2em auto}}td{{text-align:right;padding:0 1em}}\
         th{{text-align:left;font-weight:normal}}svg text{{font:12px sans-serif}}</style>\n\
         <h1>zeroboot {} bench compare</h1>\n<p>{}</p>\n<p>CPU time is that of {}.</p>\n\
         <table><tr><th>print(1)</th><td>n</td><td>wall p50</td><td>p95</td><td>p99</td><td>CPU p50</td></tr>\n{rows}</table>\n\
         {body}<ul>\n{at_once}</ul>\n<h2>Absent</h2>\n<ul>\n{absent}</ul>\n</html>\n",
        comparison.zeroboot,
        escape(&comparison.host.to_string()),
        comparison.account,
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Horizontal bars on a logarithmic scale from the power of ten below the smallest.
fn bars(title: &str, lines: &[Line], value: fn(&Line) -> f64) -> String {
    let known = || lines.iter().map(value).filter(|v| *v > 0.0);
    let low = known().fold(f64::INFINITY, f64::min).log10().floor();
    let high = known().fold(f64::NEG_INFINITY, f64::max).log10();
    let scale = (WIDTH - LEFT - 80.0) / (high - low).max(1.0);
    let mut marks = String::new();
    for (i, line) in lines.iter().enumerate() {
        let (y, width) = (i * 22, (value(line).max(f64::MIN_POSITIVE).log10() - low).max(0.0) * scale);
        let color = if line.name.starts_with("Zeroboot") { "#2563eb" } else { "#9ca3af" };
        // Writing to a String cannot fail.
        let _infallible = writeln!(
            marks,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text><rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" \
             height=\"16\" fill=\"{color}\"/><text x=\"{:.1}\" y=\"{}\">{:.2}</text>",
            LEFT - 8.0,
            y + 13,
            escape(&line.name),
            LEFT + width + 6.0,
            y + 13,
            value(line),
        );
    }
    format!("<h2>{}</h2>\n<svg width=\"{WIDTH}\" height=\"{}\">\n{marks}</svg>\n", escape(title), lines.len() * 22)
}

/// A line over a logarithmic axis.
fn line(series: &Series) -> String {
    let (height, width) = (240.0, WIDTH - 160.0);
    let top = series.points.iter().map(|(_, y)| *y).fold(f64::MIN_POSITIVE, f64::max);
    let last = series.points.iter().map(|(x, _)| *x).fold(2.0, f64::max).log10();
    let place = |(x, y): &(f64, f64)| (60.0 + x.max(1.0).log10() / last * width, 20.0 + height * (1.0 - y / top));
    let mut path = String::new();
    let mut marks = String::new();
    for point in &series.points {
        let (x, y) = place(point);
        // Writing to a String cannot fail.
        let _infallible = write!(path, "{x:.1},{y:.1} ");
        let _infallible = writeln!(
            marks,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"#2563eb\"/><text x=\"{x:.1}\" y=\"{:.1}\" \
             text-anchor=\"middle\">{:.4}</text><text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            y - 8.0,
            (point.1 * 100.0).round() / 100.0,
            height + 40.0,
            point.0,
        );
    }
    format!(
        "<h2>{}: {} by {}</h2>\n<svg width=\"{WIDTH}\" height=\"{}\"><polyline points=\"{path}\" fill=\"none\" \
         stroke=\"#2563eb\"/>\n{marks}</svg>\n",
        escape(series.name),
        escape(series.y),
        escape(series.x),
        height + 50.0
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bench::stats::{HostFacts, Summary};

    #[test]
    fn a_page_has_a_bar_for_each_line_a_point_for_each_value_and_what_is_absent() {
        let lines = [("Zeroboot", 2), ("a <b>", 200)].map(|(name, ms)| Line {
            name: name.into(),
            wall: Summary::of(vec![Duration::from_millis(ms)]),
            cpu: Summary::of(vec![Duration::ZERO]),
        });
        let page = page(&Comparison {
            zeroboot: "1",
            host: HostFacts::read(),
            account: "all processes",
            lines: lines.into(),
            absent: vec![("bwrap", "not \"here\"".into())],
            series: vec![Series { name: "T", x: "x", y: "y", points: vec![(1.0, 5.0), (32.0, 10.0)] }],
            at_once: vec![("us", 7, 3.0)],
        });
        assert_eq!(page.matches("<rect").count(), 4, "{page}");
        assert_eq!(page.matches("<circle").count(), 2);
        assert!(page.contains("<li>bwrap: not &quot;here&quot;</li>") && page.contains("a &lt;b&gt;"), "{page}");
        assert!(page.contains("7 forks") && !page.contains("NaN") && !page.contains("inf"), "{page}");
    }
}
