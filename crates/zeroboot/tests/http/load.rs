//! Many connections at once for a short time; `tests/load/run` does it for a minute with an ordinary load generator.

use std::{
    collections::BTreeMap,
    io::{BufReader, Write},
    sync::Mutex,
    time::{Duration, Instant},
};

use serde_json::json;
use zeroboot_engine::Isolation;

use crate::{
    client::{self, connect, read_answer},
    fixture::{JSON, Setup, isolation, wait_for},
};

#[test]
fn under_load_every_answer_is_right_or_an_honest_503() {
    let fixture =
        Setup { pool: 4, max_live: 8, admission_wait: Duration::from_millis(200), ..Setup::default() }.start();
    let counts = Mutex::new(BTreeMap::<u16, usize>::new());
    let until =
        Instant::now() + if isolation() == Isolation::Vm { Duration::from_secs(10) } else { Duration::from_secs(4) };
    std::thread::scope(|scope| {
        for client in 0..50 {
            let (fixture, counts) = (&fixture, &counts);
            scope.spawn(move || {
                let mut reader = BufReader::new(connect(fixture.address));
                for round in 0.. {
                    if Instant::now() > until {
                        return;
                    }
                    let number = client * 1000 + round;
                    let body = json!({"code": format!("print({number} + 1)")}).to_string();
                    reader.get_mut().write_all(&client::request("POST", "/v1/exec", &[JSON], body.as_bytes())).unwrap();
                    let answer = read_answer(&mut reader).unwrap();
                    match answer.status {
                        200 => assert_eq!(answer.json()["stdout"], format!("{}\n", number + 1)),
                        503 => {
                            assert_eq!(answer.json()["code"], "busy");
                            assert!(answer.header("retry-after").is_some());
                        }
                        other => panic!("{other}: {}", answer.text()),
                    }
                    *counts.lock().unwrap().entry(answer.status).or_default() += 1;
                }
            });
        }
    });
    let counts = counts.into_inner().unwrap();
    assert!(counts.get(&200).is_some_and(|count| *count > 8), "no place was given on: {counts:?}");
    fixture.wait_for_live(0, Duration::from_secs(5));
    wait_for("connections to end", Duration::from_secs(5), || {
        fixture.get("/v1/metrics").text().contains("\nzeroboot_http_connections 1\n")
    });
}
