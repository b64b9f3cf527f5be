//! Files.

use std::{io::Write as _, time::Duration};

use serde_json::{Value, json};

use crate::{
    client,
    fixture::{patience, wait_for},
    guest::{Guest, shared},
};

fn put(guest: &Guest<'_>, query: &str, bytes: &[u8]) -> Value {
    let answer = guest.ask("PUT", &format!("/files?{query}"), &[], bytes);
    assert_eq!(answer.status, 200, "{query}: {}", answer.text());
    answer.json()
}

#[test]
fn a_file_comes_back_as_it_was_written_whole_and_in_parts() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    let bytes: Vec<u8> = (0..8 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let entry = put(&guest, "path=a/deep/file.bin&mode=640", &bytes);
    assert_eq!((&entry["size"], &entry["kind"], &entry["mode"]), (&json!(bytes.len()), &json!("file"), &json!("640")));
    assert_eq!(entry["name"], "file.bin");
    let whole = guest.get("/files?path=a/deep/file.bin");
    assert!(whole.status == 200 && whole.body == bytes);
    let part = |range: &str| guest.ask("GET", "/files?path=a/deep/file.bin", &[&format!("Range: bytes={range}")], b"");
    for (range, from, to) in [
        ("0-0", 0, 1),
        ("100-199", 100, 200),
        ("8388600-", 8_388_600, bytes.len()),
        ("-5", bytes.len() - 5, bytes.len()),
    ] {
        let answer = part(range);
        assert_eq!(answer.status, 206, "{range}");
        assert_eq!(answer.header("content-range").unwrap(), format!("bytes {from}-{}/{}", to - 1, bytes.len()));
        assert!(answer.body == bytes[from..to], "{range}");
    }
    let answer = part("9999999999-");
    assert_eq!(
        (answer.status, answer.header("content-range").unwrap()),
        (416, format!("bytes */{}", bytes.len()).as_str())
    );
    assert_eq!(part("nonsense").status, 200);
    // The code sees the same bytes.
    assert_eq!(guest.value("len(open('a/deep/file.bin', 'rb').read())"), bytes.len().to_string());
    assert_eq!(put(&guest, "path=empty", b"")["size"], 0);
    assert_eq!(guest.get("/files?path=empty").body, b"");
}

#[test]
fn directories_are_made_listed_moved_and_removed() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    assert_eq!(guest.ok("/files/mkdir", &json!({"path": "d/e"}))["kind"], "directory");
    assert_eq!(guest.ok("/files/mkdir", &json!({"path": "d/e"}))["kind"], "directory", "it may be there");
    put(&guest, "path=d/f.txt", b"hello");
    guest.run("import os\nos.symlink('f.txt', 'd/link')");
    let list = |rest: &str| -> Vec<String> {
        let all = guest.get(&format!("/files/list?path=d{rest}")).json();
        let mut names: Vec<String> =
            all["entries"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().into()).collect();
        names.sort();
        names
    };
    assert_eq!(list(""), ["e", "f.txt", "link"]);
    put(&guest, "path=d/e/g", b"");
    assert_eq!(list("&depth=2"), ["e", "f.txt", "g", "link"]);
    let stat = |path: &str| guest.get(&format!("/files/stat?path={path}")).json();
    assert_eq!((&stat("d/link")["kind"], &stat("d/link")["target"]), (&json!("link"), &json!("f.txt")));
    assert_eq!(guest.ok("/files/move", &json!({"from": "d/f.txt", "to": "moved"}))["name"], "moved");
    assert_eq!(guest.ok("/files/chmod", &json!({"path": "moved", "mode": "700"}))["mode"], "700");
    assert_eq!(guest.value("oct(os.stat('moved').st_mode & 0o777)"), "'0o700'");
    assert_eq!(guest.refused(&guest.delete("/files?path=d")), (409, "not_empty".into()));
    assert_eq!(guest.delete("/files?path=d&recursive=true").status, 204);
    assert_eq!(guest.refused(&guest.get("/files/stat?path=d")), (404, "file_not_found".into()));
}

