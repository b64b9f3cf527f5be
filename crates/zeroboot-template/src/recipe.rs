//! Recipes: small TOML files that say what a template holds.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The recipes that come with the program.
const EMBEDDED: [(&str, &str); 3] = [
    ("python", include_str!("../recipes/python.toml")),
    ("node", include_str!("../recipes/node.toml")),
    ("data-science", include_str!("../recipes/data-science.toml")),
];
/// What a small guest with a runtime needs.
const LEAST_MEMORY: u32 = 128;
/// Most memory of a guest, MiB. Its memory is one piece below the hole for devices under 4 GiB.
const MOST_MEMORY: u32 = 3072;

/// A language runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Runtime {
    /// CPython 3.
    Python,
    /// Node.js.
    Node,
}

impl Runtime {
    /// The word that the API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Runtime::Python => "python",
            Runtime::Node => "node",
        }
    }

    /// The interpreter's path in the guest.
    pub fn interpreter(self) -> &'static str {
        match self {
            Runtime::Python => "usr/bin/python3",
            Runtime::Node => "usr/bin/node",
        }
    }

    /// The runner's path in the guest.
    pub fn runner(self) -> &'static str {
        match self {
            Runtime::Python => "usr/lib/zeroboot/python.pyz",
            Runtime::Node => "usr/lib/zeroboot/node.cjs",
        }
    }
}

/// What a template holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The template's name: lower-case letters, digits, `-`, `_` and `.`, at most 63 characters.
    pub name: String,
    /// The language.
    pub runtime: Runtime,
    /// Debian packages; what they depend on comes along.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packages: Vec<String>,
    /// Python packages as `pip install` takes them; wheels only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pip: Vec<String>,
    /// Node packages as `npm install` takes them; their install scripts are not run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub npm: Vec<String>,
    /// Modules to import before the snapshot. One that ends in `?` may be missing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warm: Vec<String>,
    /// Environment of the runtime.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Memory of a sandbox, MiB.
    #[serde(default = "default_memory")]
    pub memory_mib: u32,
}

fn default_memory() -> u32 {
    512
}

/// Why a recipe is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// Not the TOML that a recipe is.
    #[error("this is not a recipe")]
    Syntax(#[from] toml::de::Error),
    /// A name that cannot be a template's.
    #[error(
        "{0:?} cannot be a template's name: lower-case letters, digits, '-', '_', '.', at most 63, a letter or digit first"
    )]
    Name(String),
    /// A value that a program which we call would misread.
    #[error("{field}: {value:?} is not a {what}")]
    Value {
        /// The recipe's field.
        field: &'static str,
        /// The value.
        value: String,
        /// What it should be.
        what: &'static str,
    },
    /// Too little or too much memory.
    #[error("memory_mib = {0} is out of range; give {LEAST_MEMORY} to {MOST_MEMORY}")]
    Memory(u32),
    /// A list for the other runtime.
    #[error("{list} packages need runtime = {runtime:?}")]
    WrongRuntime {
        /// `pip` or `npm`.
        list: &'static str,
        /// The runtime that they are for.
        runtime: &'static str,
    },
}

impl Recipe {
    /// Reads a recipe and checks it.
    pub fn from_toml(text: &str) -> Result<Recipe, RecipeError> {
        let recipe: Recipe = toml::from_str(text)?;
        recipe.check()?;
        Ok(recipe)
    }

    /// The same, if what was changed in it is right.
    pub fn checked(self) -> Result<Recipe, RecipeError> {
        self.check()?;
        Ok(self)
    }

    /// The recipe of this name that comes with the program.
    pub fn embedded(name: &str) -> Option<Recipe> {
        let (_, text) = EMBEDDED.iter().find(|(known, _)| *known == name)?;
        // A test reads each of them.
        Recipe::from_toml(text).ok()
    }

