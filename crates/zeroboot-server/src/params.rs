//! What stands in a request's path and query.

use std::ops::RangeInclusive;

use axum::{
    extract::{FromRequestParts, RawPathParams},
    http::request::Parts,
};
use uuid::Uuid;

use crate::error::ApiError;

/// The largest offset: as JSON and JavaScript can say it exactly.
pub(crate) const MOST_OFFSET: u64 = 1 << 53;

/// The parts of the path that are named in the route.
#[derive(Debug)]
pub(crate) struct InPath(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for InPath {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<InPath, ApiError> {
        let params = RawPathParams::from_request_parts(parts, state).await;
        let params = params.map_err(|_| ApiError::new("not_found", "The path is not UTF-8"))?;
        Ok(InPath(params.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()))
    }
}

impl InPath {
    pub(crate) fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    /// `None`: it is not an id, so nothing has it.
    pub(crate) fn id(&self, name: &str) -> Option<Uuid> {
        self.get(name).parse().ok()
    }
}

/// The query of a request. Each name is taken once; a name that is left at the end is a mistake.
#[derive(Debug)]
pub(crate) struct InQuery(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for InQuery {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<InQuery, ApiError> {
        let query = parts.uri.query().unwrap_or_default();
        Ok(InQuery(form_urlencoded::parse(query.as_bytes()).into_owned().collect()))
    }
}

impl InQuery {
    /// All values of this name.
    pub(crate) fn all(&mut self, name: &str) -> Vec<String> {
        let all = std::mem::take(&mut self.0);
        let (found, rest) = all.into_iter().partition(|(known, _)| known == name);
        self.0 = rest;
        found.into_iter().map(|(_, value)| value).collect()
    }

    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        let mut found = self.all(name);
        if found.len() > 1 {
            return Err(ApiError::new("invalid_request", format!("the query has {name} more than once")));
        }
        Ok(found.pop())
    }

    pub(crate) fn needed(&mut self, name: &str) -> Result<String, ApiError> {
        let found = self.text(name)?;
        found.ok_or_else(|| ApiError::new("invalid_request", format!("the query lacks {name}")))
    }

    /// A whole number in a range.
    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, ApiError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text.parse().ok().filter(|number| digits && range.contains(number));
        let wrong = || {
            let (least, most) = range.clone().into_inner();
            ApiError::new("invalid_request", format!("{name} must be a whole number from {least} to {most}"))
        };
        number.map(Some).ok_or_else(wrong)
    }

    /// `true`, `false`, or nothing, which is `false`.
    pub(crate) fn flag(&mut self, name: &str) -> Result<bool, ApiError> {
        match self.text(name)?.as_deref() {
            None | Some("false" | "0") => Ok(false),
            Some("true" | "1" | "") => Ok(true),
            Some(_) => Err(ApiError::new("invalid_request", format!("{name} must be true or false"))),
        }
    }

    /// Nothing else may stand there: a mistyped name would change nothing.
    pub(crate) fn end(self) -> Result<(), ApiError> {
        match self.0.first() {
            None => Ok(()),
            Some((name, _)) => {
                let name: String = name.chars().take(60).collect();
                Err(ApiError::new("invalid_request", format!("the query has an unknown name {name:?}")))
            }
        }
    }
}
