//! Answers of the API as an agent reads them: text, images, and the same as structured content.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rmcp::{
    ErrorData,
    handler::server::tool::IntoCallToolResult,
    model::{CallToolResponse, CallToolResult, ContentBlock},
};
use serde_json::{Map, Value, json};

use crate::api::Failure;

/// Most bytes of one text in an answer: an agent reads it all.
const MAX_TEXT: usize = 24 * 1024;
/// Most bytes of an image, as base64.
const MAX_IMAGE: usize = 4 << 20;

/// A text, perhaps without its middle, and how many bytes were cut.
pub(crate) fn capped(text: &str) -> (String, usize) {
    if text.len() <= MAX_TEXT {
        return (text.to_owned(), 0);
    }
    // The end says more than the middle: it has the error.
    let head = text.floor_char_boundary(MAX_TEXT / 2);
    let tail = text.ceil_char_boundary(text.len() - MAX_TEXT / 2);
    let cut = tail - head;
    let (before, after) = (text.get(..head).unwrap_or_default(), text.get(tail..).unwrap_or_default());
    (format!("{before}\n[... {cut} bytes cut here ...]\n{after}"), cut)
}

/// What a tool did, in words and as structured content.
pub(crate) fn told(text: impl Into<String>, about: Value) -> CallToolResult {
    with(vec![ContentBlock::text(text)], about)
}

fn with(content: Vec<ContentBlock>, about: Value) -> CallToolResult {
    let mut result = CallToolResult::success(content);
    result.structured_content = Some(about);
    result
}

/// What a tool could not do.
pub(crate) fn failed(failure: &Failure) -> CallToolResult {
    let value = failure.value();
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let mut result = CallToolResult::structured_error(value.clone());
    result.content =
        vec![ContentBlock::text(format!("{}: {}\nWhat to do: {}", text("code"), text("cause"), text("remediation")))];
    result
}

impl IntoCallToolResult for Failure {
    fn into_call_tool_result(self) -> Result<CallToolResponse, ErrorData> {
        Ok(failed(&self).into())
    }
}

/// What a program or a cell did. What it is not good for an agent to see is left out.
pub(crate) fn ran(answer: &Value, sandbox: Option<&str>) -> CallToolResult {
    let field = |name: &str| answer.get(name).filter(|value| !value.is_null());
    let mut content = Vec::new();
    let mut kept = Map::new();
    let mut cut = Map::new();
    if let Some(id) = sandbox {
        kept.insert("sandbox_id".into(), json!(id));
    }
    for name in ["outcome", "exit_code", "signal", "context_lost", "truncated", "execution_count", "wall_time_ms"] {
        if let Some(value) = field(name) {
            kept.insert(name.into(), value.clone());
        }
    }
    let is_binary = field("encoding").is_some_and(|encoding| encoding == "base64");
    for (name, title) in [("stdout", ""), ("stderr", "[stderr]\n"), ("value", "[value]\n")] {
        let Some(text) = field(name).and_then(Value::as_str).filter(|text| !text.is_empty()) else { continue };
        if is_binary && name != "value" {
            let note = format!(
                "(binary, {} bytes; have the program write a file and take it with read_file)",
                text.len() / 4 * 3
            );
            content.push(ContentBlock::text(format!("{title}{note}")));
            kept.insert(name.into(), json!(note));
            continue;
        }
        let (text, missing) = capped(text);
        if missing > 0 {
            cut.insert(format!("{name}_bytes"), json!(missing));
        }
        content.push(ContentBlock::text(format!("{title}{text}")));
        kept.insert(name.into(), json!(text));
    }
    if let Some(error) = field("error") {
        let text = |name: &str| error.get(name).and_then(Value::as_str).unwrap_or_default();
        let (traceback, missing) = capped(text("traceback"));
        if missing > 0 {
            cut.insert("traceback_bytes".into(), json!(missing));
        }
        content.push(ContentBlock::text(format!("[error]\n{traceback}")));
        kept.insert(
            "error".into(),
            json!({"name": text("name"), "value": capped(text("value")).0, "traceback": traceback}),
        );
    }
    for hint in field("hints").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
        content.push(ContentBlock::text(format!("[hint] {hint}")));
    }
    for result in field("results").and_then(Value::as_array).into_iter().flatten() {
        for kind in ["image/png", "image/jpeg"] {
            let Some(data) = result.get(kind).and_then(Value::as_str) else { continue };
            if data.len() > MAX_IMAGE {
                content.push(ContentBlock::text(format!(
                    "[an {kind} of {} bytes is too large to show]",
                    data.len() / 4 * 3
                )));
            } else {
                content.push(ContentBlock::image(data.replace('\n', ""), kind));
            }
            break;
        }
    }
    if answer.get("truncated") == Some(&json!(true)) {
        content
            .push(ContentBlock::text("[the program wrote more than the server keeps; have it write a file instead]"));
    }
    if !cut.is_empty() {
        kept.insert("cut".into(), Value::Object(cut));
    }
    let good = matches!(answer.get("outcome").and_then(Value::as_str), Some("ok" | "exited" | "completed" | "running"))
        && field("exit_code").is_none_or(|code| code == 0);
    if !good {
        let number = |name: &str| field(name).map(|value| format!(", {name} {value}")).unwrap_or_default();
        let outcome = field("outcome").and_then(Value::as_str).unwrap_or("failed");
        content.push(ContentBlock::text(format!("[{outcome}{}{}]", number("exit_code"), number("signal"))));
    } else if content.is_empty() {
        content.push(ContentBlock::text("[no output]"));
    }
    let mut shown = with(content, Value::Object(kept));
    // The tool did its work. An agent is to see that the code failed all the same.
    shown.is_error = Some(!good);
    shown
}

