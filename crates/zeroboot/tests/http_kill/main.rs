//! What `kill -9` of parts costs. A test program of its own, because it kills this process's children.
#![allow(dead_code, reason = "the shared modules hold more than these tests need")]

#[path = "../http/client.rs"]
mod client;
#[path = "../http/fixture.rs"]
mod fixture;
#[path = "../sandboxes/guest.rs"]
mod guest;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    fixture::{Fixture, Setup, isolation, patience, wait_for},
    guest::{Events, Guest},
};

/// One at a time: each looks at the children of this process.
static ALONE: Mutex<()> = Mutex::new(());

fn kill_9(pid: i32) {
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
}

/// The same for one that may have ended by itself.
fn kill_if_there(pid: &i32) {
    let done = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
    assert!(done.is_ok());
}

/// The children of a process.
fn children(of: u32) -> Vec<i32> {
    let own = of.to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
        if parent == Some(own.as_str()) {
            found.push(pid);
        }
    }
    found
}

#[test]
fn a_killed_zygote_costs_only_its_requests_and_comes_back() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let fixture = Setup { own_engine: true, ..Setup::default() }.start();
    let zygotes = children(std::process::id());
    assert!(!zygotes.is_empty());
    std::thread::scope(|scope| {
        let slow = scope.spawn(|| fixture.post("/v1/exec", &json!({"code": "import time; time.sleep(20)"}), &[]));
        fixture.wait_for_live(1, Duration::from_secs(10));
        zygotes.iter().for_each(|pid| kill_9(*pid));
        let begun = Instant::now();
        let answer = slow.join().unwrap();
        // The worker died with its zygote: ours to answer for, not the code's.
        assert!(answer.status >= 500, "{} {}", answer.status, answer.text());
        assert!(begun.elapsed() < Duration::from_secs(10));
        wait_for("service again", Duration::from_secs(20), || {
            fixture.post("/v1/exec", &json!({"code": "print(1)"}), &[]).status == 200
        });
        wait_for("health again", Duration::from_secs(20), || fixture.get("/v1/health").json()["status"] == "ok");
    });
}

#[test]
fn a_killed_worker_ends_its_sandbox_alone_and_a_killed_zygote_those_of_its_template() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // Without a pool a zygote's children are its sandboxes.
    let fixture = Setup { node: true, pool: 0, own_engine: true, ..Setup::default() }.start();
    let zygotes = children(std::process::id());
    let of_python = |before: &[i32]| {
        let all: Vec<(i32, i32)> = zygotes
            .iter()
            .flat_map(|zygote| children(*zygote as u32).into_iter().map(|child| (*zygote, child)))
            .collect();
        all.into_iter().filter(|(_, child)| !before.contains(child)).collect::<Vec<_>>()
    };
    let others: Vec<i32> = of_python(&[]).into_iter().map(|(_, child)| child).collect();
    let victim = Guest::new(&fixture);
    victim.run("x = 1");
    let [(zygote, worker)] = of_python(&others)[..] else { panic!("not one worker") };
    let (other, node) = (Guest::new(&fixture), Guest::with(&fixture, &json!({"language": "node"})));
    other.run("x = 2");
    node.run("let x = 3");
    let follow = |guest: &Guest<'_>| {
        let mut events = guest.stream("POST", "/commands", &json!({"command": "echo on; sleep 600", "stream": true}));
        events.next_of("stdout");
        events
    };
    let lost = |mut events: Events, guest: &Guest<'_>| {
        let failure = events.next().unwrap();
        assert_eq!((failure.name.as_str(), &failure.data["code"]), ("failure", &json!("sandbox_gone")), "{failure:?}");
        assert_eq!(failure.data["reason"], "lost");
        let gone = guest.get("");
        assert_eq!((gone.status, &gone.json()["reason"]), (410, &json!("lost")));
    };
    let events = follow(&victim);
    kill_9(worker);
    lost(events, &victim);
    assert_eq!(other.value("x"), "2");
    let events = follow(&other);
    kill_9(zygote);
    lost(events, &other);
    assert_eq!(node.value("x"), "3");
    let made = || {
        let answer = fixture.post("/v1/sandboxes", &json!({}), &[]);
        let code = &answer.json()["code"];
        assert!(answer.status == 201 || (answer.status, code) == (503, &json!("not_ready")), "{}", answer.text());
        answer.status == 201
    };
    wait_for("a sandbox again", patience(Duration::from_secs(20)), made);
}

