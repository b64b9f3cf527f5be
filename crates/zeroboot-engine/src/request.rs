//! What a caller asks for: plain data, checked once by [`ExecRequest::check`].

use std::{collections::HashSet, time::Duration};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use zeroboot_proto::pattern::has_wildcard;

/// Most bytes of code in one exec (16 MiB).
pub const MAX_CODE: usize = 16 * 1024 * 1024;
/// Most bytes of all input files of one exec (64 MiB).
pub const MAX_FILES_BYTES: usize = 64 * 1024 * 1024;
/// Most input files, and most output files, of one exec.
pub const MAX_FILES: usize = 256;
/// Most patterns among the output files of one exec. The server compares each file that comes back with each pattern.
pub const MAX_PATTERNS: usize = 16;
/// Most bytes of one pattern.
pub const MAX_PATTERN_BYTES: usize = 256;
/// Fewest descriptors that a limit of open files may leave: a runner has some of its own.
pub const MIN_OPEN_FILES: u32 = 32;
/// Most environment variables, and most arguments, of one exec.
pub const MAX_ENV: usize = 256;
/// Most bytes of one environment variable or argument.
pub const MAX_ENV_BYTES: usize = 60 * 1024;

/// What a sandbox may use. Every field has a finite default; none can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Timeout of the run.
    pub timeout: Duration,
    /// CPU time of all the sandbox's processes. `None`: as the timeout.
    pub cpu: Option<Duration>,
    /// Memory of all the sandbox's processes, bytes.
    pub memory: u64,
    /// Processes and threads alive at once.
    pub processes: u32,
    /// Bytes of standard output and standard error together.
    pub output: u64,
    /// Bytes of the largest file that can be written.
    pub file_size: u64,
    /// Open descriptors of one process.
    pub open_files: u32,
    /// Bytes of all output files that are brought back.
    pub output_files: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        const MIB: u64 = 1024 * 1024;
        Limits {
            timeout: Duration::from_secs(30),
            cpu: None,
            memory: 512 * MIB,
            processes: 64,
            output: 16 * MIB,
            file_size: 64 * MIB,
            open_files: 256,
            output_files: 16 * MIB,
        }
    }
}

/// A file to put into the sandbox before the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputFile {
    /// Relative to the working directory.
    pub path: String,
    /// Its bytes.
    pub data: Bytes,
    /// Executable by its owner.
    pub executable: bool,
}

/// The name of code for the shell that is in no file.
pub const INLINE_BASH: &str = "-bash";
/// The name of TypeScript that is in no file.
pub const INLINE_TYPESCRIPT: &str = "-typescript";

/// Where standard input comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Stdin {
    /// Nothing: at its end from the start.
    #[default]
    Empty,
    /// These bytes, then the end.
    Bytes(Bytes),
    /// Sent while the code runs, by [`crate::Execution::stdin`].
    Stream,
}

/// One piece of code to run in one fresh sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecRequest {
    /// The name of a template that the engine was started with.
    pub template: String,
    /// The code.
    pub code: Bytes,
    /// What the code sees as its own path, `argv[0]`: `-c` or a script's name. A script ending in `.sh` or `.bash` is run by
    /// the shell in a Python template, and one in `.ts`, `.mts` or `.cts` as TypeScript in a Node template. So is what is
    /// called [`INLINE_BASH`] or [`INLINE_TYPESCRIPT`].
    pub name: String,
    /// The further arguments.
    pub args: Vec<String>,
    /// Environment variables, added to the template's.
    pub env: Vec<(String, String)>,
    /// Files to put in.
    pub files: Vec<InputFile>,
    /// Paths to bring back: files, directories, patterns ([`zeroboot_proto::pattern`]).
    pub output_files: Vec<String>,
    /// Standard input.
    pub stdin: Stdin,
    /// What it may use.
    pub limits: Limits,
}

impl ExecRequest {
    /// A request with default limits and nothing but code.
    pub fn new(template: impl Into<String>, code: impl Into<Bytes>) -> ExecRequest {
        ExecRequest {
            template: template.into(),
            code: code.into(),
            name: "-c".into(),
            args: Vec::new(),
            env: Vec::new(),
            files: Vec::new(),
            output_files: Vec::new(),
            stdin: Stdin::Empty,
            limits: Limits::default(),
        }
    }

