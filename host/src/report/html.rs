//! HTML in which text is text: whatever comes from a file passes [`text`], so that it can be no markup.

use std::fmt::Write as _;

/// `raw` for an element's content or a quoted attribute.
pub fn text(raw: &str) -> String {
    let mut safe = String::with_capacity(raw.len());
    for c in raw.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// `value` as JSON that can stand inside a script element: without `<`, no text can end it.
pub fn json(value: &impl serde::Serialize) -> String {
    let json = serde_json::to_string(value).expect("a page's data has text keys");
    json.replace('<', "\\u003c")
}

/// One cell of a [`Table`]. Its text is escaped when it is written.
#[derive(Clone, Debug)]
pub enum Cell {
    /// Words.
    Text(String),
    /// A key, a hash, a command: in the type of code.
    Code(String),
    /// A figure, aligned with those above and below it.
    Number(String),
    /// What the row is about.
    Head(String),
    /// What so many rows are about.
    HeadOf(String, usize),
    /// The run of this place, by its letter and color.
    Run(usize, String),
    /// The part of this place in a bar, by its color.
    Part(usize, String),
}

/// A table that reads well aloud: with a caption, and headers that say what they are the headers of.
#[derive(Debug)]
pub struct Table {
    /// What it shows.
    pub caption: String,
    /// Columns; those with `true` hold figures.
    pub columns: Vec<(String, bool)>,
    /// Groups of rows, each parted from the next.
    pub groups: Vec<Vec<Vec<Cell>>>,
}

impl Table {
    /// A table of one group of rows.
    pub fn new(caption: &str, columns: &[(&str, bool)], rows: Vec<Vec<Cell>>) -> Self {
        Table {
            caption: caption.to_owned(),
            columns: columns.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect(),
            groups: vec![rows],
        }
    }

    /// The markup. A table that is wider than the screen scrolls in its own frame, also by keyboard.
    pub fn html(&self) -> String {
        let caption = text(&self.caption);
        let mut html = format!(
            "<div class=\"scroll\" role=\"region\" aria-label=\"{caption}\" tabindex=\"0\"><table>\n<caption>{caption}</caption>\n<thead><tr>"
        );
        for (name, number) in &self.columns {
            let class = if *number { " class=\"n\"" } else { "" };
            let _ = write!(html, "<th scope=\"col\"{class}>{}</th>", text(name));
        }
        html.push_str("</tr></thead>\n");
        for group in &self.groups {
            html.push_str("<tbody>\n");
            for row in group {
                html.push_str("<tr>");
                row.iter().for_each(|cell| html.push_str(&cell.html()));
                html.push_str("</tr>\n");
            }
            html.push_str("</tbody>\n");
        }
        html.push_str("</table></div>\n");
        html
    }
}

impl Cell {
    fn html(&self) -> String {
        match self {
            Cell::Text(words) => format!("<td>{}</td>", text(words)),
            Cell::Code(words) => format!("<td><code>{}</code></td>", text(words)),
            Cell::Number(figure) => format!("<td class=\"n\">{}</td>", text(figure)),
            Cell::Head(words) => format!("<th scope=\"row\">{}</th>", text(words)),
            Cell::HeadOf(words, 1) => Cell::Head(words.clone()).html(),
            Cell::HeadOf(words, rows) => {
                format!("<th scope=\"rowgroup\" rowspan=\"{rows}\">{}</th>", text(words))
            }
            Cell::Run(place, name) => format!("<th scope=\"row\">{}</th>", run(*place, name)),
            Cell::Part(place, name) => {
                format!("<th scope=\"row\"><i class=\"c{place}\"></i>{}</th>", text(name))
            }
        }
    }
}

/// A run's letter in its color, and its name.
pub fn run(place: usize, name: &str) -> String {
    format!("<span class=\"key r{}\">{}</span> {}", place % COLORS, letter(place), text(name))
}

/// Colors of runs; further runs take them again, and are told apart by their letters.
pub const COLORS: usize = 8;

/// A, B, …, Z, AA, …
pub fn letter(place: usize) -> String {
    let last = char::from(b'A' + (place % 26) as u8);
    match place / 26 {
        0 => last.to_string(),
        more => format!("{}{last}", letter(more - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_becomes_markup() {
        assert_eq!(text("<img src=x onerror='a\"&'>"), "&lt;img src=x onerror=&#39;a&quot;&amp;&#39;&gt;");
        assert!(!json(&"</script><script>").contains('<'));
        assert_eq!(
            (letter(0), letter(25), letter(26), letter(701)),
            ("A".into(), "Z".into(), "AA".into(), "ZZ".into())
        );
    }
}
