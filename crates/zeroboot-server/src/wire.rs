//! Requests as they come over the wire, and their way into the engine's words (step 1 of an exec).
//!
//! | file | duty |
//! |---|---|
//! | `read.rs` | from JSON to a body, with errors that name the field |
//! | `few.rs` | lists and objects that keep no more items than allowed |
//! | `data.rs` | content of a file or of standard input |
//! | `batch.rs` | several execs in one body |
//! | `catalog.rs` | templates and languages as requests name them |
//! | `bounds.rs` | values, held against the server's bounds |

mod batch;
mod bounds;
mod catalog;
mod data;
mod few;
mod read;

use serde::Deserialize;
use utoipa::ToSchema;
use zeroboot_engine::{ExecRequest, InputFile, MAX_ENV, MAX_FILES, Stdin};

use self::catalog::{guest_language, quoted};
pub use self::read::nearest;
pub(crate) use self::{
    batch::{BatchBody, parse_batch},
    bounds::{descriptors, positive, within},
    catalog::{Catalog, Named},
    data::{BytesObject, Data, DataSchema, TextObject},
    few::{Few, FewNamed},
    read::{Object, parse, whole},
};
use crate::{config::RequestLimits, error::ApiError};

/// One piece of code to run in one fresh sandbox.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = ExecRequest)]
pub(crate) struct ExecBody {
    /// The code.
    #[schema(min_length = 1, example = "print(1 + 1)")]
    pub(crate) code: String,
    /// The language: `python`, `node`, `bash` or `typescript`; `python` if neither this nor `template` is given.
    /// `javascript` is another word for `node`. `bash` runs in a Python template and `typescript` in a Node template, so
    /// these two may be given together with `template`.
    #[schema(example = "python")]
    pub(crate) language: Option<String>,
    /// The template's name, instead of a language.
    pub(crate) template: Option<String>,
    /// Timeout of the run in seconds. The server's default is 30 and its maximum 300 unless configured otherwise.
    #[schema(exclusive_minimum = 0)]
    pub(crate) timeout_seconds: Option<f64>,
    /// Standard input: text, or bytes as base64. Without it, standard input is empty.
    #[schema(value_type = Option<DataSchema>)]
    pub(crate) stdin: Option<Data>,
    /// Environment variables, added to the template's.
    #[schema(value_type = Option<BTreeMap<String, String>>)]
    pub(crate) env: Option<FewNamed<String, MAX_ENV>>,
    /// Arguments (`sys.argv[1:]`, `process.argv.slice(2)`).
    #[schema(value_type = Option<Vec<String>>)]
    pub(crate) args: Option<Few<String, MAX_ENV>>,
    /// Files to put into the working directory: path to content.
    #[schema(value_type = Option<BTreeMap<String, DataSchema>>)]
    pub(crate) files: Option<FewNamed<Data, MAX_FILES>>,
    /// Paths to bring back: files, directories, and patterns such as `out/*.csv` or `**/*.png`.
    #[schema(value_type = Option<Vec<String>>)]
    pub(crate) output_files: Option<Few<String, MAX_FILES>>,
    /// What the sandbox may use.
    #[schema(value_type = Option<LimitsBody>)]
    pub(crate) limits: Option<Object<LimitsBody>>,
}

/// What the sandbox may use. Each limit has a default and a maximum, and none can be switched off.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Limits)]
pub(crate) struct LimitsBody {
    /// Memory of all its processes, MiB.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) memory_mb: Option<u64>,
    /// Processes and threads at once.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) processes: Option<u64>,
    /// Bytes of standard output and standard error together.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) output_bytes: Option<u64>,
    /// CPU time of all its processes, seconds.
    #[schema(exclusive_minimum = 0)]
    pub(crate) cpu_seconds: Option<f64>,
    /// The largest file that it may write, MiB.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1)]
    pub(crate) file_size_mb: Option<u64>,
    /// Open descriptors of one process.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 32)]
    pub(crate) open_files: Option<u64>,
}

impl ExecBody {
    /// Step 1 of an exec: what the engine is asked, and its template.
    pub(crate) fn into_request(
        self,
        catalog: &Catalog,
        bounds: &RequestLimits,
    ) -> Result<(ExecRequest, Named), ApiError> {
        let guest = self.language.as_deref().and_then(guest_language);
        let template = match (guest, &self.template) {
            (Some((asked, host, _)), Some(name)) => {
                let template = catalog.choose(None, Some(name))?;
                if *template.language != *host {
                    let text = format!("{asked} runs in a {host} template, and {} is not one", quoted(name));
                    return Err(ApiError::new("invalid_request", text));
                }
                template
            }
            (Some((asked, host, _)), None) => catalog.choose(Some(host), None).map_err(|_| {
                let text = format!("{asked} runs in a {host} template, and this server has none");
                ApiError::new("unknown_language", text)
            })?,
            (None, template) => catalog.choose(self.language.as_deref(), template.as_deref())?,
        };
        let mut request = ExecRequest::new(&*template.name, self.code);
        if let Some((_, _, name)) = guest {
            request.name = name.into();
        }
        request.limits.timeout = match self.timeout_seconds {
            None => bounds.default_timeout,
            Some(given) => {
                let time = positive(given).filter(|time| *time <= bounds.max_timeout);
                time.ok_or_else(|| {
                    let most = bounds.max_timeout.as_secs_f64();
                    ApiError::new("invalid_timeout", format!("timeout_seconds must be above 0 and at most {most}"))
                })?
            }
        };
        let limits = self.limits.map(|Object(limits)| limits).unwrap_or_default();
        let mib = 1024 * 1024;
        let memory = limits.memory_mb.map(|count| count.saturating_mul(mib));
        request.limits.memory = within("limits.memory_mb", memory, bounds.default_memory, bounds.max_memory, mib)?;
        let (processes, most) = (limits.processes, bounds.max_processes.into());
        let processes = within("limits.processes", processes, bounds.default_processes.into(), most, 1)?;
        request.limits.processes = u32::try_from(processes).unwrap_or(bounds.max_processes);
        request.limits.output =
            within("limits.output_bytes", limits.output_bytes, bounds.default_output, bounds.max_output, 1)?;
        let file_size = limits.file_size_mb.map(|count| count.saturating_mul(mib));
        let (usual, most) = (bounds.default_file_size, bounds.max_file_size);
        request.limits.file_size = within("limits.file_size_mb", file_size, usual, most, mib)?;
        let (usual, most) = (bounds.default_open_files, bounds.max_open_files);
        request.limits.open_files = descriptors("limits.open_files", limits.open_files, usual, most)?;
        request.limits.cpu = match limits.cpu_seconds {
            None => None,
            Some(given) => {
                let time = positive(given);
                Some(time.ok_or_else(|| ApiError::new("invalid_limits", "limits.cpu_seconds must be above 0"))?)
            }
        };
        request.args = self.args.map(|Few(args)| args).unwrap_or_default();
        request.env = self.env.map(|FewNamed(env)| env).unwrap_or_default().into_iter().collect();
        request.output_files = self.output_files.map(|Few(paths)| paths).unwrap_or_default();
        if let Some(data) = self.stdin {
            request.stdin = Stdin::Bytes(data.bytes);
        }
        let files = self.files.map(|FewNamed(files)| files).unwrap_or_default().into_iter();
        request.files =
            files.map(|(path, Data { bytes: data, executable })| InputFile { path, data, executable }).collect();
        request.check().map_err(zeroboot_engine::ExecError::from)?;
        Ok((request, template.clone()))
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