    /// Whether this can be sent to a sandbox at all; the reason if not. (Templates are looked up later.)
    pub fn check(&self) -> Result<(), InvalidRequest> {
        use InvalidRequest as E;
        if self.code.iter().all(u8::is_ascii_whitespace) {
            return Err(E::EmptyCode);
        }
        check_text(&self.code)?;
        if self.limits.timeout.is_zero() {
            return Err(E::ZeroTimeout);
        }
        check_env(&self.env)?;
        check_args(&self.args)?;
        check_args(std::slice::from_ref(&self.name))?;
        if self.files.len() > MAX_FILES || self.output_files.len() > MAX_FILES {
            return Err(E::TooManyFiles);
        }
        let total: usize = self.files.iter().map(|f| f.data.len()).sum();
        if total > MAX_FILES_BYTES {
            return Err(E::FilesTooLarge(total));
        }
        for path in &self.files {
            check_path(&path.path)?;
        }
        for path in &self.output_files {
            // A directory may end in a slash.
            check_path(path.strip_suffix('/').unwrap_or(path))?;
        }
        let mut patterns = self.output_files.iter().filter(|path| has_wildcard(path.as_bytes()));
        if let Some(long) = patterns.clone().find(|pattern| pattern.len() > MAX_PATTERN_BYTES) {
            return Err(E::PatternTooLong(shown(long)));
        }
        if patterns.nth(MAX_PATTERNS).is_some() {
            return Err(E::TooManyPatterns);
        }
        let files: HashSet<&str> = self.files.iter().map(|file| file.path.as_str()).collect();
        for path in &files {
            let mut folders = path.match_indices('/').filter_map(|(at, _)| path.get(..at));
            if let Some(both) = folders.find(|folder| files.contains(folder)) {
                return Err(E::FileAndFolder(shown(both)));
            }
        }
        Ok(())
    }
}

/// Code that a runtime can read, or nothing.
pub(crate) fn check_text(code: &[u8]) -> Result<(), InvalidRequest> {
    use InvalidRequest as E;
    if code.len() > MAX_CODE {
        return Err(E::CodeTooLong(code.len()));
    }
    if let Some(at) = code.iter().position(|&b| b == 0) {
        return Err(E::CodeHasNul(at));
    }
    std::str::from_utf8(code).map(drop).map_err(|error| E::CodeNotUtf8(error.valid_up_to()))
}

/// Environment variables that a process can have.
pub(crate) fn check_env(env: &[(String, String)]) -> Result<(), InvalidRequest> {
    use InvalidRequest as E;
    if env.len() > MAX_ENV {
        return Err(E::TooManyVariables);
    }
    for (key, value) in env {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            return Err(E::BadEnv(key.clone()));
        }
        if key.len() + value.len() >= MAX_ENV_BYTES {
            return Err(E::EnvTooLong(key.clone()));
        }
    }
    Ok(())
}

/// Arguments that a process can have.
pub(crate) fn check_args(args: &[String]) -> Result<(), InvalidRequest> {
    if args.len() > MAX_ENV {
        return Err(InvalidRequest::TooManyVariables);
    }
    let bad = |arg: &String| arg.contains('\0') || arg.len() >= MAX_ENV_BYTES;
    if args.iter().any(bad) { Err(InvalidRequest::BadArgument) } else { Ok(()) }
}

/// A path inside the sandbox: relative to the working directory, no `..`, no empty or NUL parts, none longer than any
/// file system has them.
pub(crate) fn check_path(path: &str) -> Result<(), InvalidRequest> {
    let bad = path.is_empty()
        || path.len() > 1024
        || path.starts_with('/')
        || path.contains('\0')
        || path.split('/').any(|part| part.is_empty() || part == "." || part == ".." || part.len() > 255);
    if bad { Err(InvalidRequest::BadPath(shown(path))) } else { Ok(()) }
}

fn shown(path: &str) -> String {
    path.chars().take(80).collect()
}