/// Keeps asking for short sums in both languages, two callers each, while `disturb` does its worst. Every answer is
/// right or a 5xx; gives the number of right ones and of failures for Python and for Node.
fn under_load(fixture: &Fixture, disturb: impl FnOnce()) -> [(usize, usize); 2] {
    let stop = AtomicBool::new(false);
    let counts = Mutex::new([(0, 0); 2]);
    std::thread::scope(|scope| {
        for caller in 0..4 {
            let (stop, counts) = (&stop, &counts);
            scope.spawn(move || {
                let (at, language, print) =
                    if caller < 2 { (0, "python", "print") } else { (1, "node", "console.log") };
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let number = caller * 10_000 + round;
                    let body = json!({"code": format!("{print}({number} + 1)"), "language": language});
                    let answer = fixture.post("/v1/exec", &body, &[]);
                    if answer.status == 200 {
                        assert_eq!(answer.json()["stdout"], format!("{}\n", number + 1), "{}", answer.text());
                        counts.lock().unwrap()[at].0 += 1;
                    } else {
                        assert!(answer.status >= 500, "{} {}", answer.status, answer.text());
                        counts.lock().unwrap()[at].1 += 1;
                        // A template that is down refuses at once; that is not to take the CPU from its restart.
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            });
        }
        disturb();
        stop.store(true, Ordering::Relaxed);
    });
    counts.into_inner().unwrap()
}

#[test]
fn health_says_which_templates_are_down() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let fixture = Setup { node: true, own_engine: true, ..Setup::default() }.start();
    let health = || {
        let answer = fixture.get("/v1/health");
        (answer.status, answer.json())
    };
    assert_eq!(health().1["status"], "ok");
    // A zygote comes back quickly: all but one are killed until one is seen to be down.
    let survivor = children(std::process::id())[0];
    wait_for("one that is down", patience(Duration::from_secs(60)), || {
        children(std::process::id()).iter().filter(|zygote| **zygote != survivor).for_each(kill_if_there);
        let (status, body) = health();
        let down = body["templates"].as_object().unwrap().values().filter(|one| one["ready"] == false).count();
        if (status, &body["status"]) != (200, &json!("degraded")) {
            return false;
        }
        assert_eq!((down, body["reasons"].as_array().map(Vec::len)), (1, Some(1)), "{body}");
        true
    });
    wait_for("none that is up", patience(Duration::from_secs(60)), || {
        children(std::process::id()).iter().for_each(kill_if_there);
        let (status, body) = health();
        (status, &body["status"]) == (503, &json!("unavailable"))
    });
    wait_for("health again", patience(Duration::from_secs(60)), || health().1["status"] == "ok");
}

#[test]
fn killed_workers_under_load_cost_only_their_own_requests() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let fixture = Setup { node: true, own_engine: true, ..Setup::default() }.start();
    let zygotes = children(std::process::id());
    let mut killed = 0;
    let [python, node] = under_load(&fixture, || {
        for round in 0..12 {
            std::thread::sleep(patience(Duration::from_millis(100)));
            // Of any template, waiting or at work.
            let workers: Vec<i32> = zygotes.iter().flat_map(|zygote| children(*zygote as u32)).collect();
            if let Some(pid) = workers.get(round % workers.len().max(1)) {
                // It may have ended by itself just now.
                killed += usize::from(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
            }
        }
    });
    assert!(killed > 3, "{killed}");
    assert!(python.0 > 0 && node.0 > 0 && python.1 + node.1 <= killed, "{python:?} {node:?} of {killed} killed");
    for body in [json!({"code": "print(1)"}), json!({"code": "console.log(1)", "language": "node"})] {
        assert_eq!(fixture.exec(&body)["stdout"], "1\n");
    }
    assert_eq!(children(std::process::id()), zygotes, "a zygote went too");
    wait_for("a full pool", patience(Duration::from_secs(20)), || {
        fixture.engine.templates().iter().all(|template| template.pool_ready == template.pool_target)
    });
}

#[test]
fn a_killed_zygote_under_load_costs_only_its_template_and_comes_back() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let fixture = Setup { node: true, own_engine: true, ..Setup::default() }.start();
    let zygotes = children(std::process::id());
    let restarts = || fixture.engine.templates().iter().map(|template| template.restarts).collect::<Vec<_>>();
    let [python, node] = under_load(&fixture, || {
        std::thread::sleep(patience(Duration::from_millis(300)));
        kill_9(zygotes[0]);
        wait_for("a new zygote", patience(Duration::from_secs(20)), || restarts().iter().sum::<u64>() == 1);
        std::thread::sleep(patience(Duration::from_millis(300)));
    });
    let [hurt, other] = if restarts()[0] == 1 { [python, node] } else { [node, python] };
    assert!(hurt.0 > 0 && hurt.1 > 0, "{hurt:?}");
    assert!(other.0 > 0 && other.1 == 0, "{other:?}");
    for body in [json!({"code": "print(1)"}), json!({"code": "console.log(1)", "language": "node"})] {
        assert_eq!(fixture.exec(&body)["stdout"], "1\n");
    }
}

