use std::time::Duration;

use bytes::Bytes;

use super::{batch::BatchSeed, read::parse_as, *};

fn catalog() -> Catalog {
    let pair = |name: &str, language: &str| Named { name: name.into(), language: language.into() };
    Catalog { templates: vec![pair("science", "python"), pair("python", "python"), pair("node", "node")] }
}

fn request(json: &str) -> Result<(ExecRequest, Named), ApiError> {
    parse::<ExecBody>(json.as_bytes())?.into_request(&catalog(), &RequestLimits::default())
}

fn refused(json: &str) -> (&'static str, String) {
    let error = request(json).expect_err(json);
    (error.code, error.message)
}

#[test]
fn the_shortest_request_takes_every_default() {
    let (request, template) = request(r#"{"code": "print(1)"}"#).unwrap();
    assert_eq!(request, ExecRequest::new("python", "print(1)"));
    assert_eq!((&*template.name, &*template.language), ("python", "python"));
}

#[test]
fn a_full_request_arrives_whole() {
    let (request, _) = request(
        r#"{"code": "1", "template": "science", "timeout_seconds": 0.25, "stdin": {"base64": "AP8="},
            "env": {"A": "b"}, "args": ["x", "y"], "files": {"a/b.txt": "text", "c.sh": {"text": "t", "executable": true}},
            "output_files": ["out"], "limits": {"memory_mb": 64, "processes": 3, "output_bytes": 5, "cpu_seconds": 0.5,
            "file_size_mb": 100, "open_files": 512}}"#,
    )
    .unwrap();
    assert_eq!(request.template, "science");
    assert_eq!(request.limits.timeout, Duration::from_millis(250));
    assert_eq!(request.stdin, Stdin::Bytes(Bytes::from_static(b"\x00\xff")));
    assert_eq!(request.env, [("A".into(), "b".into())]);
    assert_eq!(request.args, ["x", "y"]);
    assert_eq!(request.files.len(), 2);
    assert!(request.files[1].executable);
    assert_eq!(request.output_files, ["out"]);
    assert_eq!((request.limits.memory, request.limits.processes, request.limits.output), (64 << 20, 3, 5));
    assert_eq!(request.limits.cpu, Some(Duration::from_millis(500)));
    assert_eq!((request.limits.file_size, request.limits.open_files), (100 << 20, 512));
}

