//! Which files are meant by a path of `output_files`. The sandbox looks for them, and the server checks what it sends.
//!
//! | path | files |
//! |---|---|
//! | `a/b.txt` | that file; where it is a directory, all files below it |
//! | `a/` | all files below that directory |
//! | `a/*.csv` | `*`: any characters but `/`; `?`: one of them; `[a-c]`, `[!a]`: one of a set |
//! | `a/**/b`, `**` | `**` as a whole part: any directories; at the end all files |

/// Most files that the patterns and directories of one request bring back.
pub const MAX_FOUND: usize = 256;

/// Whether the path has more than one meaning: a `*`, a `?`, a `[`, or a `/` at its end.
pub fn is_pattern(path: &[u8]) -> bool {
    path.ends_with(b"/") || has_wildcard(path)
}

/// Whether the path has a `*`, a `?` or a `[`.
pub fn has_wildcard(path: &[u8]) -> bool {
    path.iter().any(|byte| matches!(byte, b'*' | b'?' | b'['))
}

/// Whether the path (relative, without empty parts) is meant by `pattern`.
pub fn is_meant(pattern: &[u8], path: &[u8]) -> bool {
    if pattern == path {
        return true;
    }
    let below = pattern.strip_suffix(b"/").unwrap_or(pattern);
    // A directory by its name, whatever is in the name.
    path.strip_prefix(below).is_some_and(|rest| rest.starts_with(b"/"))
        || (has_wildcard(below) && parts_match(below, path))
}

fn first(path: &[u8]) -> (&[u8], Option<&[u8]>) {
    match path.iter().position(|&byte| byte == b'/') {
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..)),
        None => (path, None),
    }
}

/// With two marks instead of recursion: the time is bounded by the product of the lengths.
fn parts_match(pattern: &[u8], path: &[u8]) -> bool {
    let (mut pattern, mut path) = (Some(pattern), Some(path));
    // Where to go on after a `**` that took one part more.
    let mut retry: Option<(Option<&[u8]>, &[u8])> = None;
    loop {
        match (pattern, path) {
            (Some(left), _) if first(left).0 == b"**" => {
                pattern = first(left).1;
                match (pattern, path) {
                    // At the end it takes all that is left, but not nothing.
                    (None, rest) => return rest.is_some(),
                    (_, Some(rest)) => retry = Some((pattern, rest)),
                    (_, None) => return false,
                }
                continue;
            }
            (None, None) => return true,
            (Some(left), Some(right)) => {
                let ((word, left), (name, right)) = (first(left), first(right));
                // A directory that is meant has all files below it meant.
                if part_matches(word, name) {
                    if left.is_none() && right.is_some() {
                        return true;
                    }
                    (pattern, path) = (left, right);
                    continue;
                }
            }
            _ => {}
        }
        let Some((after, from)) = retry else { return false };
        let Some(from) = first(from).1 else { return false };
        retry = Some((after, from));
        (pattern, path) = (after, Some(from));
    }
}

fn part_matches(mut pattern: &[u8], mut name: &[u8]) -> bool {
    let mut retry: Option<(&[u8], &[u8])> = None;
    loop {
        match pattern.split_first() {
            Some((b'*', rest)) => {
                retry = Some((rest, name));
                pattern = rest;
                continue;
            }
            None if name.is_empty() => return true,
            Some((&word, rest)) => {
                if let Some((&byte, left)) = name.split_first()
                    && let Some(rest) = one_matches(word, rest, byte)
                {
                    (pattern, name) = (rest, left);
                    continue;
                }
            }
            None => {}
        }
        let Some((after, from)) = retry else { return false };
        let Some((_, from)) = from.split_first() else { return false };
        retry = Some((after, from));
        (pattern, name) = (after, from);
    }
}

/// What is left of the pattern after its first word (`rest` follows it), if that word means this byte.
fn one_matches(word: u8, rest: &[u8], byte: u8) -> Option<&[u8]> {
    if word == b'[' {
        // A `]` that comes first is one of the set. Without an end it is an ordinary character.
        let negated = matches!(rest.first(), Some(b'!' | b'^'));
        let set = rest.get(usize::from(negated)..).unwrap_or_default();
        if let Some(end) = set.iter().skip(1).position(|&b| b == b']').map(|at| at + 1) {
            let (set, after) = (set.get(..end)?, set.get(end + 1..)?);
            let mut found = false;
            let mut at = 0;
            while let Some(&low) = set.get(at) {
                let high = match (set.get(at + 1), set.get(at + 2)) {
                    (Some(b'-'), Some(&high)) => {
                        at += 2;
                        high
                    }
                    _ => low,
                };
                found |= (low..=high).contains(&byte);
                at += 1;
            }
            return (found != negated).then_some(after);
        }
    }
    (word == b'?' || word == byte).then_some(rest)
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn meant(pattern: &str, path: &str) -> bool {
        is_meant(pattern.as_bytes(), path.as_bytes())
    }

    #[test]
    fn patterns_mean_what_a_shell_means() {
        for (pattern, path) in [
            ("a.txt", "a.txt"),
            ("a[1].txt", "a[1].txt"),
            ("a[1].txt", "a1.txt"),
            ("*.csv", "x.csv"),
            ("*", ".hidden"),
            ("out/*", "out/x"),
            ("out/*", "out/d/x"),
            ("out", "out/d/x"),
            ("out/", "out/x"),
            ("o?t", "oat"),
            ("**", "x"),
            ("**", "a/b/c"),
            ("**/x", "x"),
            ("**/x", "a/b/x"),
            ("a/**/b", "a/b"),
            ("a/**/b", "a/x/y/b"),
            ("**/*.py", "a/b/c.py"),
            ("[a-c]1", "b1"),
            ("[!a]1", "b1"),
            ("[]a]", "]"),
            ("[", "["),
            ("*a*b*", "xxaxxbxx"),
            ("a**", "abc"),
            ("**/b/**/d", "a/b/c/b/d"),
        ] {
            assert!(meant(pattern, path), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("a.txt", "b.txt"),
            ("*.csv", "a/x.csv"),
            ("out", "outer"),
            ("out/", "out"),
            ("o?t", "o/t"),
            ("?", ""),
            ("**/x", "y"),
            ("a/**", "b/c"),
            ("a/**", "a"),
            ("[!a]1", "a1"),
            ("[a-c]", "d"),
            ("a/**/b", "a/x"),
            ("*a", "b"),
        ] {
            assert!(!meant(pattern, path), "{pattern} {path}");
        }
    }

    #[test]
    fn a_pattern_with_many_stars_ends() {
        let path = "a".repeat(1000);
        assert!(!meant(&("*a".repeat(200) + "b"), &path));
        assert!(!meant(&("**/".repeat(200) + "b"), "a/".repeat(400).trim_end_matches('/')));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_pattern_of_any_path(pattern: Vec<u8>, path: Vec<u8>) {
            is_meant(&pattern, &path);
            is_meant(&path, &path);
        }

        #[test]
        fn two_stars_mean_every_path(path in "[a-z.]{1,4}(/[a-z.]{1,4}){0,4}") {
            prop_assert!(meant("**", &path) && meant("*", &path) && meant(&path, &path));
        }
    }
}
