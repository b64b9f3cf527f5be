//! Templates and languages as requests name them.

use std::sync::Arc;

use crate::error::ApiError;

/// A template as requests name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) name: Arc<str>,
    pub(crate) language: Arc<str>,
}

/// The templates that a request can name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Catalog {
    pub(crate) templates: Vec<Named>,
}

impl Catalog {
    /// The one that the request means.
    pub(crate) fn choose(&self, language: Option<&str>, template: Option<&str>) -> Result<&Named, ApiError> {
        let names = |of: fn(&Named) -> &str| {
            let mut names: Vec<&str> = self.templates.iter().map(of).collect();
            names.dedup();
            names.join(", ")
        };
        match (language, template) {
            (Some(_), Some(_)) => Err(ApiError::new("invalid_request", "give either language or template, not both")),
            (None, Some(name)) => self.templates.iter().find(|known| *known.name == *name).ok_or_else(|| {
                ApiError::new(
                    "unknown_template",
                    format!("Unknown template {}; there are: {}", quoted(name), names(|entry| &entry.name)),
                )
            }),
            (language, None) => {
                let asked = language.unwrap_or("python");
                let wanted = if asked == "javascript" { "node" } else { asked };
                // A template that is called as the language is its default one.
                let mut speak = self.templates.iter().filter(|known| *known.language == *wanted);
                let named = speak.clone().find(|known| *known.name == *wanted);
                named.or_else(|| speak.next()).ok_or_else(|| {
                    ApiError::new(
                        "unknown_language",
                        format!("Unknown language {}; there are: {}", quoted(asked), names(|entry| &entry.language)),
                    )
                })
            }
        }
    }
}

/// A language that runs in another one's template: its name, that language, and what its code is called there.
pub(super) fn guest_language(word: &str) -> Option<(&'static str, &'static str, &'static str)> {
    match word {
        "bash" | "sh" | "shell" => Some(("bash", "python", zeroboot_engine::INLINE_BASH)),
        "typescript" | "ts" => Some(("typescript", "node", zeroboot_engine::INLINE_TYPESCRIPT)),
        _ => None,
    }
}

pub(super) fn quoted(word: &str) -> String {
    format!("{:?}", word.chars().take(60).collect::<String>())
}