/// Bytes of a file: text, an image, or base64.
pub(crate) fn file(name: &str, bytes: &[u8], whole: bool) -> CallToolResult {
    let kind = image_kind(bytes).filter(|_| whole && bytes.len() / 3 * 4 <= MAX_IMAGE);
    // A cut may go through a character.
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => Some(text),
        Err(error) if error.error_len().is_none() => std::str::from_utf8(&bytes[..error.valid_up_to()]).ok(),
        Err(_) => None,
    }
    .filter(|text| !text.contains('\0'));
    let mut about = json!({"path": name, "bytes": bytes.len(), "whole": whole});
    let mut content = Vec::new();
    match (kind, text) {
        (Some(kind), _) => content.push(ContentBlock::image(STANDARD.encode(bytes), kind)),
        (None, Some(text)) => {
            content.push(ContentBlock::text(text));
            about["text"] = json!(text);
        }
        (None, None) => {
            let encoded = STANDARD.encode(bytes);
            content.push(ContentBlock::text(format!("[not text; {} bytes, as base64]\n{encoded}", bytes.len())));
            about["base64"] = json!(encoded);
        }
    }
    if !whole {
        content.push(ContentBlock::text("[the file goes on; ask for more with `offset`]"));
    }
    with(content, about)
}

fn image_kind(bytes: &[u8]) -> Option<&'static str> {
    let kinds: [(&[u8], &str); 4] = [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"GIF8", "image/gif"),
        (b"RIFF", "image/webp"),
    ];
    let (_, kind) = kinds.into_iter().find(|(magic, _)| bytes.starts_with(magic))?;
    (kind != "image/webp" || bytes.get(8..12) == Some(b"WEBP")).then_some(kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_long_text_keeps_its_ends_and_says_what_is_missing() {
        let text = format!("begin{}end", "é".repeat(MAX_TEXT));
        let (shown, cut) = capped(&text);
        assert!(shown.starts_with("begin") && shown.ends_with("end") && shown.contains(&format!("{cut} bytes cut")));
        assert!(shown.len() < MAX_TEXT + 100 && cut > MAX_TEXT / 2);
        assert_eq!(capped("short"), ("short".into(), 0));
    }

    #[test]
    fn a_failed_program_is_an_error_and_its_output_is_there() {
        let shown = ran(&json!({"outcome": "exited", "exit_code": 3, "stdout": "a\n", "stderr": "b\n"}), Some("id"));
        assert_eq!(shown.is_error, Some(true));
        let texts: Vec<&str> = shown.content.iter().map(|block| block.as_text().unwrap().text.as_str()).collect();
        assert_eq!(texts, ["a\n", "[stderr]\nb\n", "[exited, exit_code 3]"]);
        assert_eq!(shown.structured_content.unwrap()["sandbox_id"], "id");
    }

    #[test]
    fn a_picture_of_a_cell_is_an_image() {
        let answer = json!({"outcome": "ok", "exit_code": 0, "stdout": "", "results": [{"is_main": false, "image/png": "aGk=\n", "text/plain": "<Figure>"}]});
        let shown = ran(&answer, None);
        assert_eq!(shown.is_error, Some(false));
        assert_eq!(
            serde_json::to_value(&shown.content).unwrap()[0],
            json!({"type": "image", "data": "aGk=", "mimeType": "image/png"})
        );
    }

    proptest! {
        #[test]
        fn any_bytes_of_a_file_can_be_shown(bytes in proptest::collection::vec(any::<u8>(), 0..200), whole in any::<bool>()) {
            let shown = file("f", &bytes, whole);
            prop_assert!(!shown.content.is_empty());
        }

        #[test]
        fn any_text_is_cut_at_characters(text in "\\PC*", times in 0usize..400) {
            let text = text.repeat(times);
            let (shown, cut) = capped(&text);
            prop_assert!(cut == 0 && shown == text || shown.len() < MAX_TEXT + 100);
        }
    }
}