#[test]
fn null_is_the_same_as_absent() {
    let (with, _) = request(
        r#"{"code": "1", "language": null, "template": null, "timeout_seconds": null, "stdin": null, "env": null,
            "args": null, "files": null, "output_files": null, "limits": null}"#,
    )
    .unwrap();
    assert_eq!(with, request(r#"{"code": "1"}"#).unwrap().0);
}

#[test]
fn languages_and_templates_are_looked_up_and_never_guessed() {
    let template = |json: &str| request(json).unwrap().0.template;
    assert_eq!(template(r#"{"code": "1", "language": "python"}"#), "python");
    assert_eq!(template(r#"{"code": "1", "language": "node"}"#), "node");
    assert_eq!(template(r#"{"code": "1", "language": "javascript"}"#), "node");
    assert_eq!(template(r#"{"code": "1", "language": "bash"}"#), "python");
    assert_eq!(template(r#"{"code": "1", "language": "typescript"}"#), "node");
    let (shell, _) = request(r#"{"code": "ls", "language": "bash", "template": "science"}"#).unwrap();
    assert_eq!((shell.template.as_str(), shell.name.as_str()), ("science", zeroboot_engine::INLINE_BASH));
    let (code, text) = refused(r#"{"code": "1", "language": "bash", "template": "node"}"#);
    assert_eq!((code, text.as_str()), ("invalid_request", "bash runs in a python template, and \"node\" is not one"));
    let (code, text) = refused(r#"{"code": "1", "language": "ruby"}"#);
    assert_eq!((code, text.as_str()), ("unknown_language", "Unknown language \"ruby\"; there are: python, node"));
    assert_eq!(refused(r#"{"code": "1", "template": "python3"}"#).0, "unknown_template");
    assert_eq!(refused(r#"{"code": "1", "template": "a", "language": "python"}"#).0, "invalid_request");
}

#[test]
fn errors_name_the_field() {
    let cases = [
        (r#"{"code": 3}"#, "invalid_request", "code: invalid type: integer `3`, expected a string"),
        (r#"{}"#, "invalid_request", "missing field `code`"),
        (r#"[]"#, "invalid_request", "invalid type: sequence, expected an object"),
        (
            r#"{"code": "1", "limits": [1, 2, 3, 4]}"#,
            "invalid_request",
            "limits: invalid type: sequence, expected an object",
        ),
        (r#"{"code": "1", "cod": 2}"#, "invalid_request", "cod: unknown field `cod`"),
        (r#"{"code": "1", "limits": {"memory": 2}}"#, "invalid_request", "limits.memory: unknown field `memory`"),
        (r#"{"code": "1", "files": {"a": {"base64": "%"}}}"#, "invalid_request", "files.a: invalid base64"),
        (r#"{"code": "1", "files": {"a": {}}}"#, "invalid_request", "files.a: exactly one of text and base64"),
        (r#"{"code": "1", "stdin": 5}"#, "invalid_request", "stdin: invalid type: integer `5`, expected a string or"),
        (r#"{"code": "1", "env": {"A": 1}}"#, "invalid_request", "env.A: invalid type"),
        (r#"{"code": "1""#, "invalid_json", "Invalid JSON: EOF"),
        (r#"{"code": "1"} x"#, "invalid_json", "Invalid JSON: trailing characters"),
        ("", "invalid_json", "Invalid JSON: EOF"),
        (r#"{"code": "\ud800"}"#, "invalid_json", "Invalid JSON"),
    ];
    for (json, code, start) in cases {
        let (got, text) = refused(json);
        assert_eq!(got, code, "{json}: {text}");
        assert!(text.starts_with(start), "{json}: {text}");
    }
    for (json, start) in [
        (r#"{"executions": [{"code": "1"}, {"code": null}]}"#, "executions[1].code: "),
        (r#"{"executions": [{"code": "1"}, "1"]}"#, "executions[1]: invalid type: string \"1\", expected an object"),
        (r#"{"executions": null}"#, "executions: invalid type: null, expected a sequence"),
        (r#"{"executions": []}"#, "executions: give at least one item"),
        (r#"{"executions": [], "x": 1}"#, "x: unknown field `x`, expected `executions`"),
        (r#"{"executions": [], "executions": []}"#, "duplicate field `executions`"),
        (r#"{}"#, "missing field `executions`"),
        (r#"[]"#, "invalid type: sequence, expected an object"),
    ] {
        let error = parse_batch(json.as_bytes(), 10).unwrap_err();
        assert_eq!(error.code, "invalid_request", "{json}: {}", error.message);
        assert!(error.message.starts_with(start), "{json}: {}", error.message);
    }
}

#[test]
fn an_unknown_field_is_told_which_one_was_probably_meant() {
    for (json, meant) in [
        (r#"{"code": "1", "timeout": 5}"#, Some("timeout_seconds")),
        (r#"{"code": "1", "timeoutSeconds": 5}"#, Some("timeout_seconds")),
        (r#"{"code": "1", "lang": "python"}"#, Some("language")),
        (r#"{"code": "1", "limits": {"memory": 5}}"#, Some("memory_mb")),
        (r#"{"code": "1", "`, expected `x`": 5}"#, None),
        (r#"{"code": "1", "zzz": 5}"#, None),
    ] {
        let (_, text) = refused(json);
        match meant {
            Some(meant) => assert!(text.ends_with(&format!("; did you mean `{meant}`?")), "{json}: {text}"),
            None => assert!(!text.contains("did you mean"), "{json}: {text}"),
        }
    }
    let long = format!(r#"{{"code": "1", "timeout{}": 5}}"#, "t".repeat(10_000));
    assert!(!refused(&long).1.contains("did you mean"));
}

#[test]
fn of_a_list_that_is_too_long_little_more_than_allowed_is_kept() {
    let items = vec![r#"{"code": "1"}"#; 5000].join(",");
    let json = format!(r#"{{"executions": [{items}]}}"#);
    let (kept, count) = parse_as(json.as_bytes(), BatchSeed { most: 7 }).unwrap();
    assert_eq!((kept.len(), kept.capacity() < 100, count), (8, true, 5000));
    let error = parse_batch(json.as_bytes(), 7).unwrap_err();
    let text = "executions: 5000 items; a batch may have 7";
    assert_eq!((error.code, error.message.as_str()), ("batch_too_large", text));
    assert_eq!(parse_batch(json.as_bytes(), 5000).unwrap().len(), 5000);

    let strings = vec!["\"\""; 5000].join(",");
    let names: Vec<String> = (0..5000).map(|at| format!("\"n{at}\": \"\"")).collect();
    let names = names.join(",");
    let json = format!(
        r#"{{"code": "1", "args": [{strings}], "output_files": [{strings}], "env": {{{names}}}, "files": {{{names}}}}}"#
    );
    let body = parse::<ExecBody>(json.as_bytes()).unwrap();
    let lengths = [
        body.args.unwrap().0.len(),
        body.output_files.unwrap().0.len(),
        body.env.unwrap().0.len(),
        body.files.unwrap().0.len(),
    ];
    for (field, code) in [
        (format!(r#""args": [{strings}]"#), "invalid_env"),
        (format!(r#""env": {{{names}}}"#), "invalid_env"),
        (format!(r#""files": {{{names}}}"#), "invalid_files"),
        (format!(r#""output_files": [{strings}]"#), "invalid_files"),
    ] {
        assert_eq!(refused(&format!(r#"{{"code": "1", {field}}}"#)).0, code);
    }
    assert_eq!(lengths, [MAX_ENV + 1, MAX_FILES + 1, MAX_ENV + 1, MAX_FILES + 1]);
}

#[test]
fn numbers_that_no_sandbox_can_have_are_refused() {
    for (fields, code) in [
        (r#""timeout_seconds": 0"#, "invalid_timeout"),
        (r#""timeout_seconds": -1"#, "invalid_timeout"),
        (r#""timeout_seconds": 300.1"#, "invalid_timeout"),
        (r#""timeout_seconds": 1e300"#, "invalid_timeout"),
        (r#""limits": {"memory_mb": 0}"#, "invalid_limits"),
        (r#""limits": {"memory_mb": 18446744073709551615}"#, "invalid_limits"),
        (r#""limits": {"processes": 100000}"#, "invalid_limits"),
        (r#""limits": {"output_bytes": 0}"#, "invalid_limits"),
        (r#""limits": {"cpu_seconds": -0.5}"#, "invalid_limits"),
        (r#""limits": {"file_size_mb": 0}"#, "invalid_limits"),
        (r#""limits": {"file_size_mb": 1025}"#, "invalid_limits"),
        (r#""limits": {"open_files": 31}"#, "invalid_limits"),
        (r#""limits": {"open_files": 1025}"#, "invalid_limits"),
        (r#""limits": {"memory_mb": -1}"#, "invalid_request"),
        (r#""files": {"../x": "a"}"#, "invalid_files"),
        (r#""output_files": ["/etc/passwd"]"#, "invalid_files"),
        (r#""env": {"A=B": "a"}"#, "invalid_env"),
        (r#""args": ["\u0000"]"#, "invalid_env"),
        (r#""files": {"a": "x", "a/b": "y"}"#, "invalid_files"),
    ] {
        let json = format!(r#"{{"code": "1", {fields}}}"#);
        assert_eq!(refused(&json).0, code, "{json}");
    }
    assert_eq!(refused(r#"{"code": " \n"}"#).0, "empty_code");
    assert_eq!(refused(r#"{"code": "a\u0000"}"#).0, "invalid_code");
}

#[test]
fn a_whole_number_may_have_a_point() {
    let (request, _) = request(r#"{"code": "1", "limits": {"memory_mb": 64.0, "processes": null}}"#).unwrap();
    assert_eq!(request.limits.memory, 64 << 20);
    assert_eq!(refused(r#"{"code": "1", "limits": {"memory_mb": 64.5}}"#).0, "invalid_request");
    assert_eq!(refused(r#"{"code": "1", "limits": {"memory_mb": 1e300}}"#).0, "invalid_limits");
}

#[test]
fn a_long_value_is_not_echoed_whole() {
    let json = format!(r#"{{"code": "1", "timeout_seconds": "{}"}}"#, "x".repeat(10_000));
    assert!(refused(&json).1.len() < 500);
}