fn descendants(of: u32) -> Vec<i32> {
    let mut all = children(of);
    let mut at = 0;
    while at < all.len() {
        all.extend(children(all[at] as u32));
        at += 1;
    }
    all
}

/// The program as a server, on the engine under test.
fn serve(folder: &std::path::Path) -> Command {
    let config = folder.join("zeroboot.toml");
    // In the nested lane a template takes long to load.
    let seconds = patience(Duration::from_secs(60)).as_secs();
    std::fs::write(&config, format!("[engine]\nwarm_timeout_seconds = {seconds}\n")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_zeroboot"));
    command.args(["serve", "--listen", "127.0.0.1:0", "--engine", isolation().as_str()]).arg("--config").arg(config);
    let temporary = folder.join("tmp");
    std::fs::create_dir_all(&temporary).unwrap();
    command.env("TMPDIR", temporary);
    command
}

/// A server that was started, once it is ready; its log is read on.
fn listening(folder: &std::path::Path) -> (Child, SocketAddr) {
    let mut server = serve(folder).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(server.stderr.take().unwrap()).lines();
    let mut said = Vec::new();
    while said.last().is_none_or(|line: &String| !line.starts_with("zeroboot is ready after ")) {
        said.push(log.next().unwrap_or_else(|| panic!("it does not become ready: {said:#?}")).unwrap());
    }
    let line = said.iter().find(|line| line.contains("listens on")).unwrap();
    std::thread::spawn(move || log.count());
    let address = line.split("listens on ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    (server, address)
}

/// Waits until none of them is left. A process that ended and waits for its new parent is gone for our purpose.
fn wait_until_gone(family: &[i32]) {
    wait_for("end of every process", Duration::from_secs(30), || {
        family
            .iter()
            .all(|pid| std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z ")))
    });
}

#[test]
fn no_sandbox_survives_a_killed_server() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let (mut server, address) = listening(folder.path());
    let body = json!({"code": "import time; time.sleep(100)", "timeout_seconds": 120}).to_string();
    let mut stream = client::connect(address);
    stream.write_all(&client::request("POST", "/v1/exec", &[fixture::JSON], body.as_bytes())).unwrap();
    wait_for("live sandbox", patience(Duration::from_secs(20)), || {
        let health = client::exchange(address, &client::request("GET", "/v1/health", &[], b""));
        health.json()["live"] == 1
    });
    let family = descendants(server.id());
    assert!(family.len() > 3, "{family:?}");
    kill_9(server.id() as i32);
    server.wait().unwrap();
    wait_until_gone(&family);
}

/// Control groups of this name, in any hierarchy.
fn groups(name: &str) -> Vec<std::path::PathBuf> {
    let (mut found, mut todo) = (Vec::new(), vec![std::path::PathBuf::from("/sys/fs/cgroup")]);
    while let Some(folder) = todo.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name() == name {
                found.push(entry.path());
            } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                todo.push(entry.path());
            }
        }
    }
    found
}

/// Mounts of this host that a server may have made: others come and go.
fn mounts() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let ours = |line: &&str| {
        let point = line.split_whitespace().nth(4).unwrap_or_default();
        line.contains("zeroboot") || ["/home/sandbox", "/sys"].iter().any(|root| point.starts_with(root))
    };
    text.lines().filter(ours).map(str::to_owned).collect()
}