/// Why a request is refused before any sandbox is taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidRequest {
    /// Nothing to run.
    #[error("the code is empty")]
    EmptyCode,
    /// Above [`MAX_CODE`].
    #[error("the code has {0} bytes; the limit is {MAX_CODE}")]
    CodeTooLong(usize),
    /// A NUL byte.
    #[error("the code has a NUL byte at offset {0}; remove it")]
    CodeHasNul(usize),
    /// Not UTF-8.
    #[error("the code is not valid UTF-8 from byte {0} on")]
    CodeNotUtf8(usize),
    /// A zero timeout.
    #[error("the timeout is zero; give a timeout above zero")]
    ZeroTimeout,
    /// Above [`MAX_ENV`].
    #[error("too many environment variables or arguments; the limit is {MAX_ENV} of each")]
    TooManyVariables,
    /// Above [`MAX_PATTERNS`].
    #[error("too many patterns in the output files; the limit is {MAX_PATTERNS}")]
    TooManyPatterns,
    /// Above [`MAX_PATTERN_BYTES`].
    #[error("the pattern {0:?} is too long; the limit is {MAX_PATTERN_BYTES} bytes")]
    PatternTooLong(String),
    /// Above [`MAX_FILES`].
    #[error("too many files; the limit is {MAX_FILES} in each direction")]
    TooManyFiles,
    /// A name or value that no environment can hold.
    #[error("environment variable {0:?} has an empty name, a '=' in its name or a NUL byte")]
    BadEnv(String),
    /// Above [`MAX_ENV_BYTES`].
    #[error("environment variable {0:?} is longer than {MAX_ENV_BYTES} bytes")]
    EnvTooLong(String),
    /// An argument that no command line can hold.
    #[error("an argument has a NUL byte or is longer than {MAX_ENV_BYTES} bytes")]
    BadArgument,
    /// Above [`MAX_FILES_BYTES`].
    #[error("the files have {0} bytes together; the limit is {MAX_FILES_BYTES}")]
    FilesTooLarge(usize),
    /// More memory than the whole engine may promise.
    #[error("the memory limit of {asked} bytes is above this server's maximum of {limit} bytes")]
    TooMuchMemory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes that the engine has.
        limit: u64,
    },
    /// A path that leaves the working directory, or that no file can have.
    #[error("path {0:?} must be relative, without '.', '..' or empty parts, at most 1024 bytes and 255 in a part")]
    BadPath(String),
    /// A file that another file's path has as its folder.
    #[error("path {0:?} is a file, and another path uses it as a directory")]
    FileAndFolder(String),
    /// A command without a program.
    #[error("the command is empty; name a program")]
    NoProgram,
    /// A working directory that is not a path.
    #[error("the working directory is empty, longer than 4096 bytes, or has a NUL byte")]
    BadDirectory,
    /// Above [`crate::MAX_TAG`].
    #[error("the tag is longer than {} bytes", crate::MAX_TAG)]
    TagTooLong,
    /// A terminal without room for a character.
    #[error("a terminal needs at least one column and one row")]
    BadTerminal,
    /// A context's name that none can have.
    #[error("a context's name has 1 to 64 letters, digits, '-', '_' or '.'")]
    BadContextName,
    /// A lease above the maximum.
    #[error("the lease may be at most {} s", .0.as_secs())]
    LeaseTooLong(Duration),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(bytes: &'static [u8]) -> Result<(), InvalidRequest> {
        ExecRequest::new("python", bytes).check()
    }

    #[test]
    fn code_that_no_runtime_can_read_is_refused() {
        assert_eq!(code(b" \n\t"), Err(InvalidRequest::EmptyCode));
        assert_eq!(code(b"a\0b"), Err(InvalidRequest::CodeHasNul(1)));
        assert_eq!(code(b"ab\xff"), Err(InvalidRequest::CodeNotUtf8(2)));
        assert_eq!(code(b"print(1)"), Ok(()));
    }

    #[test]
    fn a_path_cannot_leave_the_working_directory() {
        for path in ["", "/", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a//", "a\0b"] {
            let mut request = ExecRequest::new("python", "1");
            request.output_files = vec![path.into()];
            assert!(request.check().is_err(), "{path:?}");
        }
        let mut request = ExecRequest::new("python", "1");
        request.output_files = vec!["a/b.c/..d".into(), "a/".into(), "**/*.csv".into()];
        assert_eq!(request.check(), Ok(()));
    }

    #[test]
    fn patterns_are_few_and_short() {
        let mut request = ExecRequest::new("python", "1");
        request.output_files =
            (0..MAX_FILES).map(|n| if n < MAX_PATTERNS { format!("{n}*") } else { format!("{n}/") }).collect();
        assert_eq!(request.check(), Ok(()));
        request.output_files[MAX_PATTERNS] = "one/more/?".into();
        assert_eq!(request.check(), Err(InvalidRequest::TooManyPatterns));
        request.output_files = vec!["a/".repeat(MAX_PATTERN_BYTES / 2) + "*"];
        assert!(matches!(request.check(), Err(InvalidRequest::PatternTooLong(_))));
    }

    fn with_files(paths: &[&str]) -> Result<(), InvalidRequest> {
        let mut request = ExecRequest::new("python", "1");
        let file = |path: &&str| InputFile { path: (*path).into(), data: Bytes::new(), executable: false };
        request.files = paths.iter().map(file).collect();
        request.check()
    }

    #[test]
    fn files_that_no_folder_can_hold_are_refused() {
        assert_eq!(with_files(&["a", "a/b"]), Err(InvalidRequest::FileAndFolder("a".into())));
        assert_eq!(with_files(&["x/y/z/w", "x/y"]), Err(InvalidRequest::FileAndFolder("x/y".into())));
        assert_eq!(with_files(&["a", "ab/c", "a.b/c", "d/e", "d/f"]), Ok(()));
        let (long, longest) = ("x".repeat(256), "x".repeat(255));
        assert!(with_files(&[&format!("a/{long}/b")]).is_err());
        assert_eq!(with_files(&[&format!("a/{longest}/b")]), Ok(()));
        // Half as many characters.
        assert!(with_files(&[&"é".repeat(128)]).is_err());
        let many: Vec<String> = (0..=MAX_FILES).map(|at| at.to_string()).collect();
        assert_eq!(with_files(&many.iter().map(String::as_str).collect::<Vec<_>>()), Err(InvalidRequest::TooManyFiles));
    }

    #[test]
    fn an_environment_variable_needs_a_name() {
        for (key, value) in [("", "x"), ("A=B", "x"), ("A", "x\0y")] {
            let mut request = ExecRequest::new("python", "1");
            request.env = vec![(key.into(), value.into())];
            assert!(request.check().is_err(), "{key:?}");
        }
    }
}
