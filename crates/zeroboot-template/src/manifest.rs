//! `manifest.toml`: what a template is, for people and for the checks before it is used.

use serde::{Deserialize, Serialize};

use crate::{
    assemble::Provenance,
    recipe::{Recipe, Runtime, is_template_name},
};

/// The manifest's version; other versions are refused.
pub(crate) const FORMAT: u32 = 1;
/// Most bytes of a manifest, which is a few KiB.
pub(crate) const MOST_BYTES: u64 = 1 << 20;

/// What a template is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of this manifest; another one is refused.
    pub format: u32,
    /// The template's name, which is its directory's.
    pub name: String,
    /// The language.
    pub runtime: Runtime,
    /// `vm`.
    pub engine: String,
    /// The version of Zeroboot that built it.
    pub zeroboot: String,
    /// Seconds since 1970.
    pub built_at: u64,
    /// `memory.img`.
    pub memory: FileFacts,
    /// `state.bin`.
    pub state: FileFacts,
    /// How it was warmed.
    pub warm_up: WarmUp,
    /// What it was made by.
    pub recipe: Recipe,
    /// What it was made from.
    pub provenance: Provenance,
    /// What the VM engine says of the snapshot and of the host that it belongs to. The engine checks its own copy in
    /// `state.bin`; this one is for people.
    #[serde(default)]
    pub snapshot: toml::Table,
}

/// A file of the template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileFacts {
    /// Its length.
    pub bytes: u64,
    /// Its BLAKE3; of `memory.img`, that of [`crate::memory_hash`].
    pub blake3: String,
}

/// How a template was warmed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmUp {
    /// The runtime's version as it says it, such as `Python 3.11.2`.
    pub runtime_version: String,
    /// Modules that were imported.
    pub modules: Vec<String>,
    /// From the start of the boot to the snapshot, seconds.
    pub seconds: f64,
}

/// Why a manifest is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// Not TOML, or a field is missing, unknown or of the wrong type.
    #[error("this is not a manifest")]
    Syntax(#[from] toml::de::Error),
    /// Another version.
    #[error("the manifest has format {0}; this zeroboot reads format {FORMAT}")]
    Format(i64),
    /// A value that cannot be.
    #[error("the value of {0} is not possible")]
    Value(&'static str),
}

impl Manifest {
    /// Reads a manifest and checks what can be checked without the files.
    pub fn from_toml(text: &str) -> Result<Manifest, ManifestError> {
        // The version first: the rest of another version is nothing to judge.
        let table: toml::Table = toml::from_str(text)?;
        match table.get("format").and_then(toml::Value::as_integer) {
            Some(format) if format == i64::from(FORMAT) => {}
            Some(format) => return Err(ManifestError::Format(format)),
            None => return Err(ManifestError::Value("format")),
        }
        let manifest: Manifest = toml::from_str(text)?;
        let is_hash = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_template_name(&manifest.name) {
            return Err(ManifestError::Value("name"));
        }
        if manifest.engine != "vm" {
            return Err(ManifestError::Value("engine"));
        }
        if !is_hash(&manifest.memory.blake3)
            || manifest.memory.bytes == 0
            || !manifest.memory.bytes.is_multiple_of(4096)
        {
            return Err(ManifestError::Value("memory"));
        }
        if !is_hash(&manifest.state.blake3) || manifest.state.bytes == 0 {
            return Err(ManifestError::Value("state"));
        }
        if manifest.recipe.runtime != manifest.runtime {
            return Err(ManifestError::Value("runtime"));
        }
        Ok(manifest)
    }

    /// The manifest's text.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// The template is what a build by this recipe with this agent and runner would give, but for newer packages.
    pub fn is_built_from(&self, recipe: &Recipe, agent: &[u8], runner: &[u8]) -> bool {
        self.recipe == *recipe
            && self.provenance.agent_blake3 == blake3::hash(agent).to_hex().as_str()
            && self.provenance.runner_blake3 == blake3::hash(runner).to_hex().as_str()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn example() -> Manifest {
        let recipe = Recipe::embedded("python").unwrap();
        let mut snapshot = toml::Table::new();
        snapshot.insert("host".to_owned(), toml::Table::from_iter([("kvm".to_owned(), "kvm_amd".into())]).into());
        Manifest {
            format: FORMAT,
            name: "python".to_owned(),
            runtime: Runtime::Python,
            engine: "vm".to_owned(),
            zeroboot: "0.1.0".to_owned(),
            built_at: 1_700_000_000,
            memory: FileFacts { bytes: 512 << 20, blake3: "a".repeat(64) },
            state: FileFacts { bytes: 30_000, blake3: "0".repeat(64) },
            warm_up: WarmUp {
                runtime_version: "Python 3.11.2".to_owned(),
                modules: vec!["numpy".to_owned()],
                seconds: 1.5,
            },
            recipe,
            provenance: Provenance::default(),
            snapshot,
        }
    }

    #[test]
    fn a_manifest_survives_its_text() {
        let manifest = example();
        assert_eq!(Manifest::from_toml(&manifest.to_toml().unwrap()).unwrap(), manifest);
    }

    #[test]
    fn another_version_is_refused_as_such() {
        let refused = Manifest::from_toml("format = 2\nnonsense = true").unwrap_err();
        assert_eq!(refused.to_string(), "the manifest has format 2; this zeroboot reads format 1");
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        let refused = |change: fn(&mut Manifest)| {
            let mut manifest = example();
            change(&mut manifest);
            Manifest::from_toml(&manifest.to_toml().unwrap()).unwrap_err().to_string()
        };
        assert_eq!(refused(|m| m.name = "../../etc".to_owned()), "the value of name is not possible");
        assert_eq!(refused(|m| m.engine = "process".to_owned()), "the value of engine is not possible");
        assert_eq!(refused(|m| m.memory.bytes += 1), "the value of memory is not possible");
        assert_eq!(refused(|m| m.state.blake3.clear()), "the value of state is not possible");
        assert_eq!(refused(|m| m.runtime = Runtime::Node), "the value of runtime is not possible");
    }

    #[test]
    fn a_new_agent_makes_a_template_old() {
        let mut manifest = example();
        manifest.provenance.agent_blake3 = blake3::hash(b"agent").to_hex().to_string();
        manifest.provenance.runner_blake3 = blake3::hash(b"runner").to_hex().to_string();
        let recipe = manifest.recipe.clone();
        assert!(manifest.is_built_from(&recipe, b"agent", b"runner"));
        assert!(!manifest.is_built_from(&recipe, b"another", b"runner"));
        assert!(!manifest.is_built_from(&Recipe { memory_mib: 1024, ..recipe }, b"agent", b"runner"));
    }

    proptest! {
        #[test]
        fn no_text_breaks_the_reader(text in "\\PC*") {
            drop(Manifest::from_toml(&text));
        }

        #[test]
        fn no_damage_breaks_the_reader(at in 0usize..1500, byte in 0u8..128) {
            let mut text = example().to_toml().unwrap().into_bytes();
            let at = at % text.len();
            text[at] = byte;
            if let Ok(text) = String::from_utf8(text) {
                drop(Manifest::from_toml(&text));
            }
        }
    }
}