    /// The names of the recipes that come with the program.
    pub fn embedded_names() -> impl Iterator<Item = &'static str> {
        EMBEDDED.iter().map(|(name, _)| *name)
    }

    /// The runner's command in the guest.
    pub fn runner_argv(&self) -> Vec<String> {
        let mut argv = self.runner_command();
        // Its memory is going to be copied.
        argv.push("--frozen".to_owned());
        if !self.warm.is_empty() {
            argv.push("--warm".to_owned());
            argv.push(self.warm.join(","));
        }
        argv
    }

    /// The command line of one more interpreter in a sandbox that lives.
    pub fn context_argv(&self) -> Vec<String> {
        let mut argv = self.runner_command();
        argv.push("--context".to_owned());
        argv
    }

    fn runner_command(&self) -> Vec<String> {
        let mut argv = vec![format!("/{}", self.runtime.interpreter())];
        let options: &[&str] = match self.runtime {
            // No PYTHON* variables, no user site directory; UTF-8 whatever the locale.
            Runtime::Python => &["-E", "-s", "-X", "utf8"],
            // Node 18 lets code that the runner compiles call import() only with the second; later ones need it no more.
            Runtime::Node => &["--no-deprecation", "--experimental-vm-modules"],
        };
        argv.extend(options.iter().map(|option| (*option).to_owned()));
        argv.push(format!("/{}", self.runtime.runner()));
        argv
    }

    /// The runner's environment in the guest: ours, then the recipe's over it.
    pub fn runner_environ(&self) -> BTreeMap<String, String> {
        let ours = [
            ("HOME", "/home/sandbox"),
            ("LANG", "C.UTF-8"),
            ("LOGNAME", "sandbox"),
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("USER", "sandbox"),
        ];
        let mut environ: BTreeMap<String, String> =
            ours.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        environ.extend(self.env.clone());
        environ
    }

    fn check(&self) -> Result<(), RecipeError> {
        if !is_template_name(&self.name) {
            return Err(RecipeError::Name(self.name.clone()));
        }
        if !(LEAST_MEMORY..=MOST_MEMORY).contains(&self.memory_mib) {
            return Err(RecipeError::Memory(self.memory_mib));
        }
        let check = |field, values: &[String], what, right: fn(&str) -> bool| match values.iter().find(|v| !right(v)) {
            Some(value) => Err(RecipeError::Value { field, value: value.clone(), what }),
            None => Ok(()),
        };
        check("packages", &self.packages, "Debian package's name", is_debian_name)?;
        // Never an option of pip's or npm's.
        let requirement = |value: &str| value.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '@');
        check("pip", &self.pip, "requirement", requirement)?;
        check("npm", &self.npm, "package", requirement)?;
        check("warm", &self.warm, "module's name", is_module)?;
        let names: Vec<String> = self.env.keys().cloned().collect();
        check("env", &names, "variable's name", |name| !name.is_empty() && !name.contains(['=', '\0']))?;
        let values: Vec<String> = self.env.values().cloned().collect();
        check("env", &values, "variable's value", |value| !value.contains('\0'))?;
        if self.runtime != Runtime::Python && !self.pip.is_empty() {
            return Err(RecipeError::WrongRuntime { list: "pip", runtime: "python" });
        }
        if self.runtime != Runtime::Node && !self.npm.is_empty() {
            return Err(RecipeError::WrongRuntime { list: "npm", runtime: "node" });
        }
        Ok(())
    }
}

/// A name that is safe as a directory's.
pub(crate) fn is_template_name(name: &str) -> bool {
    let safe = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
    name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.chars().all(safe)
}

// Debian policy 5.6.7, and `/suite` or `=version` behind it as apt takes them.
fn is_debian_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "+-.:=/~_".contains(c))
        && !name.ends_with(['+', '-'])
}

fn is_module(name: &str) -> bool {
    let name = name.strip_suffix('?').unwrap_or(name);
    !name.is_empty() && !name.starts_with('-') && !name.contains([',', '\0', ' ', '?'])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_recipes_that_come_along_are_right() {
        for name in Recipe::embedded_names() {
            assert_eq!(Recipe::embedded(name).unwrap().name, name);
        }
        assert!(Recipe::embedded("cobol").is_none());
    }

    #[test]
    fn the_runner_is_told_what_to_warm() {
        let python = Recipe::embedded("python").unwrap();
        let argv = python.runner_argv().join(" ");
        assert_eq!(argv, "/usr/bin/python3 -E -s -X utf8 /usr/lib/zeroboot/python.pyz --frozen --warm numpy,pandas");
        let node = Recipe::embedded("node").unwrap();
        assert_eq!(
            node.runner_argv(),
            [
                "/usr/bin/node",
                "--no-deprecation",
                "--experimental-vm-modules",
                "/usr/lib/zeroboot/node.cjs",
                "--frozen"
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let refused = |text: &str| Recipe::from_toml(text).unwrap_err().to_string();
        assert!(refused("name = 'x'\nruntime = 'python'\npackage = []").contains("not a recipe"));
        assert!(refused("name = '../x'\nruntime = 'python'").contains("cannot be a template's name"));
        assert!(refused("name = 'x'\nruntime = 'python'\nmemory_mib = 9").contains("memory_mib = 9"));
        assert!(refused("name = 'x'\nruntime = 'python'\npackages = ['-o']").contains("packages"));
        assert!(refused("name = 'x'\nruntime = 'python'\npackages = ['perl-']").contains("packages"));
        assert!(refused("name = 'x'\nruntime = 'python'\npip = ['--index-url=x']").contains("pip"));
        assert!(refused("name = 'x'\nruntime = 'python'\nwarm = ['a,b']").contains("warm"));
        assert!(refused("name = 'x'\nruntime = 'node'\npip = ['six']").contains("pip packages need"));
        assert!(refused("name = 'x'\nruntime = 'python'\n[env]\n'A=B' = 'c'").contains("env"));
    }

    proptest! {
        #[test]
        fn a_recipe_survives_its_text(
            name in "[a-z0-9][a-z0-9._-]{0,40}",
            packages in prop::collection::vec("[a-z0-9][a-z0-9.]{1,20}", 0..4),
            env in prop::collection::btree_map("[A-Z_]{1,9}", "[^\0]{0,20}", 0..3),
            memory_mib in LEAST_MEMORY..=MOST_MEMORY,
        ) {
            let recipe = Recipe {
                name, runtime: Runtime::Python, packages, pip: vec![], npm: vec![], warm: vec!["os".to_owned()], env, memory_mib,
            };
            let text = toml::to_string(&recipe).unwrap();
            prop_assert_eq!(Recipe::from_toml(&text).unwrap(), recipe);
        }

        #[test]
        fn no_text_breaks_the_reader(text in "\\PC*") {
            drop(Recipe::from_toml(&text));
        }
    }
}