#[test]
fn a_killed_server_takes_its_live_sandboxes_along_and_their_clients_hear_of_it() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let temporary = folder.path().join("tmp");
    let before = mounts();
    let (mut server, address) = listening(folder.path());
    let ask = |method: &str, path: &str, body: &Value| {
        client::exchange(address, &client::request(method, path, &[fixture::JSON], body.to_string().as_bytes()))
    };
    let mut made = None;
    wait_for("a sandbox", patience(Duration::from_secs(60)), || {
        made = Some(ask("POST", "/v1/sandboxes", &json!({}))).filter(|answer| answer.status == 201);
        made.is_some()
    });
    let id = made.unwrap().json()["id"].as_str().unwrap().to_owned();
    let state = ask("POST", &format!("/v1/sandboxes/{id}/run"), &json!({"code": "x = 1"}));
    assert_eq!(state.json()["outcome"], "ok", "{}", state.text());
    let background = json!({"command": "touch file; exec sleep 600", "background": true});
    assert_eq!(ask("POST", &format!("/v1/sandboxes/{id}/commands"), &background).status, 201);
    // One follows a command, one waits for a cell.
    let cli = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zeroboot"));
        command.arg("sandbox").args(args).env("ZEROBOOT_BASE_URL", format!("http://{address}"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut follows = cli(&["exec", &id, "--", "sh", "-c", "echo on; exec sleep 600"]);
    let mut on = [0; 3];
    follows.stdout.as_mut().unwrap().read_exact(&mut on).unwrap();
    let waits = cli(&["run", &id, "-c", "open('begun', 'w').close(); import time; time.sleep(600)"]);
    wait_for("the cell", patience(Duration::from_secs(20)), || {
        ask("GET", &format!("/v1/sandboxes/{id}/files/stat?path=begun"), &json!({})).status == 200
    });
    let family = descendants(server.id());
    assert!(family.len() > 3, "{family:?}");

    kill_9(server.id() as i32);
    server.wait().unwrap();
    for client in [follows, waits] {
        let done = client.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(125), "{said}");
        let told = said.contains("broke") || said.contains("ended before the run did");
        assert!(told && said.contains("the server may have done"), "{said}");
    }
    let done = cli(&["show", &id]).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(125) && said.contains("no server at"), "{said}");
    wait_until_gone(&family);
    wait_for("end of its mounts", Duration::from_secs(30), || mounts() == before);
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0);

    // The groups of a killed server are empty. The next one removes them, and knows nothing of its sandboxes.
    let old = format!("zeroboot-{}", server.id());
    let (mut next, address) = listening(folder.path());
    assert_eq!(groups(&old), [] as [std::path::PathBuf; 0]);
    let shown = client::exchange(address, &client::request("GET", &format!("/v1/sandboxes/{id}"), &[], b""));
    assert_eq!((shown.status, &shown.json()["code"]), (404, &json!("sandbox_not_found")));
    assert!(Command::new("kill").args(["-TERM", &next.id().to_string()]).status().unwrap().success());
    assert!(next.wait().unwrap().success());
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0);
}

#[test]
fn the_program_ends_in_order_on_sigterm() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let notify = folder.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(patience(Duration::from_secs(30)))).unwrap();
    let mut server =
        serve(folder.path()).env("NOTIFY_SOCKET", &notify).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut buffer = [0; 200];
    let count = manager.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..count], b"STATUS=Warming the templates");
    let count = manager.recv(&mut buffer).unwrap();
    assert!(buffer[..count].starts_with(b"READY=1"));
    assert!(Command::new("kill").args(["-TERM", &server.id().to_string()]).status().unwrap().success());
    let count = manager.recv(&mut buffer).unwrap();
    assert!(buffer[..count].starts_with(b"STOPPING=1"));
    assert!(server.wait().unwrap().success());
}

#[test]
fn a_server_that_cannot_be_safe_does_not_start() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("keys.json");
    std::fs::write(&broken, r#"{"keys": ["zb_live_secret"]}"#).unwrap();
    let broken = broken.to_str().unwrap();
    for args in [
        &["--listen", "0.0.0.0:0"][..],
        &["--listen", "127.0.0.1:0", "--keys-file", "/nonexistent"],
        &["--listen", "127.0.0.1:0", "--keys-file", broken],
    ] {
        let done = Command::new(env!("CARGO_BIN_EXE_zeroboot")).arg("serve").args(args).output().unwrap();
        let text = String::from_utf8_lossy(&done.stderr);
        assert!(!done.status.success(), "{args:?}");
        assert!(text.contains("key"), "{args:?}: {}, {text}", done.status);
        assert!(!text.contains("secret"), "{text}");
    }
}

#[test]
#[ignore = "a measurement; `zeroboot bench serve` is the real one"]
fn what_http_adds() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let fixture = Fixture::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let overhead = runtime.block_on(zeroboot_server::measure_overhead(&fixture.engine, "python", 200)).unwrap();
    let quantile = |times: &[Duration], at| zeroboot_server::Overhead::quantile(times, at);
    for at in [0.5, 0.9, 0.99] {
        eprintln!("{at}: direct {:?}, HTTP {:?}", quantile(&overhead.direct, at), quantile(&overhead.http, at));
    }
    eprintln!("added at the median: {:?}", overhead.added_at_median());
}
