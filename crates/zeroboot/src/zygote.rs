//! The hidden `__zygote` command: one template, on the descriptors that the front placed.

use std::{io::Read, path::Path};

use zeroboot_engine::ZygoteSpec;
use zeroboot_process::{ZygoteConfig, run_zygote};
use zeroboot_proto::Kind;
use zeroboot_sys::{
    control::{CONTROL_FD, REPORT_FD},
    process,
};
use zeroboot_vm::Prefault;

use crate::assets::ASSETS;

/// Runs a zygote. Returns only the exit status of a failure; its reason went to the front.
pub(crate) fn main() -> u8 {
    // What whoever started the server left open is nobody's business here: packages are imported, VMs are made.
    if process::close_from(CONTROL_FD as u32 + 1).is_err() {
        return 125;
    }
    let mut json = Vec::new();
    let spec = std::io::stdin()
        .read_to_end(&mut json)
        .map_err(|e| e.to_string())
        .and_then(|_| serde_json::from_slice::<ZygoteSpec>(&json).map_err(|e| e.to_string()));
    let error = match spec {
        Err(error) => format!("read the template's description: {error}"),
        Ok(ZygoteSpec::Process { runtime, interpreter, paths, warm, env, node_modules }) => {
            run_zygote(&ZygoteConfig { runtime, interpreter, paths, warm, env, node_modules }, ASSETS).to_string()
        }
        Ok(ZygoteSpec::Vm { template }) => return vm(&template),
    };
    let mut frame = Vec::new();
    zeroboot_proto::encode(&mut frame, Kind::Failure, error.as_bytes());
    // Without a front there is nobody to tell.
    let _gone = rustix::io::write(process::borrow_fd(REPORT_FD), &frame);
    125
}

/// A zygote that holds a VM template. It reports its failures itself.
fn vm(template: &Path) -> u8 {
    let (Some(report), Some(control)) = (process::inherited_fd(REPORT_FD), process::inherited_fd(CONTROL_FD)) else {
        return 125;
    };
    match zeroboot_vm::zygote(template, Prefault::All, report, control) {
        Ok(()) => 0,
        Err(_reported) => 125,
    }
}
