//! Packs each runner of `runtimes/` into one file: its path is its program, wherever it is put. The same sources always
//! give the same bytes.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

fn main() {
    let runtimes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../runtimes");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for (language, extension, packed, pack) in [
        ("python", "py", "python.pyz", zip as fn(&[(String, Vec<u8>)]) -> Vec<u8>),
        ("node", "cjs", "node.cjs", bundle),
    ] {
        let root = runtimes.join(language);
        println!("cargo::rerun-if-changed={}", root.display());
        let mut files = Vec::new();
        collect(&root, &root, extension, &mut files);
        files.sort();
        fs::write(out.join(packed), pack(&files)).expect("OUT_DIR can be written");
    }
}

/// Every source file below `directory`, by its path from `root`.
fn collect(root: &Path, directory: &Path, extension: &str, files: &mut Vec<(String, Vec<u8>)>) {
    for entry in fs::read_dir(directory).expect("the runner's sources") {
        let path = entry.expect("the runner's sources").path();
        if path.is_dir() {
            collect(root, &path, extension, files);
        } else if path.extension().is_some_and(|found| found == extension) {
            let name = path.strip_prefix(root).expect("it lies below").to_str().expect("names are ASCII").to_owned();
            files.push((name, fs::read(&path).expect("the runner's sources")));
        }
    }
}

/// A zipapp: Python runs an archive with a `__main__.py` as it runs a script. Stored, not compressed: the interpreter needs
/// no zlib for it.
fn zip(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    // PKWARE's APPNOTE 4.3.7, 4.3.12 and 4.3.16.
    let (mut archive, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in files {
        let offset = archive.len() as u32;
        let mut common = Vec::new();
        // Version 2.0, no flags, stored, midnight of 1980-01-01.
        for field in [20_u16, 0, 0, 0, 0x21] {
            common.extend_from_slice(&field.to_le_bytes());
        }
        for field in [crc32(data), data.len() as u32, data.len() as u32] {
            common.extend_from_slice(&field.to_le_bytes());
        }
        common.extend_from_slice(&(name.len() as u16).to_le_bytes());
        common.extend_from_slice(&0_u16.to_le_bytes());
        archive.extend_from_slice(b"PK\x03\x04");
        archive.extend_from_slice(&common);
        archive.extend_from_slice(name.as_bytes());
        archive.extend_from_slice(data);
        directory.extend_from_slice(b"PK\x01\x02\x14\x00");
        directory.extend_from_slice(&common);
        // No comment, disk 0, no attributes.
        directory.extend_from_slice(&[0; 10]);
        directory.extend_from_slice(&offset.to_le_bytes());
        directory.extend_from_slice(name.as_bytes());
    }
    let at = archive.len() as u32;
    archive.extend_from_slice(&directory);
    archive.extend_from_slice(b"PK\x05\x06\0\0\0\0");
    for _ in 0..2 {
        archive.extend_from_slice(&(files.len() as u16).to_le_bytes());
    }
    archive.extend_from_slice(&(directory.len() as u32).to_le_bytes());
    archive.extend_from_slice(&at.to_le_bytes());
    archive.extend_from_slice(&[0; 2]);
    archive
}

fn crc32(data: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !data.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

/// One script: each file is a function, and `require('./name')` calls it the first time. `main.cjs` begins.
fn bundle(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut script = b"'use strict';\nconst files = {\n".to_vec();
    for (name, data) in files {
        script.extend_from_slice(format!("'./{name}'(module, exports, require) {{\n").as_bytes());
        script.extend_from_slice(data);
        script.extend_from_slice(b"},\n");
    }
    script.extend_from_slice(
        b"};
const loaded = {};
function load(name) {
  if (!(name in files)) return require(name);
  if (!loaded[name]) files[name](loaded[name] = { exports: {} }, loaded[name].exports, load);
  return loaded[name].exports;
}
load('./main.cjs');
",
    );
    script
}
