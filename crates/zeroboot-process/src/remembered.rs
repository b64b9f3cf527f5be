//! What an interpreter said of itself, which takes as long as its start does.

use std::{
    env, fs,
    io::Read as _,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::cache::{self, Stamp};

/// First field of a file of the cache. Another format has another number.
const MAGIC: &[u8] = b"zeroboot interpreter 1";
/// Most files that a word is taken to depend on. A Python has some tens.
const MOST: usize = 2000;

/// The interpreter's words, by `ask` unless it is known that they are still the same.
///
/// They depend on the program, on `pyvenv.cfg` beside or above it, and for Python on the directories of `sys.path`: what
/// is in them, their `.pth` files, `sitecustomize`. All these have stamps. A program that is a script can depend on
/// anything, so it is always asked.
pub(crate) fn said<E>(program: &Path, args: &[&str], ask: impl FnOnce() -> Result<String, E>) -> Result<String, E> {
    said_in(cache::place(), program, args, ask)
}

fn said_in<E>(
    place: Option<&Path>,
    program: &Path,
    args: &[&str],
    ask: impl FnOnce() -> Result<String, E>,
) -> Result<String, E> {
    let Some(place) = place.filter(|_| program.is_absolute() && is_program(program)) else { return ask() };
    let file = cache::file(place, "interpreters", program);
    let args = args.join("\n");
    let head: &[&[u8]] = &[MAGIC, program.as_os_str().as_bytes(), args.as_bytes()];
    if let Some(words) = cache::load(&file, head).and_then(|fields| decode(&fields)) {
        return Ok(words);
    }
    // Before it is asked: what changes meanwhile makes the stamps old ones.
    let now = SystemTime::now();
    let words = ask()?;
    if let Some(fields) = encode(program, &words, now) {
        // Without it, it is asked again.
        let _not_kept = cache::store(&file, head, &fields);
    }
    Ok(words)
}

/// ELF, not a script.
fn is_program(path: &Path) -> bool {
    let mut magic = [0; 4];
    fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

/// What the words depend on.
fn depends_on(program: &Path, words: &str) -> Vec<PathBuf> {
    let mut all = vec![program.to_owned()];
    // A link in a virtualenv, and what it leads to, each with its surroundings.
    for program in [Some(program.to_owned()), program.canonicalize().ok()].into_iter().flatten() {
        all.extend(program.ancestors().skip(1).take(2).map(|folder| folder.join("pyvenv.cfg")));
        all.push(program);
    }
    for line in words.lines().skip(1) {
        // Its kind may stand before a path.
        let path = Path::new(line.trim_start_matches(['=', '+', '@']));
        all.push(path.to_owned());
        let entries = if path.is_dir() { fs::read_dir(path).ok() } else { None };
        all.extend(["sitecustomize.py", "sitecustomize"].map(|name| path.join(name)));
        let names = entries.into_iter().flatten().flatten().map(|entry| entry.path());
        all.extend(names.filter(|path| path.extension().is_some_and(|extension| extension == "pth")));
    }
    all.sort();
    all.dedup();
    all
}

/// Follows links: what counts is what the interpreter reads.
fn stamp(path: &Path) -> Option<Stamp> {
    fs::metadata(path).ok().map(|metadata| Stamp::of(&metadata))
}

fn encode(program: &Path, words: &str, now: SystemTime) -> Option<Vec<u8>> {
    let all = depends_on(program, words);
    if all.len() > MOST || words.contains('\0') {
        return None;
    }
    let mut fields = words.as_bytes().to_vec();
    fields.push(0);
    for path in all {
        let stamp = stamp(&path);
        if stamp.is_some_and(|stamp| !stamp.is_settled(now)) {
            return None;
        }
        fields.extend_from_slice(path.as_os_str().as_bytes());
        fields.push(0);
        fields.extend_from_slice(stamp.map_or_else(|| "-".to_owned(), |stamp| stamp.words()).as_bytes());
        fields.push(0);
    }
    Some(fields)
}

/// The words, if all that they depend on is as it was.
fn decode(fields: &[u8]) -> Option<String> {
    let mut fields = fields.split(|byte| *byte == 0);
    let words = std::str::from_utf8(fields.next()?).ok()?;
    let mut checked = 0;
    while let Some(path) = fields.next() {
        let kept = match std::str::from_utf8(fields.next()?).ok()? {
            "-" => None,
            words => Some(Stamp::from_words(&mut words.split(' '))?),
        };
        if stamp(Path::new(std::ffi::OsStr::from_bytes(path))) != kept {
            return None;
        }
        checked += 1;
    }
    (checked > 0).then(|| words.to_owned())
}

/// The interpreter that pyenv's script of this name would start, by pyenv's own rules: `PYENV_VERSION`, `.python-version`
/// here or above, pyenv's `version`. The script takes four times as long as Python itself. Nothing where it is not
/// pyenv's, or pyenv has more to decide.
pub(crate) fn behind_shim(program: &Path) -> Option<PathBuf> {
    let here = env::var_os("PYENV_DIR").map(PathBuf::from).or_else(|| env::current_dir().ok())?;
    behind_shim_in(program, env::var("PYENV_VERSION").ok().as_deref(), &here)
}

fn behind_shim_in(program: &Path, named: Option<&str>, here: &Path) -> Option<PathBuf> {
    let (name, shims) = (program.file_name()?, program.parent()?);
    let root = shims.parent().filter(|root| shims.ends_with("shims") && root.join("libexec/pyenv").is_file())?;
    let version = match named.filter(|version| !version.is_empty()) {
        Some(version) => version.to_owned(),
        None => {
            let mut files: Vec<PathBuf> = here.ancestors().map(|folder| folder.join(".python-version")).collect();
            files.push(root.join("version"));
            files.iter().find_map(|file| fs::read_to_string(file).ok())?
        }
    };
    // One version, by its whole name; `system`, lists and beginnings of names are pyenv's business.
    let version = version.trim();
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    if version.is_empty() || version.starts_with('.') || !version.chars().all(plain) {
        return None;
    }
    Some(root.join("versions").join(version).join("bin").join(name)).filter(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, convert::Infallible, time::Duration};

    use super::*;

    #[test]
    fn an_interpreter_is_asked_again_when_anything_that_it_reads_changed() {
        let folder = tempfile::tempdir().unwrap();
        let (cache, bin) = (folder.path().join("cache"), folder.path().join("venv/bin"));
        let site = folder.path().join("venv/lib");
        for path in [&bin, &site] {
            fs::create_dir_all(path).unwrap();
        }
        let program = bin.join("python3");
        fs::write(&program, b"\x7fELF and so on").unwrap();
        let words = format!("Python 3\n{}\n={}\n+{}\n", program.display(), bin.display(), site.display());
        let asked = Cell::new(0);
        let say = || {
            let ask = || {
                asked.set(asked.get() + 1);
                Ok::<_, Infallible>(words.clone())
            };
            assert_eq!(said_in(Some(&cache), &program, &["-c", "1"], ask).unwrap(), words);
            asked.get()
        };
        // A ctime cannot be set, and what changed just now is not kept.
        let settle = || std::thread::sleep(Duration::from_millis(3100));
        assert_eq!((say(), say()), (1, 2));
        settle();
        assert_eq!((say(), say(), say()), (3, 3, 3));
        for (path, content) in [
            (site.join("a.pth"), "/more"),
            (site.join("a.pth"), "/other"),
            (folder.path().join("venv/pyvenv.cfg"), "home = /usr"),
            (site.join("sitecustomize.py"), "import sys"),
            (program.clone(), "\x7fELF of another"),
        ] {
            let before = say();
            fs::write(&path, content).unwrap();
            assert_eq!(say(), before + 1, "{}", path.display());
            settle();
            assert_eq!((say(), say()), (before + 2, before + 2), "{}", path.display());
        }
        // Another question is another answer.
        let other = said_in(Some(&cache), &program, &["-c", "2"], || Ok::<_, Infallible>("else".into())).unwrap();
        assert_eq!(other, "else");
        // A script can depend on anything.
        fs::write(&program, "#!/bin/sh\n").unwrap();
        settle();
        let before = say();
        assert_eq!((say(), say()), (before + 1, before + 2));
    }

    #[test]
    fn the_interpreter_of_a_shim_is_the_one_that_pyenv_says() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for path in ["shims", "libexec", "versions/3.1/bin"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        for path in ["shims/python3", "libexec/pyenv", "versions/3.1/bin/python3"] {
            fs::write(root.join(path), "").unwrap();
        }
        let shim = root.join("shims/python3");
        let (one, two) = (root.join("versions/3.1/bin/python3"), root.join("versions/3.2/bin/python3"));
        for (version, found) in
            [("3.1\n", true), ("system\n", false), ("3.1\n3.2\n", false), ("../3.1", false), ("", false)]
        {
            fs::write(root.join("version"), version).unwrap();
            assert_eq!(behind_shim_in(&shim, None, root), found.then(|| one.clone()), "{version:?}");
        }
        // What is nearer wins.
        fs::create_dir_all(root.join("versions/3.2/bin")).unwrap();
        fs::write(&two, "").unwrap();
        fs::create_dir_all(root.join("project/below")).unwrap();
        fs::write(root.join("project/.python-version"), "3.2").unwrap();
        assert_eq!(behind_shim_in(&shim, None, &root.join("project/below")), Some(two));
        assert_eq!(behind_shim_in(&shim, Some("3.1"), &root.join("project/below")), Some(one));
        assert_eq!(behind_shim_in(&shim, Some("3.3"), &root.join("project/below")), None);
        fs::remove_file(root.join("libexec/pyenv")).unwrap();
        fs::write(root.join("version"), "3.1").unwrap();
        assert_eq!(behind_shim_in(&shim, None, root), None);
    }
}