#[test]
fn what_cannot_be_done_is_said_and_the_sandbox_goes_on() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    put(&guest, "path=f", b"x");
    let cases = [
        (guest.get("/files?path=absent"), 404, "file_not_found"),
        (guest.get("/files?path=."), 409, "wrong_kind"),
        (guest.get("/files"), 400, "invalid_request"),
        (guest.get("/files?path=f&path=f"), 400, "invalid_request"),
        (guest.get("/files?path=f&pth=f"), 400, "invalid_request"),
        (guest.get("/files?path="), 400, "bad_path"),
        (guest.get("/files?path=a%00b"), 400, "bad_path"),
        (guest.get(&format!("/files?path={}", "x".repeat(5000))), 400, "bad_path"),
        (guest.get("/files/list?path=f"), 409, "wrong_kind"),
        (guest.get("/files/list?depth=-1"), 400, "invalid_request"),
        (guest.get("/files/list?depth=1000000"), 400, "invalid_request"),
        (guest.ask("PUT", "/files?path=f/x", &[], b""), 409, "wrong_kind"),
        (guest.ask("PUT", "/files?path=f&mode=999", &[], b""), 400, "invalid_request"),
        (guest.ask("PUT", "/files?path=/proc/sys/kernel/hostname", &[], b"x"), 403, "not_allowed"),
        (guest.post("/files/chmod", &json!({"path": "f", "mode": "7777777"})), 400, "invalid_request"),
        (guest.post("/files/move", &json!({"from": "absent", "to": "g"})), 404, "file_not_found"),
        (guest.get("/files/watch?path=absent"), 404, "file_not_found"),
    ];
    for (at, (answer, status, code)) in cases.iter().enumerate() {
        assert_eq!(guest.refused(answer), (*status, (*code).into()), "case {at}: {}", answer.text());
    }
    guest.is_usable();
}

#[test]
fn a_path_means_what_it_means_to_the_code_and_leads_nowhere_else() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    // Up and out of the root is the root.
    let inside = guest.value("open('/etc/hostname').read() if __import__('os').path.exists('/etc/hostname') else ''");
    let climbed = guest.get("/files?path=../../../../../../etc/hostname");
    if climbed.status == 200 {
        assert_eq!(inside, format!("{:?}", climbed.text()).replace('"', "'"));
    }
    guest.run("import os\nos.symlink('/etc/shadow', 'shadow')\nos.symlink('/proc/1/root/etc/shadow', 'magic')");
    for path in
        ["/etc/shadow", "shadow", "magic", "/proc/1/root/etc/shadow", "../../../../../../../../root/.ssh/id_rsa"]
    {
        let answer = guest.get(&format!("/files?path={path}"));
        assert!([400, 403, 404, 409].contains(&answer.status), "{path}: {} {}", answer.status, answer.text());
    }
    guest.is_usable();
}

#[test]
fn changes_below_a_directory_are_told() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    guest.ok("/files/mkdir", &json!({"path": "seen/below"}));
    let mut events = guest.stream("GET", "/files/watch?path=seen&recursive=true", &json!(null));
    assert_eq!(events.next().unwrap().name, "watching");
    put(&guest, "path=seen/below/new", b"1");
    let path = |event: &crate::guest::Event| event.data["path"].as_str().unwrap().to_owned();
    let created = events.next_of("created");
    assert!(path(&created).ends_with("seen/below/new"), "{created:?}");
    std::thread::sleep(Duration::from_millis(20));
    guest.run("open('seen/below/new', 'a').write('more')");
    let modified = events.next_of("modified");
    assert!(path(&modified).ends_with("seen/below/new"), "{modified:?}");
    assert_eq!(guest.delete("/files?path=seen/below/new").status, 204);
    let removed = events.next_of("removed");
    assert!(path(&removed).ends_with("seen/below/new"), "{removed:?}");
}

#[test]
fn an_upload_that_breaks_off_leaves_the_file_as_it_was() {
    let fixture = shared();
    let guest = Guest::new(&fixture);
    put(&guest, "path=kept", b"old");
    let mut socket = client::connect(fixture.address);
    let head = format!(
        "PUT {} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n",
        guest.path("/files?path=kept")
    );
    socket.write_all(head.as_bytes()).unwrap();
    socket.write_all(&[b'n'; 500_000]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(socket);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(guest.get("/files?path=kept").body, b"old");
    let names = || guest.get("/files/list").json()["entries"].as_array().unwrap().len();
    wait_for("no rest", patience(Duration::from_secs(5)), || names() == 1);
}

#[test]
fn a_full_disk_is_said_and_the_sandbox_lives_on() {
    let fixture = shared();
    // More memory than disk: else files fill the memory, and the largest process goes.
    let guest = Guest::with(&fixture, &json!({"memory_mb": 1024}));
    let answer = guest.shell("yes | head -c 1500000000 > big; echo status $?; rm -f big");
    let said = answer["outcome"] == "out_of_memory" || answer["stdout"].as_str().unwrap() != "status 0\n";
    assert!(said, "{answer}");
    guest.shell("rm -f big");
    let mut socket = client::connect(fixture.address);
    let size = 1_500_000_000_u64;
    let head =
        format!("PUT {} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n", guest.path("/files?path=full"));
    socket.write_all(head.as_bytes()).unwrap();
    let chunk = vec![0; 1 << 20];
    for _ in 0..size >> 20 {
        if socket.write_all(&chunk).is_err() {
            break;
        }
    }
    // Whatever the client saw of the answer: nothing is left, and the sandbox is there.
    drop(socket);
    wait_for("no rest", patience(Duration::from_secs(10)), || {
        let all = guest.get("/files/list");
        all.status == 200 && all.json()["entries"].as_array().unwrap().is_empty()
    });
    guest.is_usable();
}
