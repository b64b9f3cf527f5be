//! Many sandboxes, many operations: no answer ever comes to the wrong one.

use serde_json::json;
use zeroboot_engine::Isolation;

use crate::{
    fixture::{Fixture, Setup, isolation},
    guest::Guest,
};

fn operate(guest: &Guest<'_>, sandbox: usize, n: usize) {
    let nonce = format!("nonce-{sandbox}-{n}");
    match n % 5 {
        0 => assert_eq!(guest.value(&format!("'{nonce}'")), format!("'{nonce}'")),
        1 => assert_eq!(guest.shell(&format!("echo {nonce}"))["stdout"], format!("{nonce}\n")),
        2 => {
            let put = guest.ask("PUT", &format!("/files?path={nonce}"), &[], nonce.as_bytes());
            assert_eq!(put.status, 200, "{}", put.text());
            assert_eq!(guest.get(&format!("/files?path={nonce}")).text(), nonce);
        }
        3 => {
            let (text, _) = guest.stream("POST", "/commands", &json!({"argv": ["cat"], "stdin": nonce})).rest();
            assert_eq!(text, nonce);
        }
        _ => {
            let id = guest.background(json!({"argv": ["echo", nonce], "tag": nonce}));
            let (text, _) = guest.stream("GET", &format!("/commands/{id}/output"), &json!(null)).rest();
            assert_eq!(text, format!("{nonce}\n"));
            assert_eq!(guest.command(&id)["tag"], nonce.as_str());
        }
    }
}

#[test]
fn twenty_sandboxes_with_twenty_operations_each_get_their_own_answers() {
    let (sandboxes, operations) = if isolation() == Isolation::Vm { (5, 10) } else { (20, 20) };
    let fixture: Fixture = Setup { own_engine: true, pool: 4, ..Setup::default() }.start();
    let guests: Vec<Guest<'_>> = (0..sandboxes).map(|_| Guest::with(&fixture, &json!({"memory_mb": 256}))).collect();
    for (at, guest) in guests.iter().enumerate() {
        guest.run(&format!("me = {at}"));
    }
    std::thread::scope(|scope| {
        for (sandbox, guest) in guests.iter().enumerate() {
            for half in 0..2 {
                scope.spawn(move || {
                    for n in (half..operations).step_by(2) {
                        operate(guest, sandbox, n);
                    }
                });
            }
        }
    });
    for (at, guest) in guests.iter().enumerate() {
        assert_eq!(guest.value("me"), at.to_string());
    }
}
